"""Processes of clients and servers are killed, anywhere in what they do; the others go on.

Where is enumerated: at each statement of the modules on either side, in each of their threads, and
at each await of a request. ``LMCACHE_TEST_KILLS`` is how many are killed in all, a third of them
servers. The seed of a run is printed, and ``LMCACHE_TEST_SEED`` repeats it.
"""

from __future__ import annotations

import gc
import itertools
import json
import logging
import os
import random
import signal
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from dying import CLIENT_MODULES, HOLDING, KEYS, NAMESPACE, OWN, Nursery, Traffic
from lm_server import RunningServer
from statements import Statements

from lmcache_backend_lm.backend import LmBackend
from lmcache_backend_lm.config import LmConfig
from lmcache_core import Cache, DType, KVLayout, Plugins, full_attention, load_config
from lmcache_core.aio.guard import Guard
from lmcache_core.builtin.raw import RawSerde
from lmcache_core.chunks.keys import CacheNamespace, ChunkKey
from lmcache_core.contracts.storage import BackendContext
from lmcache_core.errors import BackendError
from lmcache_core.memory.host_memory import allocate_region
from lmcache_core.metrics import Counters
from lmcache_core.testing.loop import Loop
from lmcache_core.tiers import tiers
from lmcache_core.tiers.tier import Tier

