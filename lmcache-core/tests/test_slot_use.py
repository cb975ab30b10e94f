"""The ring of chunks that could go: who is in it, and in which order."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lmcache_core.cache.slot_use import SlotUse
from lmcache_core.chunks.chunk_index import NONE

SLOTS = 5
slots = st.integers(0, SLOTS - 1)


class SlotUseMachine(RuleBasedStateMachine):
    """Against lists and dictionaries that say the same at any length."""

    def __init__(self) -> None:
        super().__init__()
        self.use = SlotUse(SLOTS)
        self.users = [0] * SLOTS
        self.parent_of: dict[int, int] = {}  # of the slots that hold something
        self.cached: set[int] = set()
        self.ring: list[int] = []

    def _continued(self, slot: int) -> bool:
        return slot in self.parent_of.values()

    def _leave(self, slot: int) -> None:
        if slot in self.ring:
            self.ring.remove(slot)

    @rule(slot=slots, parent=st.integers(NONE, SLOTS - 1))
    def fill(self, slot: int, parent: int) -> None:
        if slot in self.parent_of or self.users[slot]:
            return
        if parent not in self.parent_of:
            parent = NONE
        self.use.filled(slot, parent)
        self.users[slot] = 1
        self.parent_of[slot] = parent
        self._leave(parent)

    @rule(slot=slots)
    def cache(self, slot: int) -> None:
        if slot in self.parent_of and self.users[slot] and slot not in self.cached:
            self.use.cached(slot)
            self.cached.add(slot)

    @rule(chosen=st.lists(slots, max_size=SLOTS))
    def lease(self, chosen: list[int]) -> None:
        held = [slot for slot in chosen if slot in self.parent_of]
        self.use.lease(held)
        for slot in held:
            self.users[slot] += 1
            self._leave(slot)

    @rule(chosen=st.lists(slots, unique=True, max_size=SLOTS))
    def unlease(self, chosen: list[int]) -> None:
        used = [slot for slot in chosen if self.users[slot]]
        left = self.use.unlease(used)
        for slot in used:
            self.users[slot] -= 1
        idle = [slot for slot in used if not self.users[slot]]
        assert left == [slot for slot in idle if slot not in self.cached]
        self.ring += [s for s in idle if s in self.cached and not self._continued(s)]

    @rule(slot=slots)
    def remove(self, slot: int) -> None:
        if slot in self.parent_of:
            self._remove(slot)

    def _remove(self, slot: int) -> None:
        orphans = [child for child, parent in self.parent_of.items() if parent == slot]
        self.use.removed(slot, orphans)
        place = self.ring.index(slot) if slot in self.ring else 0
        self._leave(slot)
        self.cached.discard(slot)
        parent = self.parent_of.pop(slot)
        self.parent_of.update(dict.fromkeys(orphans, NONE))
        if parent in self.cached and not self.users[parent] and not self._continued(parent):
            self.ring.insert(place, parent)

    @rule()
    def remove_all_that_is_cached(self) -> None:
        self.use.part()
        self.parent_of = dict.fromkeys(self.parent_of, NONE)
        for slot in sorted(self.cached):
            self._remove(slot)

    @invariant()
    def the_ring_is_the_same_in_both_directions(self) -> None:
        use = self.use
        for links, ring in ((use.after, self.ring), (use._before, self.ring[::-1])):
            found, slot = list[int](), links[use.end]
            while slot != use.end and len(found) <= SLOTS:
                found.append(slot)
                slot = links[slot]
            assert found == ring

    @invariant()
    def the_longest_idle_one_is_the_first(self) -> None:
        for spared in (NONE, *range(SLOTS)):
            others = [slot for slot in self.ring if slot != spared]
            assert self.use.idle_longest(spared) == (others[0] if others else NONE)

    @invariant()
    def users_and_continuations_are_counted(self) -> None:
        assert self.use.leases.tolist() == self.users
        parents = list(self.parent_of.values())
        assert self.use.children.tolist() == [parents.count(slot) for slot in range(SLOTS)]


TestSlotUseMachine = SlotUseMachine.TestCase
TestSlotUseMachine.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def test_what_a_chunk_continued_takes_its_place_among_the_idle() -> None:
    use = SlotUse(4)
    for slot, parent in ((0, NONE), (1, 0), (2, NONE)):
        use.filled(slot, parent)
        use.cached(slot)
    use.unlease((0, 2, 1))
    assert use.idle_longest(NONE) == 2
    use.removed(1)
    assert use.idle_longest(NONE) == 2, "it was used later, and so was what it continued"
    use.removed(2)
    assert use.idle_longest(NONE) == 0
