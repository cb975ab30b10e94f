"""One daemon thread that runs an asyncio event loop: where all slow I/O lives.

Knows threads and futures. Knows nothing about what runs on it, and applies no
deadline of its own to it: that is `guard`'s business.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future, wait
from typing import Any, TypeVar

from lmcache_core.aio.guard import attempt
from lmcache_core.errors import contained

logger = logging.getLogger(__name__)
T = TypeVar("T")

EARLY = 0.95
"""Of the time that somebody waits, what runs on a loop gets: the rest is for it to say so."""


def left_of(timeout_s: float, clock: Callable[[], float] = time.monotonic) -> Callable[[], float]:
    """What is left of ``timeout_s`` from now on, in seconds: for each step of a call in turn."""
    until = clock() + timeout_s
    return lambda: max(0.0, until - clock())


class IOLoop:
    """An event loop on a thread of its own, started at once. All methods are thread-safe.

    A forked child has no copy of the thread. There, every method but `close` raises instead of
    waiting for ever.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._closed = self._stopped = False
        self._waiting: set[Future[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=f"lmcache-{name}", daemon=True)
        self._thread.start()

    def submit(self, coro: Coroutine[Any, Any, T]) -> Future[T]:
        """Run ``coro`` on the loop. Cancelling the future cancels it.

        Raises:
            RuntimeError: the loop is closed, or belongs to another process.
        """
        try:
            self._check_process()
            with self._lock:
                self._check_open()
                future = asyncio.run_coroutine_threadsafe(coro, self._loop)
                self._waiting.add(future)
        except RuntimeError:
            coro.close()  # or Python warns that nobody awaited it
            raise
        future.add_done_callback(self._forget)
        return future

    def run(self, coro: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """Run ``coro`` on the loop and wait for what it returns or raises.

        Raises:
            TimeoutError: it took longer than ``timeout_s``, and was cancelled; or the loop was
                closed meanwhile.
            RuntimeError: the loop is closed, belongs to another process, or this is its thread.
        """
        if threading.current_thread() is self._thread and os.getpid() == self._pid:
            coro.close()
            raise RuntimeError(
                f"I/O loop {self._name}: run() on its own thread would wait for ever"
            )
        future = self.submit(coro)
        wait([future], timeout_s)
        if not future.done() and future.cancel():
            waited = f"{round(timeout_s, 3):g} s"
            raise TimeoutError(f"I/O loop {self._name}: no result after {waited}")
        try:
            error = future.exception()
        except CancelledError:
            raise TimeoutError(f"I/O loop {self._name} was closed meanwhile") from None
        if error is not None:
            raise contained(error)  # somebody's SystemExit isn't this thread's
        return future.result()

    def call_soon(self, call: Callable[[], object]) -> None:
        """Call ``call`` on the loop's thread, after what is already waiting there.

        Raises:
            RuntimeError: the loop is closed, or belongs to another process.
        """
        self._check_process()
        with self._lock:
            self._check_open()
            self._loop.call_soon_threadsafe(call)

    def close(self, timeout_s: float) -> None:
        """Cancel what is left and end the thread. Idempotent; harmless in a forked child.

        Never takes much longer than ``timeout_s``: a task that won't be cancelled is left behind.
        Whoever waits for a future gets ``CancelledError``.
        """
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._loop.call_soon_threadsafe(self._begin_stop, timeout_s)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                logger.warning(
                    "I/O loop %s didn't end within %g s; its thread is left behind",
                    self._name,
                    timeout_s,
                )
            self._abandon()

    def _check_process(self) -> None:
        # Before the lock is taken: another thread may have held it when this process was forked.
        if os.getpid() != self._pid:
            raise RuntimeError(
                f"I/O loop {self._name} was started by process {self._pid}, this is "
                f"{os.getpid()}: a forked child has no copy of its thread. Create the cache after "
                "the fork, or start processes with the spawn method"
            )

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(f"I/O loop {self._name} is closed")

    def _forget(self, future: Future[Any]) -> None:
        with self._lock:
            self._waiting.discard(future)

    def _abandon(self) -> None:
        with self._lock:
            waiting = list(self._waiting)
        for future in waiting:
            future.cancel()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            # asyncio lets what callbacks and tasks raise as SystemExit end its loop.
            while (error := attempt(self._loop.run_forever)) is not None and not self._stopped:
                logger.error("I/O loop %s goes on after a callback raised: %s", self._name, error)
        finally:
            self._abandon()
            asyncio.set_event_loop(None)
            self._loop.close()

    def _begin_stop(self, timeout_s: float) -> None:
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        ended = self._loop.create_task(self._wait_for(tasks, timeout_s))
        ended.add_done_callback(self._stop)

    def _stop(self, _: asyncio.Task[None]) -> None:
        self._stopped = True
        self._loop.stop()

    async def _wait_for(self, tasks: set[asyncio.Task[Any]], timeout_s: float) -> None:
        if tasks:
            # Less than close() waits, so that the thread still ends in time.
            await asyncio.wait(tasks, timeout=0.8 * timeout_s)
        for task in tasks:
            if task.done() and not task.cancelled():
                task.exception()  # retrieved: somebody else's future tells about it
