"""Real clients and servers that die where they are told to, as processes.

    python dying.py

reads orders from its input, a JSON object a line, and answers each with a line. It has imported
everything and has one thread only, so that a process is a fork of it, which costs a tenth of a
start. `Nursery` is how tests speak to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from statements import Statements, Tracing
from stepping import Sources, Steps

from lmcache_backend_lm import (
    arena,
    backend,
    call,
    command,
    connection,
    handshake,
    incoming,
    intake,
    line,
    mapping,
    outgoing,
    server,
    service,
    session,
    shared,
    values,
    wire,
)
from lmcache_backend_lm import disk as disk_module
from lmcache_backend_lm.backend import LmBackend
from lmcache_backend_lm.config import LmConfig
from lmcache_core.aio import stream
from lmcache_core.chunks.keys import CacheNamespace, ChunkKey, chunk_key
from lmcache_core.chunks.layout import DType, KVLayout, full_attention
from lmcache_core.contracts.storage import MISS, BackendContext
from lmcache_core.memory.host_memory import allocate_region

CLIENT_MODULES = (
    *(backend, call, connection, handshake, incoming, line, mapping, outgoing, shared, stream),
)
AWAITING = (backend, connection)
SERVER_MODULES = (session, intake, wire, disk_module)
HOLDING = (*SERVER_MODULES, arena, service, values)
LAYOUT = KVLayout(16, (full_attention(layers=2, heads=2, head_size=8, dtype=DType.BF16),))
NAMESPACE = CacheNamespace("kills", LAYOUT)
OWN = CacheNamespace("a client's own", LAYOUT)
SIZES = (100, 70_003, (1 << 20) + 4099, 300_007)
"""The first goes through the socket, the others through shared memory where there is some."""
KEYS = [chunk_key(bytes([i]) * 16) for i in range(1, 25)]
HUNG_S = 60
WRONG = 3
"""The exit status of a client that read a wrong byte."""


@functools.cache
def content(key: ChunkKey) -> bytes:
    """What the value of ``key`` is, for everybody and always."""
    nbytes = SIZES[KEYS.index(key) % len(SIZES)]
    return (key * (nbytes // len(key) + 1))[:nbytes]


class Traffic:
    """What a client does. Sources of stores lie in ``room``, if there is some.

    ``gives_up``: some calls are cancelled, after which their buffers are the caller's.
    """

    def __init__(
        self, backend: LmBackend, room: memoryview | None = None, *, gives_up: bool = True
    ) -> None:
        self.hits = 0
        self._gives_up = gives_up
        self._given_back: list[memoryview] = []
        self._backend = backend
        self._room = room
        self._used = 0

    async def run(self) -> None:
        """Every kind of call, some of them at the same time."""
        backend, keys = self._backend, KEYS
        await self.store(keys[:4])
        await self.load(keys[:4])
        await asyncio.gather(
            self.store(keys[4:8]),
            self.load([*keys[:2], *keys[8:10]]),
            self.load(keys[1:4]),
            backend.contains(keys[:6]),
        )
        await self.store([*keys[2:4], *keys[8:11]])
        await backend.count_leading_hits(keys[:3])
        await backend.delete(keys[1:3])
        await self.load(keys[:11])
        if not self._gives_up:
            return
        for method, some in ((self.load, keys[2:6]), (self.store, keys[11:15])):
            given_up = asyncio.ensure_future(method(some))
            for _ in range(2):
                await asyncio.sleep(0)
            given_up.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await given_up

    async def store(self, keys: Sequence[ChunkKey]) -> None:
        """Store, and spoil the sources as soon as they are the caller's again."""
        sources = [self._buffer(content(key)) for key in keys]
        try:
            await self._backend.store(keys, sources)
        finally:
            for source in sources:
                source[:] = b"\xff" * source.nbytes

    async def load(self, keys: Sequence[ChunkKey]) -> int:
        """How many were there.

        Raises:
            WrongByteError: there is a wrong byte.
        """
        into = [memoryview(bytearray(len(content(key)))) for key in keys]
        try:
            sizes = await self._backend.load(keys, into)
        except BaseException:
            for view in into:
                view[:] = b"\xee" * view.nbytes
            self._given_back += into
            raise
        for key, size, view in zip(keys, sizes, into, strict=True):
            if size != MISS and bytes(view[:size]) != content(key):
                raise WrongByteError(f"{key!r}: {bytes(view[:16])!r} ... of {size} bytes")
        hits = sum(size != MISS for size in sizes)
        self.hits += hits
        return hits

    @property
    def untouched(self) -> bool:
        """Whether buffers of loads that failed are as they were left then."""
        return all(bytes(view) == b"\xee" * view.nbytes for view in self._given_back)

    def _buffer(self, data: bytes) -> memoryview:
        room = self._room
        if room is None or self._used + len(data) > room.nbytes:
            return memoryview(bytearray(data))
        found = room[self._used : self._used + len(data)]
        self._used += len(data)
        found[:] = data
        return found


