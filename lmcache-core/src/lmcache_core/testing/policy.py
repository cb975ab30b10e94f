"""Conformance kit for cache policies: `CachePolicyTests`.

    class TestAcmeOrder(CachePolicyTests):
        @pytest.fixture
        def policy(self):
            return AcmeOrder()

One test for each sentence of what `CachePolicy` says that a policy owes, but for time. Knows
nothing about which order is a good one.
"""

from __future__ import annotations

import random

import pytest

from lmcache_core.contracts.eviction import CachePolicy


class CachePolicyTests:
    """Give ``policy``: a fixture that makes an empty one for each test."""

    @pytest.fixture
    def policy(self) -> CachePolicy:
        """An empty policy."""
        raise NotImplementedError("give a fixture `policy` that makes an empty one")

    def test_every_slot_is_shown_once(self, policy: CachePolicy) -> None:
        """Whole numbers, those that were added, and then it ends."""
        assert list(policy.victims()) == []
        for slot in (5, 0, 3):
            policy.added(slot)
        shown = list(policy.victims())
        assert sorted(shown) == [0, 3, 5]
        assert all(type(slot) is int for slot in shown)

    def test_showing_victims_changes_nothing(self, policy: CachePolicy) -> None:
        """Neither a whole walk nor one that is left after its first step."""
        for slot in range(6):
            policy.added(slot)
        before = list(policy.victims())
        assert next(iter(policy.victims())) == before[0]
        assert list(policy.victims()) == before

    def test_use_leaves_every_slot_where_it_can_be_found(self, policy: CachePolicy) -> None:
        """``touched`` may change the order, and nothing else; twice and none are fine, too."""
        for slot in range(6):
            policy.added(slot)
        policy.touched([4, 1, 4])
        policy.touched([])
        assert sorted(policy.victims()) == list(range(6))

    def test_a_removed_slot_is_not_shown_and_may_come_back(self, policy: CachePolicy) -> None:
        """As a new one."""
        for slot in range(3):
            policy.added(slot)
        policy.removed(1)
        assert sorted(policy.victims()) == [0, 2]
        policy.added(1)
        assert sorted(policy.victims()) == [0, 1, 2]

    def test_clear_forgets_every_slot(self, policy: CachePolicy) -> None:
        """And all of them may be added again."""
        for slot in range(3):
            policy.added(slot)
        policy.clear()
        assert list(policy.victims()) == []
        policy.added(2)
        assert list(policy.victims()) == [2]

    def test_a_slot_that_is_added_twice_is_an_error(self, policy: CachePolicy) -> None:
        """`ValueError`, and it is still shown once."""
        policy.added(1)
        with pytest.raises(ValueError):
            policy.added(1)
        assert list(policy.victims()) == [1]

    def test_a_slot_that_is_not_there_is_an_error(self, policy: CachePolicy) -> None:
        """`KeyError`, and the others are as before."""
        policy.added(1)
        with pytest.raises(KeyError):
            policy.touched([2])
        with pytest.raises(KeyError):
            policy.removed(2)
        policy.removed(1)
        with pytest.raises(KeyError):
            policy.removed(1)
        assert list(policy.victims()) == []

    @pytest.mark.parametrize("seed", range(5))
    def test_it_knows_what_the_planner_told_it(self, policy: CachePolicy, seed: int) -> None:
        """After any calls in any order: those that were added and not removed."""
        draw = random.Random(seed)  # noqa: S311
        held: set[int] = set()
        for _ in range(400):
            slot = draw.randrange(12)
            if slot not in held:
                policy.added(slot)
                held.add(slot)
            elif draw.random() < 0.3:
                policy.removed(slot)
                held.discard(slot)
            else:
                policy.touched(draw.sample(sorted(held), draw.randint(1, len(held))))
            assert sorted(policy.victims()) == sorted(held)
