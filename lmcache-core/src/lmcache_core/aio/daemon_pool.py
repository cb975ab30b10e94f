"""Threads for calls that block, and that may block for ever.

`concurrent.futures.ThreadPoolExecutor` joins its threads when the interpreter
exits, so one call stuck in a client library or a dead NFS mount keeps a whole
engine from stopping. These threads are daemons. And a call's arguments are let
go of before its result is known, so that a buffer is free when its call is over.

Knows calls. Knows nothing about who makes them.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

from lmcache_core.aio.futures import settle_soon
from lmcache_core.errors import contained

_T = TypeVar("_T")


class _OnLoop:
    """What a thread needs of a future, for one that an event loop awaits."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.awaited: asyncio.Future[Any] = loop.create_future()

    def set_running_or_notify_cancel(self) -> bool:
        return not self.awaited.cancelled()

    def set_result(self, result: Any) -> None:
        settle_soon(self.awaited, result)

    def set_exception(self, error: BaseException) -> None:
        settle_soon(self.awaited, error=error)


_Call = tuple["Future[Any] | _OnLoop", Callable[..., Any], tuple[Any, ...]]


class DaemonPool:
    """At most ``threads`` daemon threads, started when they are first needed."""

    def __init__(self, threads: int, name: str) -> None:
        self._limit = threads
        self._name = name
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[tuple[threading.Thread, Future[None]]] = []
        self._idle = 0
        self._closed = False

    def submit(self, call: Callable[..., _T], *args: Any) -> Future[_T]:
        """Run ``call(*args)`` on one of the threads.

        Raises:
            RuntimeError: the pool is shut down.
        """
        future: Future[_T] = Future()
        self._put((future, call, args))
        return future

    def run(self, call: Callable[..., _T], *args: Any) -> asyncio.Future[_T]:
        """Like `submit`, for the running event loop to await: quicker than wrapping its future.

        Raises:
            RuntimeError: the pool is shut down.
        """
        future = _OnLoop(asyncio.get_running_loop())
        self._put((future, call, args))
        return future.awaited

    def shutdown(self) -> list[Future[None]]:
        """Take no more calls; answer one future a thread, done when that thread is about to end."""
        with self._lock:
            if not self._closed:
                self._closed = True
                for _ in self._threads:
                    self._calls.put(None)
            return [ended for _, ended in self._threads]

    def join(self, timeout_s: float) -> bool:
        """After `shutdown`: wait for all threads together; False if some are still busy."""
        until = time.monotonic() + timeout_s
        for thread, _ in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread, _ in self._threads)

    def _put(self, item: _Call) -> None:
        with self._lock:
            if self._closed:
                raise RuntimeError(f"the thread pool {self._name} is shut down")
            self._calls.put(item)
            if self._idle:
                self._idle -= 1
            elif len(self._threads) < self._limit:
                self._start()

    def _start(self) -> None:
        ended: Future[None] = Future()
        thread = threading.Thread(
            target=self._work,
            args=(ended,),
            name=f"{self._name}-{len(self._threads)}",
            daemon=True,
        )
        self._threads.append((thread, ended))
        thread.start()

    def _work(self, ended: Future[None]) -> None:
        while (item := self._calls.get()) is not None:
            future, call, args = item
            del item
            if not future.set_running_or_notify_cancel():
                self._rest()
                continue
            try:
                result = call(*args)
            except BaseException as error:  # noqa: BLE001 - handed to whoever waits for the result
                del call, args
                self._rest()
                # The traceback's frames hold the arguments.
                future.set_exception(contained(error.with_traceback(None)))
            else:
                del call, args
                self._rest()
                future.set_result(result)
                del result
            del future
        if ended.set_running_or_notify_cancel():  # else whoever waited for it gave up
            ended.set_result(None)

    def _rest(self) -> None:
        with self._lock:
            self._idle += 1
