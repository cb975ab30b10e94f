"""A cache policy may raise and answer whatever it likes: the planner goes on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from lmcache_core.cache.eviction_order import LOOKED_AT, MAX_FAILURES
from lmcache_core.cache.plan import Report
from lmcache_core.cache.planner import Planner
from lmcache_core.chunks.chunk_index import DictIndex
from lmcache_core.chunks.keys import ChunkKey
from lmcache_core.contracts.connector import BlockSpan
from lmcache_core.contracts.eviction import (
    LRU,
    CachedChunks,
    CachePolicy,
    OrderedPolicy,
    PolicyRequest,
)
from lmcache_core.errors import PluginError
from lmcache_core.metrics import Counters
from lmcache_core.plugins.manager import Plugins

SPAN = BlockSpan([0], 0, 16, 16)


class Odd(LRU):
    """Answers ``victims`` as it is told to."""

    def __init__(self, victims: Callable[[LRU], Any]) -> None:
        super().__init__()
        self._victims = victims

    def victims(self) -> Iterator[int]:
        found: Iterator[int] = self._victims(super())
        return found


def _raises(kind: type[BaseException]) -> Callable[[Any], Any]:
    def raising(_: Any) -> Any:
        raise kind("from a policy")

    return raising


NONSENSE: dict[str, Callable[[Any], Any]] = {
    "too large": lambda _: iter([99]),
    "negative": lambda _: iter([-1]),
    "no number": lambda _: iter(["slot"]),
    "a float": lambda _: iter([0.0]),
    "nothing": lambda _: iter([]),
    "None": lambda _: None,
    "one that is leased, for ever": lambda _: itertools.repeat(0),
    "only one that is leased": lambda _: iter([0]),
    "ValueError": _raises(ValueError),
    "StopIteration": _raises(StopIteration),
    "SystemExit": _raises(SystemExit),
    "GeneratorExit": _raises(GeneratorExit),
}


def key(number: int) -> ChunkKey:
    return ChunkKey(number.to_bytes(16, "big"))


def store(plan: Planner, number: int) -> bool:
    op = plan.plan_store(key(number), SPAN)
    if op is None:
        return False
    plan.settle(Report(ok={op.op: 1}, released={op.op: 1}))
    return True


def failures(counters: Counters) -> dict[str, float]:
    return {
        dict(labels)["operation"]: count
        for (name, labels), count in counters.snapshot().items()
        if name == "plugin_failures"
    }


@pytest.mark.parametrize("name", NONSENSE)
def test_a_wrong_victim_is_not_evicted_and_another_one_is(name: str) -> None:
    counters = Counters()
    plan = Planner(4, Odd(NONSENSE[name]), counters)
    assert all(store(plan, number) for number in range(4))
    hold = plan.acquire([key(0)])
    assert store(plan, 9)
    assert plan.ready_prefix([key(0)]) == 1, "somebody reads it"
    assert failures(counters) == {"victims": 1}
    hold.release()
    assert plan.leases == 0
    assert plan.chunks == 4


def test_a_policy_that_goes_on_failing_is_replaced_with_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    counters = Counters()
    plan = Planner(4, Odd(_raises(ValueError)), counters)
    for number in range(4 + MAX_FAILURES + 20):
        assert store(plan, number)
    assert failures(counters) == {"victims": MAX_FAILURES}
    assert sum("isn't asked any more" in line for line in caplog.messages) == 1
    plan.acquire([key(23 + MAX_FAILURES)]).release()
    hold = plan.acquire([key(22 + MAX_FAILURES)])
    hold.release()
    store(plan, 100)
    assert plan.ready_prefix([key(22 + MAX_FAILURES)]) == 1, "LRU knows what was used"


@pytest.mark.parametrize("operation", ["added", "touched", "removed"])
@pytest.mark.parametrize("kind", [ValueError, SystemExit, GeneratorExit])
def test_a_policy_that_learns_nothing_harms_nothing(
    operation: str, kind: type[BaseException]
) -> None:
    class Failing(LRU):
        pass

    def fail(*_: object) -> None:
        raise kind("from a policy")

    setattr(Failing, operation, fail)
    counters = Counters()
    plan = Planner(4, Failing(), counters)
    for number in range(40):
        assert store(plan, number)
        plan.acquire([key(number)]).release()
    assert plan.chunks == 4
    assert plan.leases == 0
    assert failures(counters)[operation] >= 1
    assert sum(failures(counters).values()) == MAX_FAILURES
    assert plan.clear() == 4
    assert plan.chunks == 0


def test_clear_forgets_what_the_policy_does_not_show() -> None:
    plan = Planner(4, Odd(lambda _: iter([])), Counters())
    assert all(store(plan, number) for number in range(3))
    assert plan.clear() == 3
    assert plan.chunks == 0


def test_policies_that_keep_their_contract_are_never_blamed() -> None:
    """Nor where everything is leased, or what is left is spared."""
    counters = Counters()
    plan = Planner(2, LRU(), counters)
    assert store(plan, 0)
    assert store(plan, 1)
    hold = plan.acquire([key(0)])
    assert plan.plan_store(key(2), SPAN, key(1)) is None
    hold.release()
    assert failures(counters) == {}


class Counting(OrderedPolicy):
    """``real``, and how many slots were looked at."""

    def __init__(self, real: OrderedPolicy) -> None:
        self.real = real
        self.steps = 0

    def added(self, slot: int) -> None:
        self.real.added(slot)

    def touched(self, slots: Sequence[int]) -> None:
        self.real.touched(slots)

    def removed(self, slot: int, evicted: bool = False) -> None:
        self.real.removed(slot, evicted)

    def victims(self) -> Iterator[int]:
        for slot in self.real.victims():
            self.steps += 1
            yield slot

    def clear(self) -> None:
        self.real.clear()


class CountingIndex(DictIndex):
    """How many questions about slots were asked."""

    steps = 0

    def leaf(self, slot: int) -> int:
        self.steps += 1
        return super().leaf(slot)

    def state(self, slot: int) -> int:
        self.steps += 1
        return super().state(slot)


def counted(name: str, slots: int) -> tuple[Planner, Callable[[int], int]]:
    """A full planner, and what takes the steps of storing one more chunk."""
    policy, index = Counting(Plugins().make_cache_policy(name)), CountingIndex(slots)
    plan = Planner(slots, policy, Counters(), index=index)
    assert all(store(plan, number) for number in range(slots))

    def steps(number: int, parent: ChunkKey | None = None) -> int:
        policy.steps = index.steps = 0
        dropped = plan.plan_store(key(number), SPAN, parent) is None
        return -1 if dropped else policy.steps + index.steps

    return plan, steps


MOST_STEPS = 4 * LOOKED_AT


@pytest.mark.parametrize(
    ("name", "slots", "idle"),
    [
        *itertools.product(("LRU", "LFU", "FIFO", "MRU"), (1_000, 10_000), ("first", "last")),
        ("LRU", 100_000, "last"),
    ],
)
def test_a_victim_is_found_in_as_many_steps_whatever_is_leased(
    name: str, slots: int, idle: str
) -> None:
    plan, steps = counted(name, slots)
    used = range(10, slots) if idle == "first" else range(slots - 10)
    hold = plan.acquire([key(number) for number in used])
    found = [steps(10**6 + number) for number in range(10)]
    assert all(0 <= n <= MOST_STEPS for n in found), found
    assert steps(10**7) == -1
    hold.release()
    assert 0 <= steps(10**8) <= MOST_STEPS


@pytest.mark.parametrize("slots", [1_000, 20_000])
def test_that_there_is_none_is_found_in_one_step(slots: int) -> None:
    plan, _ = counted("LRU", slots)
    policy = plan._order._policy
    assert isinstance(policy, Counting)
    hold = plan.acquire([key(number) for number in range(slots)])
    policy.steps = 0
    assert plan.plan_store(key(10**6), SPAN) is None
    assert policy.steps == 0
    hold.release()


@pytest.mark.parametrize("name", ["LRU", "LFU", "FIFO", "MRU"])
def test_a_prefix_whose_end_is_being_written_is_not_looked_through(name: str) -> None:
    plan, steps = counted(name, 2_000)
    assert plan.clear() == 2_000
    parent = None
    for number in range(1_999):
        op = plan.plan_store(key(number), SPAN, parent)
        assert op is not None
        plan.settle(Report(ok={op.op: 1}, released={op.op: 1}))
        parent = key(number)
    assert plan.plan_store(key(1_999), SPAN, parent) is not None
    assert steps(10**6) == -1, "all of it is part of what is being written"
    policy = plan._order._policy
    assert isinstance(policy, Counting)
    assert policy.steps == 0


@pytest.mark.parametrize("name", ["LRU", "LFU", "FIFO", "MRU"])
def test_leases_that_ended_leave_the_order_as_it_was(name: str) -> None:
    def gone(leased: bool) -> list[ChunkKey]:
        """What is evicted after a time in which stores met chunks that were in use, or not."""
        plan = Planner(64, Plugins().make_cache_policy(name), Counters())
        assert all(store(plan, number) for number in range(64))
        holds = [plan.acquire([key(number)]) for number in (*range(64), *range(0, 64, 8))]
        if leased:
            assert not any(store(plan, number) for number in range(200, 300))
        while holds:
            holds.pop(-1 if len(holds) % 3 else 0).release()
        evicted: list[ChunkKey] = []
        plan.on_evicted = evicted.append
        assert all(store(plan, number) for number in range(100, 164))
        return evicted

    assert gone(leased=True) == gone(leased=False) != []


def test_a_listener_that_fails_keeps_nothing_back() -> None:
    counters = Counters()
    plan = Planner(1, LRU(), counters)

    def fail(_: ChunkKey) -> None:
        raise SystemExit("from a listener")

    plan.on_ready = plan.on_evicted = plan.on_failed = fail
    assert store(plan, 0)
    assert store(plan, 1)
    assert plan.leases == 0
    assert failures(counters) == {"events": 3}


def test_an_index_of_another_size_is_refused_at_the_start() -> None:
    with pytest.raises(PluginError, match="has 3 slots and 0 chunks; the planner needs 4"):
        Planner(4, LRU(), Counters(), index=DictIndex(3))


# -- policies that want more ---------------------------------------------------------------


class Choosing(CachePolicy):
    """Answers ``victim`` as it is told to, and remembers what it heard."""

    def __init__(self, answer: Callable[[CachedChunks], Any] = lambda chunks: None) -> None:
        self.answer = answer
        self.heard: list[tuple[Any, ...]] = []

    def open(self, chunks: CachedChunks) -> None:
        self.chunks = chunks

    def added(self, slot: int) -> None:
        self.heard.append(("added", slot, self.chunks.key(slot)))

    def touched(self, slots: Sequence[int]) -> None:
        self.heard.append(("touched", *slots))

    def removed(self, slot: int, evicted: bool = False) -> None:
        self.heard.append(("removed", slot, evicted, self.chunks.key(slot)))

    def victim(self, spared: int | None) -> int | None:
        self.heard.append(("victim", spared))
        found: int | None = self.answer(self.chunks)
        return found

    def clear(self) -> None:
        pass


class Seeing(Choosing):
    def requested(self, request: PolicyRequest) -> None:
        self.heard.append(("requested", request))

    def finished(self, name: str, tokens: int) -> None:
        self.heard.append(("finished", name, tokens))


class Refusing(Choosing):
    refuses = True

    def admit(self, key: ChunkKey, parent: int | None) -> bool:
        self.heard.append(("admit", key, parent))
        return not self.refuses


def extend(plan: Planner, number: int, parent: int) -> bool:
    op = plan.plan_store(key(number), SPAN, key(parent))
    if op is None:
        return False
    plan.settle(Report(ok={op.op: 1}, released={op.op: 1}))
    return True


WRONG: dict[str, Callable[[Any], Any]] = {
    "too large": lambda _: 99,
    "negative": lambda _: -1,
    "no number": lambda _: "slot",
    "a float": lambda _: 0.0,
    "one that is leased": lambda _: 0,
    "one that is continued": lambda _: 1,
    "SystemExit": _raises(SystemExit),
    "StopIteration": _raises(StopIteration),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_choice_is_not_evicted_and_another_one_is(name: str) -> None:
    counters = Counters()
    plan = Planner(4, Choosing(WRONG[name]), counters)
    assert store(plan, 0)
    assert store(plan, 1)
    assert extend(plan, 2, 1)
    assert store(plan, 3)
    hold = plan.acquire([key(0)])
    assert store(plan, 9)
    assert plan.ready_prefix([key(0)]) == 1, "somebody reads it"
    assert plan.ready_prefix([key(1)]) == 1, "something continues it, or is spared"
    assert failures(counters) == {"victim": 1}
    hold.release()
    assert plan.leases == 0


def test_the_chosen_one_goes_and_none_is_no_failure() -> None:
    counters = Counters()
    policy = Choosing(lambda _: 2)
    plan = Planner(4, policy, counters)
    assert all(store(plan, number) for number in range(4))
    assert store(plan, 9)
    assert plan.ready_prefix([key(2)]) == 0
    assert policy.heard[-3:] == [
        ("victim", None),
        ("removed", 2, True, key(2)),
        ("added", 2, key(9)),
    ]
    policy.answer = lambda _: None
    assert store(plan, 10)
    assert plan.ready_prefix([key(0)]) == 0, "nobody used it for the longest"
    assert failures(counters) == {}


def test_what_a_new_chunk_continues_is_no_choice() -> None:
    counters = Counters()
    policy = Choosing(lambda _: 1)
    plan = Planner(2, policy, counters)
    assert store(plan, 0)
    assert store(plan, 1)
    assert extend(plan, 2, 1)
    assert policy.heard[-3] == ("victim", 1)
    assert plan.ready_prefix([key(1)]) == 1
    assert failures(counters) == {"victim": 1}


def test_a_chooser_that_goes_on_failing_is_replaced() -> None:
    counters = Counters()
    plan = Planner(2, Choosing(_raises(ValueError)), counters)
    assert all(store(plan, number) for number in range(20))
    assert failures(counters) == {"victim": MAX_FAILURES}


def test_what_is_forgotten_is_not_evicted() -> None:
    policy = Choosing()
    plan = Planner(4, policy, Counters())
    assert store(plan, 0)
    assert extend(plan, 1, 0)
    plan.forget(key(0))
    assert policy.heard[-2:] == [("removed", 1, False, key(1)), ("removed", 0, False, key(0))]


@pytest.mark.parametrize("index", [DictIndex, Plugins().chunk_index])
def test_what_a_policy_may_ask(index: Callable[[int], Any]) -> None:
    now = itertools.count(7)
    policy = Choosing()
    plan = Planner(6, policy, Counters(), index=index(6), clock=lambda: next(now))
    chunks = policy.chunks
    assert chunks.slots == 6
    assert chunks.now() == 7
    assert store(plan, 0)
    assert extend(plan, 1, 0)
    assert extend(plan, 2, 1)
    assert [chunks.parent(slot) for slot in range(3)] == [None, 0, 1]
    assert [chunks.children(slot) for slot in range(3)] == [1, 1, 0]
    assert [chunks.evictable(slot) for slot in range(4)] == [False, False, True, False]
    assert chunks.leaf(0) == chunks.leaf(2) == 2
    assert chunks.descendants(0) == [2, 1]
    assert (chunks.key(1), chunks.key(5)) == (key(1), None)
    hold = plan.acquire([key(0), key(1), key(2)])
    assert not chunks.evictable(2)
    hold.release()
    assert chunks.evictable(2)


def test_requests_are_told_to_who_wants_them() -> None:
    def unasked() -> list[ChunkKey]:
        raise AssertionError("nobody wants to know")

    assert not Planner(4, LRU(), Counters()).requested(unasked, 100)
    policy = Seeing()
    plan = Planner(4, policy, Counters(), clock=lambda: 5.0)
    assert store(plan, 0)
    keys = [key(0), key(1)]
    assert plan.requested(lambda: keys, 40, "r", {"priority": 2})
    plan.finished("r", 45)
    asked = PolicyRequest(name="r", keys=keys, slots=[0], tokens=40, now=5.0, hints={"priority": 2})
    assert policy.heard[-2:] == [("requested", asked), ("finished", "r", 45)]


@pytest.mark.parametrize("operation", ["requested", "finished", "admit"])
def test_a_policy_that_fails_at_what_it_wanted_harms_nothing(operation: str) -> None:
    class Failing(Refusing, Seeing):
        pass

    setattr(Failing, operation, lambda *_: _raises(SystemExit)(None))
    Failing.refuses = False
    counters = Counters()
    plan = Planner(2, Failing(), counters)
    for number in range(20):
        plan.requested(list, 10, "r")
        assert store(plan, number)
        plan.finished("r", 10)
    assert failures(counters) == {operation: MAX_FAILURES}


def test_a_chunk_may_be_refused_where_another_one_would_have_to_go() -> None:
    counters = Counters()
    policy = Refusing()
    plan = Planner(2, policy, counters)
    assert store(plan, 0)
    assert extend(plan, 1, 0)
    assert ("admit", key(1), 0) not in policy.heard, "there was room"
    assert not extend(plan, 2, 1)
    assert policy.heard[-1] == ("admit", key(2), 1)
    assert plan.chunks == 2
    dropped = ("store_dropped", (("reason", "not_admitted"),))
    assert counters.snapshot()[dropped] == 1
    policy.refuses = False
    assert extend(plan, 2, 0)


def test_nothing_is_refused_on_its_way_to_slow_tiers() -> None:
    policy = Refusing()
    plan = Planner(1, policy, Counters(), persist=True)
    assert store(plan, 0)
    assert store(plan, 1)
    assert not [heard for heard in policy.heard if heard[0] == "admit"]


def test_a_policy_that_cannot_be_opened_is_an_error_at_the_start() -> None:
    class Closed(LRU):
        def open(self, chunks: CachedChunks) -> None:
            raise OSError("no room for ghosts")

    with pytest.raises(
        PluginError, match="Closed can't be opened: OSError: no room for ghosts; set"
    ):
        Planner(4, Closed(), Counters())
