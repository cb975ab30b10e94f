"""One child process: its start, calls to it, what it prints, its end.

Knows pids, sockets and time. Knows nothing about backends, nor whether there
is to be a next child.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from lmcache_core.errors import BackendProcessLost, BackendUnavailable
from lmcache_core.isolation.wire import Channel, Message, error_from_plain

logger = logging.getLogger(__name__)

PING_EVERY_S = 1.0
PING_PATIENCE_S = 10.0
_LAST_LINES = 5
_LINE_BYTES = 8192
_DRAIN_S = 0.5
_Pair = tuple[socket.socket, socket.socket]
_MARK = re.compile(r"<(\d)>")
_LEVELS = {3: logging.ERROR, 4: logging.WARNING, 6: logging.INFO, 7: logging.DEBUG}


class Child:
    """A fresh interpreter that serves one backend, or one channel. Lives on one event loop.

    ``gone`` is done once the process is dead and its last lines were read; from the first moment
    that it is dead, every call to it has failed with `BackendProcessLost`, and none of them touches
    a buffer any more. ``memory_bytes``: the private memory that it may take; ``module``: what runs
    in it, beside this one.
    """

    def __init__(
        self, name: str, *, memory_bytes: int | None = None, module: str = "child"
    ) -> None:
        self.name = name
        self._module = module
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.reason = "died"
        """In a word why it is dead, or about to be: ``died``, ``hung``, ``memory``, ``closed``."""
        self._why = ""
        self._loop = asyncio.get_running_loop()
        self._memory_bytes = memory_bytes
        self._calls: dict[int, tuple[str, asyncio.Future[Any], asyncio.TimerHandle]] = {}
        self._number = 0
        self._channel = Channel(self._answered, self._hung_up)
        self._printed = _Lines(self._line)
        self._last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._lock = threading.Lock()
        self._starting: asyncio.Task[None] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._killed = False
        self._returncode: int | None = None
        self._ping_timer: asyncio.TimerHandle | None = None
        self.usage: tuple[int, int] | None = None
        """What the backend last said that it holds."""

    @property
    def alive(self) -> bool:
        """Whether calls have a chance."""
        return self._process is not None and not self._killed and self._returncode is None

    @property
    def pid(self) -> int | None:
        """The process, once it is started."""
        return None if self._process is None else self._process.pid

    async def start(self, fds: Sequence[int]) -> None:
        """Start the interpreter; ``fds`` are inherited under their numbers.

        Raises:
            BackendUnavailable: there can't be another process.
        """
        try:
            control, prints = socket.socketpair(), socket.socketpair()
        except OSError as error:  # too many open files
            self.gone.set_result(None)
            raise BackendUnavailable(f"{self.name}: no process: {error.strerror}") from error
        # Not to be left half done: `gone` tells the rest to whoever doesn't wait for it.
        self._starting = self._loop.create_task(self._start(control, prints, fds))
        await asyncio.shield(self._starting)

    async def _start(self, control: _Pair, prints: _Pair, fds: Sequence[int]) -> None:
        started: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(
            target=self._live,
            args=(control[1], prints[1], fds, started),
            name=f"lmcache-{self.name}-process",
            daemon=True,
        )
        self._thread.start()
        for (ours, _), protocol in ((control, self._channel), (prints, self._printed)):
            ours.setblocking(False)
            await self._loop.create_unix_connection(_always(protocol), sock=ours)
        await started

    def ask(self, what: str, patience_s: float, **facts: Any) -> asyncio.Future[Any]:
        """Call the child. A child that hasn't answered after ``patience_s`` is killed.

        The future is done when the answer is there or the process is dead, never before, and
        isn't to be cancelled: until then the child may use the buffers of the call.

        Raises:
            BackendProcessLost: it is dead.
        """
        if not self.alive:
            raise BackendProcessLost(f"{self.name}: {self.end}")
        self._number = number = self._number + 1
        self._channel.send({"id": number, "do": what, **facts})
        future: asyncio.Future[Any] = self._loop.create_future()
        timer = self._loop.call_later(patience_s, self._overdue, what, patience_s)
        self._calls[number] = what, future, timer
        return future

    def watch(self) -> None:
        """From now on see to it that its event loop runs and that it isn't too large."""
        self._ping_timer = self._loop.call_later(PING_EVERY_S, self._ping)

    def kill(self, reason: str, why: str = "") -> None:
        """End it, if it hasn't ended; ``gone`` says when that is done."""
        if not self._killed and self._returncode is None:
            self.reason, self._why, self._killed = reason, why, True
            self._signal()

    @property
    def end(self) -> str:
        """In words how it ended; with the last that it printed, where nobody killed it."""
        if self._returncode is None and not self._killed:
            return "its process is running"
        if self._why:
            return f"its process was killed: {self._why}"
        if self._returncode is None or self.reason == "closed":
            return "its process is gone"
        return f"its process {describe_exit(self._returncode)}"

    @property
    def last_lines(self) -> str:
        """What it printed last, as one line."""
        return " | ".join(self._last_lines)

    def join(self) -> None:
        """After ``gone``: let its thread, which is about to end, end."""
        if self._thread is not None:
            self._thread.join(1.0)

    # -- the thread ------------------------------------------------------------------------

    def _live(
        self,
        control: socket.socket,
        prints: socket.socket,
        fds: Sequence[int],
        started: asyncio.Future[None],
    ) -> None:
        """Start the process and wait for its end.

        The child asks the kernel to be killed when the thread that started it ends, so it has to
        be this one, which outlives it.
        """
        module = f"{__package__}.{self._module}"
        # Nothing that lies in the current folder by chance is to be imported.
        flags = ["-u", "-X", "faulthandler", *(["-P"] if sys.version_info >= (3, 11) else [])]
        arguments = [self.name, str(control.fileno()), str(os.getpid())]
        command = [sys.executable, *flags, "-m", module, *arguments]
        # The same modules as here, from the first import on.
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=prints.fileno(),
                stderr=prints.fileno(),
                env=environ,
                pass_fds=[control.fileno(), *fds],
                start_new_session=True,  # Ctrl-C is for the engine, which closes us
            )
        except OSError as error:
            text = f"{self.name}: can't start {sys.executable or 'Python'}: {error.strerror}"
            self._tell(lambda: started.set_exception(BackendUnavailable(text)))
            self._tell(lambda: self._ended(127))
            return
        finally:
            control.close()
            prints.close()
        self._process = process
        if self._killed:  # before there was anything to kill
            self._signal()
        self._tell(lambda: started.set_result(None))
        with suppress(ChildProcessError):  # this process ignores SIGCHLD, or reaps strangers
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with self._lock:
            # Until the process is reaped, its number is nobody else's.
            self._signal_group(process)
            returncode = process.wait()
        self._tell(lambda: self._ended(returncode))

    def _tell(self, call: Callable[[], object]) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(call)

    def _signal(self) -> None:
        process = self._process
        with self._lock:
            if process is not None and process.returncode is None:
                self._signal_group(process)

    @staticmethod
    def _signal_group(process: subprocess.Popen[bytes]) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # whatever it started maps our memory, too

    # -- the loop --------------------------------------------------------------------------

    def _answered(self, answer: Message) -> None:
        number = answer.get("id")
        asked = self._calls.pop(number, None) if isinstance(number, int) else None
        if asked is None:
            self.kill("died", "it answered what it wasn't asked")
            return
        _, future, timer = asked
        timer.cancel()
        usage = answer.get("usage")
        if isinstance(usage, list) and len(usage) == 2:
            self.usage = usage[0], usage[1]
        if "error" in answer:
            _fail(future, error_from_plain(answer["error"]))
        else:
            future.set_result(answer.get("ok"))

    def _hung_up(self, wrong: str) -> None:
        if wrong:
            self.kill("died", wrong)
        else:
            self._signal()  # it ended, or closed what it shouldn't have

    def _overdue(self, what: str, patience_s: float) -> None:
        said = "its event loop didn't run" if what == "ping" else f"{what} wasn't answered"
        self.kill("hung", f"{said} for {patience_s:g} s")

    def _ping(self) -> None:
        if self.alive:
            self.ask("ping", PING_PATIENCE_S).add_done_callback(self._pinged)

    def _pinged(self, answer: asyncio.Future[Any]) -> None:
        if answer.exception() is not None or not self.alive:
            return
        taken, limit = answer.result(), self._memory_bytes
        if limit is not None and isinstance(taken, int) and taken > limit:
            text = f"{taken / 2**30:.2f} GiB of memory, and may have {limit / 2**30:.2f} GiB"
            self.kill("memory", f"it took {text} (isolated_memory_gib)")
            return
        self.watch()

    def _ended(self, returncode: int) -> None:
        self._returncode = returncode
        if self._ping_timer is not None:
            self._ping_timer.cancel()
        calls, self._calls = list(self._calls.values()), {}
        for what, future, timer in calls:
            timer.cancel()
            _fail(future, BackendProcessLost(f"{self.name}: {what}: {self.end}"))
        self._channel.close()
        # Something that it started and that outlived it may keep the other end open.
        timer = self._loop.call_later(_DRAIN_S, self._printed.close)

        def finish(_: asyncio.Future[None]) -> None:
            timer.cancel()
            self.gone.set_result(None)

        self._printed.ended.add_done_callback(finish)

    def _line(self, line: str) -> None:
        mark = _MARK.match(line)
        level = _LEVELS.get(int(mark[1]), logging.INFO) if mark else logging.INFO
        text = line[mark.end() :] if mark else line
        self._last_lines.append(text)
        logger.log(level, "%s: %s", self.name, text)


def _always(protocol: asyncio.Protocol) -> Callable[[], asyncio.Protocol]:
    return lambda: protocol


class _Lines(asyncio.Protocol):
    """Cuts what is printed into lines."""

    def __init__(self, on_line: Callable[[str], object]) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._on_line = on_line
        self._rest = b""
        self._transport: asyncio.BaseTransport | None = None

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _LINE_BYTES:
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            self._tell(line)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self._tell(self._rest)
        if not self.ended.done():
            self.ended.set_result(None)

    def _tell(self, line: bytes) -> None:
        text = line.decode(errors="replace").strip()
        if text:
            self._on_line(text[:_LINE_BYTES])


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    future.set_exception(error)
    future.exception()  # retrieved: perhaps nobody waits any more


def describe_exit(returncode: int) -> str:
    """How a process ended, as subprocess puts it, in words."""
    if returncode >= 0:
        return f"ended with exit code {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    return f"was killed by {name}"
