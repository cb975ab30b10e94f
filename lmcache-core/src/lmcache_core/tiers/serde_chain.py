"""Serdes one after the other, as configurations write them: ``cachegen+aesgcm``.

The first encodes a chunk. Each further one encodes the bytes that the one before wrote, which it
sees as a chunk of one token whose one head has that many unsigned bytes.

    offset  bytes  field
    0       1      how many serdes
    1       1      0
    2       2 n    their wire ids
    2 + 2n  4 n    bytes that each of them wrote; the last one's are the rest
    2 + 6n         what the last one wrote

Knows the contract. Knows nothing about any serde.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from lmcache_core.chunks.layout import AttentionKind, DType, LayerGroup
from lmcache_core.contracts.serde import Serde, SerdeFacts

WIRE_ID = 2
_MOST_SERDES = 8


def chain_serdes(serdes: Sequence[Serde]) -> Serde:
    """One serde that is all of ``serdes``.

    Raises:
        ValueError: there are none, or more than eight.
    """
    if not 1 <= len(serdes) <= _MOST_SERDES:
        raise ValueError(f"a chain has 1 to {_MOST_SERDES} serdes, not {len(serdes)}")
    return serdes[0] if len(serdes) == 1 else ChainedSerde(tuple(serdes))


class ChainedSerde(Serde):
    """``serdes`` in the order of encoding."""

    def __init__(self, serdes: tuple[Serde, ...]) -> None:
        self._serdes = serdes
        self._head = struct.Struct(f"<BB{len(serdes)}H{len(serdes)}I")
        self._ids = tuple(serde.wire_id for serde in serdes)

    @property
    def wire_id(self) -> int:
        return WIRE_ID

    def identity(self, group: LayerGroup) -> str:
        first, *others = self._serdes
        inner = [serde.identity(_bytes_of(1)) for serde in others]
        return "+".join([first.identity(group), *inner])

    def bound(self, facts: SerdeFacts) -> Serde:
        return ChainedSerde(tuple(serde.bound(facts) for serde in self._serdes))

    def for_chunk(self, key: bytes, start: int | None) -> Serde:
        mine = tuple(serde.for_chunk(key, start) for serde in self._serdes)
        same = all(a is b for a, b in zip(mine, self._serdes, strict=True))
        return self if same else ChainedSerde(mine)

    def max_encoded_bytes(self, group: LayerGroup, tokens: int) -> int:
        return self._head.size + self._limits(group, tokens)[-1]

    def encode(self, chunk: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> int:
        limits = self._limits(group, tokens)
        source, sizes = chunk, []
        for serde, limit in zip(self._serdes[:-1], limits[:-1], strict=True):
            written = memoryview(bytearray(limit))
            sizes.append(serde.encode(source, written, group, tokens))
            source = written[: sizes[-1]]
            group, tokens = _bytes_of(sizes[-1]), 1
        sizes.append(self._serdes[-1].encode(source, into[self._head.size :], group, tokens))
        self._head.pack_into(into, 0, len(self._ids), 0, *self._ids, *sizes)
        return self._head.size + sizes[-1]

    def decode(self, encoded: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> None:
        sizes = self._sizes(encoded, self._limits(group, tokens))
        source = encoded[self._head.size :]
        for serde, size in zip(self._serdes[:0:-1], sizes[-2::-1], strict=True):
            decoded = memoryview(bytearray(size))
            serde.decode(source, decoded, _bytes_of(size), 1)
            source = decoded
        self._serdes[0].decode(source, into, group, tokens)

    def _limits(self, group: LayerGroup, tokens: int) -> list[int]:
        """The most that each may write, if all before wrote the most that they may."""
        limits: list[int] = []
        for serde in self._serdes:
            limits.append(serde.max_encoded_bytes(group, tokens))
            group, tokens = _bytes_of(limits[-1]), 1
        return limits

    def _sizes(self, encoded: memoryview, limits: list[int]) -> list[int]:
        count = len(self._ids)
        if encoded.nbytes < self._head.size:
            raise ValueError(f"{encoded.nbytes} bytes are too few for a chain of {count} serdes")
        number, zero, *rest = self._head.unpack_from(encoded)
        if (number, zero, *rest[:count]) != (count, 0, *self._ids):
            raise ValueError(f"written by other serdes than {self._ids}: {tuple(rest[:count])}")
        sizes = rest[count:]
        if any(not 0 < size <= limit for size, limit in zip(sizes, limits, strict=True)):
            raise ValueError(f"no chain of such a chunk has steps of {sizes} bytes")
        if sizes[-1] != encoded.nbytes - self._head.size:
            raise ValueError(f"{encoded.nbytes} bytes end with a step of {sizes[-1]}")
        return sizes


def _bytes_of(size: int) -> LayerGroup:
    """``size`` bytes as a chunk of one token."""
    return LayerGroup((0,), AttentionKind.MLA, 1, 1, size, DType.U8)
