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

import logging
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from lmcache_core.aio.guard import attempt
from lmcache_core.cache.eviction_order import EvictionOrder
from lmcache_core.cache.holds import Hold, Operation, check_live, not_due, not_under_way
from lmcache_core.cache.plan import FetchOp, Report, StoreOp
from lmcache_core.cache.slot_use import SlotUse
from lmcache_core.chunks.chunk_index import (
    ABSENT,
    FETCHING,
    NONE,
    READY,
    STORING,
    ChunkIndex,
    ChunkState,
    DictIndex,
)
from lmcache_core.chunks.keys import ChunkKey
from lmcache_core.contracts.connector import BlockSpan
from lmcache_core.contracts.eviction import CachePolicy
from lmcache_core.errors import LeaseError, PluginError
from lmcache_core.memory.leases import Ledger
from lmcache_core.metrics import Counters, Series

logger = logging.getLogger(__name__)

EVICTED: Series = ("evicted_chunks", (("tier", "host"),))
NO_PARENT: Series = ("store_dropped", (("reason", "parent_missing"),))
NOT_ADMITTED: Series = ("store_dropped", (("reason", "not_admitted"),))
NO_ROOM: Series = ("store_dropped", (("reason", "memory_full"),))
_NO_HINTS: Mapping[str, Any] = {}


