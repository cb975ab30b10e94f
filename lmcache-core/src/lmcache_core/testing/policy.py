"""Conformance kit for cache policies: `CachePolicyTests`.

    class TestAcme(CachePolicyTests):
        @pytest.fixture
        def make_policy(self):
            return lambda: AcmePolicy(AcmeConfig())

One test for each sentence of what `CachePolicy`, and `OrderedPolicy`, say that a policy owes. Each
policy is driven by a `SimulatedMemory`, as the planner would. Knows nothing about which order is a
good one.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from lmcache_core.chunks.keys import ChunkKey
from lmcache_core.contracts.eviction import CachePolicy, OrderedPolicy
from lmcache_core.testing.simulated_memory import SimulatedMemory

MakePolicy = Callable[[], CachePolicy]

STEPS = 300
"""Requests in a test that draws them."""


def key(number: int) -> ChunkKey:
    """The key of one of many chunks."""
    return ChunkKey(number.to_bytes(16, "big"))


def prompts(seed: int, *, trunks: int = 6, longest: int = 6) -> Iterator[list[ChunkKey]]:
    """Prompts without end: some are seen again, go on where others ended, or branch off."""
    draw = random.Random(seed)  # noqa: S311
    seen: list[list[ChunkKey]] = [[key(number)] for number in range(trunks)]
    fresh = trunks
    while True:
        base = draw.choice(seen[-3 * trunks :])
        prompt = base[: draw.randint(1, len(base))]
        for _ in range(draw.randint(0, max(0, longest - len(prompt)))):
            prompt.append(key(fresh))
            fresh += 1
        seen.append(prompt)
        yield prompt


class CachePolicyTests:
    """Give ``make_policy``: a fixture that makes new policies, not opened yet."""

    @pytest.fixture
    def make_policy(self) -> MakePolicy:
        """Makes policies that know of nothing and of each other nothing."""
        raise NotImplementedError("give a fixture `make_policy` that makes new policies")

    # -- victims ---------------------------------------------------------------------------

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("slots", [7, 40])
    def test_every_victim_could_go(self, make_policy: MakePolicy, slots: int, seed: int) -> None:
        """Nobody uses it, nothing continues it, and it isn't what the new chunk continues."""
        memory, requests = SimulatedMemory(make_policy(), slots), prompts(seed)
        for number in range(STEPS):
            memory.clock += 1.0
            memory.request(next(requests), tokens=100, name=f"request {number}")
        assert memory.evicted > 0
        assert len(memory) <= slots

    def test_there_is_a_victim_where_nobody_uses_anything(self, make_policy: MakePolicy) -> None:
        """Else another order than the policy's is in effect."""
        memory = SimulatedMemory(make_policy(), 20)
        for number in range(100):
            memory.request([key(number)])
        for number in range(90, 140):
            memory.request([key(number)])
        assert memory.evicted > 80
        assert memory.unanswered == 0
        assert len(memory) == 20

    def test_what_is_in_use_stays(self, make_policy: MakePolicy) -> None:
        """And goes when it isn't any more."""
        memory = SimulatedMemory(make_policy(), 8)
        for number in range(8):
            memory.request([key(number)])
        kept = memory.held()[2:5]
        memory.use(kept)
        for number in range(100, 140):
            memory.request([key(number)])
        assert set(kept) <= set(memory.held())
        memory.release(kept)
        assert [memory.evict() is not None for _ in range(8)] == [True] * 8

    def test_the_end_of_a_prefix_goes_before_its_beginning(self, make_policy: MakePolicy) -> None:
        """However often the end was used."""
        memory = SimulatedMemory(make_policy(), 6)
        prompt = [key(number) for number in range(6)]
        for _ in range(5):
            memory.request(prompt)
        gone = [memory.evict() for _ in range(6)]
        assert None not in gone
        assert len(set(gone)) == 6

    def test_what_is_spared_stays(self, make_policy: MakePolicy) -> None:
        """Where it is the only one, there is no room."""
        memory = SimulatedMemory(make_policy(), 1)
        slot = memory.store(key(0))
        assert memory.store(key(1), parent=slot) is None
        assert memory.held() == [slot]

    def test_where_everything_is_in_use_there_is_none(self, make_policy: MakePolicy) -> None:
        """And that is no error."""
        memory = SimulatedMemory(make_policy(), 4)
        for number in range(4):
            memory.request([key(number)])
        memory.use(memory.held())
        assert memory.store(key(9)) is None
        memory.release(memory.held())
        assert memory.store(key(9)) is not None

    # -- what it is told -------------------------------------------------------------------

    def test_a_removed_slot_may_come_back(self, make_policy: MakePolicy) -> None:
        """As a new one; and it isn't a victim before that."""
        memory = SimulatedMemory(make_policy(), 4)
        slots = [memory.store(key(number)) for number in range(4)]
        for slot in (slots[1], slots[2]):
            assert slot is not None
            memory.forget(slot)
        assert {memory.evict(), memory.evict()} == {slots[0], slots[3]}
        assert memory.evict() is None
        for number in range(10, 16):
            assert memory.store(key(number)) is not None

    def test_a_slot_that_is_added_twice_is_an_error(self, make_policy: MakePolicy) -> None:
        """`ValueError`, and it is still there once."""
        memory = SimulatedMemory(make_policy(), 2)
        slot = memory.store(key(0))
        assert slot is not None
        with pytest.raises(ValueError):
            memory.policy.added(slot)
        assert memory.evict() == slot
        assert memory.evict() is None

    def test_a_slot_that_is_not_there_is_an_error(self, make_policy: MakePolicy) -> None:
        """`KeyError`, and the others are as before."""
        memory = SimulatedMemory(make_policy(), 8)
        policy, slot = memory.policy, memory.store(key(0))
        assert slot is not None
        other = 3 if slot != 3 else 4
        with pytest.raises(KeyError):
            policy.touched([other])
        with pytest.raises(KeyError):
            policy.removed(other)
        assert memory.evict() == slot
        with pytest.raises(KeyError):
            policy.removed(slot)

    def test_use_of_none_and_of_one_twice(self, make_policy: MakePolicy) -> None:
        """Both are fine; so is a request without chunks."""
        memory = SimulatedMemory(make_policy(), 4)
        slots = [slot for n in range(4) if (slot := memory.store(key(n))) is not None]
        memory.policy.touched([])
        memory.policy.touched([slots[1], slots[0], slots[1]])
        assert memory.request([], name="empty") == 0
        assert {memory.evict() for _ in range(4)} == set(slots)

    def test_clear_forgets_every_slot(self, make_policy: MakePolicy) -> None:
        """And all of them may be added again."""
        memory = SimulatedMemory(make_policy(), 4)
        for number in range(6):
            memory.request([key(number)])
        memory.policy.clear()
        for slot in memory.held():
            memory.policy.added(slot)
        assert len({memory.evict() for _ in range(4)}) == 4

    def test_two_share_nothing(self, make_policy: MakePolicy) -> None:
        """What one is told, the other doesn't know."""
        one, other = SimulatedMemory(make_policy(), 4), SimulatedMemory(make_policy(), 4)
        for number in range(10):
            one.request([key(number)])
        slots = [other.store(key(number)) for number in range(2)]
        assert {other.evict(), other.evict()} == set(slots)
        assert len(one) == 4

    @pytest.mark.parametrize("seed", range(5))
    def test_it_knows_what_it_was_told(self, make_policy: MakePolicy, seed: int) -> None:
        """After requests, losses and uses in any order: what is here, and nothing else."""
        draw = random.Random(seed)  # noqa: S311
        memory, requests = SimulatedMemory(make_policy(), 24), prompts(seed)
        used: list[int] = []
        for number in range(STEPS):
            memory.clock += draw.random()
            memory.request(next(requests), name=str(number))
            if draw.random() < 0.2 and memory.held():
                slot = draw.choice(memory.held())
                if not {slot, *memory.descendants(slot)} & set(used):
                    memory.forget(slot)
            if draw.random() < 0.2:
                memory.release(used)
                used = draw.sample(memory.held(), min(3, len(memory)))
                memory.use(used)
            if isinstance(memory.policy, OrderedPolicy):
                assert sorted(memory.policy.victims()) == memory.held()
        memory.release(used)
        there = set(memory.held())
        assert {memory.evict() for _ in range(len(there))} == there
        assert memory.evict() is None

    def test_no_call_becomes_slower_with_the_number_of_slots(self, make_policy: MakePolicy) -> None:
        """Counted in lines of Python, on the mean of many evictions."""

        def lines(slots: int) -> float:
            memory = SimulatedMemory(make_policy(), slots)
            for number in range(slots):
                memory.request([key(number)])
            for number in range(0, slots, 3):
                memory.request([key(number)])
            fresh = [key(10**6 + number) for number in range(200)]
            return _lines_of(lambda: [memory.request([one]) for one in fresh]) / len(fresh)

        few, many = lines(200), lines(4_000)
        assert many < 3 * few + 50, f"{few:.0f} lines at 200 slots, {many:.0f} at 4,000"

    # -- of an order -----------------------------------------------------------------------

    def test_every_slot_is_shown_once(self, make_policy: MakePolicy) -> None:
        """Whole numbers, those that were added, and then it ends."""
        memory, policy = _ordered(make_policy, 8)
        assert list(policy.victims()) == []
        for number in range(3):
            memory.store(key(number))
        shown = list(policy.victims())
        assert sorted(shown) == memory.held()
        assert all(type(slot) is int for slot in shown)

    def test_showing_victims_changes_nothing(self, make_policy: MakePolicy) -> None:
        """Neither a whole walk nor one that is left after its first step."""
        memory, policy = _ordered(make_policy, 8)
        for number in range(6):
            memory.store(key(number))
        before = list(policy.victims())
        assert next(iter(policy.victims())) == before[0]
        assert list(policy.victims()) == before

    def test_use_leaves_every_slot_where_it_can_be_found(self, make_policy: MakePolicy) -> None:
        """``touched`` may change the order, and nothing else."""
        memory, policy = _ordered(make_policy, 8)
        for number in range(6):
            memory.store(key(number))
        policy.touched([memory.held()[4], memory.held()[1]])
        assert sorted(policy.victims()) == memory.held()


def _ordered(make_policy: MakePolicy, slots: int) -> tuple[SimulatedMemory, OrderedPolicy]:
    policy = make_policy()
    if not isinstance(policy, OrderedPolicy):
        pytest.skip("chooses each victim: it isn't an OrderedPolicy")
    return SimulatedMemory(policy, slots), policy


def _lines_of(work: Callable[[], Any]) -> int:
    """How many lines of Python ``work`` runs through."""
    count = 0

    def local(_frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return local

    before = sys.gettrace()
    sys.settrace(lambda *_: local)
    try:
        work()
    finally:
        sys.settrace(before)
    return count
