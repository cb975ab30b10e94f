"""A cache policy that can do no harm, nor take long: whatever it shows, the planner finds a victim.

A policy is a plugin, called in an engine's scheduler. Each call is attempted, and each victim is
looked at before it is believed. Where that fails, or the first that it shows are all in use, the
chunk goes that nobody has used for the longest; and a policy that goes on failing is replaced.

Knows slots, their users and the index, and answers what a policy may ask about them. Knows nothing
about when a victim is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lmcache_core.aio.guard import attempt, attempted
from lmcache_core.cache.slot_use import SlotUse
from lmcache_core.chunks.chunk_index import NONE, READY, ChunkIndex
from lmcache_core.chunks.keys import ChunkKey
from lmcache_core.contracts.eviction import (
    LRU,
    Admits,
    CachePolicy,
    OrderedPolicy,
    PolicyRequest,
    SeesRequests,
)
from lmcache_core.errors import PluginError
from lmcache_core.metrics import Counters

logger = logging.getLogger(__name__)

MAX_FAILURES = 5
"""So often a policy may fail; then it is LRU's turn, for the rest of the process."""
LOOKED_AT = 16
"""So many slots are looked at, at the most, of those that a policy shows: others may be in use."""


class EvictionOrder:
    """Which READY slot goes next. ``use`` says which could, and is only read.

    Raises:
        PluginError: the policy can't be opened.
    """

    def __init__(
        self,
        policy: CachePolicy,
        index: ChunkIndex,
        use: SlotUse,
        counters: Counters,
        clock: Callable[[], float],
    ) -> None:
        self._index = index
        self._use = use
        self._counters = counters
        self._clock = clock
        self._take(policy)
        error = attempt(policy.open, _Chunks(index, use, clock))
        if error is not None:
            raise PluginError(
                f"the cache policy {_name(policy)} can't be opened: {type(error).__name__}: "
                f"{error}; set cache_policy to another one, or report this to its authors"
            ) from error
        self._ready = 0
        self._failures = 0
        self._found = NONE

    def _take(self, policy: CachePolicy) -> None:
        self._policy = policy
        # Asked once, here: what a policy doesn't want costs a comparison with None. ``admitting``
        # may be read by who would have to find out first whether to ask.
        self._ordered = policy if isinstance(policy, OrderedPolicy) else None
        self._seeing = policy if isinstance(policy, SeesRequests) else None
        self.admitting = policy if isinstance(policy, Admits) else None

    def added(self, slot: int) -> None:
        """``slot`` is READY from now on."""
        self._ready += 1
        if (error := attempt(self._policy.added, slot)) is not None:
            self._failed("added", error)

    def touched(self, slots: list[int]) -> None:
        """READY slots were used, the last one most recently."""
        if slots and (error := attempt(self._policy.touched, slots)) is not None:
            self._failed("touched", error)

    def removed(self, slot: int, evicted: bool = False) -> None:
        """``slot``, which was READY, is about to be empty. ``evicted``: for another chunk."""
        self._ready -= 1
        if (error := attempt(self._policy.removed, slot, evicted)) is None:
            return
        policy = self._policy
        self._failed("removed", error)
        if self._policy is not policy:
            self._policy.removed(slot)

    def requested(
        self,
        keys: Callable[[], Sequence[ChunkKey]],
        tokens: int,
        name: str,
        hints: Mapping[str, Any],
    ) -> bool:
        """A request begins. Answers whether anybody wants to know when it ends."""
        if self._seeing is None:
            return False
        found = keys()
        slots = self._index.ready_slots(found)
        request = PolicyRequest(
            name=name, keys=found, slots=slots, tokens=tokens, now=self._clock(), hints=hints
        )
        if (error := attempt(self._seeing.requested, request)) is not None:
            self._failed("requested", error)
        return True

    def finished(self, name: str, tokens: int) -> None:
        """A request ended."""
        if self._seeing is None:
            return
        if (error := attempt(self._seeing.finished, name, tokens)) is not None:
            self._failed("finished", error)

    def admits(self, key: ChunkKey, parent: int) -> bool:
        """Whether a chunk is worth another one's room. ``parent``: what it continues, or `NONE`."""
        if self.admitting is None:
            return True
        answer = attempted(self.admitting.admit, key, None if parent == NONE else parent)
        if answer.error is not None:
            self._failed("admit", answer.error)
            return True
        return answer.value is not False

    def victim(self, spared: int) -> int | None:
        """The slot to evict: the policy's choice; of an order, the end of the prefix it is part of.

        Leaves go first: a chunk without its parents can't be found. ``spared`` isn't chosen.
        Where the policy finds none, or the first ones of its order are all in use, the chunk goes
        that was used by nobody for the longest. The steps that this takes don't grow with the
        number of slots.
        """
        use, self._found = self._use, NONE
        if use.after[use.end] == use.end:
            return None
        if self._ordered is not None:
            if (error := attempt(self._look_at, self._ordered, spared)) is not None:
                self._failed("victims", error)
        elif (error := attempt(self._ask, spared)) is not None:
            self._failed("victim", error)
        found = use.idle_longest(spared) if self._found == NONE else self._found
        return None if found == NONE else found

    def _ask(self, spared: int) -> None:
        slot = self._policy.victim(None if spared == NONE else spared)
        if slot is None:
            return
        if not 0 <= slot < self._index.slots:
            raise IndexError(f"slot {slot!r}: there are {self._index.slots}")
        if slot == spared or self._use.after[slot] < 0:
            raise ValueError(f"slot {slot} isn't evictable, or is what the new chunk continues")
        self._found = slot

    def _look_at(self, policy: OrderedPolicy, spared: int) -> None:
        leases, after = self._use.leases, self._use.after
        index, slots, shown = self._index, self._index.slots, 0
        for slot in policy.victims():
            if not 0 <= slot < slots:
                raise IndexError(f"slot {slot!r}: there are {slots}")
            if not leases[slot]:
                leaf = index.leaf(slot)
                if leaf != spared and after[leaf] >= 0:
                    self._found = leaf
                    return
            shown += 1
            if shown > self._ready:
                raise ValueError(f"it shows more than the {self._ready} slots that hold chunks")
            if shown == LOOKED_AT:
                return
        if shown < self._ready:
            raise ValueError(f"it shows {shown} of the {self._ready} slots that hold chunks")

    def _failed(self, operation: str, error: BaseException) -> None:
        self._counters.add("plugin_failures", kind="policy", operation=operation)
        self._failures += 1
        name = _name(self._policy)
        logger.warning(
            "Cache policy %s: %s failed: %s: %s", name, operation, type(error).__name__, error
        )
        if self._failures < MAX_FAILURES:
            return
        self._failures = 0
        self._take(LRU())
        for slot in range(self._index.slots):
            if self._index.state(slot) == READY:
                self._policy.added(slot)
        logger.error(
            "Cache policy %s failed %d times and isn't asked any more: LRU replaces it until a "
            "restart. Set cache_policy to another one, or report this to its authors",
            name,
            MAX_FAILURES,
        )


class _Chunks:
    """What a policy may ask: see `CachedChunks`."""

    def __init__(self, index: ChunkIndex, use: SlotUse, clock: Callable[[], float]) -> None:
        self.slots = index.slots
        self.now = clock
        self.key = index.key
        self.leaf = index.leaf
        self.descendants = index.descendants
        self._use = use

    def parent(self, slot: int) -> int | None:
        parent = self._use.parents[slot]
        return None if parent == NONE else parent

    def children(self, slot: int) -> int:
        return self._use.children[slot]

    def evictable(self, slot: int) -> bool:
        return self._use.after[slot] >= 0


def _name(policy: CachePolicy) -> str:
    return f"{type(policy).__module__}.{type(policy).__qualname__}"