class WrongByteError(Exception):
    """A hit whose bytes aren't what was stored."""


# -- in a process of its own ---------------------------------------------------------------


class Death:
    """What a process does at its ``nth`` time ``at`` a place: it dies of ``how``."""

    def __init__(self, at: str, nth: int, how: str) -> None:
        self.seen: Counter[str] = Counter()
        self._at = at
        self._nth = nth
        self._number = getattr(signal, how or "SIGKILL")
        self.late = bool(at)
        """To die, and not there yet."""

    def reached(self, name: str) -> None:
        self.seen[name] += 1
        if self.late and name == self._at and self.seen[name] >= self._nth:
            self.now()

    def now(self) -> None:
        self.late = False
        os.kill(os.getpid(), self._number)


async def _client(order: dict[str, Any]) -> None:
    config = LmConfig(**order["config"])
    with contextlib.ExitStack() as stack:
        region = None
        if order["region"]:
            owned = allocate_region(8 << 20, shared=True)
            stack.callback(owned.close)
            region = owned.region
        one = LmBackend(config)
        other = LmBackend(config)
        try:
            await one.open(BackendContext("client", NAMESPACE, region))
            await Traffic(one, None if region is None else region.view).run()
            await other.open(BackendContext("own", OWN))
            await other.store(KEYS[:1], [memoryview(content(KEYS[0]))])
            await other.clear()
            other.usage()
        finally:
            await asyncio.gather(one.close(), other.close())


@functools.cache
def _client_points() -> tuple[Statements, Sources]:
    return Statements(CLIENT_MODULES), Sources((*AWAITING, sys.modules[__name__]))


@functools.cache
def _server_points() -> tuple[Statements, Sources]:
    return Statements(HOLDING), Sources(SERVER_MODULES)


