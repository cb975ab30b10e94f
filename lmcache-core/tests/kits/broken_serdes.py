"""Serdes with one typical mistake each. The kit must catch every one of them."""

from __future__ import annotations

import struct
import threading
import zlib
from typing import ClassVar

from lmcache_core.chunks.layout import DType, LayerGroup
from lmcache_core.contracts.serde import Serde
from lmcache_core.testing.serde import pack, unpack


class Correct(Serde):
    """zlib with the chunk's length in front. No mistake."""

    max_error: ClassVar[float] = 0.0

    @property
    def wire_id(self) -> int:
        return 1000

    def max_encoded_bytes(self, group: LayerGroup, tokens: int) -> int:
        size = group.chunk_bytes(tokens)
        return 64 + size + size // 1000 * 2

    def encode(self, chunk: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> int:
        packed = struct.pack("<Q", chunk.nbytes) + zlib.compress(chunk, 1)
        into[: len(packed)] = packed
        return len(packed)

    def decode(self, encoded: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> None:
        if encoded.nbytes < 8:
            raise ValueError("too short")
        (size,) = struct.unpack_from("<Q", encoded)
        inflate = zlib.decompressobj()
        try:
            chunk = inflate.decompress(encoded[8:], into.nbytes + 1)
        except zlib.error as error:
            raise ValueError(str(error)) from error
        if not inflate.eof or inflate.unused_data or len(chunk) != size or size != into.nbytes:
            raise ValueError("another length")
        into[:] = chunk


class CorrectlyLossy(Serde):
    """Halves of the numbers' range of bits: BF16-like rounding of whatever it is given."""

    max_error = 0.01

    @property
    def wire_id(self) -> int:
        return 1001

    def max_encoded_bytes(self, group: LayerGroup, tokens: int) -> int:
        return 4 * group.chunk_bytes(tokens) // group.dtype.itemsize

    def encode(self, chunk: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> int:
        packed = pack(DType.F32, [value * 1.001 for value in unpack(group.dtype, bytearray(chunk))])
        into[: len(packed)] = packed
        return len(packed)

    def decode(self, encoded: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> None:
        if encoded.nbytes != self.max_encoded_bytes(group, tokens):
            raise ValueError("another length")
        values = unpack(DType.F32, bytearray(encoded))
        if group.dtype is DType.U8:
            into[:] = bytes(
                min(255, max(0, round(value))) if value == value else 0 for value in values
            )
            return
        into[:] = _narrow(group.dtype, values)


def _narrow(dtype: DType, values: list[float]) -> bytearray:
    largest = {DType.F16: 65504.0, DType.F8_E5M2: 57344.0}.get(dtype, 3.0e38)
    return pack(dtype, [max(-largest, min(largest, value)) for value in values])


class WorseThanPromised(CorrectlyLossy):
    max_error = 1e-6


class CanonicalNaN(Correct):
    """Goes through floating-point numbers and claims to be lossless."""

    def decode(self, encoded: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> None:
        super().decode(encoded, into, group, tokens)
        if group.dtype is DType.F32:
            for i in range(0, into.nbytes, 4):
                if (value := struct.unpack_from("<f", into, i)[0]) != value:
                    struct.pack_into("<I", into, i, 0x7FC00000)


class PromisesTooLittle(Correct):
    def max_encoded_bytes(self, group: LayerGroup, tokens: int) -> int:
        return group.chunk_bytes(tokens)


class ForgivesTruncation(Correct):
    """Fills up with zeros what didn't arrive."""

    def decode(self, encoded: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> None:
        try:
            super().decode(encoded, into, group, tokens)
        except ValueError:
            into[:] = bytes(into.nbytes)


class IgnoresTheRest(Correct):
    """Takes what it needs and doesn't ask what the rest is."""

    def encode(self, chunk: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> int:
        into[: chunk.nbytes] = chunk
        return chunk.nbytes

    def decode(self, encoded: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> None:
        if encoded.nbytes < into.nbytes:
            raise ValueError("too short")
        into[:] = encoded[: into.nbytes]


class SharesScratch(Correct):
    """Builds its answer in one buffer of its own; the threads meet in it, every time."""

    def __init__(self) -> None:
        self.scratch = b""
        self.inside = 0
        self.met = threading.Event()

    def encode(self, chunk: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> int:
        self.scratch = bytes(chunk)
        self.inside += 1
        if self.inside > 1:
            self.met.set()
        elif threading.current_thread() is not threading.main_thread():
            self.met.wait(10)
        return super().encode(memoryview(self.scratch), into, group, tokens)


class RemembersInItself(Correct):
    """Keeps in the instance what belongs into the bytes."""

    def __init__(self) -> None:
        self.known: dict[bytes, bytes] = {}

    def encode(self, chunk: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> int:
        size = super().encode(chunk, into, group, tokens)
        self.known[bytes(into[:size])] = bytes(chunk)
        return size

    def decode(self, encoded: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> None:
        known = self.known.get(bytes(encoded))
        if known is None or len(known) != into.nbytes:
            raise ValueError("never heard of it")
        into[:] = known


class RaisesStructError(Correct):
    """Lets out whatever its parser raises."""

    def decode(self, encoded: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> None:
        struct.unpack_from("<Q", encoded)
        super().decode(encoded, into, group, tokens)


class EncodesInPlace(Correct):
    def encode(self, chunk: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> int:
        size = super().encode(chunk, into, group, tokens)
        chunk[0] ^= 1
        return size


class KeepsBuffer(Correct):
    def decode(self, encoded: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> None:
        super().decode(encoded, into, group, tokens)
        self.last = into


class WritesBehind(Correct):
    """Writes whole vectors through the buffer's owner."""

    def decode(self, encoded: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> None:
        super().decode(encoded, into, group, tokens)
        memoryview(into.obj)[-16:] = bytes(16)


class ReservedWireId(Correct):
    @property
    def wire_id(self) -> int:
        return 7


class SharesACompressor(Correct):
    """One compressor for all, which zlib leaves the interpreter for."""

    def __init__(self) -> None:
        self.stream = zlib.compressobj(1)

    def encode(self, chunk: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> int:
        self.stream = zlib.compressobj(1)
        half = chunk.nbytes // 2
        parts = [self.stream.compress(chunk[:half]), self.stream.compress(chunk[half:])]
        packed = struct.pack("<Q", chunk.nbytes) + b"".join(parts) + self.stream.flush()
        into[: len(packed)] = packed
        return len(packed)


class WrongWireId(Correct):
    @property
    def wire_id(self) -> int:
        return 1 << 16


class ClaimsInPlace(Correct):
    @property
    def in_place(self) -> bool:
        return True
