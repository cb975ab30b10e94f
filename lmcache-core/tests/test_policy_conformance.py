"""Core's policies keep their contract, and the kit catches those that don't."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import pytest

from lmcache_core.chunks.keys import ChunkKey
from lmcache_core.contracts.eviction import (
    FIFO,
    LRU,
    CachedChunks,
    CachePolicy,
    OrderedPolicy,
    PolicyRequest,
)
from lmcache_core.plugins.manager import Plugins
from lmcache_core.testing.policy import CachePolicyTests, MakePolicy, key
from lmcache_core.testing.simulated_memory import PolicyMistake, SimulatedMemory


class TestPolicies(CachePolicyTests):
    @pytest.fixture(params=["LRU", "LFU", "FIFO", "MRU"])
    def make_policy(self, request: pytest.FixtureRequest) -> MakePolicy:
        return lambda: Plugins().make_cache_policy(request.param)


class Leaves(CachePolicy):
    """Chooses each victim: the first leaf, by age. Refuses what it refused before."""

    def __init__(self) -> None:
        self.slots: dict[int, None] = {}

    def open(self, chunks: CachedChunks) -> None:
        self.chunks = chunks

    def added(self, slot: int) -> None:
        if slot in self.slots:
            raise ValueError(slot)
        self.slots[slot] = None

    def touched(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.slots[slot]

    def removed(self, slot: int, evicted: bool = False) -> None:
        del self.slots[slot]

    def victim(self, spared: int | None) -> int | None:
        for slot in itertools.islice(self.slots, 16):
            leaf = self.chunks.leaf(slot)
            if leaf != spared and self.chunks.evictable(leaf):
                return leaf
        return None

    def clear(self) -> None:
        self.slots.clear()


class TestOneThatChooses(CachePolicyTests):
    @pytest.fixture
    def make_policy(self) -> MakePolicy:
        return Leaves


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
            self._order.pop(slot)


class Keeping(LRU):
    def removed(self, slot: int, evicted: bool = False) -> None:
        pass


class Words(LRU):
    def victims(self) -> Iterator[int]:
        return (float(slot) for slot in super().victims())  # type: ignore[misc]


class Lenient(LRU):
    def added(self, slot: int) -> None:
        self._order[slot] = None


class Silent(FIFO):
    def touched(self, slots: Sequence[int]) -> None:
        pass


class Shared(LRU):
    everybodys = LRU()

    def __init__(self) -> None:
        self._order = self.everybodys._order


class Slow(LRU):
    def added(self, slot: int) -> None:
        for _ in self._order:
            pass
        super().added(slot)


class Remembering(LRU):
    def clear(self) -> None:
        pass


class Roots(Leaves):
    def victim(self, spared: int | None) -> int | None:
        return next(iter(self.slots), None)


class Selfish(Leaves):
    def victim(self, spared: int | None) -> int | None:
        return super().victim(None)


class Idle(Leaves):
    def victim(self, spared: int | None) -> int | None:
        return None


class Careless(Leaves):
    def victim(self, spared: int | None) -> int | None:
        leaves = (self.chunks.leaf(slot) for slot in self.slots)
        return next((leaf for leaf in leaves if leaf != spared), None)


class Dividing(Leaves):
    def requested(self, request: PolicyRequest) -> None:
        self.share = len(request.slots) / len(request.keys)

    def finished(self, name: str, tokens: int) -> None:
        pass


NEW: dict[str, object] = {"seed": 0, "slots": 7}


@pytest.mark.parametrize(
    ("broken", "caught"),
    [
        (Endless, "test_every_slot_is_shown_once"),
        (Consuming, "test_showing_victims_changes_nothing"),
        (Losing, "test_use_leaves_every_slot_where_it_can_be_found"),
        (Losing, "test_use_of_none_and_of_one_twice"),
        (Keeping, "test_a_removed_slot_may_come_back"),
        (Keeping, "test_it_knows_what_it_was_told"),
        (Words, "test_every_slot_is_shown_once"),
        (Lenient, "test_a_slot_that_is_added_twice_is_an_error"),
        (Silent, "test_a_slot_that_is_not_there_is_an_error"),
        (Shared, "test_two_share_nothing"),
        (Slow, "test_no_call_becomes_slower_with_the_number_of_slots"),
        (Remembering, "test_clear_forgets_every_slot"),
        (Roots, "test_every_victim_could_go"),
        (Roots, "test_the_end_of_a_prefix_goes_before_its_beginning"),
        (Selfish, "test_what_is_spared_stays"),
        (Idle, "test_there_is_a_victim_where_nobody_uses_anything"),
        (Careless, "test_what_is_in_use_stays"),
        (Dividing, "test_use_of_none_and_of_one_twice"),
    ],
)
def test_the_kit_catches(broken: type[CachePolicy], caught: str) -> None:
    test: Callable[..., None] = getattr(CachePolicyTests(), caught)
    code = test.__func__.__code__  # type: ignore[attr-defined]
    drawn = {name: NEW[name] for name in code.co_varnames[2 : code.co_argcount]}
    with pytest.raises((Exception, pytest.fail.Exception)):
        test(broken, **drawn)


# -- the memory that drives them -----------------------------------------------------------


def test_a_request_finds_its_prefix_and_stores_the_rest() -> None:
    memory = SimulatedMemory(LRU(), 4)
    keys = [key(number) for number in range(6)]
    assert memory.request(keys[:3]) == 0
    assert memory.request([keys[0], keys[1], keys[5]]) == 2
    assert memory.request([keys[0], keys[4]]) == 1
    assert (memory.accesses, memory.hits, memory.evicted) == (8, 3, 1)
    # The chunk that was used the longest ago, and that nothing continues, is gone.
    assert memory.request(keys[:3]) == 2


def test_a_request_longer_than_memory_keeps_its_beginning() -> None:
    memory = SimulatedMemory(LRU(), 3)
    keys = [key(number) for number in range(9)]
    memory.request(keys)
    assert memory.request(keys) == 3
    assert memory.evicted == 0


def test_a_victim_in_use_is_the_policys_mistake() -> None:
    memory = SimulatedMemory(Roots(), 3)
    memory.request([key(0), key(1)])
    memory.request([key(2)])
    with pytest.raises(PolicyMistake):
        memory.request([key(3)])


class Choosy(Leaves):
    """Wants to know all there is to know."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[object] = []

    def requested(self, request: PolicyRequest) -> None:
        self.heard.append(request)

    def finished(self, name: str, tokens: int) -> None:
        self.heard.append((name, tokens))

    def admit(self, key: ChunkKey, parent: int | None) -> bool:
        self.heard.append((key, parent))
        return parent is None

    def removed(self, slot: int, evicted: bool = False) -> None:
        super().removed(slot)
        self.heard.append((slot, evicted, self.chunks.key(slot)))


def test_a_policy_hears_what_it_wants_to() -> None:
    policy = Choosy()
    memory = SimulatedMemory(policy, 2)
    memory.clock = 5.0
    memory.request([key(0), key(1)], tokens=20, answer_tokens=3, name="a", hints={"priority": 1})
    (asked, ended) = policy.heard
    assert asked == PolicyRequest(
        name="a", keys=[key(0), key(1)], slots=[], tokens=20, now=5.0, hints={"priority": 1}
    )
    assert ended == ("a", 23)
    policy.heard.clear()
    first, second = memory.held()
    memory.request([key(2), key(3)])
    asked, *rest = policy.heard
    assert isinstance(asked, PolicyRequest)
    assert rest == [(key(2), None), (second, True, key(1)), (key(3), second)]
    assert (memory.refused, memory.evicted) == (1, 1)
    policy.heard.clear()
    memory.forget(first)
    assert policy.heard == [(first, False, key(0))]


def test_an_order_answers_a_victim_by_itself() -> None:
    policy: OrderedPolicy = LRU()
    assert policy.victim(None) is None
    policy.added(3)
    policy.added(5)
    assert (policy.victim(None), policy.victim(3)) == (3, 5)
