"""Core's policies keep their contract, and the kit catches those that don't."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import pytest

from lmcache_core.contracts.eviction import LRU, CachePolicy
from lmcache_core.plugins.manager import Plugins
from lmcache_core.testing.policy import CachePolicyTests


class TestPolicies(CachePolicyTests):
    @pytest.fixture(params=["LRU", "LFU", "FIFO", "MRU"])
    def policy(self, request: pytest.FixtureRequest) -> CachePolicy:
        return Plugins().cache_policy(request.param).create()


class Endless(LRU):
    def victims(self) -> Iterator[int]:
        return itertools.chain(super().victims(), super().victims())


class Consuming(LRU):
    def victims(self) -> Iterator[int]:
        while self._order:
            yield self._order.popitem(last=False)[0]


class Losing(LRU):
    def touched(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self._order.pop(slot, None)


class Keeping(LRU):
    def removed(self, slot: int) -> None:
        pass


class Words(LRU):
    def victims(self) -> Iterator[int]:
        return (float(slot) for slot in super().victims())  # type: ignore[misc]


class Lenient(LRU):
    def added(self, slot: int) -> None:
        self._order[slot] = None


@pytest.mark.parametrize(
    ("broken", "caught"),
    [
        (Endless, "test_every_slot_is_shown_once"),
        (Consuming, "test_showing_victims_changes_nothing"),
        (Losing, "test_use_leaves_every_slot_where_it_can_be_found"),
        (Keeping, "test_a_removed_slot_is_not_shown_and_may_come_back"),
        (Words, "test_every_slot_is_shown_once"),
        (Lenient, "test_a_slot_that_is_added_twice_is_an_error"),
    ],
)
def test_the_kit_catches(broken: type[CachePolicy], caught: str) -> None:
    with pytest.raises((AssertionError, StopIteration, ValueError, pytest.fail.Exception)):
        getattr(CachePolicyTests(), caught)(broken())
