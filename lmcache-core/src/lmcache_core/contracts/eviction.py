"""In which order chunks leave host memory.

Knows small integers, the numbers of arena slots, and when they were used.
Knows nothing about keys, leases or memory: the planner asks for victims and
skips those that somebody is using, a few of them at the most.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


class CachePolicy(ABC):
    """Orders the slots that hold chunks.

    What the planner guarantees: `added` comes before anything else for a slot, `removed` ends it,
    and only then may it be added again; all calls come from one thread at a time; after any
    other call it doesn't go on with an iterator that `victims` returned earlier.

    The planner looks at the first few slots that `victims` shows. Where these are all in use, the
    chunk goes that nobody has used for the longest, and the policy is told with `removed`.

    A call that raises otherwise than it says here, and a victim that is none, are counted, and the
    planner finds another; a policy that goes on so is replaced.

    What a policy owes: no call becomes slower with the number of slots, nor does the first step of
    `victims`, which changes nothing and shows every slot once.
    """

    @abstractmethod
    def added(self, slot: int) -> None:
        """``slot`` holds a chunk from now on. Counts as its first use.

        Raises:
            ValueError: it holds one already.
        """

    @abstractmethod
    def touched(self, slots: Sequence[int]) -> None:
        """``slots`` were used, the last one most recently.

        Raises:
            KeyError: a slot was never added, or was removed.
        """

    @abstractmethod
    def removed(self, slot: int) -> None:
        """``slot`` holds no chunk any more.

        Raises:
            KeyError: it was never added, or was removed already.
        """

    @abstractmethod
    def victims(self) -> Iterator[int]:
        """The slots that hold chunks, the one to evict first first."""

    @abstractmethod
    def clear(self) -> None:
        """Forget every slot."""


@dataclass(frozen=True, kw_only=True)
class CachePolicyDescriptor:
    """What a plugin says about an eviction policy."""

    name: str
    """What ``cache_policy`` calls it; compared without regard to case."""
    summary: str
    create: Callable[[], CachePolicy]


class _Ordered(CachePolicy):
    """Keeps slots in one order. ``OrderedDict`` because its moves are O(1) and written in C."""

    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()

    def added(self, slot: int) -> None:
        if slot in self._order:
            raise ValueError(f"slot {slot} holds a chunk already")
        self._order[slot] = None

    def removed(self, slot: int) -> None:
        del self._order[slot]

    def victims(self) -> Iterator[int]:
        return iter(self._order)

    def clear(self) -> None:
        self._order.clear()


class FIFO(_Ordered):
    """First in, first out: use changes nothing."""

    def touched(self, slots: Sequence[int]) -> None:
        for slot in slots:
            if slot not in self._order:
                raise KeyError(slot)


class LRU(_Ordered):
    """Least recently used first."""

    def touched(self, slots: Sequence[int]) -> None:
        move = self._order.move_to_end
        for slot in slots:
            move(slot)


class MRU(LRU):
    """Most recently used first: for scans over more than the cache holds."""

    def victims(self) -> Iterator[int]:
        return reversed(self._order)


class _Bucket:
    """The slots that were used equally often, by recency, in a ring ordered by use count."""

    __slots__ = ("next", "previous", "slots", "uses")

    def __init__(self, uses: int) -> None:
        self.uses = uses
        self.slots: OrderedDict[int, None] = OrderedDict()
        self.previous: _Bucket = self
        self.next: _Bucket = self

    def insert_after(self, other: _Bucket) -> None:
        self.previous, self.next = other, other.next
        self.previous.next = self.next.previous = self

    def unlink(self) -> None:
        self.previous.next, self.next.previous = self.next, self.previous


class LFU(CachePolicy):
    """Least often used first, of those the least recently used.

    A ring of buckets, one for each use count that occurs: every call is O(1) per slot, see
    Shah, Mitra, Matani: "An O(1) algorithm for implementing the LFU cache eviction scheme" (2010).
    """

    def __init__(self) -> None:
        self._bucket_of: dict[int, _Bucket] = {}
        self._head = _Bucket(0)  # stays empty; the ring starts and ends here

    def added(self, slot: int) -> None:
        if slot in self._bucket_of:
            raise ValueError(f"slot {slot} holds a chunk already")
        self._put(slot, self._head)

    def touched(self, slots: Sequence[int]) -> None:
        for slot in slots:
            bucket = self._bucket_of[slot]
            del bucket.slots[slot]
            self._put(slot, bucket)
            if not bucket.slots:
                bucket.unlink()

    def removed(self, slot: int) -> None:
        bucket = self._bucket_of.pop(slot)
        del bucket.slots[slot]
        if not bucket.slots:
            bucket.unlink()

    def victims(self) -> Iterator[int]:
        bucket = self._head.next
        while bucket is not self._head:
            yield from bucket.slots
            bucket = bucket.next

    def clear(self) -> None:
        self._bucket_of.clear()
        self._head = _Bucket(0)

    def _put(self, slot: int, bucket: _Bucket) -> None:
        """Put ``slot`` among those that were used once more often than those in ``bucket``."""
        target = bucket.next
        if target.uses != bucket.uses + 1:
            target = _Bucket(bucket.uses + 1)
            target.insert_after(bucket)
        target.slots[slot] = None
        self._bucket_of[slot] = target
