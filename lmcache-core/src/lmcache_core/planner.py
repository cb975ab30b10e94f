"""Decides what is where, what to load, what to store and what to evict.

The planner owns the index of host memory: which chunk lies in which arena
slot, who is using it, and which slot goes next. It computes over small keys
only: no I/O, no buffers, no clock but the one it is given. Movers carry out
what it plans and report back; until every rank has reported, a chunk isn't
offered to anybody.

Not thread-safe. An engine's scheduler calls it from one thread; `cache` adds
a lock for own applications.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from lmcache_core.connector import BlockSpan
from lmcache_core.eviction import CachePolicy
from lmcache_core.keys import ChunkKey
from lmcache_core.metrics import Counters
from lmcache_core.plan import FetchOp, Report, StoreOp


class ChunkState(Enum):
    """What host memory knows about a chunk."""

    ABSENT = auto()
    STORING = auto()
    FETCHING = auto()
    READY = auto()


@dataclass
class _Operation:
    key: ChunkKey
    slot: int
    results_due: int
    releases_due: int
    fetch: bool
    failed: bool = False


@dataclass
class Hold:
    """Slots that somebody is going to read, in prefix order. Not evicted until released.

    ``awaited`` are slots that are being fetched for the holder.
    """

    keys: list[ChunkKey] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    awaited: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.slots)


class Planner:
    """The index of one arena of ``slots`` slots, the same on ``ranks`` ranks.

    ``keep``: whether host memory is a cache; otherwise (``local_cpu: false``) it is only where
    chunks wait on their way to and from slow tiers, and a slot is free as soon as nobody uses it.
    ``on_ready``, ``on_failed`` (stores) and ``on_evicted`` are told about keys, for KV events.
    """

    def __init__(
        self,
        slots: int,
        policy: CachePolicy,
        counters: Counters,
        *,
        ranks: int = 1,
        keep: bool = True,
        persist: bool = False,
        pin_timeout_s: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.slots = slots
        self.persist = persist
        self._ranks = ranks
        self._keep = keep
        self._policy = policy
        self._counters = counters
        self._clock = clock
        self._pin_timeout_s = pin_timeout_s
        self._index: dict[ChunkKey, int] = {}
        self._key_of: list[ChunkKey | None] = [None] * slots
        self._state: list[ChunkState] = [ChunkState.ABSENT] * slots
        self._leases = array("i", bytes(4 * slots))
        self._free = list(range(slots - 1, -1, -1))
        self._operations: dict[int, _Operation] = {}
        self._next_op = 1
        self._pins: dict[ChunkKey, float] = {}
        self.on_ready: Callable[[ChunkKey], None] | None = None
        self.on_failed: Callable[[ChunkKey], None] | None = None
        self.on_evicted: Callable[[ChunkKey], None] | None = None

    # -- looking ---------------------------------------------------------------------------

    def state(self, key: ChunkKey) -> ChunkState:
        """What host memory knows about ``key``."""
        slot = self._index.get(key)
        return ChunkState.ABSENT if slot is None else self._state[slot]

    def ready_prefix(self, keys: Sequence[ChunkKey]) -> int:
        """How many keys from the first on are ready in host memory."""
        index, state, ready = self._index, self._state, ChunkState.READY
        for position, key in enumerate(keys):
            slot = index.get(key)
            if slot is None or state[slot] is not ready:
                return position
        return len(keys)

    def acquire(self, keys: Sequence[ChunkKey]) -> Hold:
        """Lease the leading ready chunks of ``keys``, and mark them as used.

        Marked from the last to the first, so that by recency a chunk never outlives its parents.
        """
        count = self.ready_prefix(keys)
        slots = [self._index[key] for key in keys[:count]]
        for slot in slots:
            self._leases[slot] += 1
        self._policy.touched(slots[::-1])
        return Hold(list(keys[:count]), slots)

    def extend(self, hold: Hold, keys: Sequence[ChunkKey]) -> None:
        """Add the leading ready chunks of ``keys``, which continue the hold's prefix."""
        more = self.acquire(keys)
        hold.keys += more.keys
        hold.slots += more.slots

    def release(self, hold: Hold) -> None:
        """Give a hold back. Idempotent."""
        slots = hold.slots + hold.awaited
        hold.keys, hold.slots, hold.awaited = [], [], []
        for slot in slots:
            self._unlease(slot)

    # -- planning --------------------------------------------------------------------------

    def plan_store(self, key: ChunkKey, span: BlockSpan) -> StoreOp | None:
        """Make room for a chunk and plan its store, unless it is here or on its way already."""
        if key in self._index:
            return None
        slot = self._take_slot()
        if slot is None:
            self._counters.add("store_dropped", reason="memory_full")
            return None
        op = self._begin(key, slot, ChunkState.STORING)
        return StoreOp(op, key, slot, span, self.persist)

    def plan_fetch(self, key: ChunkKey, tokens: int, tier: int, hold: Hold) -> FetchOp | None:
        """Make room for an absent chunk of a slow tier and plan its load; ``None`` without room.

        The slot is leased to ``hold`` from now on, whether or not the load succeeds.
        """
        slot = self._take_slot()
        if slot is None:
            self._counters.add("load_failures", tier="host", reason="memory_full")
            return None
        op = self._begin(key, slot, ChunkState.FETCHING)
        self.join(key, hold)
        return FetchOp(op, key, slot, tokens, tier)

    def join(self, key: ChunkKey, hold: Hold) -> None:
        """Lease a chunk that somebody else is having fetched."""
        slot = self._index[key]
        self._leases[slot] += 1
        hold.awaited.append(slot)

    def settle(self, report: Report) -> None:
        """Take in what movers report."""
        for op, count in report.ok.items():
            self._result(op, count, failed=False)
        for op, count in report.bad.items():
            self._result(op, count, failed=True)
        for op, count in report.released.items():
            self._released(op, count)
        for key in report.unreadable:
            self.forget(key)

    def forget(self, key: ChunkKey) -> bool:
        """Never offer ``key`` from host memory again; its slot is freed once nobody uses it."""
        slot = self._index.get(key)
        if slot is None:
            return False
        self._drop(slot)
        return True

    def clear(self) -> int:
        """Forget everything that is ready; answer how many chunks that were."""
        self._pins_expire(float("inf"))
        ready = [s for s in self._index.values() if self._state[s] is ChunkState.READY]
        for slot in ready:
            self._drop(slot)
        for operation in self._operations.values():
            operation.failed = True  # what is on its way was computed before the clear
        return len(ready)

    # -- pins ------------------------------------------------------------------------------

    def pin(self, keys: Sequence[ChunkKey]) -> int:
        """Keep the leading ready chunks from being evicted, for ``pin_timeout_s`` at the most."""
        self._pins_expire(self._clock())
        count = self.ready_prefix(keys)
        until = self._clock() + self._pin_timeout_s
        for key in keys[:count]:
            if key not in self._pins:
                self._leases[self._index[key]] += 1
            self._pins[key] = until
        return count

    def unpin(self, keys: Iterable[ChunkKey]) -> int:
        """Undo `pin`; answer how many of ``keys`` were pinned."""
        pinned = [key for key in keys if self._pins.pop(key, None) is not None]
        for key in pinned:
            self._unlease(self._index[key])
        return len(pinned)

    # -- figures ---------------------------------------------------------------------------

    @property
    def chunks(self) -> int:
        """Chunks in host memory, ready or on their way."""
        return len(self._index)

    @property
    def pending(self) -> int:
        """Operations that not every rank has finished."""
        return len(self._operations)

    # -- inside ----------------------------------------------------------------------------

    def _begin(self, key: ChunkKey, slot: int, state: ChunkState) -> int:
        op = self._next_op
        self._next_op += 1
        self._index[key] = slot
        self._key_of[slot] = key
        self._state[slot] = state
        self._leases[slot] += 1
        self._operations[op] = _Operation(
            key, slot, self._ranks, self._ranks, state is ChunkState.FETCHING
        )
        return op

    def _result(self, op: int, count: int, *, failed: bool) -> None:
        operation = self._operations[op]
        operation.results_due -= count
        operation.failed |= failed
        if operation.results_due:
            return
        slot, key = operation.slot, operation.key
        if operation.failed:
            if self._key_of[slot] == key:
                self._drop(slot)
            if self.on_failed is not None and not operation.fetch:
                self.on_failed(key)
        elif self._key_of[slot] == key and self._state[slot] is not ChunkState.READY:
            self._state[slot] = ChunkState.READY
            self._policy.added(slot)
            if self.on_ready is not None and not operation.fetch:
                self.on_ready(key)
        self._finish(op, operation)

    def _released(self, op: int, count: int) -> None:
        operation = self._operations[op]
        operation.releases_due -= count
        self._finish(op, operation)

    def _finish(self, op: int, operation: _Operation) -> None:
        if operation.results_due or operation.releases_due:
            return
        del self._operations[op]
        self._unlease(operation.slot)

    def _take_slot(self) -> int | None:
        if self._free:
            return self._free.pop()
        if self._pins:
            self._pins_expire(self._clock())
        leases = self._leases
        victim = next((slot for slot in self._policy.victims() if not leases[slot]), None)
        if victim is None:
            return None
        self._drop(victim)
        self._counters.add("evicted_chunks", tier="host")
        return self._free.pop()

    def _drop(self, slot: int) -> None:
        """Take a slot out of the index; free it now, or when its last lease ends."""
        key = self._key_of[slot]
        if key is None:
            return
        if self._pins.pop(key, None) is not None:
            self._leases[slot] -= 1
        if self._state[slot] is ChunkState.READY:
            self._policy.removed(slot)
            if self.on_evicted is not None:
                self.on_evicted(key)
        del self._index[key]
        self._key_of[slot] = None
        self._state[slot] = ChunkState.ABSENT
        if not self._leases[slot]:
            self._free.append(slot)

    def _unlease(self, slot: int) -> None:
        self._leases[slot] -= 1
        if self._leases[slot]:
            return
        if self._key_of[slot] is None:
            self._free.append(slot)
        elif not self._keep:
            self._drop(slot)

    def _pins_expire(self, now: float) -> None:
        for key in [key for key, until in self._pins.items() if until <= now]:
            del self._pins[key]
            self._unlease(self._index[key])
