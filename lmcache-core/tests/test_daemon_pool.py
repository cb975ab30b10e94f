"""Calls run, arguments are let go of, and a stuck call stops nobody from leaving."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

from lmcache_core.aio.daemon_pool import DaemonPool
from lmcache_core.errors import PluginRaised


def test_results_and_exceptions_come_back() -> None:
    pool = DaemonPool(2, "test")
    assert pool.submit(divmod, 7, 2).result(10) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        pool.submit(divmod, 7, 0).result(10)
    pool.shutdown()
    assert pool.join(10)


def test_calls_run_side_by_side() -> None:
    pool = DaemonPool(4, "test")
    barrier = threading.Barrier(4)
    futures = [pool.submit(barrier.wait, 10) for _ in range(4)]
    assert sorted(future.result(10) for future in futures) == [0, 1, 2, 3]
    pool.shutdown()
    assert pool.join(10)


def test_more_calls_than_threads_wait_their_turn() -> None:
    pool = DaemonPool(1, "test")
    assert [pool.submit(abs, -n).result(10) for n in range(50)] == list(range(50))
    pool.shutdown()
    assert pool.join(10)


@pytest.mark.parametrize("fails", [False, True])
def test_arguments_are_let_go_of_before_the_result_is_known(fails: bool) -> None:
    pool = DaemonPool(1, "test")

    def use(view: memoryview) -> int:
        return view[len(view)] if fails else view[0]

    for _ in range(200):
        buffer = bytearray(8)
        future = pool.submit(use, memoryview(buffer))
        if fails:
            assert isinstance(future.exception(10), IndexError)
        else:
            assert future.result(10) == 0
        buffer.append(1)  # BufferError while anybody still holds a view
    pool.shutdown()
    assert pool.join(10)


def test_an_event_loop_awaits_results_and_exceptions() -> None:
    pool = DaemonPool(2, "test")

    async def use() -> None:
        assert await pool.run(divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            await pool.run(divmod, 7, 0)

    asyncio.run(use())
    pool.shutdown()
    assert pool.join(10)


@pytest.mark.parametrize("fails", [False, True])
def test_arguments_are_let_go_of_before_a_loop_knows_the_result(fails: bool) -> None:
    pool = DaemonPool(1, "test")

    def use(view: memoryview) -> int:
        return view[len(view)] if fails else view[0]

    async def repeat() -> None:
        for _ in range(200):
            buffer = bytearray(8)
            (done,) = await asyncio.gather(
                pool.run(use, memoryview(buffer)), return_exceptions=True
            )
            assert isinstance(done, IndexError) if fails else done == 0
            buffer.append(1)  # BufferError while anybody still holds a view

    asyncio.run(repeat())
    pool.shutdown()
    assert pool.join(10)


def test_a_call_that_is_cancelled_before_its_turn_is_left_out() -> None:
    pool = DaemonPool(1, "test")
    busy, ran = threading.Event(), list[str]()

    async def use() -> None:
        first = pool.run(busy.wait, 10)
        second = pool.run(ran.append, "second")
        third = pool.run(ran.append, "third")
        second.cancel()
        busy.set()
        await asyncio.gather(first, third)

    asyncio.run(use())
    assert ran == ["third"]
    pool.shutdown()
    assert pool.join(10)


def test_nobody_waits_for_a_call_that_outlives_its_loop() -> None:
    pool = DaemonPool(1, "test")
    busy = threading.Event()

    async def leave() -> None:
        pool.run(busy.wait, 10)

    asyncio.run(leave())
    busy.set()
    assert pool.submit(abs, -1).result(10) == 1  # the thread lives on
    pool.shutdown()
    assert pool.join(10)


def test_after_shutdown_nothing_is_taken() -> None:
    pool = DaemonPool(1, "test")
    pool.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        pool.submit(abs, 1)


def test_a_stuck_call_does_not_keep_the_interpreter_from_exiting() -> None:
    program = (
        "import threading\n"
        "from lmcache_core.aio.daemon_pool import DaemonPool\n"
        "stuck = threading.Event()\n"
        "pool = DaemonPool(1, 'test')\n"
        "pool.submit(stuck.wait)\n"
        "pool.shutdown()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], timeout=60, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize(
    "kind", [StopIteration, SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError]
)
def test_what_no_future_can_hold_is_told_in_words(kind: type[BaseException]) -> None:
    """Whoever awaits it isn't cancelled, and doesn't wait for ever; the thread goes on."""
    pool = DaemonPool(1, "contained")

    def fail() -> None:
        raise kind("from a plugin")

    async def awaits() -> None:
        with pytest.raises(PluginRaised, match=f"{kind.__name__}: from a plugin"):
            await pool.run(fail)
        assert await pool.run(lambda: 7) == 7

    asyncio.run(awaits())
    with pytest.raises(PluginRaised, match="from a plugin"):
        pool.submit(fail).result(10.0)
    pool.shutdown()
    assert pool.join(10.0)