class Planner:
    """The books of one arena of ``slots`` slots, the same on ``ranks`` ranks.

    ``index`` is an empty one with as many slots; without, one of Python's own containers is made.
    ``keep``: whether host memory is a cache; otherwise (``local_cpu: false``) it is only where
    chunks wait on their way to and from slow tiers, and a slot is free as soon as nobody uses it.
    ``clock`` is the policy's, too.
    ``on_ready`` and ``on_failed`` (of stores and fetches) and ``on_evicted`` are told about keys,
    for KV events.
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
        index: ChunkIndex | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.slots = slots
        self.index: ChunkIndex = DictIndex(slots) if index is None else _checked(index, slots)
        self.persist = persist
        self._every_rank = (1 << ranks) - 1
        self._keep = keep
        self._counters = counters
        self._clock = clock
        self._pin_timeout_s = pin_timeout_s
        self._holds = Ledger("slot", counters)
        self._use = SlotUse(slots)  # its leases are holds, operations and pins
        self._order = EvictionOrder(policy, self.index, self._use, counters, clock)
        self._unused = 0  # slots from here on were never used
        self._free = array("I")
        self._operations: dict[int, Operation] = {}
        self._next_op = 1
        self._pins: OrderedDict[ChunkKey, tuple[int, float]] = OrderedDict()  # slot, until when
        self.on_ready: Callable[[ChunkKey], None] | None = None
        self.on_failed: Callable[[ChunkKey], None] | None = None
        self.on_evicted: Callable[[ChunkKey], None] | None = None

    # -- looking ---------------------------------------------------------------------------

    def state(self, key: ChunkKey) -> ChunkState:
        """What host memory knows about ``key``."""
        slot = self.index.find(key)
        return ChunkState.ABSENT if slot == NONE else ChunkState(self.index.state(slot))

    def ready_prefix(self, keys: Sequence[ChunkKey]) -> int:
        """How many keys from the first on are ready in host memory."""
        return len(self.index.ready_slots(keys))

    def acquire(self, keys: Sequence[ChunkKey]) -> Hold:
        """Lease the leading ready chunks of ``keys``, and mark them as used.

        Marked from the last to the first, so that by recency a chunk never outlives its parents.
        """
        slots, awaited = self._lease_ready(keys), list[int]()
        lease = self._holds.lease(partial(self._end_hold, slots, awaited), "held for reading")
        return Hold(lease, list(keys[: len(slots)]), slots, awaited)

    def extend(self, hold: Hold, keys: Sequence[ChunkKey]) -> None:
        """Add the leading ready chunks of ``keys``, which continue the hold's prefix.

        Raises:
            LeaseError: the hold was released.
        """
        check_live(hold)
        slots = self._lease_ready(keys)
        hold.keys += keys[: len(slots)]
        hold.slots += slots

    def requested(
        self,
        keys: Callable[[], Sequence[ChunkKey]],
        tokens: int,
        name: str = "",
        hints: Mapping[str, Any] = _NO_HINTS,
    ) -> bool:
        """Tell a policy that wants to know of a request of ``tokens`` tokens, before its `acquire`.

        ``keys`` answers those of all its chunks, and is asked where a policy wants to know. So does
        the answer say whether it wants `finished`. ``hints`` are `PolicyRequest.hints`.
        """
        return self._order.requested(keys, tokens, name, hints)

    def finished(self, name: str, tokens: int) -> None:
        """A request that `requested` was told of by this name has ended, with ``tokens`` tokens."""
        self._order.finished(name, tokens)

    # -- planning --------------------------------------------------------------------------

    def plan_store(
        self,
        key: ChunkKey,
        span: BlockSpan,
        parent: ChunkKey | None = None,
        start: int | None = None,
    ) -> StoreOp | None:
        """Make room for a chunk and plan its store, unless it is here or on its way already.

        ``parent`` is the chunk that it continues. Where that was dropped, and no slow tier may have
        it, nobody could find the chunk: it is dropped too. ``start`` is for the operation.
        """
        if self._pins:
            self._pins_expire()
        if self.index.find(key) != NONE:
            return None
        before = NONE if parent is None else self.index.find(parent)
        if before == NONE and parent is not None and not self.persist:
            self._counters.count(NO_PARENT)
            return None
        if self._order.admitting is not None and not self._admitted(key, before):
            self._counters.count(NOT_ADMITTED)
            return None
        slot = self._take_slot(before)
        if slot is None:
            self._counters.count(NO_ROOM)
            return None
        op = self._begin(key, slot, before, STORING)
        return StoreOp(op, key, slot, span, self.persist, start)

    def plan_fetch(
        self,
        key: ChunkKey,
        tokens: int,
        tier: int,
        hold: Hold,
        parent: ChunkKey | None = None,
    ) -> FetchOp | None:
        """Make room for an absent chunk of a slow tier and plan its load; ``None`` without room.

        The slot is leased to ``hold`` from now on, whether or not the load succeeds.

        Raises:
            LeaseError: the hold was released.
            ValueError: the chunk isn't absent.
        """
        check_live(hold)
        self._pins_expire()
        if self.index.find(key) != NONE:
            raise ValueError(f"chunk {key.hex()} is here or on its way: `join` those who fetch it")
        before = NONE if parent is None else self.index.find(parent)
        slot = self._take_slot(before)
        if slot is None:
            self._counters.add("load_failures", tier="host", reason="memory_full")
            return None
        op = self._begin(key, slot, before, FETCHING)
        self.join(key, hold)
        return FetchOp(op, key, slot, tokens, tier)

    def join(self, key: ChunkKey, hold: Hold) -> None:
        """Lease a chunk that somebody else is having fetched.

        Raises:
            LeaseError: the hold was released.
            ValueError: the chunk is absent.
        """
        check_live(hold)
        slot = self.index.find(key)
        if slot == NONE:
            raise ValueError(f"chunk {key.hex()} is absent: nobody is having it fetched")
        self._use.lease((slot,))
        hold.awaited.append(slot)

    def withdraw(self, ops: Iterable[StoreOp | FetchOp]) -> None:
        """Undo the planning of operations that no mover has heard of.

        Raises:
            LeaseError: one isn't under way, or was reported.
        """
        planned = [(op.op, self._every_rank) for op in ops]
        wrong = self._results(planned, failed=True) + self._released(planned)
        if wrong:
            raise LeaseError("; ".join(wrong))

    def settle(self, report: Report) -> None:
        """Take in what movers report.

        Raises:
            LeaseError: a rank reports an operation that isn't under way, or something twice. The
                rest of the report was taken in, and what was wrong had no effect.
        """
        wrong = self._results(report.bad.items(), failed=True)
        wrong += self._results(report.ok.items(), failed=False)
        wrong += self._released(report.released.items())
        for key in report.unreadable:
            self.forget(key)
        if wrong:
            raise LeaseError("; ".join(wrong))

    def forget(self, key: ChunkKey) -> bool:
        """Never offer ``key`` from host memory again; its slot is freed once nobody uses it.

        What continues it goes too: nobody could load it.
        """
        slot = self.index.find(key)
        if slot == NONE:
            return False
        self._drop_with_descendants(slot)
        return True

    def clear(self) -> int:
        """Forget everything that is ready; answer how many chunks that were."""
        self.unpin(list(self._pins))
        state = self.index.state  # what is there doesn't depend on what a policy knows
        ready = [slot for slot in range(self._unused) if state(slot) == READY]
        self._use.part()
        for slot in ready:
            self._drop(slot)
        for operation in self._operations.values():
            operation.failed = True  # what is on its way was computed before the clear
        return len(ready)

    # -- pins ------------------------------------------------------------------------------

    def pin(self, keys: Sequence[ChunkKey]) -> int:
        """Keep the leading ready chunks from being evicted, for ``pin_timeout_s`` at the most."""
        self._pins_expire()
        slots = self.index.ready_slots(keys)
        until = self._clock() + self._pin_timeout_s
        for key, slot in zip(keys, slots, strict=False):
            if self._pins.pop(key, None) is None:
                self._use.lease((slot,))
            self._pins[key] = slot, until  # so that they are in the order in which they expire
        return len(slots)

    def unpin(self, keys: Iterable[ChunkKey]) -> int:
        """Undo `pin`; answer how many of ``keys`` were pinned."""
        pinned = [pin for key in keys if (pin := self._pins.pop(key, None)) is not None]
        self._unlease([slot for slot, _ in pinned])
        return len(pinned)

    # -- figures ---------------------------------------------------------------------------

    @property
    def chunks(self) -> int:
        """Chunks in host memory, ready or on their way."""
        return len(self.index)

    @property
    def pending(self) -> int:
        """Operations that not every rank has finished."""
        return len(self._operations)

    @property
    def leases(self) -> int:
        """Holds, operations and pins that have slots now; at rest there are none."""
        return self._holds.out + len(self._operations) + len(self._pins)

    # -- inside ----------------------------------------------------------------------------

    def _begin(self, key: ChunkKey, slot: int, parent: int, state: int) -> int:
        op = self._next_op
        self._next_op += 1
        self.index.insert(key, slot, parent, state)
        self._use.filled(slot, parent)
        self._operations[op] = Operation(key, slot, self._every_rank, self._every_rank)
        return op

    def _lease_ready(self, keys: Sequence[ChunkKey]) -> list[int]:
        """Lease the slots of the leading ready chunks to one more user."""
        slots = self.index.ready_slots(keys)
        self._order.touched(slots[::-1])
        self._use.lease(slots)
        return slots

    def _end_hold(self, slots: list[int], awaited: list[int]) -> None:
        self._unlease(awaited[::-1])
        self._unlease(slots[::-1])  # of a prefix, the end is to be evicted before the beginning
        slots.clear()
        awaited.clear()

    def _results(self, marks: Iterable[tuple[int, int]], *, failed: bool) -> list[str]:
        """Take in results, as operations and their ranks; answer what is wrong with them."""
        operations, wrong = self._operations, list[str]()
        for op, ranks in marks:
            operation = operations.get(op)
            if operation is None:
                wrong.append(not_under_way(op))
                continue
            due = operation.results_due & ranks
            if due != ranks:
                wrong.append(not_due(op, "result", ranks ^ due))
            if due:
                operation.results_due ^= due
                operation.failed |= failed
                if not operation.results_due:
                    self._concluded(operation)
                    if not operation.releases_due:
                        del operations[op]
                        self._unlease((operation.slot,))
        return wrong

    def _released(self, marks: Iterable[tuple[int, int]]) -> list[str]:
        """Take in releases, as operations and their ranks; answer what is wrong with them."""
        operations, wrong, over = self._operations, list[str](), list[int]()
        for op, ranks in marks:
            operation = operations.get(op)
            if operation is None:
                wrong.append(not_under_way(op))
                continue
            due = operation.releases_due & ranks
            if due != ranks:
                wrong.append(not_due(op, "release", ranks ^ due))
            operation.releases_due ^= due
            if not operation.releases_due and not operation.results_due:
                del operations[op]
                over.append(operation.slot)
        self._unlease(over)
        return wrong

    def _concluded(self, operation: Operation) -> None:
        """Offer a chunk of which every rank has its part, or drop it."""
        slot = operation.slot
        here = self.index.state(slot) != ABSENT  # or it was forgotten; the slot is nobody else's
        if here and not operation.failed:
            self.index.set_state(slot, READY)
            self._order.added(slot)
            if self._keep:
                self._use.cached(slot)
            told = self.on_ready
        else:
            if here:
                self._drop_with_descendants(slot)
            told = self.on_failed
        if told is not None:
            self._tell(told, operation.key)

    def _tell(self, listener: Callable[[ChunkKey], None], key: ChunkKey) -> None:
        if (error := attempt(listener, key)) is not None:
            self._counters.add("plugin_failures", kind="listener", operation="events")
            logger.warning("A listener to the planner failed, which changes nothing: %r", error)

    def _admitted(self, key: ChunkKey, parent: int) -> bool:
        """What slow tiers keep goes through host memory; where there is room nobody is asked."""
        roomy = self.persist or self._free or self._unused < self.slots
        return bool(roomy) or self._order.admits(key, parent)

    def _take_slot(self, parent: int) -> int | None:
        """An empty slot for a chunk that continues the one in ``parent``, which isn't evicted."""
        if self._free:
            return self._free.pop()
        if self._unused < self.slots:
            self._unused += 1
            return self._unused - 1
        victim = self._order.victim(parent)
        if victim is None:
            return None
        self._evict(victim)
        return victim

    def _evict(self, slot: int) -> None:
        """`_drop` a READY chunk that nobody uses and nothing continues, for who takes its slot."""
        self._ready_no_more(slot, True)
        self._use.removed(slot)
        self.index.remove(slot)
        self._counters.count(EVICTED)

    def _drop_with_descendants(self, slot: int) -> None:
        """`_drop`, and what continues the chunk; what is on its way as soon as it arrives."""
        under_way = set()
        for below in self.index.descendants(slot):
            if self.index.state(below) == READY:
                self._drop(below)
            else:
                under_way.add(below)
        if under_way:
            for operation in self._operations.values():
                operation.failed |= operation.slot in under_way
        self._drop(slot)

    def _drop(self, slot: int) -> None:
        """Take a slot out of the index; free it now, or when its last lease ends."""
        key = self.index.key(slot)
        if key is None:
            return
        if self._pins and self._pins.pop(key, None) is not None:
            self._use.unlease((slot,))
        if self.index.state(slot) == READY:
            self._ready_no_more(slot)
        orphans = self.index.descendants(slot) if self._use.children[slot] else ()
        self._use.removed(slot, orphans)
        self.index.remove(slot)
        if not self._use.leases[slot]:
            self._free.append(slot)

    def _ready_no_more(self, slot: int, evicted: bool = False) -> None:
        self._order.removed(slot, evicted)
        if self.on_evicted is not None and (key := self.index.key(slot)) is not None:
            self._tell(self.on_evicted, key)

    def _unlease(self, slots: Iterable[int]) -> None:
        for slot in self._use.unlease(slots):
            self._unused_now(slot)

    def _unused_now(self, slot: int) -> None:
        """Nobody uses a slot any more, and its chunk, if it has one, isn't kept."""
        if self.index.state(slot) == ABSENT:
            self._free.append(slot)
        else:
            self._drop(slot)

    def _pins_expire(self) -> None:
        now = self._clock()
        while self._pins:
            key, (slot, until) = next(iter(self._pins.items()))
            if until > now:
                return
            del self._pins[key]
            self._unlease((slot,))


def _checked(index: ChunkIndex, slots: int) -> ChunkIndex:
    if index.slots != slots or len(index):
        raise PluginError(
            f"{type(index).__module__}.{type(index).__qualname__} has {index.slots} slots and "
            f"{len(index)} chunks; the planner needs {slots} empty ones. Uninstall or disable the "
            "plugin that provides lmcache_chunk_index, and report this to its authors"
        )
    return index
