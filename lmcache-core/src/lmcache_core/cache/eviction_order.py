"""A cache policy that can do no harm, nor take long: whatever it shows, the planner finds a victim.

A policy is a plugin, called in an engine's scheduler. Each call is attempted, and each victim is
looked at before it is believed. Where that fails, or the first that it shows are all in use, the
chunk goes that nobody has used for the longest; and a policy that goes on failing is replaced.

Knows slots, their users and the index. Knows nothing about keys, nor when a victim is needed.
"""

from __future__ import annotations

import logging

from lmcache_core.aio.guard import attempt
from lmcache_core.cache.slot_use import SlotUse
from lmcache_core.chunks.chunk_index import NONE, READY, ChunkIndex
from lmcache_core.contracts.eviction import LRU, CachePolicy
from lmcache_core.metrics import Counters

logger = logging.getLogger(__name__)

MAX_FAILURES = 5
"""So often a policy may fail; then it is LRU's turn, for the rest of the process."""
LOOKED_AT = 16
"""So many slots are looked at, at the most, of those that a policy shows: others may be in use."""


class EvictionOrder:
    """Which READY slot goes next. ``use`` says which could, and is only read."""

    def __init__(
        self, policy: CachePolicy, index: ChunkIndex, use: SlotUse, counters: Counters
    ) -> None:
        self._policy = policy
        self._index = index
        self._use = use
        self._counters = counters
        self._ready = 0
        self._failures = 0
        self._found = NONE

    def added(self, slot: int) -> None:
        """``slot`` is READY from now on."""
        self._ready += 1
        if (error := attempt(self._policy.added, slot)) is not None:
            self._failed("added", error)

    def touched(self, slots: list[int]) -> None:
        """READY slots were used, the last one most recently."""
        if slots and (error := attempt(self._policy.touched, slots)) is not None:
            self._failed("touched", error)

    def removed(self, slot: int) -> None:
        """``slot``, which was READY, won't be any more."""
        self._ready -= 1
        if (error := attempt(self._policy.removed, slot)) is None:
            return
        policy = self._policy
        self._failed("removed", error)
        if self._policy is not policy:
            self._policy.removed(slot)

    def victim(self, spared: int) -> int | None:
        """The slot to evict: the policy's choice, or rather the end of the prefix it is part of.

        Leaves go first: a chunk without its parents can't be found. ``spared`` isn't chosen.
        Where the policy's first choices are all in use, the chunk goes that was used by nobody for
        the longest. The steps that this takes don't grow with the number of slots.
        """
        use, self._found = self._use, NONE
        if use.after[use.end] == use.end:
            return None
        if (error := attempt(self._choose, spared)) is not None:
            self._failed("victims", error)
        found = use.idle_longest(spared) if self._found == NONE else self._found
        return None if found == NONE else found

    def _choose(self, spared: int) -> None:
        leases, after = self._use.leases, self._use.after
        index, slots, shown = self._index, self._index.slots, 0
        for slot in self._policy.victims():
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

    def _failed(self, operation: str, error: Exception) -> None:
        self._counters.add("plugin_failures", kind="policy", operation=operation)
        self._failures += 1
        name = f"{type(self._policy).__module__}.{type(self._policy).__qualname__}"
        logger.warning(
            "Cache policy %s: %s failed: %s: %s", name, operation, type(error).__name__, error
        )
        if self._failures < MAX_FAILURES:
            return
        self._failures = 0
        self._policy = LRU()
        for slot in range(self._index.slots):
            if self._index.state(slot) == READY:
                self._policy.added(slot)
        logger.error(
            "Cache policy %s failed %d times and isn't asked any more: LRU replaces it until a "
            "restart. Set cache_policy to another one, or report this to its authors",
            name,
            MAX_FAILURES,
        )