def client(order: dict[str, Any]) -> int:
    """A client that dies, or that says where it could."""
    death = Death(order["at"], order["nth"], order["how"])
    statements, sources = _client_points()
    steps = Steps(sources)
    ours = f"{__name__}."
    steps.on_wait = lambda chain: death.reached(
        " > ".join(point for point in chain if not point.startswith(ours))
    )
    loop = asyncio.new_event_loop()
    steps.watch(loop)
    with Tracing(statements, death.reached):
        task = loop.create_task(_client(order))
        loop.add_signal_handler(signal.SIGTERM, task.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
    loop.close()
    if order["report"]:
        Path(order["report"]).write_text(json.dumps(death.seen))
    if death.late:  # what it does may end before a thread of it comes there
        death.now()
    return 0


def serve(order: dict[str, Any], ready: int) -> int:
    """A server that dies, or that says where it could; its port goes to ``ready``."""
    death = Death(order["at"], order["nth"], order["how"])
    statements, sources = _server_points()
    steps = Steps(sources)
    steps.on_wait = lambda chain: death.reached(" > ".join(chain))
    announce, new_event_loop = server.Server._announce, asyncio.new_event_loop

    def announced(self: server.Server) -> None:
        announce(self)
        os.write(ready, json.dumps({"port": self.port}).encode())
        os.close(ready)

    def watched() -> asyncio.AbstractEventLoop:
        loop = new_event_loop()
        steps.watch(loop)
        return loop

    server.Server._announce = announced  # type: ignore[method-assign]
    asyncio.new_event_loop = watched
    with Tracing(statements, death.reached):
        status = command.main(order["options"])
    if order["report"]:
        Path(order["report"]).write_text(json.dumps(death.seen))
    if death.late:
        death.now()
    return status


# -- where processes come from -------------------------------------------------------------


def _fork(order: dict[str, Any]) -> dict[str, Any]:
    ready, told = os.pipe()
    pid = os.fork()
    if pid:
        os.close(told)
        answer = {"pid": pid}
        if order["do"] == "serve":
            answer |= json.loads(os.read(ready, 4096) or b'{"port": 0}')
        os.close(ready)
        return answer
    status = 1
    try:
        os.close(ready)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        if order["do"] == "serve":
            status = serve(order, told)
        else:
            os.close(told)
            status = client(order)
    except WrongByteError:
        traceback.print_exc()
        status = WRONG
    except BaseException:  # noqa: BLE001  whatever it is must not go on as the parent
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _wait(order: dict[str, Any]) -> dict[str, Any]:
    pid, patience_ms = order["pid"], order["kill_after_ms"]
    if patience_ms is not None:
        handle = os.pidfd_open(pid)
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        if not poll.poll(patience_ms):
            os.kill(pid, signal.SIGKILL)
        os.close(handle)
    signal.alarm(HUNG_S)
    try:
        _, status = os.waitpid(pid, os.WUNTRACED)
    except InterruptedError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return {"hung": True}
    finally:
        signal.alarm(0)
    if os.WIFSTOPPED(status):
        return {"stopped": True}
    return {"status": os.waitstatus_to_exitcode(status)}


def _interrupt(number: int, frame: object) -> None:
    raise InterruptedError


def main() -> None:
    assert len(os.listdir("/proc/self/task")) == 1, "a fork has one thread of its parent's only"
    _client_points(), _server_points(), [content(key) for key in KEYS]
    signal.signal(signal.SIGALRM, _interrupt)
    for text in sys.stdin:
        order = json.loads(text)
        answer = _wait(order) if order["do"] == "wait" else _fork(order)
        print(json.dumps(answer), flush=True)


# -- for tests -----------------------------------------------------------------------------


class Nursery:
    """Starts clients and servers that die, and waits for their end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: set[int] = set()
        self._reports = 0
        with (folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )

    @property
    def log(self) -> str:
        """What they wrote, for messages."""
        return (self._folder / "log").read_text()[-4000:]

    def client(
        self,
        config: dict[str, Any],
        *,
        region: bool = False,
        at: str = "",
        nth: int = 1,
        how: str = "SIGKILL",
        report: Path | None = None,
    ) -> int:
        """Start a client; its process id."""
        told = self._told(
            "client",
            config=config,
            region=region,
            at=at,
            nth=nth,
            how=how,
            report=report and str(report),
        )
        return int(told["pid"])

    def serve(
        self,
        *options: str,
        at: str = "",
        nth: int = 1,
        report: Path | None = None,
    ) -> dict[str, int]:
        """Start a server and wait until it serves: its ``pid`` and ``port``.

        The latter is 0 if it died before.
        """
        told = self._told(
            "serve", options=options, at=at, nth=nth, how="SIGKILL", report=report and str(report)
        )
        assert told["port"] or at, self.log
        return told

    def wait(self, pid: int, kill_after_ms: int | None = None) -> int | None:
        """The exit status, minus the signal that it died of; ``None``: it was stopped."""
        told = self._told("wait", pid=pid, kill_after_ms=kill_after_ms)
        assert "hung" not in told, f"a process didn't end: {self.log}"
        if "stopped" in told:
            return None
        self._running.discard(pid)
        return int(told["status"])

    def close(self) -> None:
        """End all that still run."""
        for pid in list(self._running):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait(HUNG_S)
        self._process.stdout.close()

    def _told(self, do: str, **order: Any) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps({"do": do, **order}), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, self.log
        told: dict[str, Any] = json.loads(answer)
        if "pid" in told:
            self._running.add(told["pid"])
        return told


if __name__ == "__main__":
    main()
