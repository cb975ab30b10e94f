"""Checksums of canonical chunks: one for each layer, so that layers can be moved one by one.

The checksums of a chunk are the xxh3-64 of each of its layers, as little-endian 64-bit integers
one after the other; `combined` makes one number of them. Kernels make them in passing while they
copy; this is the plain form for those that don't. Knows bytes only.
"""

from __future__ import annotations

import xxhash

SUM_BYTES = 8


def checksums(buffer: memoryview, pieces: int) -> bytes:
    """The xxh3-64 of each of the ``pieces`` equal parts of ``buffer``.

    Raises:
        ValueError: it can't be cut so.
    """
    if pieces < 1 or buffer.nbytes % pieces:
        raise ValueError(f"{buffer.nbytes} bytes can't be cut into {pieces} equal pieces")
    return b"".join(_sum(part) for part in _parts(buffer, pieces, range(pieces)))


def layer_checksums(chunk: memoryview, layers: int, chosen: range) -> bytes:
    """The checksums of the ``chosen`` ones of a chunk's ``layers`` layers."""
    return b"".join(_sum(part) for part in _parts(chunk, layers, chosen))


def combined(sums: bytes) -> int:
    """One checksum for all the pieces that ``sums`` are of."""
    return xxhash.xxh3_64_intdigest(sums)


def part_of(sums: bytes, chosen: range | None) -> bytes:
    """The checksums of some layers, out of those of all."""
    if chosen is None:
        return sums
    return sums[chosen.start * SUM_BYTES : chosen.stop * SUM_BYTES]


def _parts(buffer: memoryview, pieces: int, chosen: range) -> list[memoryview]:
    size = buffer.nbytes // pieces
    return [buffer[i * size : (i + 1) * size] for i in chosen]


def _sum(part: memoryview) -> bytes:
    return xxhash.xxh3_64_intdigest(part).to_bytes(SUM_BYTES, "little")
