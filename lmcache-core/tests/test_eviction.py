"""Eviction policies against models that are too slow and too simple to be wrong."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_core.builtin import policies
from lmcache_core.contracts.eviction import FIFO, LFU, LRU, MRU, CachePolicy

SLOTS = 8
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("added"), st.integers(0, SLOTS - 1)),
        st.tuples(st.just("removed"), st.integers(0, SLOTS - 1)),
        st.tuples(st.just("touched"), st.lists(st.integers(0, SLOTS - 1), max_size=4)),
        st.tuples(st.just("clear"), st.none()),
    ),
    max_size=80,
)


class Model:
    """Remembers everything about each slot and sorts when asked."""

    def __init__(self, kind: type[CachePolicy]) -> None:
        self.kind = kind
        self.time = itertools.count()
        self.held: dict[int, dict[str, int]] = {}

    def added(self, slot: int) -> None:
        now = next(self.time)
        self.held[slot] = {"born": now, "last": now, "uses": 1}

    def touched(self, slots: list[int]) -> None:
        for slot in slots:
            self.held[slot]["last"] = next(self.time)
            self.held[slot]["uses"] += 1

    def order(self) -> list[int]:
        rank = {
            FIFO: lambda s: s["born"],
            LRU: lambda s: s["last"],
            MRU: lambda s: -s["last"],
            LFU: lambda s: (s["uses"], s["last"]),
        }[self.kind]
        return sorted(self.held, key=lambda slot: rank(self.held[slot]))


@pytest.mark.parametrize("kind", [LRU, FIFO, LFU, MRU])
@given(operations=OPERATIONS)
@settings(max_examples=150, deadline=None)
def test_victims_come_in_the_models_order(
    kind: type[CachePolicy], operations: list[tuple[str, object]]
) -> None:
    policy, model = kind(), Model(kind)
    for name, argument in operations:
        if name == "clear":
            policy.clear()
            model.held.clear()
        elif name == "touched":
            slots = [slot for slot in argument if slot in model.held]
            policy.touched(slots)
            model.touched(slots)
        elif name == "added" and argument not in model.held:
            policy.added(argument)
            model.added(argument)
        elif name == "removed" and argument in model.held:
            policy.removed(argument)
            del model.held[argument]
        assert list(policy.victims()) == model.order()


@pytest.mark.parametrize("kind", [LRU, FIFO, LFU, MRU])
def test_the_planners_way_of_evicting(kind: type[CachePolicy]) -> None:
    """Skip leased slots, stop, remove; leave the iterator where it is; start over."""
    policy = kind()
    for slot in range(4):
        policy.added(slot)
    leased = next(policy.victims())
    walk = policy.victims()
    victim = next(slot for slot in walk if slot != leased)
    policy.removed(victim)
    remaining = list(policy.victims())
    assert leased in remaining
    assert victim not in remaining
    assert len(remaining) == 3


@pytest.mark.parametrize("kind", [LRU, FIFO, LFU, MRU])
def test_mistakes_of_the_caller_are_errors(kind: type[CachePolicy]) -> None:
    policy = kind()
    policy.added(1)
    with pytest.raises(ValueError, match="slot 1 "):
        policy.added(1)
    with pytest.raises(KeyError):
        policy.touched([2])
    with pytest.raises(KeyError):
        policy.removed(2)
    assert list(policy.victims()) == [1]


def test_a_removed_slot_starts_from_scratch() -> None:
    policy = LFU()
    policy.added(1)
    policy.touched([1, 1, 1])
    policy.removed(1)
    policy.added(2)
    policy.touched([2])
    policy.added(1)
    assert list(policy.victims()) == [1, 2]


def test_lfu_keeps_no_bucket_that_nobody_is_in() -> None:
    policy = LFU()
    policy.added(1)
    policy.touched([1] * 50)
    buckets = 0
    bucket = policy._head.next
    while bucket is not policy._head:
        buckets += 1
        bucket = bucket.next
    assert buckets == 1


def test_the_builtin_policies() -> None:
    made = {d.name: type(d.create(d.config())) for d in policies.lmcache_cache_policies()}
    assert made == {"LRU": LRU, "LFU": LFU, "FIFO": FIFO, "MRU": MRU}
