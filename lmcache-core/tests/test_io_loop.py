"""The I/O loop: it answers, it stops, and it never makes anybody wait for ever."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest

from lmcache_core.aio.io_loop import IOLoop
from lmcache_core.errors import PluginRaised


@pytest.fixture
def loop() -> Iterator[IOLoop]:
    loop = IOLoop("test")
    yield loop
    loop.close(10.0)


async def answer(value: object) -> object:
    return value


async def forever() -> None:
    await asyncio.Event().wait()


def test_run_answers_from_another_thread(loop: IOLoop) -> None:
    async def thread() -> str:
        return threading.current_thread().name

    assert loop.run(thread(), 10.0) == "lmcache-test"


def test_run_raises_what_the_coroutine_raises(loop: IOLoop) -> None:
    async def fail() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        loop.run(fail(), 10.0)


def test_run_gives_up_and_cancels(loop: IOLoop) -> None:
    cancelled = threading.Event()

    async def slow() -> None:
        try:
            await forever()
        finally:
            cancelled.set()

    with pytest.raises(TimeoutError, match=r"no result after 0\.01 s"):
        loop.run(slow(), 0.01)
    assert cancelled.wait(10.0) or pytest.fail("the coroutine goes on")


def test_run_on_its_own_thread_is_refused(loop: IOLoop) -> None:
    async def outer() -> None:
        loop.run(answer(1), 10.0)

    with pytest.raises(RuntimeError, match="its own thread"):
        loop.run(outer(), 10.0)


def test_submit_runs_at_the_same_time(loop: IOLoop) -> None:
    async def meet(mine: asyncio.Event, theirs: asyncio.Event) -> bool:
        mine.set()
        return await theirs.wait()

    first, second = asyncio.Event(), asyncio.Event()
    futures = [loop.submit(meet(first, second)), loop.submit(meet(second, first))]
    assert [future.result(10.0) for future in futures] == [True, True]


def test_call_soon_keeps_the_order(loop: IOLoop) -> None:
    seen: list[int] = []
    for number in range(5):
        loop.call_soon(lambda number=number: seen.append(number))
    loop.run(answer(None), 10.0)
    assert seen == [0, 1, 2, 3, 4]


def test_close_cancels_what_is_left() -> None:
    loop, cleaned_up = IOLoop("test"), threading.Event()

    async def clean() -> None:
        try:
            await forever()
        finally:
            cleaned_up.set()

    future = loop.submit(clean())
    loop.run(answer(None), 10.0)
    loop.close(10.0)
    assert cleaned_up.is_set()
    with pytest.raises(CancelledError):
        future.result(10.0)


def test_close_is_idempotent_and_final() -> None:
    loop = IOLoop("test")
    loop.close(10.0)
    loop.close(10.0)
    for refused in (
        lambda: loop.submit(forever()),
        lambda: loop.run(forever(), 1.0),
        lambda: loop.call_soon(lambda: None),
    ):
        with pytest.raises(RuntimeError, match="closed"):
            refused()


def test_close_on_its_own_thread_ends_it() -> None:
    loop = IOLoop("test")
    loop.call_soon(lambda: loop.close(10.0))
    loop._thread.join(10.0)
    assert not loop._thread.is_alive()


def test_close_leaves_a_blocked_loop_behind(caplog: pytest.LogCaptureFixture) -> None:
    loop, blocked, release = IOLoop("test"), threading.Event(), threading.Event()

    def block() -> None:
        blocked.set()
        release.wait(30.0)

    loop.call_soon(block)
    assert blocked.wait(10.0)
    future = loop.submit(forever())
    loop.close(0.01)
    assert "didn't end" in caplog.text
    with pytest.raises(CancelledError):  # and not for ever
        future.result(10.0)
    release.set()
    loop._thread.join(10.0)
    assert not loop._thread.is_alive()


def test_close_leaves_a_task_behind_that_will_not_be_cancelled() -> None:
    loop, release = IOLoop("test"), asyncio.Event()

    async def stubborn() -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:  # noqa: PERF203 - that is the point
                loop._loop.call_later(0.05, release.set)  # long after close() gave up

    future = loop.submit(stubborn())
    loop.run(answer(None), 10.0)
    loop.close(0.01)
    with pytest.raises(CancelledError):
        future.result(10.0)
    loop._thread.join(10.0)
    assert not loop._thread.is_alive()


def test_a_waiting_run_ends_when_the_loop_is_closed(loop: IOLoop) -> None:
    running = threading.Event()

    async def wait() -> None:
        running.set()
        await forever()

    def close() -> None:
        running.wait(10.0)
        loop.close(10.0)

    closer = threading.Thread(target=close)
    closer.start()
    with pytest.raises(TimeoutError, match="closed meanwhile"):
        loop.run(wait(), 30.0)
    closer.join()


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_forked_child_is_told_so(loop: IOLoop) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        said = "nothing was raised"
        try:
            loop.run(answer(1), 5.0)
        except RuntimeError as error:
            said = str(error)
        loop.close(5.0)  # harmless
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    assert "forked child" in said
    assert loop.run(answer(2), 10.0) == 2


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_what_ends_an_asyncio_loop_does_not_end_this_one(
    loop: IOLoop, kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    """Raised by a coroutine, by a callback and by a callback of a future that is done."""

    def exits(*_: object) -> None:
        raise kind("from a plugin")

    async def fail() -> None:
        exits()

    async def calls_back() -> None:
        asyncio.get_running_loop().create_task(asyncio.sleep(0)).add_done_callback(exits)
        await asyncio.sleep(0)

    with pytest.raises(PluginRaised, match=f"{kind.__name__}: from a plugin"):
        loop.run(fail(), 10.0)
    loop.call_soon(exits)
    loop.run(calls_back(), 10.0)
    assert loop.run(answer(7), 10.0) == 7
    assert "goes on after a callback raised" in caplog.text


def test_a_loop_that_is_closing_ends_whatever_is_raised(loop: IOLoop) -> None:
    async def fail() -> None:
        try:
            await forever()
        finally:
            raise SystemExit("while it is cancelled")

    future = loop.submit(fail())
    loop.run(answer(1), 10.0)
    loop.close(10.0)
    assert future.done()
    assert not loop._thread.is_alive()
