"""What requests may hold before they are scheduled, and in which order they get it."""

from __future__ import annotations

from lmcache_core.cache.waiting import WaitingBudget
from lmcache_core.metrics import Counters


def test_one_that_needs_more_than_the_share_has_it_alone() -> None:
    budget = WaitingBudget(40, Counters())
    assert budget.admits("a", 100, asked=True)
    assert not budget.admits("b", 1, asked=True)
    budget.ends("a")
    budget.next_step()
    assert budget.admits("b", 1, asked=True)


def test_those_that_wait_hold_the_share_together() -> None:
    budget = WaitingBudget(40, Counters())
    assert all(budget.admits(f"r{n}", 5, asked=False) for n in range(4))
    assert not budget.admits("r4", 1, asked=True)
    budget.holds("r0", 1)
    budget.next_step()
    assert budget.admits("r4", 4, asked=True), "r0 was found to need less"


def test_nobody_overtakes_one_that_was_refused() -> None:
    budget = WaitingBudget(40, Counters())
    assert budget.admits("first", 10, asked=True)
    assert not budget.admits("big", 15, asked=True)
    assert not budget.admits("small", 1, asked=True)
    assert not budget.admits("new", 1, asked=False)
    budget.next_step()
    assert not budget.admits("big", 15, asked=True)
    budget.next_step()
    budget.ends("first")
    assert budget.admits("big", 15, asked=True)
    assert budget.admits("small", 1, asked=True)
    assert not budget.admits("later", 1, asked=False), "new hasn't been asked for yet"
    budget.ends("new")
    budget.ends("later")
    assert budget.admits("last", 1, asked=False)


def test_a_request_is_counted_once_however_often_it_is_refused() -> None:
    counters = Counters()
    budget = WaitingBudget(40, counters)
    budget.admits("a", 40, asked=True)
    for _ in range(3):
        budget.admits("b", 1, asked=True)
        budget.next_step()
    assert counters.snapshot() == {("lookups_deferred", ()): 1}
