"""What the server holds: values by namespace and key, in order of use, some of them being read.

A value is seen by nobody before it is complete, and its memory is used again only after its last
reader let go. Who reads or fills has a `Held`, which ends exactly once whatever becomes of the
request. Memory for what is still to come is bounded: a value that was only announced evicts
nothing, and one that has begun to come gets the rest bit by bit once too much is waited for.
Knows nothing about connections. Thread-safe: every method takes locks for microseconds, and none
does I/O.
"""

from __future__ import annotations

import heapq
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from types import TracebackType

from lmcache_backend_lm.arena import Arena, trimmed, whole_pages
from lmcache_backend_lm.protocol import MAX_EXTENTS, Extent
from lmcache_backend_lm.shares import Shares
from lmcache_core import PAGE_BYTES, ChunkKey, Counters, Lease, Ledger, StoreOutcome

_BYTES_PER_ENTRY = 16 << 10
"""There is one entry for so many bytes of arena at most, which bounds the index's own memory, some
600 bytes an entry, to a twentieth of it."""
UNSENT_PART = 8
"""At most one part in so many of the memory waits for bytes; besides, each value may have as much
ahead of it as has come, and a page."""


class Value:
    """One value. Only `Values` changes it."""

    __slots__ = ("key", "leases", "linked", "nbytes", "parts", "room", "space", "unsent")

    def __init__(self, space: str, key: ChunkKey, nbytes: int, parts: list[Extent]) -> None:
        self.space = space
        self.key = key
        self.nbytes = nbytes
        self.parts = parts
        self.leases = 1
        """How many a `Held` has of it. Its memory is its own until there are none."""
        self.linked = False
        self.room = nbytes
        """So many of its bytes have memory: fewer than all only while it comes."""
        self.unsent = 0
        """Those of them that weren't there when the memory was taken."""

    def extents(self) -> list[Extent]:
        """Where its bytes lie in the arena."""
        return trimmed(self.parts, self.nbytes)


class Held:
    """What one request holds: values that it reads, and memory that it fills.

    One lease, however many values it is for, so that a request costs one object more. Belongs to
    whoever has it, and ends exactly once, by `release` or as a context manager. What it holds can
    be moved to another one; what was moved is no longer given back here. Not thread-safe: the one
    who has it is the only one to use it.
    """

    __slots__ = ("_lease", "_owner", "values")

    def __init__(self, owner: Values, values: list[Value | None], lease: Lease) -> None:
        self._owner = owner
        self._lease = lease
        self.values = values
        """Those that it reads by position, ``None`` where there is none; or those that it fills."""

    @property
    def live(self) -> bool:
        """Whether it is still to be released."""
        return self._lease.live

    def release(self) -> None:
        """Let go of everything.

        Raises:
            LeaseError: that was done before.
        """
        self._lease.release()

    def handed_on(self) -> Held:
        """Another one that holds all of this, for somebody who goes on longer; this has nothing."""
        values = self.values.copy()
        other = self._owner._held(values)
        self.values.clear()
        return other

    def take_over(self, other: Held, at: Sequence[int]) -> None:
        """Hold what ``other`` holds, at these positions of `values`; that one has nothing then."""
        for place, value in zip(at, other.values, strict=True):
            self.values[place] = value
        other.values.clear()

    def reserve(
        self, space: str, key: ChunkKey, nbytes: int, *, one_piece: bool = False
    ) -> Value | StoreOutcome:
        """Memory for a value that is there, to be copied at once, or why there is none.

        Evicts what isn't being read. An existing value of another length is replaced.
        """
        value = self._owner._reserve(space, key, nbytes, one_piece)
        if isinstance(value, Value):
            self.values.append(value)
        return value

    def expect(self, space: str, key: ChunkKey, nbytes: int) -> Value | StoreOutcome:
        """Memory for a value of which a byte came, and for which nobody knows whether more will.

        It may have `Value.room` for the first of its bytes only; when those are there, `grow` it.
        Where this fills others already, there is all of its memory or none: fill those first.
        """
        value = self._owner._expect(space, key, nbytes, alone=not self.values)
        if isinstance(value, Value):
            self.values.append(value)
        return value

    def grow(self, value: Value) -> list[Extent]:
        """More memory for a value whose `Value.room` is full; nothing: there is none."""
        return self._owner._grow(value)

    def discard(self, value: Value) -> None:
        """Let go of one that it fills."""
        self.values.remove(value)
        self._owner._end([value])

    def commit(self) -> list[StoreOutcome]:
        """Let everybody see the values that it fills, which are complete; it has nothing then."""
        return self._owner._commit(self.values)

    def settle(self, sizes: Sequence[int | None]) -> None:
        """The same for those that came, in so many bytes; it goes on holding them, as a reader.

        They were reserved in one piece. ``None``: that one didn't come, nor is it held any more.
        """
        self._owner._settle(self.values, sizes)

    def drop(self) -> None:
        """Let go of everything, and go on with nothing."""
        self._owner._end(self.values)

    def __enter__(self) -> Held:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lease.release()


