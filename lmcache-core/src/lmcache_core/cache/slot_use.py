"""Who uses the slots of host memory, and which of their chunks could go now.

Counts the users of each slot, and keeps the chunks that nobody uses and nothing continues in a
ring, in the order in which their last user left: one that could be evicted, and that there is none,
is found in one step, however many others are in use. 20 bytes a slot.

Knows slots. Knows nothing about keys, nor about the order that a cache policy would have.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterable

from lmcache_core.chunks.chunk_index import NONE

STAYS = -1
"""Of a chunk: somebody uses it, or something continues it."""
NOTHING = -2
"""Of a slot: it holds no chunk that is cached."""


class SlotUse:
    """Of ``slots`` slots. What others may read, and only read, are the attributes without ``_``.

    ``leases`` counts the users of each slot, ``children`` the chunks that continue its chunk.
    ``parents`` has the slots of what they continue, or `NONE`.
    ``after`` has the ring: for a chunk that could be evicted, the slot of the next one, or `STAYS`,
    or `NOTHING`. ``end`` is no slot, and before the ring's first one and after its last one.
    """

    def __init__(self, slots: int) -> None:
        self.end = slots
        self.leases = array("i", bytes(4 * slots))
        self.children = array("i", bytes(4 * slots))
        self.after = array("i", [NOTHING]) * slots + array("i", [slots])
        self._before = array("i", [NOTHING]) * slots + array("i", [slots])
        self.parents = array("i", [NONE]) * slots

    def lease(self, slots: Iterable[int]) -> None:
        """Each of ``slots`` has one more user."""
        leases, after, before = self.leases, self.after, self._before
        for slot in slots:
            leases[slot] += 1
            following = after[slot]
            if following >= 0:
                leading = before[slot]
                after[leading], before[following] = following, leading
                after[slot] = STAYS

    def unlease(self, slots: Iterable[int]) -> list[int]:
        """Each of ``slots`` has one user less; answers those without any that aren't cached.

        The first of ``slots`` counts as idle for longer than the others.
        """
        leases, after, before = self.leases, self.after, self._before
        children, end = self.children, self.end
        left: list[int] = []
        for slot in slots:
            leases[slot] -= 1
            if leases[slot]:
                continue
            if after[slot] == NOTHING:
                left.append(slot)
            elif not children[slot]:
                last = before[end]
                after[last] = before[end] = slot
                after[slot], before[slot] = end, last
        return left

    def filled(self, slot: int, parent: int) -> None:
        """``slot`` has a first user, who fills it with what continues ``parent``, or is `NONE`."""
        self.leases[slot] = 1
        self.parents[slot] = parent
        if parent == NONE:
            return
        self.children[parent] += 1
        after, before = self.after, self._before
        following = after[parent]
        if following >= 0:
            leading = before[parent]
            after[leading], before[following] = following, leading
            after[parent] = STAYS

    def cached(self, slot: int) -> None:
        """``slot``, which has a user, holds a chunk that may be evicted when it has none."""
        self.after[slot] = STAYS

    def removed(self, slot: int, orphans: Collection[int] = ()) -> None:
        """``slot`` holds nothing any more; ``orphans`` are among what continued it.

        What it continued may be one that could go, now. It takes this one's place in the ring, or
        the first: it was used hardly later.
        """
        after, before, parents, children = self.after, self._before, self.parents, self.children
        following, leading = after[slot], before[slot]
        after[slot] = NOTHING
        if following >= 0:
            after[leading], before[following] = following, leading
        else:
            leading, following = self.end, after[self.end]
        if orphans:
            children[slot] = 0
            for orphan in orphans:
                if parents[orphan] == slot:
                    parents[orphan] = NONE
        parent = parents[slot]
        if parent == NONE:
            return
        children[parent] = left = children[parent] - 1
        if not left and not self.leases[parent] and after[parent] == STAYS:
            after[leading] = before[following] = parent
            after[parent], before[parent] = following, leading

    def part(self) -> None:
        """Nothing continues anything any more: every cached chunk is about to be removed."""
        self.parents = array("i", [NONE]) * self.end
        self.children = array("i", bytes(4 * self.end))

    def idle_longest(self, spared: int) -> int:
        """The chunk that could go for the longest, other than ``spared``; or `NONE`."""
        slot = self.after[self.end]
        if slot == spared:
            slot = self.after[slot]
        return NONE if slot == self.end else slot
