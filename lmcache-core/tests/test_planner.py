"""The planner's promises: nothing in use is evicted, nothing unconfirmed is offered."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import FrameType

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from lmcache_core.cache.holds import Hold
from lmcache_core.cache.plan import FetchOp, Report, StoreOp
from lmcache_core.cache.planner import Planner
from lmcache_core.chunks.chunk_index import NONE, ChunkIndex, ChunkState, DictIndex
from lmcache_core.chunks.keys import ChunkKey
from lmcache_core.contracts.connector import BlockSpan
from lmcache_core.contracts.eviction import CachePolicy
from lmcache_core.errors import LeaseError
from lmcache_core.metrics import Counters
from lmcache_core.plugins.manager import Plugins
from lmcache_core.testing.faults import Faults, Raise
from lmcache_core.testing.faults import WrongAnswer as Nonsense
from lmcache_core.testing.faulty import FaultyPolicy

SPAN = BlockSpan([0], 0, 16, 16)


def key(number: int) -> ChunkKey:
    return ChunkKey(number.to_bytes(16, "big"))


def policy(name: str = "LRU") -> CachePolicy:
    return Plugins().make_cache_policy(name)


INDEXES: dict[str, Callable[[int], ChunkIndex]] = {
    "Python": DictIndex,
    "plugin": lambda slots: Plugins().chunk_index(slots),  # native, where that is installed
}


def planner(slots: int = 4, **options: object) -> Planner:
    return Planner(slots, policy(), Counters(), **options)  # type: ignore[arg-type]


def evicted(plan: Planner) -> list[int]:
    """Numbers of chunks, as they are evicted from now on."""
    seen: list[int] = []
    plan.on_evicted = lambda k: seen.append(int.from_bytes(k, "big"))
    return seen


def chain(plan: Planner, *numbers: int, ready: bool = True) -> list[StoreOp]:
    """Store chunks of which each continues the one before."""
    ops: list[StoreOp] = []
    parent = None
    for number in numbers:
        op = plan.plan_store(key(number), SPAN, parent)
        parent = key(number)
        if op is not None:
            ops.append(op)
    if ready:
        plan.settle(done(*ops))
    return ops


def done(*ops: StoreOp | FetchOp, rank: int = 0) -> Report:
    marks = dict.fromkeys((op.op for op in ops), 1)
    return Report(ok=marks, released=dict(marks)).of_rank(rank)


def failed(*ops: StoreOp | FetchOp, rank: int = 0) -> Report:
    marks = dict.fromkeys((op.op for op in ops), 1)
    return Report(bad=marks, released=dict(marks)).of_rank(rank)


def store(plan: Planner, *numbers: int) -> list[StoreOp]:
    ops = [plan.plan_store(key(n), SPAN) for n in numbers]
    assert None not in ops
    plan.settle(done(*[op for op in ops if op]))
    return [op for op in ops if op]


def test_a_store_is_offered_only_after_it_is_confirmed() -> None:
    plan = planner()
    op = plan.plan_store(key(1), SPAN)
    assert op is not None
    assert plan.ready_prefix([key(1)]) == 0
    assert plan.state(key(1)) is ChunkState.STORING
    plan.settle(done(op))
    assert plan.ready_prefix([key(1)]) == 1


def test_every_rank_must_confirm() -> None:
    plan = planner(ranks=2)
    op = plan.plan_store(key(1), SPAN)
    assert op is not None
    plan.settle(done(op))
    assert plan.ready_prefix([key(1)]) == 0
    plan.settle(done(op, rank=1))
    assert plan.ready_prefix([key(1)]) == 1


def test_reports_of_all_ranks_come_as_one() -> None:
    plan = planner(ranks=3)
    op = plan.plan_store(key(1), SPAN)
    assert op is not None
    plan.settle(Report().add(done(op)).add(done(op, rank=2)).add(done(op, rank=1)))
    assert plan.ready_prefix([key(1)]) == 1
    assert plan.leases == 0


def test_one_failing_rank_makes_it_a_miss_and_frees_the_slot() -> None:
    plan = planner(slots=1, ranks=2)
    op = plan.plan_store(key(1), SPAN)
    assert op is not None
    plan.settle(failed(op))
    assert plan.plan_store(key(2), SPAN) is None, "the other rank may still be writing"
    plan.settle(done(op, rank=1))
    assert plan.state(key(1)) is ChunkState.ABSENT
    assert plan.plan_store(key(2), SPAN) is not None


def test_no_rank_can_answer_for_another() -> None:
    plan = planner(slots=1, ranks=2)
    op = plan.plan_store(key(1), SPAN)
    assert op is not None
    plan.settle(done(op))
    with pytest.raises(LeaseError, match=r"a result of ranks \[0\] isn't due.*a release of ranks"):
        plan.settle(done(op))
    assert plan.ready_prefix([key(1)]) == 0
    plan.settle(Report(ok={op.op: 0b10}))
    assert plan.ready_prefix([key(1)]) == 1
    with pytest.raises(LeaseError, match=r"a release of ranks \[0, 4\] isn't due"):
        plan.settle(Report(released={op.op: 0b10001}))
    assert plan.plan_store(key(2), SPAN) is None, "rank 1 may still be reading"
    plan.settle(Report(released={op.op: 0b10}))
    assert plan.plan_store(key(2), SPAN) is not None


def test_what_is_wrong_in_a_report_keeps_nothing_else_back() -> None:
    plan = planner()
    op = plan.plan_store(key(1), SPAN)
    assert op is not None
    report = done(op).add(Report(ok={99: 1}, released={99: 1}, unreadable={key(1)}))
    with pytest.raises(LeaseError, match="operation 99 isn't under way"):
        plan.settle(report)
    assert plan.leases == 0
    assert plan.chunks == 0


def test_one_report_settles_a_prefix_of_which_a_part_failed() -> None:
    plan = planner(slots=8)
    first, second, third, other = chain(plan, 1, 2, 3, ready=False) + chain(plan, 9, ready=False)
    seen: list[tuple[str, ChunkKey]] = []
    plan.on_ready = lambda k: seen.append(("ready", k))
    plan.on_failed = lambda k: seen.append(("failed", k))
    plan.on_evicted = lambda k: seen.append(("evicted", k))
    plan.settle(done(third, first, other).add(failed(second)))
    assert seen == [
        ("failed", key(2)),
        ("failed", key(3)),
        ("ready", key(1)),
        ("ready", key(9)),
    ], "what nobody could find is never offered"
    assert plan.leases == 0
    assert plan.chunks == 2
    assert len([plan.plan_store(key(n), SPAN) for n in range(20, 26)]) == 6
    assert plan.chunks == 8, "both failed slots were free again"


def test_a_rank_that_says_both_has_failed() -> None:
    plan = planner()
    op = plan.plan_store(key(1), SPAN)
    assert op is not None
    with pytest.raises(LeaseError, match="isn't due"):
        plan.settle(done(op).add(failed(op)))
    assert plan.state(key(1)) is ChunkState.ABSENT


def test_what_was_planned_and_given_to_nobody_is_withdrawn() -> None:
    plan = planner(slots=2, ranks=2)
    lost: list[ChunkKey] = []
    plan.on_failed = lost.append
    hold = plan.acquire([])
    ops = [plan.plan_store(key(1), SPAN), plan.plan_fetch(key(2), 16, 0, hold)]
    planned = [op for op in ops if op is not None]
    plan.withdraw(planned)
    assert lost == [key(1), key(2)]
    assert plan.chunks == 0
    hold.release()
    assert plan.leases == 0
    assert len([plan.plan_store(key(n), SPAN) for n in (3, 4)]) == 2
    with pytest.raises(LeaseError, match="isn't under way"):
        plan.withdraw(planned)


def test_a_hold_is_released_once() -> None:
    plan = planner(slots=1)
    store(plan, 1)
    hold, other = plan.acquire([key(1)]), plan.acquire([key(1)])
    hold.release()
    with pytest.raises(LeaseError, match="given back before"):
        hold.release()
    assert plan.plan_store(key(2), SPAN) is None, "the other one is reading"
    other.release()
    assert plan.leases == 0


def test_nothing_is_added_to_a_hold_that_was_released() -> None:
    plan = planner()
    store(plan, 1)
    hold = plan.acquire([])
    hold.release()
    for add in (
        lambda: plan.extend(hold, [key(1)]),
        lambda: plan.join(key(1), hold),
        lambda: plan.plan_fetch(key(2), 16, 0, hold),
    ):
        with pytest.raises(LeaseError, match="was released"):
            add()
    assert plan.leases == 0
    assert plan.chunks == 1


def test_a_forgotten_hold_is_reported_and_keeps_its_slots(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plan = planner(slots=1)
    store(plan, 1)
    plan.acquire([key(1)])
    assert "held for reading was forgotten" in caplog.text
    assert plan._counters.snapshot()["leases_forgotten", (("kind", "slot"),)] == 1
    assert plan.leases == 1
    assert plan.plan_store(key(2), SPAN) is None


def test_fetching_what_is_there_or_joining_what_is_not_is_a_mistake() -> None:
    plan = planner()
    store(plan, 1)
    hold = plan.acquire([])
    with pytest.raises(ValueError, match="is here or on its way"):
        plan.plan_fetch(key(1), 16, 0, hold)
    with pytest.raises(ValueError, match="is absent"):
        plan.join(key(2), hold)
    hold.release()
    assert plan.leases == 0
    assert plan.chunks == 1


def test_a_store_of_a_chunk_that_was_forgotten_meanwhile_has_failed() -> None:
    plan = planner()
    lost: list[ChunkKey] = []
    plan.on_failed = lost.append
    op = plan.plan_store(key(1), SPAN)
    assert op is not None
    plan.forget(key(1))
    plan.settle(done(op))
    assert lost == [key(1)]


def test_a_chunk_is_stored_once() -> None:
    plan = planner()
    assert plan.plan_store(key(1), SPAN) is not None
    assert plan.plan_store(key(1), SPAN) is None


def test_a_prefix_ends_at_the_first_gap() -> None:
    plan = planner()
    store(plan, 1, 3)
    assert plan.ready_prefix([key(1), key(2), key(3)]) == 1


def test_held_chunks_are_not_evicted() -> None:
    plan = planner(slots=2)
    store(plan, 1, 2)
    hold = plan.acquire([key(1), key(2)])
    assert len(hold) == 2
    assert plan.plan_store(key(3), SPAN) is None
    hold.release()
    assert plan.plan_store(key(3), SPAN) is not None


def test_a_chunk_that_is_being_written_through_keeps_its_slot() -> None:
    plan = planner(slots=1, persist=True)
    op = plan.plan_store(key(1), SPAN)
    assert op is not None
    assert op.persist
    plan.settle(Report(ok={op.op: 1}))
    assert plan.ready_prefix([key(1)]) == 1
    assert plan.plan_store(key(2), SPAN) is None
    plan.settle(Report(released={op.op: 1}))
    assert plan.plan_store(key(2), SPAN) is not None


def test_recency_evicts_leaves_before_their_parents() -> None:
    plan = planner(slots=3)
    store(plan, 1, 2, 3)
    plan.acquire([key(1), key(2), key(3)]).release()
    store(plan, 4)
    assert plan.state(key(3)) is ChunkState.ABSENT
    assert plan.ready_prefix([key(1), key(2)]) == 2


def test_forgotten_while_held_is_freed_at_the_release() -> None:
    plan = planner(slots=1)
    store(plan, 1)
    hold = plan.acquire([key(1)])
    assert plan.forget(key(1))
    assert plan.plan_store(key(2), SPAN) is None
    hold.release()
    assert plan.plan_store(key(2), SPAN) is not None


def test_clear_also_spoils_what_is_on_its_way() -> None:
    plan = planner()
    store(plan, 1)
    op = plan.plan_store(key(2), SPAN)
    assert op is not None
    assert plan.clear() == 1
    plan.settle(done(op))
    assert plan.ready_prefix([key(2)]) == 0
    assert plan.chunks == 0


def test_pins_protect_until_they_expire() -> None:
    now = [0.0]
    plan = planner(slots=1, pin_timeout_s=10.0, clock=lambda: now[0])
    store(plan, 1)
    assert plan.pin([key(1)]) == 1
    assert plan.pin([key(1)]) == 1, "pinning twice renews"
    assert plan.plan_store(key(2), SPAN) is None
    now[0] = 11.0
    assert plan.plan_store(key(2), SPAN) is not None


def test_unpin() -> None:
    plan = planner(slots=1)
    store(plan, 1)
    plan.pin([key(1)])
    assert plan.unpin([key(1), key(9)]) == 1
    assert plan.plan_store(key(2), SPAN) is not None


def test_without_keeping_a_stored_chunk_leaves_when_it_is_written_through() -> None:
    plan = planner(slots=1, keep=False, persist=True)
    op = plan.plan_store(key(1), SPAN)
    assert op is not None
    plan.settle(done(op))
    assert plan.state(key(1)) is ChunkState.ABSENT
    assert plan.plan_store(key(2), SPAN) is not None


def test_without_keeping_a_fetched_chunk_stays_for_its_reader() -> None:
    plan = planner(slots=1, keep=False, persist=True)
    hold = plan.acquire([])
    op = plan.plan_fetch(key(1), 16, 0, hold)
    assert op is not None
    plan.settle(done(op))
    assert plan.ready_prefix([key(1)]) == 1
    hold.release()
    assert plan.state(key(1)) is ChunkState.ABSENT


def test_a_pin_that_is_renewed_outlives_one_that_came_later() -> None:
    now = [0.0]
    plan = planner(slots=2, pin_timeout_s=10.0, clock=lambda: now[0])
    store(plan, 1, 2)
    for number, time_s in ((1, 0.0), (2, 1.0), (1, 9.0)):
        now[0] = time_s
        plan.pin([key(number)])
    now[0] = 11.0
    assert plan.plan_store(key(3), SPAN) is not None
    assert plan.ready_prefix([key(1)]) == 1
    assert plan.plan_store(key(4), SPAN) is None


def test_events() -> None:
    plan = planner(slots=1)
    seen: list[tuple[str, ChunkKey]] = []
    plan.on_ready = lambda k: seen.append(("ready", k))
    plan.on_failed = lambda k: seen.append(("failed", k))
    plan.on_evicted = lambda k: seen.append(("evicted", k))
    store(plan, 1)
    op = plan.plan_store(key(2), SPAN)
    assert op is not None
    plan.settle(failed(op))
    assert seen == [("ready", key(1)), ("evicted", key(1)), ("failed", key(2))]
    seen.clear()
    hold = plan.acquire([])
    fetches = [plan.plan_fetch(key(3), 16, 0, hold)]
    plan.settle(done(*[op for op in fetches if op]))
    hold.release()
    hold = plan.acquire([])
    fetches = [plan.plan_fetch(key(4), 16, 0, hold)]
    plan.settle(failed(*[op for op in fetches if op]))
    hold.release()
    assert seen == [("ready", key(3)), ("evicted", key(3)), ("failed", key(4))]


@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.parametrize("name", ["LRU", "LFU", "FIFO", "MRU"])
def test_leaves_go_first_whatever_the_policy(name: str, index: str) -> None:
    plan = Planner(6, policy(name), Counters(), index=INDEXES[index](6))
    chain(plan, 1, 2, 3)
    chain(plan, 1, 12, 13)
    gone = evicted(plan)
    for number in range(20, 25):
        store(plan, number)
        for parent, child in ((1, 2), (2, 3), (1, 12), (12, 13)):
            if plan.state(key(parent)) is ChunkState.ABSENT:
                assert plan.state(key(child)) is ChunkState.ABSENT
    assert len(gone) == 4
    if name == "FIFO":
        assert gone == [3, 2, 13, 12]


@pytest.mark.parametrize("index", INDEXES)
def test_a_prefix_that_does_not_fit_keeps_its_beginning(index: str) -> None:
    plan = planner(3, index=INDEXES[index](3))
    chain(plan, 100, 101, 102)
    chain(plan, *range(10), ready=False)
    dropped = {
        dict(labels)["reason"]: count
        for (name, labels), count in plan._counters.snapshot().items()
        if name == "store_dropped"
    }
    assert dropped == {"memory_full": 1, "parent_missing": 6}
    assert [plan.state(key(n)) for n in range(4)] == [ChunkState.STORING] * 3 + [ChunkState.ABSENT]


def test_a_chunk_is_not_evicted_for_what_continues_it() -> None:
    plan = planner(2)
    chain(plan, 1, 2)
    assert plan.plan_store(key(3), SPAN, key(2)) is None
    assert plan.ready_prefix([key(1), key(2)]) == 2
    store(plan, 9)
    assert plan.state(key(2)) is ChunkState.ABSENT
    assert plan.ready_prefix([key(1)]) == 1


def test_with_slow_tiers_a_chunk_may_come_without_its_parent() -> None:
    plan = planner(2, persist=True)
    assert plan.plan_store(key(3), SPAN, key(2)) is not None


def test_what_continues_a_damaged_chunk_goes_with_it() -> None:
    plan = planner(8)
    chain(plan, 1, 2, 3)
    (late,) = chain(plan, 1, 2, 3, 4, ready=False)
    chain(plan, 5)
    gone = evicted(plan)
    plan.settle(Report(unreadable={key(2)}))
    assert gone == [3, 2]
    plan.settle(done(late))
    assert plan.state(key(4)) is ChunkState.ABSENT
    assert plan.chunks == 2
    assert len(chain(plan, 1, 2, 3, 4)) == 3


class PlannerMachine(RuleBasedStateMachine):
    """Random traffic over a tree of chunks, in which ``n`` continues ``(n - 1) // 2``.

    A slot has at most one user of each kind, none is ever lost, no chunk stays without the chunk
    that it continues, and whatever is given back a second time is refused.
    """

    SLOTS = 4
    RANKS = 2
    ops: Bundle[StoreOp | FetchOp] = Bundle("ops")
    holds: Bundle[Hold] = Bundle("holds")
    ended: Bundle[Hold] = Bundle("ended")
    index = "Python"

    def __init__(self) -> None:
        super().__init__()
        self.faults = Faults(seed=1)
        self.plan = Planner(
            self.SLOTS,
            FaultyPolicy(policy(), self.faults),
            Counters(),
            ranks=self.RANKS,
            index=INDEXES[self.index](self.SLOTS),
        )
        self.results: dict[int, set[int]] = {}  # by operation, the ranks that haven't reported
        self.releases: dict[int, set[int]] = {}
        self.slot_of: dict[int, int] = {}
        self.live_holds: list[Hold] = []

    def _writable(self, slot: int) -> None:
        for hold in self.live_holds:
            assert slot not in hold.slots, "a slot that somebody reads was given away"
        assert slot not in self.slot_of.values(), "a slot has two writers"

    def _planned(self, op: StoreOp | FetchOp | None) -> object:
        if op is None:
            return multiple()
        self._writable(op.slot)
        self.slot_of[op.op] = op.slot
        self.results[op.op], self.releases[op.op] = {0, 1}, {0, 1}
        return op

    @rule(target=ops, number=st.integers(0, 10))
    def plan_store(self, number: int) -> object:
        return self._planned(self.plan.plan_store(key(number), SPAN, _parent(number)))

    @rule(target=ops, hold=holds, number=st.integers(0, 10))
    def plan_fetch(self, hold: Hold, number: int) -> object:
        if self.plan.state(key(number)) is not ChunkState.ABSENT:
            self.plan.join(key(number), hold)
            return multiple()
        parent = _parent(number)
        if parent is not None and self.plan.state(parent) is ChunkState.ABSENT:
            return multiple()  # a lookup fetches in prefix order
        return self._planned(self.plan.plan_fetch(key(number), 16, 0, hold, parent))

    @rule(op=ops, rank=st.integers(0, 2), ok=st.booleans(), what=st.sampled_from(["result", "end"]))
    def report(self, op: StoreOp | FetchOp, rank: int, ok: bool, what: str) -> None:
        """Of an operation that may be over, of a rank that may have reported, or isn't one."""
        marks = {op.op: 1 << rank}
        if what == "end":
            report = Report(released=marks)
        else:
            report = Report(ok=marks) if ok else Report(bad=marks)
        due = (self.releases if what == "end" else self.results)[op.op]
        if rank not in due:
            before = self._books()
            with pytest.raises(LeaseError):
                self.plan.settle(report)
            assert self._books() == before
            return
        due.discard(rank)
        self.plan.settle(report)
        self._forget_finished(op.op)

    @rule(rank=st.integers(0, 1), bad=st.sets(st.integers(0, SLOTS - 1)), ends=st.booleans())
    def report_all(self, rank: int, bad: set[int], ends: bool) -> None:
        """One report of all that a rank owes: results, of which some failed, and ends."""
        report = Report()
        for place, op in enumerate(self.slot_of):
            if rank in self.results[op]:
                (report.bad if place in bad else report.ok)[op] = 1 << rank
                self.results[op].discard(rank)
            if ends and rank in self.releases[op]:
                report.released[op] = 1 << rank
                self.releases[op].discard(rank)
        self.plan.settle(report)
        for op in list(self.slot_of):
            self._forget_finished(op)

    @rule(op=ops)
    def withdraw(self, op: StoreOp | FetchOp) -> None:
        if len(self.results[op.op]) == len(self.releases[op.op]) == self.RANKS:
            self.results[op.op], self.releases[op.op] = set(), set()
            self.plan.withdraw([op])
            self._forget_finished(op.op)

    def _forget_finished(self, op: int) -> None:
        if not self.results[op] and not self.releases[op]:
            self.slot_of.pop(op, None)

    def _books(self) -> object:
        plan = self.plan
        keys = [plan.index.key(slot) for slot in range(self.SLOTS)]
        return plan._use.leases.tolist(), plan._free.tolist(), keys, plan.leases

    @rule(target=holds, last=st.integers(0, 10))
    def acquire(self, last: int) -> Hold:
        hold = self.plan.acquire(_line(last))
        self.live_holds.append(hold)
        return hold

    @rule(hold=holds, last=st.integers(0, 10))
    def extend(self, hold: Hold, last: int) -> None:
        self.plan.extend(hold, _line(last))

    @rule(target=ended, hold=consumes(holds))
    def release(self, hold: Hold) -> Hold:
        hold.release()
        self.live_holds = [h for h in self.live_holds if h is not hold]
        return hold

    @rule(hold=ended)
    def release_again(self, hold: Hold) -> None:
        before = self._books()
        with pytest.raises(LeaseError):
            hold.release()
        assert self._books() == before

    @rule(number=st.integers(0, 10))
    def forget(self, number: int) -> None:
        self.plan.forget(key(number))

    @rule(number=st.integers(0, 10))
    def pin(self, number: int) -> None:
        self.plan.pin(_line(number))

    @rule(number=st.integers(0, 10))
    def unpin(self, number: int) -> None:
        self.plan.unpin(_line(number))

    @rule(
        operation=st.sampled_from(["added", "touched", "removed", "victims", "victim"]),
        kind=st.sampled_from([ValueError, SystemExit, StopIteration]),
    )
    def the_policy_fails(self, operation: str, kind: type[BaseException]) -> None:
        self.faults.arm(operation, Raise(kind))

    @rule(answer=st.sampled_from([-1, 99, 2**40]))
    def the_policy_shows_nonsense(self, answer: int) -> None:
        self.faults.arm("victim", Nonsense("a wrong slot", lambda *_: answer))

    @rule()
    def clear(self) -> None:
        self.plan.clear()

    @invariant()
    def nothing_is_lost(self) -> None:
        plan, slots = self.plan, set(range(self.SLOTS))
        used = {slot for slot in slots if plan.index.key(slot) is not None}
        free = set(plan._free) | {slot for slot in slots if slot >= plan._unused}
        assert len(used) == plan.chunks
        assert not used & free
        assert len(plan._free) == len(set(plan._free))
        assert min(plan._use.leases) >= 0
        lost = slots - used - free
        assert all(plan._use.leases[slot] for slot in lost), "a slot is neither free nor in use"

    @invariant()
    def each_lease_has_its_owner(self) -> None:
        plan = self.plan
        held = sum(len(hold.slots) + len(hold.awaited) for hold in self.live_holds)
        assert sum(plan._use.leases) == held + len(self.slot_of) + len(plan._pins)
        assert plan.leases == len(self.live_holds) + len(self.slot_of) + len(plan._pins)

    @invariant()
    def what_could_go_is_known(self) -> None:
        """Ready, used by nobody and continued by nothing: neither one less nor one more."""
        plan, use = self.plan, self.plan._use
        index = plan.index
        could_go = {
            slot
            for slot in range(self.SLOTS)
            if index.state(slot) == ChunkState.READY
            and not use.leases[slot]
            and index.leaf(slot) == slot
        }
        ring, slot = [], use.after[use.end]
        while slot != use.end:
            assert use._before[use.after[slot]] == slot
            ring.append(slot)
            slot = use.after[slot]
        assert sorted(ring) == sorted(could_go)

    @invariant()
    def nothing_is_an_orphan(self) -> None:
        for number in range(11):
            parent = _parent(number)
            if parent is not None and self.plan.state(key(number)) is ChunkState.READY:
                assert self.plan.index.find(parent) != NONE

    def teardown(self) -> None:
        """When everything has ended, no slot is leased, and each is free or has a chunk."""
        for hold in self.live_holds:
            hold.release()
        self.plan.unpin([key(number) for number in range(11)])
        for op in list(self.slot_of):
            results = sum(1 << rank for rank in self.results[op])
            releases = sum(1 << rank for rank in self.releases[op])
            self.plan.settle(
                Report(
                    bad={op: results} if results else {},
                    released={op: releases} if releases else {},
                )
            )
        plan = self.plan
        assert plan.leases == 0
        assert sum(plan._use.leases) == 0
        assert plan.pending == 0
        assert len(plan._free) + self.SLOTS - plan._unused + plan.chunks == self.SLOTS
        assert not any(name == "leases_forgotten" for name, _ in plan._counters.snapshot())


