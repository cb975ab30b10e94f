"""The process of one isolated backend: makes it, calls it as asked, answers.

    python -m lmcache_core.isolation.child NAME CONTROL_FD PARENT_PID

Started by `process`, never by hand; NAME is for whoever lists processes. Dies with its parent.
Knows nothing about deadlines: the parent kills a process that it is tired of.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from lmcache_core.aio.guard import attempt, contain
from lmcache_core.chunks.keys import ChunkKey
from lmcache_core.contracts.storage import (
    BackendCapabilities,
    BlockingBackend,
    HostRegion,
    ReportsUsage,
    StorageBackend,
    StoreOutcome,
    SupportsClear,
    SupportsDelete,
    SupportsPrefixLookup,
)
from lmcache_core.errors import BackendUnavailable, LMCacheError, PluginError
from lmcache_core.isolation.wire import (
    ARENA,
    Answers,
    Channel,
    Message,
    context_from_plain,
    error_to_plain,
)
from lmcache_core.memory.host_memory import PAGE_BYTES, attach
from lmcache_core.plugins.creation import NotCreated, created
from lmcache_core.plugins.manager import Plugins

_PR_SET_PDEATHSIG = 1
_KILL_FIRST = "1000"
"""oom_score_adj: if memory runs out, this process can be replaced, the engine can't."""

_ANSWERED = object()
"""The result of a call whose answer was sent by the thread that made it."""

OPTIONAL_METHODS: dict[str, type] = {
    "count_leading_hits": SupportsPrefixLookup,
    "delete": SupportsDelete,
    "clear": SupportsClear,
    "usage": ReportsUsage,
}

SYSLOG_LEVELS = {7: logging.DEBUG, 6: logging.INFO, 4: logging.WARNING, 3: logging.ERROR}
"""As in sd-daemon(3), ``<4>text`` on standard error is a warning."""


