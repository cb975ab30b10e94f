"""Prefixes that are brought into host memory while nobody waits for them.

One thread follows all of them, each until it is done or its deadline has come: what one tier holds
up costs the others nothing, and those that want the same chunks share one fetch.

Knows lookups and futures. Knows nothing about what is looked up.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

from lmcache_core.aio.guard import attempted


class Followed(Protocol):
    """What is followed. All of it is called with the lock of ``news`` held."""

    @property
    def left_s(self) -> float:
        """Seconds until it is done, whatever has come by then."""

    def advance(self) -> int | None:
        """Do what can be done now; answer what its future is to say, or ``None``: not yet."""

    def give_up(self) -> int:
        """Settle for what is there."""

    def end(self) -> None:
        """Let go of everything; nothing else is called afterwards."""


class Prefetches:
    """Follows what `add` is given; whoever has news notifies ``news``. Thread-safe."""

    def __init__(self, news: threading.Condition) -> None:
        self._news = news
        self._pending: list[tuple[Followed, Future[int]]] = []
        self._thread: threading.Thread | None = None
        self._closed = False

    def add(self, followed: Followed) -> Future[int]:
        """Follow it from now on. A future that is cancelled ends it.

        Raises:
            RuntimeError: `close` was called.
        """
        future: Future[int] = Future()
        with self._news:
            if self._closed:
                attempted(followed.end)
                raise RuntimeError("the cache is closed: nothing can be prefetched any more")
            try:
                done = self._tried(followed, future)
            except BaseException:  # Ctrl-C
                followed.end()
                raise
            if done is None:
                self._pending.append((followed, future))
                self._news.notify_all()
                if self._thread is None:
                    self._thread = threading.Thread(
                        target=self._follow, name="lmcache-prefetch", daemon=True
                    )
                    self._thread.start()
        if done is not None:
            done()
        return future

    def close(self, timeout_s: float) -> None:
        """Settle for what is there by now, everywhere, and end the thread. Idempotent."""
        with self._news:
            self._closed = True
            self._news.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout_s)

    def _follow(self) -> None:
        over = False
        while not over:
            with self._news:
                tried = [(one, self._tried(*one)) for one in self._pending]
                self._pending = [one for one, done in tried if done is None]
                if all(done is None for _, done in tried) and not self._closed:
                    left = [followed.left_s for followed, _ in self._pending]
                    self._news.wait(min(left, default=None))
                over = self._closed and not self._pending
            for _, done in tried:
                if done is not None:
                    attempted(done)  # without the lock: it runs what others added to their future

    def _tried(self, followed: Followed, future: Future[int]) -> Callable[[], None] | None:
        """Go on with one; what tells its future once it is over."""
        step: Callable[[], int | None] = followed.advance
        if self._closed or future.cancelled():
            step = followed.give_up
        found = attempted(step)
        if found.value is None and found.error is None:
            return None
        attempted(followed.end)

        def tell() -> None:
            if not future.set_running_or_notify_cancel():
                return
            if found.error is not None:
                future.set_exception(found.error)
            else:
                future.set_result(found.value or 0)

        return tell
