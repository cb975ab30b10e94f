"""Turns chunks into the values of one tier, and values into chunks.

A value is a frame (see `frame`) around what the tier's serde makes of a chunk. What the serde is
given is compared with the checksums that were made when the chunk was gathered, and what it gives
back too, if it is exact. Checksums are compared *after* encoding: bytes that change before it, or
while it reads them, are found; comparing before it would miss the latter.

Knows serdes, frames and checksums. Knows nothing about who holds the memory, nor where values go.
Raises whatever a serde raises: who calls this stands at the seam to plugins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lmcache_core.chunks.checksums import checksums, combined
from lmcache_core.chunks.frame import HEADER_BYTES, read_header, write_header
from lmcache_core.chunks.keys import ChunkKey
from lmcache_core.chunks.layout import LayerGroup
from lmcache_core.contracts.serde import Serde
from lmcache_core.errors import FrameError


@dataclass(frozen=True)
class Chunk:
    """One chunk: its name, its shape, and where its bytes lie.

    ``slot`` begins with room for a header; the ``group.chunk_bytes(tokens)`` bytes of the chunk
    follow. ``start`` is the position of its first token, ``None`` if unknown.
    """

    key: ChunkKey
    slot: memoryview
    group: LayerGroup
    tokens: int
    start: int | None = None

    @property
    def frame(self) -> memoryview:
        """Header and chunk, as they lie in the slot."""
        return self.slot[: HEADER_BYTES + self.group.chunk_bytes(self.tokens)]

    @property
    def payload(self) -> memoryview:
        """The chunk's own bytes."""
        return self.slot[HEADER_BYTES : HEADER_BYTES + self.group.chunk_bytes(self.tokens)]


class Sealer:
    """Seals and opens the values of one tier.

    ``exact``: the serde gives back every bit. ``fingerprint`` is that of the tier's namespace, its
    place included. ``checksums_of`` is `checksums`, or something faster.
    """

    def __init__(
        self,
        serde: Serde,
        *,
        exact: bool,
        fingerprint: str,
        checksums_of: Callable[[memoryview, int], bytes] = checksums,
    ) -> None:
        self.in_place = serde.in_place
        """Whether values lie in slots as they are stored."""
        self._serde = serde
        self._exact = exact
        self._fingerprint = fingerprint
        self._checksums = checksums_of

    def seal(self, chunk: Chunk, sums: bytes) -> memoryview:
        """The value of ``chunk``, which had the checksums ``sums`` when it was gathered.

        It lies in the slot itself where the serde works in place.

        Raises:
            FrameError: ``checksum``: the chunk isn't what was gathered; ``encode``: the serde
                answered nonsense.
        """
        payload, frame = chunk.payload, chunk.frame
        payload_bytes = payload.nbytes
        if not self.in_place:
            serde = self._serde.for_chunk(chunk.key, chunk.start)
            longest = serde.max_encoded_bytes(chunk.group, chunk.tokens)
            frame = memoryview(bytearray(HEADER_BYTES + longest))
            payload_bytes = serde.encode(payload, frame[HEADER_BYTES:], chunk.group, chunk.tokens)
            if not isinstance(payload_bytes, int) or not 0 < payload_bytes <= longest:
                raise FrameError(
                    "encode",
                    f"{type(serde).__name__}.encode answered {payload_bytes!r:.80} for a chunk "
                    f"that takes 1 to {longest} bytes; this is a mistake in the plugin",
                )
            if self._checksums(payload, len(chunk.group.layers)) != sums:
                raise FrameError("checksum", "the chunk changed in host memory since it was stored")
            frame = frame[: HEADER_BYTES + payload_bytes]
        write_header(
            frame,
            key=chunk.key,
            fingerprint=self._fingerprint,
            serde=self._serde.wire_id,
            exact=self._exact,
            raw_bytes=payload.nbytes,
            payload_bytes=payload_bytes,
            chunk_sums=sums,
            raw=self.in_place,
        )
        return frame

    def landing(self, chunk: Chunk) -> memoryview:
        """Where a value is to be read to: the chunk's slot, or memory of its own."""
        if self.in_place:
            return chunk.frame
        longest = self._serde.max_encoded_bytes(chunk.group, chunk.tokens)
        return memoryview(bytearray(HEADER_BYTES + longest))

    def open(self, frame: memoryview, chunk: Chunk) -> bytes:
        """Check a value that was read, decode it into ``chunk``; answer its layers' checksums.

        Raises:
            FrameError: it isn't the value of this chunk; see `frame.read_header`. Or ``serde``:
                another one wrote it; ``content``: it decodes to something else than was stored.
            Exception: whatever the serde raises.
        """
        header = read_header(
            frame, key=chunk.key, fingerprint=self._fingerprint, checksums_of=self._checksums
        )
        payload, layers = chunk.payload, len(chunk.group.layers)
        if (header.raw_bytes, header.layers) != (payload.nbytes, layers):
            raise FrameError(
                "length",
                f"{header.raw_bytes} bytes in {header.layers} layers; this chunk has "
                f"{payload.nbytes} in {layers}",
            )
        if header.serde != self._serde.wire_id:
            raise FrameError("serde", f"written by serde {header.serde}, not {self._serde.wire_id}")
        if self.in_place:
            if header.payload_bytes != header.raw_bytes or header.pieces != layers:
                raise FrameError("length", "a raw chunk has a payload of another shape")
            sums = header.sums
        else:
            serde = self._serde.for_chunk(chunk.key, None)
            serde.decode(frame[HEADER_BYTES:], payload, chunk.group, chunk.tokens)
            sums = self._checksums(payload, layers)
        if self._exact and combined(sums) != header.chunk_sum:
            raise FrameError("content", "it decodes to other bytes than were stored")
        return sums