class Service:
    """Answers requests, each in a task of its own. Lives on the process's one event loop."""

    def __init__(self, control: socket.socket) -> None:
        self.channel = Channel(self._asked, lambda _: os._exit(0))
        self._answers = Answers(control.dup(), lambda: os._exit(0))
        self._backend: StorageBackend | None = None
        self._memory: list[HostRegion | None] = []
        self._tasks: set[asyncio.Task[Any]] = set()

    def _asked(self, request: Message) -> None:
        task = asyncio.get_running_loop().create_task(self._contained(request))
        self._tasks.add(task)
        task.add_done_callback(partial(self._done, request["id"]))

    async def _contained(self, request: Message) -> Any:
        return await contain(self._do(request))

    def _done(self, number: int, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            self._answer_error(number, BackendUnavailable("the call was cancelled"))
        elif (error := task.exception()) is not None:
            self._answer_error(number, error)
        elif (result := task.result()) is not _ANSWERED:
            self._answer(number, result)

    def _answer(self, number: int, result: Any) -> None:
        """From any thread."""
        answer = {"id": number, "ok": result, "usage": self._usage()}
        error = attempt(self._answers.send, answer)  # a backend may answer whatever it likes
        if error is not None:
            self._answer_error(number, error)

    def _answer_error(self, number: int, error: BaseException) -> None:
        self._answers.send({"id": number, "error": error_to_plain(error)})

    async def _do(self, request: Message) -> Any:
        what = request["do"]
        if what == "open":
            return await self._open(request)
        if what == "ping":
            return private_bytes()
        backend: Any = self._backend
        if backend is None:
            raise BackendUnavailable("the backend isn't open")
        if what in ("close", "clear"):
            return await getattr(backend, what)()
        keys = [ChunkKey(bytes.fromhex(key)) for key in request["keys"]]
        if what not in ("load", "store"):
            return await getattr(backend, what)(keys)
        buffers = [self._buffer(*place) for place in request["places"]]
        if isinstance(backend, BlockingBackend) and _only_blocks(backend, what):
            return await backend._run(self._call, request["id"], backend, what, keys, buffers)
        return _plain(what, await getattr(backend, what)(keys, buffers))

    def _call(self, number: int, backend: BlockingBackend, what: str, *args: Any) -> object:
        """On a thread of the backend: make a call and answer it, before the loop hears of it."""
        call = getattr(backend, f"{what}_blocking")
        results: list[Any] = []
        error = attempt(lambda: results.append(_plain(what, call(*args))))
        if error is None:
            self._answer(number, results[0])
        else:
            self._answer_error(number, error)
        return _ANSWERED

    def _buffer(self, space: int, start: int, nbytes: int) -> memoryview:
        region = self._memory[space]
        if region is None:
            raise ValueError(f"no memory is shared that {nbytes} bytes at {start} could lie in")
        return region.view[start : start + nbytes]

    async def _open(self, request: Message) -> dict[str, Any]:
        sys.path[:] = request["sys_path"]
        log_to_stderr(request["log_level"])
        self._memory = [None if one is None else attached(*one) for one in request["memory"]]
        try:
            backend = _make(request["type"], request["where"], request["options"])
        except LMCacheError as error:
            raise NotCreated(error) from error
        await backend.open(context_from_plain(request["context"], self._memory[ARENA]))
        capabilities = backend.capabilities
        if not isinstance(capabilities, BackendCapabilities):
            raise TypeError(f"capabilities are {capabilities!r}, not BackendCapabilities")
        self._backend = backend
        methods = [name for name, one in OPTIONAL_METHODS.items() if isinstance(backend, one)]
        return {"capabilities": asdict(capabilities), "methods": methods}

    def _usage(self) -> list[int] | None:
        """What `usage` says, which the parent has to know before it is asked."""
        backend, usage = self._backend, list[int]()
        if not isinstance(backend, ReportsUsage):
            return None
        failed = attempt(lambda: usage.extend(map(int, backend.usage())))
        return None if failed else usage


def attached(fd: int, nbytes: int) -> HostRegion:
    """The memory behind an inherited descriptor."""
    os.set_inheritable(fd, False)
    return attach(fd, nbytes)


def _only_blocks(backend: BlockingBackend, what: str) -> bool:
    """Whether ``what`` does no more than to call its blocking namesake on a thread."""
    return getattr(type(backend), what) is getattr(BlockingBackend, what)


def _plain(what: str, answer: Any) -> Any:
    """What `load` or `store` answered, for JSON."""
    return [_named(outcome) for outcome in answer] if what == "store" else answer


def _named(outcome: object) -> str:
    return outcome.name if isinstance(outcome, StoreOutcome) else repr(outcome)[:80]


def plugins_here() -> Plugins:
    """This process's plugins; the parent has told what is wrong with them."""
    logging.getLogger("lmcache_core.plugins.manager").setLevel(logging.ERROR)
    return Plugins()


def options_of(config: type[BaseModel], plain: dict[str, Any], where: str) -> BaseModel:
    """Options as the parent had them.

    Raises:
        PluginError: they can't be written as plain data.
    """
    try:
        return config.model_validate(plain)
    except ValidationError as error:
        raise PluginError(
            f"{where}: its options were valid, but aren't after being written as plain data and "
            f"read again, so it can't be isolated; this is a mistake in the plugin: {error}"
        ) from None


def _make(kind: str, where: str, plain: dict[str, Any]) -> StorageBackend:
    descriptor = plugins_here().storage_backend(kind)
    options = options_of(descriptor.config, plain, where)
    return created(
        lambda: descriptor.create(options),
        StorageBackend,  # type: ignore[type-abstract]
        where,
        descriptor.create,
    )


def private_bytes() -> int:
    """Resident memory of this process that isn't shared with others, nor read from files."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * PAGE_BYTES


class _Formatter(logging.Formatter):
    """Lines that the parent can log at their own level."""

    def format(self, record: logging.LogRecord) -> str:
        mark = next((m for m, level in SYSLOG_LEVELS.items() if level >= record.levelno), 3)
        return f"<{mark}>{super().format(record)}"


def log_to_stderr(level: int) -> None:
    """Let the parent log what is logged here."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(message)s (%(name)s)"))
    logging.basicConfig(level=level, handlers=[handler])


def _die_with(parent: int) -> None:
    """End this process when ``parent`` does, even while a client library blocks everything."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)  # it died before that


async def _serve(control: socket.socket, make: Callable[[socket.socket], Service]) -> None:
    service = make(control)
    await asyncio.get_running_loop().create_connection(lambda: service.channel, sock=control)
    await asyncio.Event().wait()  # until the channel is lost, which ends the process


def serve(make: Callable[[socket.socket], Service] = Service) -> None:
    """Serve until the parent hangs up."""
    _, control, parent = sys.argv[1:]
    _die_with(int(parent))
    attempt(Path("/proc/self/oom_score_adj").write_text, _KILL_FIRST)
    os.set_inheritable(int(control), False)
    asyncio.run(_serve(socket.socket(fileno=int(control)), make))


if __name__ == "__main__":
    serve()
