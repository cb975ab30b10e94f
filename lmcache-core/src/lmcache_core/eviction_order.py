"""A cache policy that can do no harm: whatever it raises or answers, the planner finds a victim.

A policy is a plugin, called in an engine's scheduler. Each call is attempted, and each victim is
looked at before it is believed. Where that fails, slots are swept in the order of their numbers,
which is about that in which they were filled; and a policy that goes on failing is replaced.

Knows slots, their leases and the index. Knows nothing about keys, nor when a victim is needed.
"""

from __future__ import annotations

import logging
from array import array

from lmcache_core.chunk_index import ChunkIndex, ChunkState
from lmcache_core.eviction import LRU, CachePolicy
from lmcache_core.guard import attempt
from lmcache_core.metrics import Counters

logger = logging.getLogger(__name__)

READY = int(ChunkState.READY)
MAX_FAILURES = 5
"""So often a policy may fail; then it is LRU's turn, for the rest of the process."""
SWEPT_SLOTS = 4096
"""So many slots are looked at, at the most, where the policy is of no help."""


class EvictionOrder:
    """Which READY slot goes next. ``leases`` counts the users of each slot, and is only read."""

    def __init__(
        self, policy: CachePolicy, index: ChunkIndex, leases: array[int], counters: Counters
    ) -> None:
        self._policy = policy
        self._index = index
        self._leases = leases
        self._counters = counters
        self._ready = 0
        self._failures = 0
        self._hand = 0
        self._found: int | None = None

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
        """
        self._found = None
        if (error := attempt(self._choose, spared)) is None:
            return self._found
        self._failed("victims", error)
        return self._swept(spared)

    def _choose(self, spared: int) -> None:
        leases, index, slots, shown = self._leases, self._index, len(self._leases), 0
        for slot in self._policy.victims():
            if not 0 <= slot < slots:
                raise IndexError(f"slot {slot!r}: there are {slots}")
            if not leases[slot]:
                leaf = index.leaf(slot)
                if not leases[leaf] and leaf != spared and index.state(leaf) == READY:
                    self._found = leaf
                    return
            shown += 1
            if shown > self._ready:
                raise ValueError(f"it shows more than the {self._ready} slots that hold chunks")
        if shown < self._ready:
            raise ValueError(f"it shows {shown} of the {self._ready} slots that hold chunks")

    def _swept(self, spared: int) -> int | None:
        slots = len(self._leases)
        for _ in range(min(slots, SWEPT_SLOTS)):
            slot, self._hand = self._hand, (self._hand + 1) % slots
            if self._index.state(slot) == READY and not self._leases[slot]:
                leaf = self._index.leaf(slot)
                if not self._leases[leaf] and leaf != spared and self._index.state(leaf) == READY:
                    return leaf
        return None

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
        for slot in range(len(self._leases)):
            if self._index.state(slot) == READY:
                self._policy.added(slot)
        logger.error(
            "Cache policy %s failed %d times and isn't asked any more: LRU replaces it until a "
            "restart. Set cache_policy to another one, or report this to its authors",
            name,
            MAX_FAILURES,
        )
