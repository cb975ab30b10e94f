"""Runs a backend's coroutines in a test, and notices when one of them blocks the loop.

Whether a call blocks is decided by what it calls, not by how long it takes:
`BlockingCalls` watches the loop's thread for functions that wait for a disk, a
socket, another thread or the clock. What hides inside a C library can't be
seen that way; `Heartbeat` finds it if it stands still for seconds.
"""

from __future__ import annotations

import asyncio
import builtins
import io
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable
from types import FrameType, TracebackType
from typing import Any, TypeVar

_T = TypeVar("_T")

DEADLINE_S = 60.0
"""A call of a test backend that takes longer hangs; the fastest machine says nothing about it."""
STALL_S = 5.0
"""A loop that runs nothing for so long is blocked. No correct backend comes near it."""

_FILE_CALLS = (
    "open read write pread preadv pwrite pwritev fsync fdatasync stat lstat access replace rename "
    "unlink remove mkdir rmdir listdir scandir link symlink truncate ftruncate statvfs sendfile"
)
_BLOCKING = {
    time.sleep,
    builtins.open,
    io.open,
    *(getattr(os, name) for name in _FILE_CALLS.split() if name in os.__all__),
}
_BLOCKING_PYTHON = {
    threading.Condition.wait.__code__: "threading.Condition.wait",
    threading.Thread.join.__code__: "threading.Thread.join",
    subprocess.Popen.__init__.__code__: "subprocess.Popen",
    socket.getaddrinfo.__code__: "socket.getaddrinfo",
}
_SOCKET_CALLS = {"connect", "accept", "recv", "recv_into", "send", "sendall", "recvmsg", "sendmsg"}
_DATABASE_CALLS = {"execute", "executemany", "executescript", "commit", "rollback", "fetchall"}
_THREAD_START = threading.Thread.start.__code__


class Loop:
    """An event loop for one test; `run` is bounded, so that a hang is a failure."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self.hung = False
        """Whether something took longer than `DEADLINE_S`."""

    def __call__(self, work: Awaitable[_T]) -> _T:
        async def bounded() -> _T:
            task = asyncio.ensure_future(work)
            done, _ = await asyncio.wait([task], timeout=DEADLINE_S)
            if not done:
                self.hung = True
                task.cancel()
                raise asyncio.TimeoutError(f"not done after {DEADLINE_S:g} s")
            return await task

        return self._loop.run_until_complete(bounded())

    def stop_own_threads(self) -> None:
        """End the threads of the loop's default executor. Nothing may use it afterwards."""
        self._loop.run_until_complete(self._loop.shutdown_default_executor())

    def close(self) -> None:
        """Cancel what a test left behind and close the loop."""
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        if left:
            self._loop.run_until_complete(asyncio.wait(left))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()


class BlockingCalls:
    """While entered, collects calls on this thread that wait; ``found`` says what and where."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self._before: Any = None

    def __enter__(self) -> BlockingCalls:
        self._before = sys.getprofile()
        sys.setprofile(self._profile)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        sys.setprofile(self._before)

    def _profile(self, frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call":
            name = _blocking_builtin(function)
        elif event == "call":
            name = _BLOCKING_PYTHON.get(frame.f_code, "")
            timeout = frame.f_locals.get("timeout") if name else None
            if timeout is not None and timeout <= 0:
                return  # only asks
        else:
            return
        if name and not _starts_a_thread(frame):
            where = "".join(traceback.format_stack(frame, limit=4))
            self.found.append(f"{name} was called on the event loop's thread:\n{where}")


class Heartbeat:
    """While entered, asks the loop for a sign of life again and again from another thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._loop_thread = threading.get_ident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="conformance-heartbeat")
        self.stalls: list[str] = []

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._stop.wait(0.05):
            answered = threading.Event()
            self._loop.call_soon_threadsafe(answered.set)
            asked = time.monotonic()
            while not answered.wait(0.05):
                if self._stop.is_set():
                    return  # the loop is waiting for this thread to end
                if time.monotonic() - asked < STALL_S:
                    continue
                frame = sys._current_frames().get(self._loop_thread)
                where = "".join(traceback.format_stack(frame, limit=6)) if frame else ""
                self.stalls.append(f"the event loop stood still for {STALL_S:g} s:\n{where}")
                return


def watched(loop: Loop, make: Callable[[], Awaitable[_T]]) -> tuple[_T, list[str]]:
    """Await what ``make`` answers; also answer what in it blocked the loop."""

    async def work() -> tuple[_T, list[str]]:
        with Heartbeat(asyncio.get_running_loop()) as heartbeat, BlockingCalls() as calls:
            answer = await make()
        return answer, [*calls.found, *heartbeat.stalls]

    return loop(work())


def _blocking_builtin(function: Any) -> str:
    owner = getattr(function, "__self__", None)
    name = getattr(function, "__name__", "")
    if isinstance(owner, socket.socket):
        return f"socket.{name}" if name in _SOCKET_CALLS and owner.gettimeout() != 0 else ""
    if isinstance(owner, (sqlite3.Connection, sqlite3.Cursor)):
        return f"sqlite3.{name}" if name in _DATABASE_CALLS else ""
    if function in _BLOCKING:
        return f"{getattr(function, '__module__', '')}.{name}"
    return ""


def _starts_a_thread(frame: FrameType | None) -> bool:
    """An executor that grows waits for its new thread to run: that isn't waiting for work."""
    while frame is not None:
        if frame.f_code is _THREAD_START:
            return True
        frame = frame.f_back
    return False