class Values:
    """The index of an arena, the least recently used values going first."""

    def __init__(self, arena: Arena, counters: Counters) -> None:
        self.leases = Ledger("server values", counters)
        """How many `Held` there are."""
        self._arena = arena
        self._counters = counters
        self._max_entries = max(1024, arena.capacity // _BYTES_PER_ENTRY)
        self._spaces: dict[str, dict[ChunkKey, Value]] = {}
        self._bytes: dict[str, int] = {}
        self._used: OrderedDict[Value, None] = OrderedDict()
        self._unsent = Shares(arena.capacity // UNSENT_PART)
        self._lock = threading.Lock()

    # -- reading ---------------------------------------------------------------------------

    def contains(self, space: str, keys: Sequence[ChunkKey]) -> list[bool]:
        """Which of ``keys`` are there."""
        with self._lock:
            held = self._spaces.get(space, {})
            return [key in held for key in keys]

    def leading(self, space: str, keys: Sequence[ChunkKey]) -> int:
        """How many of ``keys`` are there, up to the first that isn't."""
        with self._lock:
            held = self._spaces.get(space, {})
            return next((i for i, key in enumerate(keys) if key not in held), len(keys))

    def acquire(self, space: str, keys: Sequence[ChunkKey], capacities: Sequence[int]) -> Held:
        """Hold the values that are there and not longer than their capacity, by position."""
        found: list[Value | None] = []
        with self._lock:
            held = self._spaces.get(space, {})
            for key, capacity in zip(keys, capacities, strict=True):
                value = held.get(key)
                if value is not None and value.nbytes <= capacity:
                    value.leases += 1
                    self._used.move_to_end(value)
                    found.append(value)
                else:
                    found.append(None)
        return self._held(found)

    # -- writing ---------------------------------------------------------------------------

    def hold(self) -> Held:
        """Hold nothing, for `Held.reserve`."""
        return self._held([])

    def delete(self, space: str, keys: Sequence[ChunkKey]) -> int:
        """Forget ``keys``; answer how many were there."""
        with self._lock:
            held = self._spaces.get(space, {})
            found = [value for key in keys if (value := held.get(key)) is not None]
            for value in found:
                self._unlink(value)
            return len(found)

    def clear(self, space: str) -> int:
        """Forget a namespace; answer how many values it had."""
        return self.purge(space)[0]

    def purge(self, space: str) -> tuple[int, int]:
        """Forget a namespace; answer how many values it had, and their bytes."""
        with self._lock:
            found = list(self._spaces.get(space, {}).values())
            for value in found:
                self._unlink(value)
            return len(found), sum(value.nbytes for value in found)

    # -- how much --------------------------------------------------------------------------

    def usage(self, space: str) -> tuple[int, int]:
        """Values and bytes of a namespace."""
        with self._lock:
            return len(self._spaces.get(space, ())), self._bytes.get(space, 0)

    def spaces(self, after: str, most: int) -> list[str]:
        """The first ``most`` namespaces behind ``after``, in order."""
        with self._lock:
            return heapq.nsmallest(most, (space for space in self._spaces if space > after))

    def totals(self) -> dict[str, int]:
        """Numbers for operators."""
        with self._lock:
            free = self._arena.extents.free_bytes
            return {
                "server_values": len(self._used),
                "server_value_bytes": sum(self._bytes.values()),
                "server_memory_bytes": self._arena.capacity,
                "server_memory_used_bytes": self._arena.capacity - free,
                "server_namespaces": len(self._spaces),
                "server_leases": self.leases.out,
                "server_unsent_bytes": self._unsent.taken,
            }

    # -- for `Held` ------------------------------------------------------------------------

    def _held(self, values: list[Value | None]) -> Held:
        return Held(self, values, self.leases.lease(partial(self._end, values)))

    def _end(self, values: list[Value | None]) -> None:
        with self._lock:
            for value in values:
                if value is not None:
                    self._let_go(value)
        values.clear()

    def _reserve(
        self, space: str, key: ChunkKey, nbytes: int, one_piece: bool
    ) -> Value | StoreOutcome:
        with self._lock:
            refused = self._refused(space, key, nbytes)
            if refused is not None:
                return refused
            parts = self._allocate(nbytes, 1 if one_piece else MAX_EXTENTS)
            if parts is None:
                return StoreOutcome.NOT_ADMITTED
            return Value(space, key, nbytes, parts)

    def _expect(
        self, space: str, key: ChunkKey, nbytes: int, *, alone: bool
    ) -> Value | StoreOutcome:
        with self._lock:
            refused = self._refused(space, key, nbytes)
            if refused is not None:
                return refused
            if nbytes <= self._unsent.left(space):  # nearly always
                parts = self._allocate(nbytes, MAX_EXTENTS)
                if parts is None:
                    return StoreOutcome.NOT_ADMITTED
                value = Value(space, key, nbytes, parts)
                value.unsent = nbytes
                self._unsent.take(space, nbytes)
                return value
            value = Value(space, key, nbytes, [])
            value.room = 0
            if not alone or not self._extend(value):
                return StoreOutcome.NOT_ADMITTED
            return value

    def _grow(self, value: Value) -> list[Extent]:
        with self._lock:
            self._came(value)
            return self._extend(value)

    def _commit(self, values: list[Value | None]) -> list[StoreOutcome]:
        outcomes: list[StoreOutcome] = []
        with self._lock:
            for value in values:
                if value is not None:
                    if value.unsent:
                        self._came(value)
                    outcomes.append(self._link(value))
                    self._let_go(value)
        values.clear()
        return outcomes

    def _settle(self, values: list[Value | None], sizes: Sequence[int | None]) -> None:
        with self._lock:
            for place, (value, nbytes) in enumerate(zip(values, sizes, strict=True)):
                if value is None:
                    continue
                if nbytes is None:
                    values[place] = None
                    self._let_go(value)
                else:
                    self._shrink(value, nbytes)
                    self._link(value)

    # -- inside, with the lock held --------------------------------------------------------

    def _link(self, value: Value) -> StoreOutcome:
        held = self._spaces.setdefault(value.space, {}).get(value.key)
        if held is not None and held.nbytes == value.nbytes:
            return StoreOutcome.ALREADY_PRESENT  # somebody else was faster
        if held is not None:
            self._unlink(held)
        if len(self._used) >= self._max_entries:
            self._evict_one()
        self._spaces.setdefault(value.space, {})[value.key] = value
        self._bytes[value.space] = self._bytes.get(value.space, 0) + value.nbytes
        self._used[value] = None
        value.linked = True
        return StoreOutcome.STORED

    def _shrink(self, value: Value, nbytes: int) -> None:
        """Give back what a reserved value turned out not to need."""
        value.nbytes = nbytes
        start, length = value.parts[0]  # reserved in one piece
        used = whole_pages(nbytes)
        if used < length:
            value.parts = [(start, used)]
            self._arena.extents.release([(start + used, length - used)])

    def _refused(self, space: str, key: ChunkKey, nbytes: int) -> StoreOutcome | None:
        """Why a value gets no memory, whatever there is."""
        held = self._spaces.get(space, {}).get(key)
        if held is not None and held.nbytes == nbytes:
            self._used.move_to_end(held)
            return StoreOutcome.ALREADY_PRESENT
        if not 0 < nbytes <= self._arena.capacity:
            return StoreOutcome.NOT_ADMITTED
        return None

    def _extend(self, value: Value) -> list[Extent]:
        """Memory for what follows `Value.room`, all of which came: as much as may be ahead."""
        rest = value.nbytes - value.room
        left = MAX_EXTENTS - len(value.parts)
        some = max(self._unsent.left(value.space), value.room, PAGE_BYTES)
        if some < rest:
            some -= some % PAGE_BYTES
            left //= 2  # the others are for what comes after that
        else:
            some = rest
        last = sum(value.parts[-1]) if value.parts else None
        parts = self._allocate(some, left, last) if left else None
        if parts is None:
            return []
        more = parts
        if parts[0][0] == last:
            start, length = value.parts.pop()
            more = [(start, length + parts[0][1]), *parts[1:]]
        value.parts += more
        value.room += some
        value.unsent = some
        self._unsent.take(value.space, some)
        return trimmed(parts, some)

    def _came(self, value: Value) -> None:
        """All of a value's memory is filled, or nobody waits for it any more."""
        if value.unsent:
            self._unsent.give(value.space, value.unsent)
            value.unsent = 0

    def _allocate(self, nbytes: int, runs: int, after: int | None = None) -> list[Extent] | None:
        extents = self._arena.extents
        evicted = 0
        # In one piece, whole runs of values may have to go; that has to end somewhere.
        bound = 4 * nbytes if runs == 1 else self._arena.capacity
        while (parts := extents.allocate(nbytes, runs=runs, after=after)) is None:
            if evicted > bound or not (freed := self._evict_one()):
                return None
            evicted += freed
        return parts

    def _evict_one(self) -> int:
        """Drop the least recently used value that nobody reads; answer its bytes, 0 if none."""
        for value in self._used:
            if not value.leases:
                self._unlink(value)
                self._counters.add("evicted_chunks", tier="server")
                return value.nbytes
        return 0

    def _unlink(self, value: Value) -> None:
        value.linked = False
        del self._used[value]
        held = self._spaces[value.space]
        del held[value.key]
        self._bytes[value.space] -= value.nbytes
        if not held:
            del self._spaces[value.space], self._bytes[value.space]
        if not value.leases:
            self._free(value)

    def _let_go(self, value: Value) -> None:
        value.leases -= 1
        if not value.leases and not value.linked:
            self._free(value)

    def _free(self, value: Value) -> None:
        self._came(value)
        self._arena.extents.release(value.parts)
        value.parts = []