KILLS = int(os.environ.get("LMCACHE_TEST_KILLS", "40"))
SEED = int(os.environ.get("LMCACHE_TEST_SEED") or random.randrange(1 << 32))
TOGETHER = 3
"""Clients that are at it at the same time."""
PATIENCE_S = 30.0
RECORDS = 4
SERVERS = max(1, KILLS // 3)
CLIENTS = KILLS - SERVERS
POLITE = (0, -signal.SIGTERM)
"""How else a client ends that was told to: it gives up what it is at and says goodbye."""


@pytest.fixture
def nursery(tmp_path: Path) -> Iterator[Nursery]:
    made = Nursery(tmp_path)
    yield made
    made.close()


@pytest.fixture
def run() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


def eventually(true: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < until, what
        time.sleep(0.02)


def gauge(server: RunningServer, name: str) -> float:
    with urllib.request.urlopen(server.metrics, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"lmcache_{name}"))


def holdings(pid: int) -> Counter[str]:
    """What a process has of the system."""
    of = Path("/proc", str(pid))
    maps = (of / "maps").read_text().count("memfd:")
    return Counter(
        descriptors=len(list((of / "fd").iterdir())),
        threads=len(list((of / "task").iterdir())),
        shared=maps,
    )


def ways_to(server: RunningServer) -> dict[str, tuple[dict[str, Any], bool]]:
    """Options of a client, and whether it has a region, by what its values travel through."""
    tcp = {"host": "127.0.0.1", "port": server.port}
    near = {"path": str(server.unix)}
    return {
        "socket": ({**tcp, "same_host": False}, False),
        "staging": (near, False),
        "region": (tcp, True),  # over TCP at first, until it knows the Unix socket
    }


def opened(run: Loop, options: dict[str, Any], namespace: CacheNamespace = NAMESPACE) -> LmBackend:
    backend = LmBackend(LmConfig(**options))
    run(backend.open(BackendContext("survivor", namespace)))
    return backend


# -- clients -------------------------------------------------------------------------------

ELSEWHERE = {
    "backend.LmBackend.capabilities": "core asks for them",
    "backend.LmBackend._notice": "the server is another user's",
    "connection.Connection.ended": "a connection failed before",
    "line.Line.drain": "values come for a call that was given up, by chance",
    "line.Line.refusal": "the server refuses",
    "line.Line.tick": "nothing moves for half a second",
    "mapping.is_sealed": "the server's",
    **dict.fromkeys(
        (f"mapping.Backing.{name}" for name in ("__init__", "_next_data", "close", "holds")),
        "the same",
    ),
    "stream.PlainStream.binding": "there is no token",
    "stream.TlsStream.binding": "there is no token",
    "stream._closed_on_failure": "the other end goes while a stream is made, by chance",
    "shared.Staging.withdraw": "an offer is given up before its answer comes, by chance",
}
ELSEWHERE |= dict.fromkeys(
    (
        "stream.TlsStream.__init__",
        *(f"stream.TlsStream.{name}" for name in ("_attempt", "close", "receive")),
        *(f"stream.TlsStream.{name}" for name in ("send", "shutdown")),
    ),
    "TLS, which the server sees as a socket's end, too",
)


def complete(
    modules: Sequence[ModuleType], elsewhere: dict[str, str], record: Callable[[], set[str]]
) -> set[str]:
    """What ``record`` finds: somebody dies in each function of ``modules``, or it says why not.

    Recorded again where one is missing, since much depends on who is faster.
    """
    known = Statements(modules).functions
    assert known >= elsewhere.keys(), "a reason is out of date"
    for _ in range(RECORDS):
        reached = record()
        missing = known - {name.split(" ")[0] for name in reached} - elsewhere.keys()
        if not missing:
            return reached
    raise AssertionError(f"nobody comes to {sorted(missing)}")


def is_await(place: str) -> bool:
    return len(place.split()) > 2


def drawn(
    places: dict[tuple[str, str], int], chance: random.Random
) -> list[tuple[tuple[str, str], int]]:
    """All of ``places`` in any order, but each second one an await at first, and no name twice
    before all were there.
    """
    every = sorted(places.items())
    chance.shuffle(every)
    awaits = [one for one in every if is_await(one[0][1])]
    others = [one for one in every if not is_await(one[0][1])]
    first = {name: one for one in reversed(others) for name in [one[0][1]]}
    others = [*first.values(), *(one for one in others if first[one[0][1]] != one)]
    pairs = itertools.zip_longest(awaits, others)
    return [one for pair in pairs for one in pair if one is not None]


def covered(killed: set[str], names: set[str]) -> str:
    """How many of the places in ``names``, for people."""
    awaits = {name for name in names if is_await(name)}
    return (
        f"{len(killed & awaits)} of {len(awaits)} awaits, "
        f"{len(killed - awaits)} of {len(names - awaits)} statements"
    )


@dataclass(frozen=True)
class Kill:
    """One client that is to die ``at`` some place; without one, after ``after_ms``."""

    way: str
    at: str
    nth: int
    how: str
    after_ms: int | None = None


class Places:
    """Where clients can die, found by letting some live."""

    def __init__(self, nursery: Nursery, server: RunningServer, folder: Path) -> None:
        self.ways = ways_to(server)
        self.seen: dict[tuple[str, str], int] = {}
        self._nursery = nursery
        self._folder = folder
        self.names = complete(CLIENT_MODULES, ELSEWHERE, self._record)

    def _record(self) -> set[str]:
        for way, (config, region) in self.ways.items():
            report = self._folder / way
            client = self._nursery.client(config, region=region, report=report)
            assert self._nursery.wait(client) == 0, self._nursery.log
            for name, count in json.loads(report.read_text()).items():
                self.seen[way, name] = count
        return {name for _, name in self.seen}

    def kills(self, chance: random.Random) -> Iterator[Kill]:
        """Every place once, then again; some kills are at any time instead."""
        while True:
            for (way, name), count in drawn(self.seen, chance):
                how = chance.choices(("SIGKILL", "SIGSTOP", "SIGTERM"), (6, 2, 2))[0]
                yield Kill(way, name, chance.randint(1, count), how)
                if chance.random() < 0.1:
                    yield Kill(way, "", 1, "SIGKILL", chance.randint(0, 120))


def test_clients_are_killed(nursery: Nursery, run: Loop, tmp_path: Path) -> None:
    """Whatever they were at, nothing of theirs stays, and no byte of a value is another one."""
    chance = random.Random(SEED)
    server = RunningServer(
        *("--memory-gib", "0.01", "--stall-timeout", "2", "--metrics-port", "0", "--threads", "2")
    )
    try:
        before = holdings(server.process.pid)  # a client has one connection less after giving up
        places = Places(nursery, server, tmp_path)
        survivor = opened(run, {"path": str(server.unix)})
        traffic = Traffic(survivor)
        run(traffic.run())
        kills = list(itertools.islice(places.kills(chance), CLIENTS))
        for some in range(0, len(kills), TOGETHER):
            batch = kills[some : some + TOGETHER]
            pids = [
                nursery.client(
                    places.ways[kill.way][0],
                    region=places.ways[kill.way][1],
                    at=kill.at,
                    nth=kill.nth,
                    how=kill.how,
                )
                for kill in batch
            ]
            ended = [
                nursery.wait(pid, kill.after_ms) for pid, kill in zip(pids, batch, strict=True)
            ]
            run(traffic.run())  # also while some are stopped, and hold what they hold
            for pid, kill, end in zip(pids, batch, ended, strict=True):
                if end is None:
                    os.kill(pid, signal.SIGKILL)
                    end = nursery.wait(pid)
                ends = (-signal.SIGKILL, *(POLITE if kill.how == "SIGTERM" or not kill.at else ()))
                assert end in ends, f"{kill}: {end}\n{nursery.log}"
        eventually(lambda: gauge(server, "server_leases") == 0, "leases are held at rest")
        run(survivor.close())
        eventually(lambda: holdings(server.process.pid) <= before, "the server holds more")
        own = opened(run, {"port": server.port}, OWN)
        fresh = opened(run, {"port": server.port})
        for backend in (own, fresh):
            run(backend.clear())
        assert gauge(server, "server_memory_used_bytes") == 0
        run(Traffic(fresh).store(KEYS[:4]))
        assert run(Traffic(fresh).load(KEYS[:4])) == 4
        run(own.close())
        run(fresh.close())
        done = Counter(kill.how if kill.at else "at any time" for kill in kills)
        where = covered({kill.at for kill in kills if kill.at}, places.names)
        print(
            f"seed {SEED}: {len(kills)} clients killed at {where}; {dict(done)}; leases at rest 0"
        )
    finally:
        assert server.stop() == 0


# -- servers -------------------------------------------------------------------------------

SERVERS_ELSEWHERE = {
    "arena.Arena._populate": "an option",
    "disk.Disk._failed": "the disk fails",
    "service.Epoch.revoke": "a client reads for too long",
    "session.Session._refuse": "a client is rude",
    "session.Session.check": "once a second",
    "session.Session._do_long": "requests with thousands of keys",
    "session.Session._prove": "there is no token",
    "wire.Wire.is_stalled": "the same",
    "values.Held.discard": "the memory is full half way through a value",
    "values.Held.drop": "an offer is taken back",
    "values.Held.live": "for tests",
    **dict.fromkeys(
        (
            *(f"disk.Disk.{name}" for name in ("described", "spaces", "totals", "_totals")),
            *(f"disk.Disk.{name}" for name in ("totals_blocking", "purge", "purge.forget")),
            "session.Session._operate",
            *(f"values.Values.{name}" for name in ("spaces", "totals")),
        ),
        "for operators",
    ),
    "wire.Wire.handshake.step": "TLS",
    "wire.Wire._fill": "a client sends slowly, by chance",
    "wire.Wire._writable": "it reads slowly, by chance",
    "wire.Wire._on_writable": "the same",
}

GROUP = full_attention(layers=4, heads=8, head_size=64, dtype=DType.BF16)
CHUNK = 16
CHUNKS = 6
SLOTS = 16
AGuard = partial(Guard, retries=0, breaker_threshold=1 << 30)
"""Each call comes to the server: the breaker would keep clients from the next one for a while."""


class Guarded:
    """A backend's calls as core makes them: what fails is a miss, and nothing is left running."""

    def __init__(self, tier: Tier) -> None:
        self._tier = tier

    async def load(self, keys: Sequence[ChunkKey], into: Sequence[memoryview]) -> list[int]:
        answer = await self._tier.load(keys, into)
        assert answer.unsettled is None
        return answer.sizes

    async def store(self, keys: Sequence[ChunkKey], sources: Sequence[memoryview]) -> None:
        assert (await self._tier.store(keys, sources)).unsettled is None

    async def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        return await self._tier.contains(keys, leading=False)

    async def count_leading_hits(self, keys: Sequence[ChunkKey]) -> list[bool]:
        return await self._tier.contains(keys)

    async def delete(self, keys: Sequence[ChunkKey]) -> int:
        return await self._tier.delete(keys)


class Clients:
    """Living clients of a server that dies: one for each way of values, and a whole cache."""

    def __init__(self, run: Loop, stack: ExitStack, port: int, path: Path) -> None:
        self.counters = Counters()
        self.backends: list[LmBackend] = []
        self._run = run
        self._traffics: list[Traffic] = []
        owned = allocate_region(8 << 20, shared=True)
        stack.callback(owned.close)
        for options, region in (
            ({"host": "127.0.0.1", "port": port, "same_host": False}, None),
            ({"path": path}, None),
            ({"host": "127.0.0.1", "port": port}, owned.region),
        ):
            backend = LmBackend(LmConfig(**options))
            run(backend.open(BackendContext("living", NAMESPACE, region)))
            stack.callback(lambda backend=backend: run(backend.close()))
            guard = AGuard("living", deadline_s=PATIENCE_S, counters=self.counters)
            tier = Tier(
                *("living", backend, RawSerde()),
                guard=guard,
                counters=self.counters,
                deadline_s=PATIENCE_S,
            )
            tier.opened(backend, backend.capabilities)
            self.backends.append(backend)
            room = None if region is None else region.view
            self._traffics.append(Traffic(Guarded(tier), room, gives_up=False))
        slot = GROUP.chunk_bytes(CHUNK) + 8192
        options = [
            f"chunk_size={CHUNK}",
            f"max_local_cpu_size={SLOTS * slot / 2**30}",
            "local_cpu=false",
            f"blocking_timeout_secs={PATIENCE_S}",
            f"lookup_timeout_ms={PATIENCE_S * 1000:.0f}",
            f"remote_url=lm://127.0.0.1:{port}",
        ]
        config = load_config(Plugins(), environ={}, assignments=options)
        layout = KVLayout(CHUNK, (GROUP,))
        self.cache = stack.enter_context(Cache.open(model="m", layout=layout, config=config))
        self._tokens = list(range(CHUNKS * CHUNK))
        self._kv = random.Random(1).randbytes(GROUP.chunk_bytes(len(self._tokens)))

    def act(self, *, there: bool = False) -> None:
        """Do everything once: no byte is wrong, nothing hangs. ``there``: everybody has hits."""
        with suppress(BackendError):
            self._run(self.backends[0].clear())
        for traffic in self._traffics:
            before = traffic.hits
            self._run(traffic.run())
            assert traffic.hits > before or not there
        cache, into = self.cache, bytearray(len(self._kv))
        cache.store(self._tokens, self._kv)
        assert cache.flush(PATIENCE_S)
        cache.lookup(self._tokens)
        loaded = cache.load(self._tokens, into)
        assert loaded == len(self._tokens) or not there
        if loaded == len(self._tokens):
            assert into == self._kv

    def check(self) -> None:
        """Nobody holds anything, and no call had to wait for its deadline."""
        for backend in self.backends:
            for connection in backend._connections.values():
                assert not connection.waiting_bytes
                assert not connection._pending
                shared = connection._shared
                assert shared is None or not shared.staging._taken
        cache = self.cache
        eventually(lambda: cache._running.mover.leases == 0, "the cache holds slots at rest")
        cache.lookup([1] * CHUNK)  # takes the last report in
        assert cache._running.planner.pending == 0
        for counters in (self.counters, cache.counters):
            counted = {name for name, _ in counters.snapshot()}
            assert not counted & {"backend_timeouts", "leases_forgotten"}


class Dying:
    """A server that dies again and again, and is started again where it was."""

    def __init__(self, nursery: Nursery, folder: Path) -> None:
        self.path = folder / "socket"
        self.pid = 0
        self.places: dict[tuple[str, str], int] = {}
        """Where it can die, by its storage: how often it comes there."""
        self.storages = ("cpu", str(folder / "disk"))
        self._report = folder / "report"
        self._nursery = nursery
        self._port = 0

    def start(self, storage: str = "cpu", **how: Any) -> int:
        """Start it; its port."""
        options = ("--unix", str(self.path), "--memory-gib", "0.0036", "--threads", "2")
        told = self._nursery.serve("127.0.0.1", str(self._port), storage, *options, **how)
        self.pid = told["pid"]
        self._port = self._port or told["port"]
        return self._port

    def ended(self) -> int | None:
        """Tell it to end; how it did."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
        return self._nursery.wait(self.pid)

    def record(self, clients: Clients) -> set[str]:
        """Let it live, and find out where it could have died."""
        for storage in self.storages:
            self.start(storage, report=self._report)
            clients.act(there=True)
            assert self.ended() == 0
            for name, count in json.loads(self._report.read_text()).items():
                self.places[storage, name] = count
        return {name for _, name in self.places}

    def often(self, clients: Clients, chance: random.Random) -> set[str]:
        """Let it die `SERVERS` times under ``clients``; where."""
        every = drawn(self.places, chance)
        killed: set[str] = set()
        for number in range(SERVERS):
            (storage, name), count = every[number % len(every)]
            self.start(storage, at=name, nth=chance.randint(1, count))
            clients.act()
            # Some places are on the way to its end.
            assert self.ended() == -signal.SIGKILL, f"{name}: {self._nursery.log}"
            clients.check()
            killed.add(name)
            if number % 8 == 7 or number == SERVERS - 1:
                self.start(storage)
                clients.act(there=True)
                assert self.ended() == 0
        return killed


def test_servers_are_killed(
    nursery: Nursery,
    run: Loop,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Calls under way end as misses, at once; clients hold nothing, and use the next server."""
    # Records that pytest keeps hold errors, and those hold frames with their buffers.
    caplog.set_level(logging.CRITICAL, "lmcache_core")
    monkeypatch.setattr(tiers, "Guard", AGuard)
    dying = Dying(nursery, tmp_path)
    port = dying.start()
    with ExitStack() as stack:  # what is made once in a process is made here
        Clients(run, stack, port, dying.path).act(there=True)
    gc.collect()
    before = holdings(os.getpid())
    with ExitStack() as stack:
        clients = Clients(run, stack, port, dying.path)
        os.kill(dying.pid, signal.SIGKILL)
        dying.ended()
        names = complete(HOLDING, SERVERS_ELSEWHERE, partial(dying.record, clients))
        killed = dying.often(clients, random.Random(SEED))
    del clients
    # Threads that end a little later still held something: collected each time.
    eventually(
        lambda: gc.collect() >= 0 and holdings(os.getpid()) <= before, "clients left something"
    )
    where = covered(killed, names)
    print(f"seed {SEED}: {SERVERS} servers killed at {where}; clients' slots and leases at rest 0")
