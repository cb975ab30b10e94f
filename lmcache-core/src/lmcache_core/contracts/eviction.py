"""In which order chunks leave host memory: the contract, and four that keep it.

Knows small integers, the numbers of slots, and what may be asked about the chunks in them. Leases,
memory and tiers are the planner's business: it asks for victims and evicts them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict

from lmcache_core.chunks.keys import ChunkKey


class CachedChunks(Protocol):
    """What a policy may ask about host memory. Asking changes nothing."""

    @property
    def slots(self) -> int:
        """How many chunks there is room for."""

    def now(self) -> float:
        """Seconds on the planner's clock. A policy has no other one."""

    def key(self, slot: int) -> ChunkKey | None:
        """What lies in a slot; also of a slot that the policy is just told of."""

    def parent(self, slot: int) -> int | None:
        """The slot of the chunk that this one continues, if that is here."""

    def children(self, slot: int) -> int:
        """How many chunks here continue this one, or are about to."""

    def evictable(self, slot: int) -> bool:
        """Whether this chunk could go now: nobody uses it, and nothing continues it."""

    def leaf(self, slot: int) -> int:
        """An end of the prefixes that this chunk is part of: itself, or what continues it."""

    def descendants(self, slot: int) -> list[int]:
        """All that continue this chunk, however far; each before what it continues."""


@dataclass(frozen=True, kw_only=True)
class PolicyRequest:
    """One request, as `SeesRequests` hears of it when it is looked up."""

    name: str = ""
    """What `SeesRequests.finished` will call it. Empty: nobody will say when it ends."""
    keys: Sequence[ChunkKey]
    """Of all its full chunks, in the order of the prefix."""
    slots: Sequence[int]
    """Of the leading chunks that are in host memory."""
    tokens: int
    """How long the prompt is."""
    now: float
    """As `CachedChunks.now`."""
    hints: Mapping[str, Any] = field(default_factory=dict)
    """What the engine says beside that, all of it optional: ``session`` (str), ``priority`` (int,
    smaller is more urgent), ``next_use_s`` (float), ``last_turn`` (bool), ``ttl_s`` (float)."""


class CachePolicy(ABC):
    """Decides which chunk leaves host memory next.

    What core guarantees: `open` comes first and once. `added` comes before anything else for a
    slot, `removed` ends it, and only then may it be added again. All calls come from one thread at
    a time. A call that raises otherwise than it says here, and a victim that is none, are counted,
    and another chunk goes; a policy that goes on so is replaced by `LRU`.

    What a policy owes: no call becomes slower with the number of slots, but for what `open` needs
    and what many calls share. It reads no clock but `CachedChunks.now`, starts no thread, and does
    no I/O: an engine's scheduler waits for it.

    Derive from `OrderedPolicy` where one order of all slots is enough. The methods of
    `SeesRequests` and `Admits` are optional: having them is all it takes, and where a policy
    doesn't, nothing is made for them.
    """

    def open(self, chunks: CachedChunks) -> None:  # noqa: B027  for those who ask nothing
        """``chunks`` is for asking, as long as the policy lives. Nothing was added yet."""

    @abstractmethod
    def added(self, slot: int) -> None:
        """``slot`` holds a chunk from now on. Counts as its first use.

        Raises:
            ValueError: it holds one already.
        """

    @abstractmethod
    def touched(self, slots: Sequence[int]) -> None:
        """``slots`` were used, the last one most recently: of a prefix, its end comes first.

        Raises:
            KeyError: a slot was never added, or was removed.
        """

    @abstractmethod
    def removed(self, slot: int, evicted: bool = False) -> None:
        """``slot`` is about to hold no chunk any more.

        ``evicted``: it made room for another one, and may be asked for again. Otherwise it was
        damaged, or forgotten on purpose.

        Raises:
            KeyError: it was never added, or was removed already.
        """

    @abstractmethod
    def victim(self, spared: int | None) -> int | None:
        """The chunk to evict now, one that `CachedChunks.evictable` says yes for; not ``spared``.

        `removed` follows at once if it is one. ``None``: none was found in a few steps; then the
        chunk goes that nobody has used for the longest.
        """

    @abstractmethod
    def clear(self) -> None:
        """Forget every slot, and whatever was remembered of chunks that went."""


class OrderedPolicy(CachePolicy):
    """A policy that is an order of all slots, whoever uses them and whatever continues them.

    Core looks at the first few that `victims` shows, and evicts the end of the prefix that one of
    them is part of. Where these are all in use, the chunk goes that nobody has used for the
    longest. After any other call it doesn't go on with an iterator that it was given earlier.
    """

    @abstractmethod
    def victims(self) -> Iterator[int]:
        """The slots that hold chunks, each once, the one to evict first first. Changes nothing.

        The first step doesn't become slower with the number of slots.
        """

    def victim(self, spared: int | None) -> int | None:
        """The first that isn't ``spared``. Core asks `victims` instead."""
        return next((slot for slot in self.victims() if slot != spared), None)


@runtime_checkable
class SeesRequests(Protocol):
    """A policy that wants to know where requests begin and end."""

    def requested(self, request: PolicyRequest) -> None:
        """A request is looked up for the first time. Its chunks are touched and added after this.

        An engine may begin others before it has computed this one.
        """

    def finished(self, name: str, tokens: int) -> None:
        """The request of this name has ended, with so many tokens, those of its answer included."""


@runtime_checkable
class Admits(Protocol):
    """A policy that may refuse a chunk, rather than evict another one for it."""

    def admit(self, key: ChunkKey, parent: int | None) -> bool:
        """Whether a chunk is worth the room of another one.

        Asked where host memory is full, before anything is evicted or copied, and only where there
        are no slow tiers: what they keep goes through host memory. ``parent`` is the slot of what
        it continues. What would continue a chunk that was refused isn't stored.
        """


class NoOptions(BaseModel):
    """The options of a policy that has none."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, kw_only=True)
class CachePolicyDescriptor:
    """What a plugin says about an eviction policy."""

    name: str
    """What ``cache_policy`` calls it; compared without regard to case."""
    summary: str
    create: Callable[[Any], CachePolicy]
    """Makes the policy from a validated ``config``."""
    config: type[BaseModel] = NoOptions
    """Its options, what ``cache_policy_options`` may say; ``extra="forbid"``."""


class _Ordered(OrderedPolicy):
    """Keeps slots in one order. ``OrderedDict`` because its moves are O(1) and written in C."""

    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()

    def added(self, slot: int) -> None:
        if slot in self._order:
            raise ValueError(f"slot {slot} holds a chunk already")
        self._order[slot] = None

    def removed(self, slot: int, evicted: bool = False) -> None:  # noqa: ARG002
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


class LFU(OrderedPolicy):
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

    def removed(self, slot: int, evicted: bool = False) -> None:  # noqa: ARG002
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
