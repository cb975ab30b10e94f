"""Conformance tests for serdes.

In your plugin::

    from lmcache_core.testing.serde import SerdeTests

    class TestMySerde(SerdeTests):
        @pytest.fixture
        def make_serde(self):
            return lambda: MySerde(MyConfig())

A lossy serde sets ``max_error`` to what it promises, as a fraction of a chunk's
largest magnitude. ``dtypes`` narrows down what is tried.
"""

from __future__ import annotations

import math
import random
import struct
import sys
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest

from lmcache_core.aio.guard import attempted
from lmcache_core.chunks.layout import AttentionKind, DType, LayerGroup
from lmcache_core.contracts.serde import Serde
from lmcache_core.plugins.manager import Plugins

MakeSerde = Callable[[], Serde]

TOKENS = 17
LARGE_TOKENS = 1024
_GUARD = b"\xee" * 64


class SerdeTests:
    """The contract of `Serde`, one test for each sentence of it."""

    max_error: ClassVar[float] = 0.0
    """0: lossless, every bit comes back."""
    dtypes: ClassVar[tuple[DType, ...]] = tuple(DType)

    @pytest.fixture
    def make_serde(self) -> MakeSerde:
        """Override it."""
        raise NotImplementedError("override make_serde: return a function that makes a serde")

    @pytest.fixture
    def serde(self, make_serde: MakeSerde) -> Serde:
        return make_serde()

    def groups(self) -> Iterator[LayerGroup]:
        """Ordinary attention and MLA's single plane, in each dtype."""
        for dtype in self.dtypes:
            yield LayerGroup((0, 1, 2), AttentionKind.FULL, 2, 2, 8, dtype)
            yield LayerGroup((0, 1), AttentionKind.MLA, 1, 1, 24, dtype)

    # -- where values lie ------------------------------------------------------------------

    def test_identity_is_the_same_in_every_process(self, make_serde: MakeSerde) -> None:
        """Printable, without blanks, and equal for serdes that were made alike."""
        for group in self.groups():
            identity = make_serde().identity(group)
            assert identity == make_serde().identity(group)
            assert 0 < len(identity) <= 200
            assert all("!" <= character <= "~" for character in identity)

    # -- what comes back -------------------------------------------------------------------

    @pytest.mark.parametrize("tokens", [1, 16, TOKENS])
    def test_decode_gives_back_what_was_encoded(self, serde: Serde, tokens: int) -> None:
        for group in self.groups():
            chunk = ordinary(group, tokens)
            decoded = decode(serde, encode(serde, chunk, group, tokens), group, tokens)
            self.check(chunk, decoded, group)

    def test_every_bit_pattern(self, serde: Serde) -> None:
        """NaN and infinity come back as they were if the serde is lossless, and never crash it."""
        for group in self.groups():
            chunk = any_bits(group, TOKENS)
            decoded = decode(serde, encode(serde, chunk, group, TOKENS), group, TOKENS)
            assert self.max_error or decoded == chunk, group

    def test_constant_chunks(self, serde: Serde) -> None:
        """All zeros, and all ones of bits, are chunks too."""
        for group in self.groups():
            for byte in (0x00, 0xFF):
                chunk = bytearray([byte]) * group.chunk_bytes(TOKENS)
                decoded = decode(serde, encode(serde, chunk, group, TOKENS), group, TOKENS)
                assert decoded == chunk or (self.max_error and byte), group

    def test_any_instance_decodes(self, make_serde: MakeSerde) -> None:
        for group in self.groups():
            chunk = ordinary(group, TOKENS)
            encoded = encode(make_serde(), chunk, group, TOKENS)
            self.check(chunk, decode(make_serde(), encoded, group, TOKENS), group)

    # -- buffers ---------------------------------------------------------------------------

    def test_max_encoded_bytes_is_enough(self, serde: Serde) -> None:
        """Noise, which nothing compresses, fits as well."""
        for group in self.groups():
            for tokens in (1, TOKENS, 64):
                encode(serde, any_bits(group, tokens), group, tokens)

    def test_arguments_are_not_changed(self, serde: Serde) -> None:
        for group in self.groups():
            chunk = ordinary(group, TOKENS)
            encoded = encode(serde, chunk, group, TOKENS)
            assert chunk == ordinary(group, TOKENS)
            before = bytes(encoded)
            decode(serde, encoded, group, TOKENS)
            assert encoded == before

    def test_buffers_are_released(self, serde: Serde) -> None:
        group = next(self.groups())
        chunk, decoded = ordinary(group, TOKENS), bytearray(group.chunk_bytes(TOKENS))
        room = bytearray(serde.max_encoded_bytes(group, TOKENS))
        size = serde.encode(memoryview(chunk), memoryview(room), group, TOKENS)
        encoded = room[:size]
        serde.decode(memoryview(encoded), memoryview(decoded), group, TOKENS)
        for held in (chunk, room, encoded, decoded):
            held.append(0)  # raises BufferError while anything still exports the buffer

    # -- bad input -------------------------------------------------------------------------

    def test_truncated_input_is_refused(self, serde: Serde) -> None:
        for group in self.groups():
            encoded = encode(serde, ordinary(group, TOKENS), group, TOKENS)
            for size in {0, 1, len(encoded) // 2, len(encoded) - 1}:
                with pytest.raises(ValueError):
                    decode(serde, encoded[:size], group, TOKENS)

    def test_longer_input_is_refused(self, serde: Serde) -> None:
        for group in self.groups():
            encoded = encode(serde, ordinary(group, TOKENS), group, TOKENS)
            with pytest.raises(ValueError):
                decode(serde, encoded + b"\0", group, TOKENS)

    def test_a_chunk_of_other_size_is_refused(self, serde: Serde) -> None:
        for group in self.groups():
            encoded = encode(serde, ordinary(group, TOKENS), group, TOKENS)
            with pytest.raises(ValueError):
                decode(serde, encoded, group, TOKENS + 1)

    def test_rubbish_is_refused_or_decoded(self, serde: Serde) -> None:
        """Whatever the bytes are: a ValueError or some chunk, never another exception."""
        draw = random.Random(0)  # noqa: S311  the same every time
        group = next(self.groups())
        encoded = encode(serde, ordinary(group, TOKENS), group, TOKENS)
        for _ in range(200):
            broken = bytearray(encoded)
            for _ in range(draw.randint(1, 4)):
                broken[draw.randrange(len(broken))] = draw.randrange(256)
            _try(serde, broken, group)
            _try(serde, bytearray(draw.randbytes(draw.randrange(2 * len(encoded)))), group)

    # -- facts -----------------------------------------------------------------------------

    def test_threads_share_one_instance(self, serde: Serde) -> None:
        group = next(self.groups())
        chunks = [ordinary(group, TOKENS, seed) for seed in range(32)]

        def there_and_back(chunk: bytearray) -> bytearray:
            return decode(serde, encode(serde, chunk, group, TOKENS), group, TOKENS)

        with ThreadPoolExecutor(4) as threads:
            for chunk, decoded in zip(chunks, threads.map(there_and_back, chunks), strict=True):
                self.check(chunk, decoded, group)

    def test_threads_share_one_instance_at_the_same_time(self, make_serde: MakeSerde) -> None:
        """With chunks that are large enough for a library to let other threads run meanwhile."""
        group = next(self.groups())
        chunks = [any_bits(group, LARGE_TOKENS, seed) for seed in range(8)]
        alone, shared = make_serde(), make_serde()
        begin = threading.Barrier(len(chunks))

        def there_and_back(chunk: bytearray) -> bytearray:
            begin.wait()
            return decode(shared, encode(shared, chunk, group, LARGE_TOKENS), group, LARGE_TOKENS)

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            with ThreadPoolExecutor(len(chunks)) as threads:
                found = list(threads.map(there_and_back, chunks))
        finally:
            sys.setswitchinterval(interval)
        for chunk, decoded in zip(chunks, found, strict=True):
            once = encode(alone, chunk, group, LARGE_TOKENS)
            assert decoded == decode(alone, once, group, LARGE_TOKENS)

    def test_wire_id(self, make_serde: MakeSerde) -> None:
        """One for all instances, and 1 to 999 belong to LMCache itself."""
        ids = {make_serde().wire_id for _ in range(2)}
        assert len(ids) == 1
        least = 1 if _is_ours(make_serde()) else 1000
        assert least <= ids.pop() <= 64_999

    def test_no_other_serde_has_its_wire_id(self, make_serde: MakeSerde) -> None:
        """Of those that are installed here. Chunks of the other one would be taken for its own."""
        serde = make_serde()
        if _is_ours(serde):
            return
        for descriptor in Plugins().serdes():
            made = attempted(lambda d=descriptor: d.create(d.config()))
            if isinstance(made.value, Serde) and type(made.value) is not type(serde):
                assert made.value.wire_id != serde.wire_id, f"{descriptor.name} has it, too"

    def test_in_place_means_the_same_bytes(self, serde: Serde) -> None:
        for group in self.groups():
            chunk = any_bits(group, TOKENS)
            if serde.in_place:
                assert encode(serde, chunk, group, TOKENS) == chunk
                assert serde.max_encoded_bytes(group, TOKENS) == len(chunk)

    def check(self, chunk: bytearray, decoded: bytearray, group: LayerGroup) -> None:
        """Fail if ``decoded`` isn't ``chunk``, as exactly as the serde promises."""
        if not self.max_error:
            assert decoded == chunk, group
            return
        expected, actual = unpack(group.dtype, chunk), unpack(group.dtype, decoded)
        allowed = self.max_error * max(map(abs, expected))
        worst = max(abs(a - b) for a, b in zip(expected, actual, strict=True))
        assert worst <= allowed, f"{group}: off by {worst}, promised {allowed}"


def _is_ours(serde: Serde) -> bool:
    return type(serde).__module__.partition(".")[0] in ("lmcache_core", "lmcache_kernels")


def ordinary(group: LayerGroup, tokens: int, seed: int = 0) -> bytearray:
    """A chunk of normally distributed elements, as KV roughly is."""
    draw = random.Random(seed)  # noqa: S311  the same every time
    count = group.chunk_bytes(tokens) // group.dtype.itemsize
    return pack(group.dtype, [draw.gauss(0.0, 2.0) for _ in range(count)])


def any_bits(group: LayerGroup, tokens: int, seed: int = 0) -> bytearray:
    """A chunk of every bit pattern: NaN payloads, infinities, denormals, negative zero."""
    draw = random.Random(seed)  # noqa: S311  the same every time
    return bytearray(draw.randbytes(group.chunk_bytes(tokens)))


def encode(serde: Serde, chunk: bytearray, group: LayerGroup, tokens: int) -> bytearray:
    """Encode into a buffer that is exactly as large as promised, with guards around it."""
    room = serde.max_encoded_bytes(group, tokens)
    with _Guarded(room) as into:
        size = serde.encode(memoryview(chunk), into, group, tokens)
        assert 0 < size <= room, f"max_encoded_bytes promised {room}, encode answered {size}"
        return bytearray(into[:size])


def decode(serde: Serde, encoded: bytearray, group: LayerGroup, tokens: int) -> bytearray:
    """Decode into a buffer of the chunk's size, with guards around it."""
    with _Guarded(group.chunk_bytes(tokens)) as into:
        serde.decode(memoryview(encoded), into, group, tokens)
        return bytearray(into)


class _Guarded:
    """A buffer between guards, which must be whole at the end, whatever happened."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._all = bytearray(_GUARD + b"\x55" * nbytes + _GUARD)

    def __enter__(self) -> memoryview:
        return memoryview(self._all)[len(_GUARD) : len(_GUARD) + self._nbytes]

    def __exit__(self, *_: object) -> None:
        assert self._all[: len(_GUARD)] == _GUARD, "wrote before the buffer"
        assert self._all[-len(_GUARD) :] == _GUARD, "wrote behind the buffer"


def _try(serde: Serde, encoded: bytearray, group: LayerGroup) -> None:
    try:
        decode(serde, encoded, group, TOKENS)
    except ValueError:
        return


def pack(dtype: DType, values: list[float]) -> bytearray:
    """``values`` in ``dtype``; 8-bit types and BF16 are truncated, which is near enough."""
    if dtype is DType.F32:
        return bytearray(struct.pack(f"<{len(values)}f", *values))
    if dtype is DType.BF16:
        wide = struct.pack(f"<{len(values)}f", *values)
        return bytearray(b"".join(wide[i + 2 : i + 4] for i in range(0, len(wide), 4)))
    if dtype is DType.U8:
        return bytearray(min(255, max(0, round(128 + 32 * value))) for value in values)
    if dtype is DType.F8_E4M3:
        return bytearray(map(_to_e4m3, values))
    halves = struct.pack(f"<{len(values)}e", *values)
    return bytearray(halves if dtype is DType.F16 else halves[1::2])


def unpack(dtype: DType, chunk: bytearray) -> list[float]:
    """The elements of ``chunk``."""
    if dtype is DType.F32:
        return list(struct.unpack(f"<{len(chunk) // 4}f", chunk))
    if dtype is DType.F16:
        return list(struct.unpack(f"<{len(chunk) // 2}e", chunk))
    if dtype is DType.U8:
        return [float(byte) for byte in chunk]
    if dtype is DType.F8_E4M3:
        return [_from_e4m3(byte) for byte in chunk]
    if dtype is DType.BF16:
        pairs = (chunk[i : i + 2] for i in range(0, len(chunk), 2))
        wide = b"".join(b"\0\0" + bytes(pair) for pair in pairs)
        return list(struct.unpack(f"<{len(wide) // 4}f", wide))
    return list(struct.unpack(f"<{len(chunk)}e", b"".join(bytes((0, byte)) for byte in chunk)))


def _from_e4m3(byte: int) -> float:
    """OCP 8-bit floating point, E4M3: no infinities, 0x7f is NaN, bias 7."""
    exponent, mantissa = byte >> 3 & 0xF, byte & 7
    if byte & 0x7F == 0x7F:
        return math.nan
    size = mantissa / 8 * 2**-6 if not exponent else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if byte & 0x80 else size


_E4M3 = [_from_e4m3(byte) for byte in range(0x7F)]
"""The magnitudes, ascending."""


def _to_e4m3(value: float) -> int:
    above = min(bisect_left(_E4M3, abs(value)), 0x7E)
    below = max(above - 1, 0)
    nearer = min((above, below), key=lambda byte: abs(_E4M3[byte] - abs(value)))
    return nearer | (0x80 if value < 0 else 0)
