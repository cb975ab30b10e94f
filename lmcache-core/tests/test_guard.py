"""The guard: deadlines, retries, the breaker and what is logged."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from lmcache_core.aio.guard import Answer, BreakerState, Guard, attempt, attempted
from lmcache_core.errors import (
    BackendError,
    BackendProcessLost,
    BackendRejected,
    BackendTimeout,
    BackendUnavailable,
    PluginRaised,
)
from lmcache_core.metrics import Counters

LONG_S = 30.0
SHORT_S = 0.01
"""A deadline that is meant to be missed."""


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Rig:
    """A guard, its clock and its counters, on one event loop."""

    def __init__(self, **options: Any) -> None:
        self.clock = Clock()
        self.counters = Counters()
        self.calls = 0
        options = {
            "deadline_s": LONG_S,
            "breaker_threshold": 2,
            "jitter": lambda: -0.5,  # no pause at all
            **options,
        }
        self.guard = Guard("disk", clock=self.clock, counters=self.counters, **options)

    def raising(self, *errors: BaseException | None) -> Callable[[], Awaitable[str]]:
        """Raises one error after the other, then answers."""
        left = list(errors)

        async def call() -> str:
            self.calls += 1
            error = left.pop(0) if left else None
            if error is not None:
                raise error
            return "good"

        return call

    async def fail(self, times: int = 1, operation: str = "load") -> None:
        for _ in range(times):
            answer = await self.guard.call(operation, self.raising(BackendError("broken")))
            assert not answer.ok

    def count(self, name: str, **labels: str) -> float:
        key = (name, tuple(sorted({"backend": "disk", **labels}.items())))
        return self.counters.snapshot().get(key, 0)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


# -- answers -------------------------------------------------------------------------------


def test_a_good_call_is_answered() -> None:
    async def test() -> None:
        rig = Rig()
        answer = await rig.guard.call("load", rig.raising())
        assert (answer.value, answer.error, answer.unsettled, answer.ok) == (
            "good",
            None,
            None,
            True,
        )
        assert rig.counters.snapshot() == {}

    run(test)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (BackendRejected("no"), "rejected"),
        (BackendError("odd"), "failed"),
        (ValueError("bug"), "exception"),
        (MemoryError(), "exception"),
    ],
)
def test_other_errors_are_answered_counted_and_not_retried(error: Exception, kind: str) -> None:
    async def test() -> None:
        rig = Rig()
        answer = await rig.guard.call("load", rig.raising(error))
        assert answer == Answer(error=error)
        assert rig.calls == 1
        assert rig.count("backend_errors", operation="load", kind=kind) == 1

    run(test)


def test_a_call_that_cannot_even_be_made_is_answered() -> None:
    async def test() -> None:
        def make() -> Awaitable[None]:
            raise TypeError("not a coroutine")

        answer = await Rig().guard.call("load", make)
        assert isinstance(answer.error, TypeError)

    run(test)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (ConnectionResetError("gone"), BackendUnavailable),
        (EOFError(), BackendUnavailable),
        (TimeoutError(), BackendTimeout),
        (asyncio.TimeoutError(), BackendTimeout),
    ],
)
def test_errors_of_sloppy_clients_get_their_class(
    raised: Exception, expected: type[BackendError]
) -> None:
    async def test() -> None:
        rig = Rig(retries=0)
        answer = await rig.guard.call("load", rig.raising(raised))
        assert isinstance(answer.error, expected)
        assert answer.error.__cause__ is raised

    run(test)


def test_a_call_that_is_cancelled_inside_is_a_failure() -> None:
    async def test() -> None:
        answer = await Rig(retries=0).guard.call(
            "load", Rig().raising(asyncio.CancelledError("from within"))
        )
        assert isinstance(answer.error, BackendUnavailable)

    run(test)


def test_attempt_and_now_answer_instead_of_raising() -> None:
    error = ValueError("x")

    def fail() -> int:
        raise error

    rig = Rig()
    assert attempt(fail) is error
    assert attempt(int, "3") is None
    assert rig.guard.now("usage", fail).error is error
    assert rig.guard.now("usage", lambda: 3).value == 3
    assert rig.count("backend_errors", operation="usage", kind="exception") == 1


# -- retries -------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [BackendUnavailable("gone"), BackendTimeout("late")])
def test_what_may_work_later_is_tried_again(error: BackendError) -> None:
    async def test() -> None:
        rig = Rig()
        answer = await rig.guard.call("load", rig.raising(error), owns_buffers=True)
        assert answer.value == "good"
        assert rig.calls == 2

    run(test)


def test_retries_end() -> None:
    async def test() -> None:
        rig = Rig(retries=2)
        errors = [BackendUnavailable(str(i)) for i in range(5)]
        answer = await rig.guard.call("load", rig.raising(*errors))
        assert answer.error is errors[2]
        assert rig.calls == 3

    run(test)


def test_no_retry_that_the_deadline_has_no_room_for() -> None:
    async def test() -> None:
        rig = Rig(jitter=lambda: 1000.0)
        answer = await rig.guard.call("load", rig.raising(BackendUnavailable("gone")))
        assert isinstance(answer.error, BackendUnavailable)
        assert rig.calls == 1

    run(test)


# -- deadlines -----------------------------------------------------------------------------


def test_a_late_call_is_cancelled() -> None:
    async def test() -> None:
        rig, cancelled = Rig(), asyncio.Event()

        async def hang() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        answer = await rig.guard.call("contains", hang, deadline_s=SHORT_S)
        assert isinstance(answer.error, BackendTimeout)
        assert "contains took longer than 0.01 s" in str(answer.error)
        assert answer.unsettled is None
        await asyncio.wait_for(cancelled.wait(), LONG_S)
        assert rig.count("backend_timeouts", operation="contains") == 1

    run(test)


def test_a_late_call_with_buffers_is_handed_back_running() -> None:
    async def test() -> None:
        rig, release = Rig(), asyncio.Event()

        async def hang() -> str:
            rig.calls += 1
            await release.wait()
            return "too late"

        answer = await rig.guard.call("load", hang, deadline_s=SHORT_S, owns_buffers=True)
        assert isinstance(answer.error, BackendTimeout)
        assert answer.value is None
        task = answer.unsettled
        assert task is not None
        assert not task.done()
        assert rig.calls == 1  # nothing else may be started with the same buffers
        release.set()
        await asyncio.wait([task])
        assert task.result() == "too late"

    run(test)


def test_what_a_late_call_raises_is_nobodys_surprise(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        rig, release = Rig(), asyncio.Event()

        async def hang() -> None:
            await release.wait()
            raise ValueError("after all")

        answer = await rig.guard.call("load", hang, deadline_s=SHORT_S, owns_buffers=True)
        assert answer.unsettled is not None
        release.set()
        await asyncio.wait([answer.unsettled])

    run(test)
    assert "never retrieved" not in caplog.text


def test_a_deadline_in_the_past_calls_nothing_and_blames_nobody() -> None:
    async def test() -> None:
        rig = Rig(breaker_threshold=1)
        answer = await rig.guard.call("load", rig.raising(), deadline_s=-1.0)
        assert isinstance(answer.error, BackendTimeout)
        assert rig.calls == 0
        assert rig.guard.state is BreakerState.CLOSED

    run(test)


@pytest.mark.parametrize("owns_buffers", [False, True])
def test_a_cancelled_caller_gets_cancelled_error(owns_buffers: bool) -> None:
    async def test() -> None:
        rig, started, ended, release = Rig(), asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def hang() -> None:
            started.set()
            try:
                await release.wait()
            finally:
                ended.set()

        caller = asyncio.ensure_future(rig.guard.call("load", hang, owns_buffers=owns_buffers))
        await started.wait()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        if owns_buffers:
            assert not ended.is_set()
            release.set()
        await asyncio.wait_for(ended.wait(), LONG_S)
        assert rig.guard.state is BreakerState.CLOSED

    run(test)


def test_hanging_calls_hold_a_bounded_number_of_buffers() -> None:
    async def test() -> None:
        rig, release = Rig(breaker_threshold=3, breaker_cooldown_s=1.0), asyncio.Event()
        held = []
        for _ in range(6):
            rig.clock.now += 2.0  # past any cooldown
            answer = await rig.guard.call(
                "load", release.wait, deadline_s=SHORT_S, owns_buffers=True
            )
            held.append(answer.unsettled)
        assert [task is not None for task in held] == [True] * 3 + [False] * 3
        assert rig.guard.saturated
        assert rig.count("backend_errors", operation="load", kind="saturated") == 3
        # Calls without buffers are still tried, and whatever ends makes room again.
        assert (await rig.guard.call("contains", rig.raising())).ok
        release.set()
        await asyncio.wait([task for task in held if task])
        assert not rig.guard.saturated
        assert (await rig.guard.call("load", rig.raising(), owns_buffers=True)).ok

    run(test)


def test_hanging_calls_hold_a_bounded_number_of_bytes() -> None:
    """By operation, and while the circuit is closed and no number of calls is reached."""

    async def test() -> None:
        rig, release = Rig(breaker_threshold=100), asyncio.Event()
        rig.guard.max_bytes = 100
        late = await rig.guard.call(
            "store", release.wait, deadline_s=SHORT_S, owns_buffers=True, nbytes=60
        )
        assert late.unsettled is not None

        async def good(operation: str, nbytes: int) -> bool:
            made = rig.raising()
            answer = await rig.guard.call(operation, made, owns_buffers=True, nbytes=nbytes)
            return answer.ok

        assert not await good("store", 60)
        assert rig.calls == 0
        assert rig.count("backend_errors", operation="store", kind="saturated") == 1
        assert await good("store", 40)
        assert await good("load", 100)
        assert not rig.guard.is_full("store")
        release.set()
        await asyncio.wait([late.unsettled])
        assert await good("store", 100)

    run(test)


def test_calls_wait_for_room_and_go_on_in_their_order() -> None:
    async def test() -> None:
        rig, begun = Rig(), list[int]()
        rig.guard.max_bytes = 100
        releases = [asyncio.Event() for _ in range(4)]

        def call(number: int) -> Callable[[], Awaitable[bool]]:
            async def made() -> bool:
                begun.append(number)
                return await releases[number].wait()

            return made

        sizes = (60, 300, 60, 40)  # what is longer than the room is let in alone
        calls = [
            asyncio.ensure_future(
                rig.guard.call("store", call(i), owns_buffers=True, nbytes=nbytes)
            )
            for i, nbytes in enumerate(sizes)
        ]
        for number, expected in enumerate(([0], [0, 1], [0, 1, 2, 3], [0, 1, 2, 3])):
            await steps()
            assert begun == expected
            releases[number].set()
        assert all(answer.ok for answer in await asyncio.gather(*calls))

    run(test)


def test_who_waits_for_room_that_is_lost_is_refused_at_once() -> None:
    async def test() -> None:
        rig, release = Rig(breaker_threshold=100), asyncio.Event()
        rig.guard.max_bytes = 100
        first = asyncio.ensure_future(
            rig.guard.call("store", release.wait, deadline_s=SHORT_S, owns_buffers=True, nbytes=60)
        )
        await steps()
        waiting = [
            rig.guard.call("store", rig.raising(), owns_buffers=True, nbytes=nbytes)
            for nbytes in (60, 40)
        ]
        refused, good = await asyncio.wait_for(asyncio.gather(*waiting), LONG_S)
        assert "never came back" in str(refused.error)
        assert good.ok
        task = (await first).unsettled
        assert task is not None
        release.set()
        await asyncio.wait([task])

    run(test)


def test_waiting_for_room_ends_at_the_deadline_and_loses_none() -> None:
    async def test() -> None:
        rig, release = Rig(breaker_threshold=1), asyncio.Event()
        rig.guard.max_bytes = 100
        store = {"owns_buffers": True, "nbytes": 60}
        first = asyncio.ensure_future(rig.guard.call("store", release.wait, **store))
        await steps()
        late = await rig.guard.call("store", rig.raising(), deadline_s=SHORT_S, **store)
        assert isinstance(late.error, BackendTimeout)
        assert rig.guard.state is BreakerState.CLOSED
        cancelled = asyncio.ensure_future(rig.guard.call("store", rig.raising(), **store))
        await steps()
        cancelled.cancel()
        await asyncio.wait([cancelled])
        assert rig.calls == 0
        release.set()
        assert (await first).ok
        assert (await rig.guard.call("store", rig.raising(), owns_buffers=True, nbytes=100)).ok

    run(test)


def test_a_call_that_can_be_cancelled_is_unsettled_until_it_has_ended() -> None:
    async def test() -> None:
        rig, cancelled, let_go = Rig(breaker_threshold=100), asyncio.Event(), asyncio.Event()
        rig.guard.max_bytes = 100
        rig.guard.cancels = True

        async def hang() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()
                await let_go.wait()

        store = {"owns_buffers": True, "nbytes": 100}
        answer = await rig.guard.call("store", hang, deadline_s=SHORT_S, **store)
        assert answer.unsettled is not None
        await asyncio.wait_for(cancelled.wait(), LONG_S)
        assert not answer.unsettled.done()
        assert not (await rig.guard.call("store", rig.raising(), **store)).ok
        let_go.set()
        await asyncio.wait([answer.unsettled])
        assert (await rig.guard.call("store", rig.raising(), **store)).ok

    run(test)


async def steps(count: int = 10) -> None:
    """Let others go on."""
    for _ in range(count):
        await asyncio.sleep(0)


# -- concurrency ---------------------------------------------------------------------------


def test_no_more_calls_run_than_allowed() -> None:
    async def test() -> None:
        rig, running, most = Rig(), 0, 0
        rig.guard.max_concurrency = 2

        async def call() -> int:
            nonlocal running, most
            running += 1
            most = max(most, running)
            for _ in range(3):
                await asyncio.sleep(0)
            running -= 1
            return 1

        answers = await asyncio.gather(*(rig.guard.call("load", call) for _ in range(7)))
        assert sum(answer.value or 0 for answer in answers) == 7
        assert most == 2

    run(test)


def test_waiting_for_a_turn_ends_at_the_deadline_and_blames_nobody() -> None:
    async def test() -> None:
        rig, release = Rig(breaker_threshold=1), asyncio.Event()
        rig.guard.max_concurrency = 1
        first = asyncio.ensure_future(rig.guard.call("load", release.wait))
        await asyncio.sleep(0)
        answer = await rig.guard.call("load", rig.raising(), deadline_s=SHORT_S, owns_buffers=True)
        assert isinstance(answer.error, BackendTimeout)
        assert answer.unsettled is None
        assert rig.calls == 0
        assert rig.guard.state is BreakerState.CLOSED
        release.set()
        assert (await first).ok
        assert (await rig.guard.call("load", rig.raising())).ok

    run(test)


def test_a_cancelled_wait_for_a_turn_loses_no_turn() -> None:
    async def test() -> None:
        rig, release = Rig(), asyncio.Event()
        rig.guard.max_concurrency = 1
        first = asyncio.ensure_future(rig.guard.call("load", release.wait))
        await asyncio.sleep(0)
        waiting = [asyncio.ensure_future(rig.guard.call("load", rig.raising())) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        release.set()
        await first
        waiting[1].cancel()  # it may have its turn already
        await asyncio.wait(waiting)
        assert waiting[2].result().ok
        assert (await rig.guard.call("load", rig.raising())).ok

    run(test)


# -- breaker -------------------------------------------------------------------------------


def test_the_circuit_opens_after_failures_in_a_row_and_then_calls_nothing() -> None:
    async def test() -> None:
        rig = Rig()
        await rig.fail()
        assert (await rig.guard.call("load", rig.raising())).ok  # not in a row
        await rig.fail()
        assert rig.guard.state is BreakerState.CLOSED
        await rig.fail()
        assert rig.guard.state is BreakerState.OPEN
        assert rig.count("breaker_open") == 1
        calls = rig.calls
        rig.clock.now += 4.0
        answer = await rig.guard.call("load", rig.raising())
        assert isinstance(answer.error, BackendUnavailable)
        assert "circuit open for 6 s" in str(answer.error)
        assert rig.calls == calls
        assert rig.count("backend_errors", operation="load", kind="circuit_open") == 1

    run(test)


def test_deadline_misses_open_the_circuit() -> None:
    async def test() -> None:
        rig = Rig()
        for _ in range(2):
            await rig.guard.call("load", asyncio.Event().wait, deadline_s=SHORT_S)
        assert rig.guard.state is BreakerState.OPEN

    run(test)


def test_rejected_calls_do_not_open_the_circuit() -> None:
    async def test() -> None:
        rig = Rig()
        for _ in range(5):
            await rig.guard.call("store", rig.raising(BackendRejected("read-only")))
        assert rig.guard.state is BreakerState.CLOSED

    run(test)


def test_a_lost_process_neither_opens_the_circuit_nor_keeps_it_open(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test() -> None:
        rig = Rig(retries=3)
        lost = BackendProcessLost("its process isn't running")
        for _ in range(9):
            assert not (await rig.guard.call("load", rig.raising(lost))).ok
        assert rig.guard.state is BreakerState.CLOSED
        assert rig.calls == 9  # none was tried again
        assert rig.count("backend_errors", operation="load", kind="process_lost") == 9
        assert not caplog.records  # who runs the process tells

        await rig.fail(2)
        rig.clock.now += 10.0
        await rig.guard.call("load", rig.raising(lost))
        assert rig.guard.state is BreakerState.OPEN
        assert (await rig.guard.call("load", rig.raising())).ok  # without another rest
        assert rig.guard.state is BreakerState.CLOSED

    run(test)


@pytest.mark.parametrize("error", [None, BackendRejected("read-only")])
def test_one_call_tries_after_the_cooldown_and_closes_the_circuit(
    error: BackendError | None,
) -> None:
    async def test() -> None:
        rig, release, started = Rig(), asyncio.Event(), asyncio.Event()
        await rig.fail(2)
        rig.clock.now += 10.0

        async def probe() -> None:
            started.set()
            await release.wait()
            if error is not None:
                raise error

        probing = asyncio.ensure_future(rig.guard.call("load", probe))
        await started.wait()
        assert rig.guard.state is BreakerState.HALF_OPEN
        calls = rig.calls
        assert not (await rig.guard.call("load", rig.raising())).ok
        assert rig.calls == calls
        release.set()
        await probing
        assert rig.guard.state is BreakerState.CLOSED
        assert rig.count("breaker_open") == 0
        await rig.fail()
        assert rig.guard.state is BreakerState.CLOSED  # counting from zero again

    run(test)


def test_a_failed_probe_waits_again_and_is_not_retried() -> None:
    async def test() -> None:
        rig = Rig(retries=3)
        await rig.fail(2)
        rig.clock.now += 10.0
        calls = rig.calls
        await rig.guard.call("load", rig.raising(*[BackendUnavailable("gone")] * 9))
        assert rig.calls == calls + 1
        assert rig.guard.state is BreakerState.OPEN
        rig.clock.now += 9.0
        await rig.guard.call("load", rig.raising())
        assert rig.calls == calls + 1
        rig.clock.now += 1.0
        assert (await rig.guard.call("load", rig.raising())).ok
        assert rig.count("breaker_open") == 0

    run(test)


def test_a_cancelled_probe_leaves_room_for_the_next() -> None:
    async def test() -> None:
        rig = Rig()
        await rig.fail(2)
        rig.clock.now += 10.0
        probing = asyncio.ensure_future(rig.guard.call("load", asyncio.Event().wait))
        await asyncio.sleep(0)
        assert rig.guard.state is BreakerState.HALF_OPEN
        probing.cancel()
        await asyncio.wait([probing])
        assert rig.guard.state is BreakerState.OPEN
        assert (await rig.guard.call("load", rig.raising())).ok
        assert rig.guard.state is BreakerState.CLOSED

    run(test)


def test_who_waited_for_a_turn_while_the_circuit_opened_is_refused() -> None:
    async def test() -> None:
        rig, release = Rig(breaker_threshold=1, retries=0), asyncio.Event()
        rig.guard.max_concurrency = 1

        async def fail() -> None:
            await release.wait()
            raise BackendUnavailable("gone")

        calls = [
            asyncio.ensure_future(rig.guard.call("load", make)) for make in (fail, rig.raising())
        ]
        await asyncio.sleep(0)
        release.set()
        await asyncio.wait(calls)
        assert "circuit open" in str(calls[1].result().error)
        assert rig.calls == 0
        rig.clock.now += 10.0
        assert (await rig.guard.call("load", rig.raising())).ok  # the turn wasn't lost

    run(test)


def test_once_is_beside_the_breaker_and_unlogged(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        rig = Rig(breaker_threshold=1)
        answer = await rig.guard.once(
            "open", rig.raising(BackendUnavailable("gone")), deadline_s=LONG_S
        )
        assert isinstance(answer.error, BackendUnavailable)
        assert rig.calls == 1
        assert rig.guard.state is BreakerState.CLOSED
        await rig.fail()
        assert (await rig.guard.once("close", rig.raising(), deadline_s=LONG_S)).ok

    run(test)
    assert "gone" not in caplog.text


# -- logging -------------------------------------------------------------------------------


def lines(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [
        (record.levelname, record.getMessage())
        for record in caplog.records
        if record.levelno >= logging.INFO
    ]


def test_one_line_when_the_circuit_opens_and_one_when_it_closes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test() -> None:
        rig = Rig(breaker_threshold=1)
        await rig.fail()
        for _ in range(3):  # failed probes, and calls that are refused
            rig.clock.now += 10.0
            await rig.fail(2)
        rig.clock.now += 10.0
        await rig.guard.call("load", rig.raising())

    with caplog.at_level(logging.INFO):
        run(test)
    assert [level for level, _ in lines(caplog)] == ["WARNING", "INFO"]
    assert "circuit open, failures in a row: 1" in lines(caplog)[0][1]
    assert "broken" in lines(caplog)[0][1]


def test_failures_are_logged_rarely_for_each_operation(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        rig = Rig(breaker_threshold=100)
        await rig.fail(5)
        await rig.fail(1, "store")
        rig.clock.now += 29.0
        await rig.fail(2)
        rig.clock.now += 1.0
        await rig.fail(2)

    run(test)
    assert [text for _, text in lines(caplog)] == [
        "disk: load failed: broken",
        "disk: store failed: broken",
        "disk: load failed: broken (6 more since the last such line)",
    ]


# -- what would end a loop -----------------------------------------------------------------

ENDING = [SystemExit, KeyboardInterrupt, GeneratorExit, StopIteration, asyncio.CancelledError]


@pytest.mark.parametrize("kind", ENDING)
def test_what_ends_loops_is_an_answer(kind: type[BaseException]) -> None:
    """On a loop of ours, which isn't the main thread's, and the next call is answered."""

    async def test() -> None:
        rig = Rig(breaker_threshold=100, retries=0)
        answer = await rig.guard.call("load", rig.raising(kind("from a plugin")))
        assert isinstance(answer.error, Exception)
        assert rig.guard.now("usage", lambda: _raise(kind("here"))).error is not None
        assert (await rig.guard.call("load", rig.raising())).value == "good"

    errors: list[BaseException] = []

    def thread() -> None:
        answer = attempted(run, test)
        errors.extend([] if answer.error is None else [answer.error])

    own = threading.Thread(target=thread)
    own.start()
    own.join(30.0)
    assert not own.is_alive()
    assert errors == []


@pytest.mark.parametrize("kind", ENDING)
def test_attempts_answer_with_an_exception(kind: type[BaseException]) -> None:
    found: list[BaseException | None] = []

    def thread() -> None:
        found.append(attempt(_raise, kind("from a plugin")))
        found.append(attempted(_raise, kind("from a plugin")).error)

    own = threading.Thread(target=thread)
    own.start()
    own.join(30.0)
    assert len(found) == 2
    for error in found:
        assert isinstance(error, PluginRaised)
        assert f"{kind.__name__}: from a plugin" in str(error)


@pytest.mark.parametrize("attempting", [attempt, attempted])
def test_what_a_signal_raises_reaches_the_user(attempting: Callable[..., Any]) -> None:
    """Ctrl-C, and the handler with which an engine ends itself; but no plugin's own exit."""

    def handler(*_: object) -> None:
        raise SystemExit("the engine was told to stop")

    # Shells have it ignored in what they start in the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            attempting(signal.raise_signal, signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(SystemExit, match="told to stop"):
            attempting(signal.raise_signal, signal.SIGUSR1)
        assert attempting(_raise, SystemExit("a plugin's own")) is not None
    finally:
        signal.signal(signal.SIGUSR1, before)


def _raise(error: BaseException) -> None:
    raise error
