"""What the server holds: values by namespace and key, in order of use, some of them being read.

A value is seen by nobody before `commit`, and its memory is used again only after
its last reader let go. Knows nothing about connections. Thread-safe: every method
takes one lock for microseconds, and none does I/O.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from lmcache_core.keys import ChunkKey
from lmcache_core.lm.arena import Arena, trimmed, whole_pages
from lmcache_core.lm.protocol import Extent
from lmcache_core.metrics import Counters
from lmcache_core.storage import StoreOutcome

_BYTES_PER_ENTRY = 16 << 10
"""There is one entry for so many bytes of arena at most, which bounds the index's own memory, some
600 bytes an entry, to a twentieth of it."""


class Value:
    """One value. Only `Values` changes it."""

    __slots__ = ("key", "leases", "linked", "nbytes", "parts", "space")

    def __init__(self, space: str, key: ChunkKey, nbytes: int, parts: list[Extent]) -> None:
        self.space = space
        self.key = key
        self.nbytes = nbytes
        self.parts = parts
        self.leases = 1
        self.linked = False

    def extents(self) -> list[Extent]:
        """Where its bytes lie in the arena."""
        return trimmed(self.parts, self.nbytes)


class Values:
    """The index of an arena, the least recently used values going first."""

    def __init__(self, arena: Arena, counters: Counters) -> None:
        self._arena = arena
        self._counters = counters
        self._max_entries = max(1024, arena.capacity // _BYTES_PER_ENTRY)
        self._spaces: dict[str, dict[ChunkKey, Value]] = {}
        self._bytes: dict[str, int] = {}
        self._used: OrderedDict[Value, None] = OrderedDict()
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

    def acquire(
        self, space: str, keys: Sequence[ChunkKey], capacities: Sequence[int]
    ) -> list[Value | None]:
        """Lease the values that are there and not longer than their capacity, for `release`."""
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
        return found

    def release(self, values: Iterable[Value | None]) -> None:
        """End leases."""
        with self._lock:
            for value in values:
                if value is not None:
                    self._let_go(value)

    # -- writing ---------------------------------------------------------------------------

    def reserve(
        self, space: str, key: ChunkKey, nbytes: int, *, one_piece: bool = False
    ) -> Value | StoreOutcome:
        """Memory for a value that is about to come; it ends with `commit` or `release`.

        Or why there is none. Evicts what isn't being read. An existing value of another length was
        written by another serde; it is replaced.
        """
        with self._lock:
            held = self._spaces.get(space, {}).get(key)
            if held is not None and held.nbytes == nbytes:
                self._used.move_to_end(held)
                return StoreOutcome.ALREADY_PRESENT
            if not 0 < nbytes <= self._arena.capacity:
                return StoreOutcome.NOT_ADMITTED
            parts = self._allocate(nbytes, one_piece)
            if parts is None:
                return StoreOutcome.NOT_ADMITTED
            return Value(space, key, nbytes, parts)

    def commit(self, value: Value, *, keep_lease: bool = False) -> StoreOutcome:
        """Let everybody see ``value``, which is complete now."""
        with self._lock:
            held = self._spaces.setdefault(value.space, {}).get(value.key)
            if held is not None and held.nbytes == value.nbytes:
                outcome = StoreOutcome.ALREADY_PRESENT  # somebody else was faster
            else:
                if held is not None:
                    self._unlink(held)
                if len(self._used) >= self._max_entries:
                    self._evict_one()
                self._spaces.setdefault(value.space, {})[value.key] = value
                self._bytes[value.space] = self._bytes.get(value.space, 0) + value.nbytes
                self._used[value] = None
                value.linked = True
                outcome = StoreOutcome.STORED
            if not keep_lease:
                self._let_go(value)
            return outcome

    def shrink(self, value: Value, nbytes: int) -> None:
        """Give back what a reserved value turned out not to need."""
        with self._lock:
            value.nbytes = nbytes
            start, length = value.parts[0]  # reserved in one piece
            used = whole_pages(nbytes)
            if used < length:
                value.parts = [(start, used)]
                self._arena.extents.release([(start + used, length - used)])

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
        with self._lock:
            found = list(self._spaces.get(space, {}).values())
            for value in found:
                self._unlink(value)
            return len(found)

    # -- how much --------------------------------------------------------------------------

    def usage(self, space: str) -> tuple[int, int]:
        """Values and bytes of a namespace."""
        with self._lock:
            return len(self._spaces.get(space, ())), self._bytes.get(space, 0)

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
            }

    # -- inside, with the lock held --------------------------------------------------------

    def _allocate(self, nbytes: int, one_piece: bool) -> list[Extent] | None:
        extents = self._arena.extents
        evicted = 0
        # In one piece, whole runs of values may have to go; that has to end somewhere.
        bound = 4 * nbytes if one_piece else self._arena.capacity
        while (parts := extents.allocate(nbytes, one_piece=one_piece)) is None:
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
        self._arena.extents.release(value.parts)
        value.parts = []