def _parent(number: int) -> ChunkKey | None:
    return key((number - 1) // 2) if number else None


def _line(number: int) -> list[ChunkKey]:
    """A chunk and all that it continues, in prefix order."""
    line = [number]
    while line[0]:
        line.insert(0, (line[0] - 1) // 2)
    return [key(n) for n in line]


class PluginPlannerMachine(PlannerMachine):
    index = "plugin"


STEPS = 40
EXAMPLES = max(1, int(os.environ.get("LMCACHE_TEST_STEPS", "4000")) // STEPS)
"""A long run: 100000 of them, with ``-s --hypothesis-show-statistics --hypothesis-seed=…``."""

TestPlannerMachine = PlannerMachine.TestCase
TestPluginPlannerMachine = PluginPlannerMachine.TestCase
TestPlannerMachine.settings = TestPluginPlannerMachine.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None
)


@pytest.mark.parametrize("full", [False, True])
def test_a_chunk_is_planned_and_settled_in_few_steps(full: bool) -> None:
    """It is the engine's scheduler that takes them, for every chunk of every prompt."""
    plan, steps = planner(slots=128 if full else 256), 0
    if full:
        chain(plan, *range(1000, 1128))

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal steps
        here = frame.f_globals["__name__"].startswith("lmcache_core.")
        steps += event == "call" and here and not isinstance(frame.f_locals.get("self"), DictIndex)

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        ops = chain(plan, *range(128))
    finally:
        sys.setprofile(before)
    assert len(ops) == 128
    assert steps < 128 * (23 if full else 12)


@pytest.mark.parametrize("name", ["LRU", "LFU", "FIFO", "MRU"])
def test_every_policy_works_under_a_full_arena(name: str) -> None:
    plan = Planner(2, policy(name), Counters())
    for number in range(10):
        store(plan, number)
    assert plan.chunks == 2
