"""Whatever ends a client's request, and wherever: its buffers are its own again, nothing is lost.

A client is struck at each of its awaits: its server goes, the request is cancelled, or the
connection fails. The server is in this process, so that what it holds can be counted. At statements
of the client's threads it is struck, too: at each one if ``LMCACHE_TEST_KILLS`` is large enough.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import dying
import lm_service
import pytest
from dying import AWAITING, CLIENT_MODULES, KEYS, NAMESPACE, Traffic, content
from lm_service import a_service
from statements import Statements, Tracing
from stepping import Chain, Sources, Stepped, Steps

from lmcache_backend_lm import handshake
from lmcache_backend_lm.backend import LmBackend
from lmcache_backend_lm.config import LmConfig
from lmcache_backend_lm.server import _Worker
from lmcache_core.contracts.storage import BackendContext, HostRegion
from lmcache_core.errors import BackendError, BackendUnavailable
from lmcache_core.memory.host_memory import allocate_region

STRUCK = int(os.environ.get("LMCACHE_TEST_KILLS", "40"))
SEED = int(os.environ.get("LMCACHE_TEST_SEED") or random.randrange(1 << 32))
END_S = 30.0
FAULTS = ("goes", "cancelled", "fails")
WAYS: dict[str, dict[str, Any]] = {
    "socket": {"host": "127.0.0.1", "port": 1, "same_host": False},
    "staging": {"path": "/where the server is"},
    "region": {"host": "127.0.0.1", "port": 1},
}
CALLS = ("stream.PlainStream.receive ", "stream.PlainStream._receive ", "stream.PlainStream.send ")
"""Functions of nothing but system calls, which may fail at any time."""
BUSY = ("incoming.Incoming._receive ", "incoming.Incoming._copy ", "outgoing.Outgoing._send_staged")
HALF_WAY = "connection.Connection.call asyncio.wait 2"
"""Where a call waits that was cancelled while a thread had its buffers."""
STATEMENTS = Statements(CLIENT_MODULES)


class Host:
    """A server in this process, to which clients connect without its listeners."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.service = a_service(16 << 20, unix_path="/where the server is")
        self._worker = _Worker(self.service, 0, lambda client: None)
        self.gone = threading.Event()
        self.gone.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        monkeypatch.setattr(handshake, "dial", self._dial)
        monkeypatch.setattr(handshake, "dial_unix", self._dial_unix)

    def _dial(self, host: str, port: int, timeout_s: float) -> socket.socket:
        ours = socket.create_connection(self._listener.getsockname())
        self._worker.take(self._listener.accept()[0], "a client", "a test", None, full=False)
        return ours

    def _dial_unix(self, path: object, timeout_s: float) -> socket.socket:
        ours, theirs = socket.socketpair()
        self._worker.take(theirs, "a client", "a test", None, full=False)
        return ours

    def go(self) -> None:
        """End every connection, as the end of a process does. From any thread."""
        self.gone.clear()

        def go() -> None:
            for task in list(self._worker._open):
                task.cancel()
            self.gone.set()

        self._worker._loop.call_soon_threadsafe(go)

    def at_rest(self) -> None:
        """Nothing is held, nothing is lost, and what is there is right."""
        eventually(lambda: lm_service.held(self.service) == 0, "leases are held")
        lm_service.check_at_rest(self.service, lambda key, _: content(key))

    def close(self) -> None:
        self._worker.stop()
        self._worker.join()
        self._listener.close()
        lm_service.close(self.service)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    made = Host(monkeypatch)
    yield made
    made.close()


@pytest.fixture
def region() -> Iterator[HostRegion]:
    owned = allocate_region(8 << 20, shared=True)
    yield owned.region
    owned.close()


