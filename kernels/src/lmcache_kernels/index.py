"""Which chunk lies in which slot, and in which order slots are evicted, in native code.

`ChunkIndex` is that of `lmcache_core.chunks.chunk_index`: 42.7 bytes a slot, asked for at once and
used when needed. Its keys have 16 bytes: take an index for each layer group. The policies are
`lmcache_core.contracts.eviction`'s, at 8 bytes a slot.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lmcache_core import OrderedPolicy
from lmcache_kernels._native import ChunkIndex, SlotRing

__all__ = ["FIFO", "LRU", "MRU", "ChunkIndex"]


class _Ordered(OrderedPolicy):
    def __init__(self) -> None:
        self._ring = SlotRing()

    def __len__(self) -> int:
        return len(self._ring)

    @property
    def nbytes(self) -> int:
        """Bytes that the order takes."""
        return self._ring.nbytes

    def added(self, slot: int) -> None:
        self._ring.added(slot)

    def touched(self, slots: Sequence[int]) -> None:
        self._ring.touched(slots)

    def removed(self, slot: int, evicted: bool = False) -> None:  # noqa: ARG002
        self._ring.removed(slot)

    def victims(self) -> Iterator[int]:
        slot = -1
        while (slot := self._ring.after(slot)) >= 0:
            yield slot

    def clear(self) -> None:
        self._ring.clear()


class LRU(_Ordered):
    """Least recently used first."""


class FIFO(_Ordered):
    """First in, first out: use changes nothing."""

    def touched(self, slots: Sequence[int]) -> None:
        self._ring.check(slots)


class MRU(_Ordered):
    """Most recently used first."""

    def victims(self) -> Iterator[int]:
        slot = -1
        while (slot := self._ring.before(slot)) >= 0:
            yield slot