def eventually(true: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + END_S
    while not true():
        assert time.monotonic() < until, what
        time.sleep(0.005)


def left() -> Counter[str]:
    """Threads and descriptors that there are."""
    gc.collect()
    return Counter(threads=threading.active_count(), descriptors=len(os.listdir("/proc/self/fd")))


@dataclass
class Trial:
    """One client of ``host`` that is struck, and what must hold afterwards."""

    host: Host
    way: str
    region: HostRegion
    steps: Steps
    fault: str = ""
    at: Chain | str = ()
    nth: int = 1

    def __post_init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self.struck = False
        self._twice = False
        self._traffic: Traffic | None = None
        self._backend = LmBackend(LmConfig(**WAYS[self.way]))
        self._loop = asyncio.new_event_loop()
        self._task: asyncio.Task[None] | None = None

    def run(self) -> bool:
        """Let the client act, be struck, and act again. Whether it was struck.

        Raises:
            AssertionError: something is wrong afterwards.
        """
        loop, steps = self._loop, self.steps
        steps.at = self.at if isinstance(self.at, tuple) else None
        steps.fault = self._strike_await if steps.at else None
        steps.on_wait = self._waits
        steps.watch(loop)
        at_statements = isinstance(self.at, str)
        tracing = Tracing(STATEMENTS, self._reached) if at_statements else nullcontext()
        try:
            with tracing:
                self._task = loop.create_task(self._act())
                loop.run_until_complete(asyncio.wait([self._task], timeout=END_S))
            self._check()
            assert self.host.gone.wait(END_S)  # or it would strike what comes now
            steps.fault = None
            struck, self.struck = self.struck, True
            others = asyncio.all_tasks(loop)  # calls that were made at the same time
            loop.run_until_complete(asyncio.wait_for(self._again(others), END_S))
            assert self._traffic is None or self._traffic.untouched, "a buffer was written late"
            self.host.at_rest()
            return struck
        except AssertionError as error:
            where = f"{self.way}, {self.fault} at {self.at}, {self.nth}"
            raise AssertionError(f"{where}: {error}") from error
        finally:
            loop.close()

    def _check(self) -> None:
        task = self._task
        assert task is not None
        assert task.done(), "it didn't end"
        if task.cancelled():
            assert self.fault == "cancelled"
        elif (error := task.exception()) is not None:
            assert self.struck
            assert isinstance(error, BackendError), repr(error)

    async def _opened(self) -> LmBackend:
        region = self.region if self.way == "region" else None
        await self._backend.open(BackendContext("struck", NAMESPACE, region))
        return self._backend

    async def _act(self) -> None:
        backend = await self._opened()
        room = self.region.view if self.way == "region" else None
        self._traffic = Traffic(backend, room, gives_up=False)
        await self._traffic.run()
        await backend.clear()
        await backend.close()

    async def _again(self, others: set[asyncio.Task[Any]]) -> None:
        """As if nothing had been: the same backend, then its end."""
        for task in others:
            with suppress(BackendError, asyncio.CancelledError):
                await task
        for connection in self._backend._connections.values():
            assert not connection.waiting_bytes
        # A connection that ended meanwhile may be noticed only now; guards try once more, too, and
        # tiers open again what couldn't be opened.
        try:
            backend = await self._opened()
        except BackendUnavailable:
            backend = await self._opened()
        traffic = Traffic(backend)
        with suppress(BackendUnavailable):
            await traffic.store(KEYS[:4])
        await traffic.store(KEYS[:4])
        assert await traffic.load(KEYS[:4]) == 4
        await backend.close()

    # -- how it is struck ------------------------------------------------------------------

    def _strike_await(self, stepped: Stepped) -> None:
        self.struck = True
        if self.fault == "goes":
            self.host.go()
        elif self.fault == "fails":
            self._fail()
        else:
            assert stepped.task is not None
            self._loop.call_soon(stepped.task.cancel)

    def _waits(self, chain: Chain) -> None:
        """Cancel once more what waits for its end because it was cancelled."""
        if chain and chain[-1] == HALF_WAY and not self._twice:
            self._twice = True
            assert self._task is not None
            self._loop.call_soon(self._task.cancel)

    def _fail(self) -> None:
        for connection in list(self._backend._connections.values()):
            connection._fail(BackendUnavailable("struck"))

    def _reached(self, name: str) -> None:
        self.seen[name] += 1
        if self.struck or name != self.at or self.seen[name] < self.nth:
            return
        self.struck = True
        if self.fault == "goes":
            self.host.go()
        elif self.fault == "fails":
            raise OSError("struck")
        else:
            assert self._task is not None
            cancelled = threading.Event()
            task = self._task

            def cancel() -> None:
                task.cancel()
                # Once more round the loop, so that the call has been told.
                self._loop.call_soon(self._loop.call_soon, cancelled.set)

            self._loop.call_soon_threadsafe(cancel)
            if threading.current_thread() is not threading.main_thread():
                cancelled.wait(0.02)  # no longer: this thread may have the lock that it takes


OURS = (f"{dying.__name__}.", f"{__name__.rpartition('.')[2]}.")


def own(chain: Chain) -> Chain:
    """Without the awaits of what the test does itself."""
    return tuple(point for point in chain if not point.startswith(OURS))


def test_struck_at_every_await(
    host: Host, region: HostRegion, caplog: pytest.LogCaptureFixture
) -> None:
    # Records that pytest keeps hold errors, and those hold frames with their buffers.
    caplog.set_level(logging.CRITICAL, "lmcache_backend_lm")
    print("LMCACHE_TEST_SEED", SEED)
    known = Sources((*AWAITING, dying, sys.modules[__name__]))
    reached: set[str] = set()
    trials = 0
    Trial(host, "region", region, Steps(known)).run()
    before = left()
    for way in WAYS:
        steps = Steps(known)
        Trial(host, way, region, steps).run()
        chains = {own(chain): chain for chain in steps.seen if own(chain)}
        for chain in chains.values():
            for fault in FAULTS:
                trials += Trial(host, way, region, steps, fault, chain).run()
        for name, fault, nth in statements(host, way, region, Steps(known)):
            trials += Trial(host, way, region, steps, fault, name, nth).run()
        reached |= {point for chain in steps.seen for point in own(chain)}
    eventually(lambda: left() <= before, "threads or descriptors are left")
    names = {name for name in known.names if not name.startswith(OURS)}
    print(f"struck {trials} times, at {len(reached)} of {len(names)} awaits")
    missing = names - reached
    assert not missing, f"no request waits at {sorted(missing)}"


def statements(
    host: Host, way: str, region: HostRegion, steps: Steps
) -> Iterator[tuple[str, str, int]]:
    """Where threads are struck, and how: always while they have a call's buffers."""
    trial = Trial(host, way, region, steps, at="nowhere")
    trial.run()
    every = [
        (name, fault, count)
        for name, count in sorted(trial.seen.items())
        for fault in FAULTS
        if fault != "fails" or name.startswith(CALLS)
    ]
    chance = random.Random(SEED)
    drawn = chance.sample(every, min(len(every), STRUCK // len(WAYS)))
    always = [one for one in every if one[0].startswith(BUSY) and one[1] == "cancelled"]
    # The greeting, so that opening fails.
    yield min(name for name, fault, _ in every if fault == "fails"), "fails", 1
    for name, fault, count in dict.fromkeys([*always, *drawn]):
        yield name, fault, chance.randint(1, count)
