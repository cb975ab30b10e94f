"""Faults at random between the lm:// client and its server: no wrong byte, no late answer.

Over TCP, and over a Unix socket with memory that the server copies from itself.
``LM_FAULTS=5000 pytest test_lm_random_faults.py -s`` runs so many over each, which takes minutes.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from faulty_link import FaultyLink, Traffic
from lm_server import RunningServer

from lmcache_backend_lm.backend import LmBackend
from lmcache_backend_lm.call import Call
from lmcache_backend_lm.config import LmConfig
from lmcache_backend_lm.connection import Connection
from lmcache_backend_lm.protocol import Op
from lmcache_core.aio.guard import Guard
from lmcache_core.builtin.raw import RawSerde
from lmcache_core.chunks.keys import CacheNamespace, ChunkKey
from lmcache_core.contracts.storage import BackendContext, HostRegion
from lmcache_core.errors import BackendError
from lmcache_core.memory.host_memory import allocate_region
from lmcache_core.metrics import Counters
from lmcache_core.testing.loop import Loop
from lmcache_core.testing.storage import LAYOUT, keys, value
from lmcache_core.tiers.tier import Tier

FAULTS = int(os.environ.get("LM_FAULTS", "200"))
NAMESPACE = CacheNamespace("random faults", LAYOUT)
LONG = {"tcp": 1_200_077, "region": (2 << 20) + 77}
"""Two of the first are waited for mebibyte by mebibyte. In shared memory only requests pass the
link: so that it breaks while a value is being copied, values are longer there, and connections
shorter."""
SHORT_CUTS = (0, 50, 300, 1_000, 3_000, 10_000)
FLOWS = 6
IN_REGION = 16
"""Values that the region has room for; what comes on top of them lies elsewhere."""
DEADLINE_S = 1.0
STALL_S = 2.0
"""So long after a link fell silent, buffers come back."""
SLACK_S = 3.0
"""What a loaded machine may add. A call that hangs doesn't end within it either."""


@pytest.fixture
def run() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Counter[Op]:
    """How often which requests were sent, once they were."""
    counted: Counter[Op] = Counter()
    original = Connection._sent

    def sent(self: Connection, call: Call) -> None:
        counted[call.op] += 1
        original(self, call)

    monkeypatch.setattr(Connection, "_sent", sent)
    return counted


class Unreliable:
    """A server that hangs now and then, or is killed and started again."""

    def __init__(self, chance: random.Random, *options: str) -> None:
        self.harmed = 0
        self._chance = chance
        self._options = ("--memory-gib", "0.1", "--stall-timeout", "2", *options)
        self.running = RunningServer(*self._options)

    async def harm(self, going_on: Callable[[], bool]) -> None:
        chance, loop = self._chance, asyncio.get_running_loop()
        while going_on():
            await asyncio.sleep(chance.uniform(0.2, 1.5))
            self.harmed += 1
            if chance.random() < 0.5:
                self.running.process.send_signal(signal.SIGSTOP)
                await asyncio.sleep(chance.uniform(0.05, 0.6))
                self.running.process.send_signal(signal.SIGCONT)
            else:
                self.running = await loop.run_in_executor(None, self._restarted)

    def _restarted(self) -> RunningServer:
        self.running.kill()
        return RunningServer(*self._options, port=self.running.port)


class Impatient(Traffic):
    """Half of its stores are taken back after a moment, whatever has become of them."""

    async def store(
        self, batch: Sequence[ChunkKey], sources: Sequence[memoryview]
    ) -> asyncio.Task[Any] | None:
        chance, backend = self._chance, self._tier.backend
        if chance.random() < 0.5:
            return await super().store(batch, sources)
        with suppress(BackendError, asyncio.TimeoutError):
            await asyncio.wait_for(backend.store(batch, sources), chance.uniform(0, 0.02))
        return None


def opened(run: Loop, config: LmConfig, region: HostRegion | None) -> Tier:
    """A tier whose breaker never opens: every call meets the faults."""
    backend = LmBackend(config)
    until = time.monotonic() + 30
    while True:
        with suppress(BackendError):
            run(backend.open(BackendContext("faults", NAMESPACE, region)))
            break
        assert time.monotonic() < until, "no connection without a fault"
    guard = Guard("faults", deadline_s=DEADLINE_S, breaker_threshold=1 << 30, counters=Counters())
    tier = Tier(
        "faults", backend, RawSerde(), guard=guard, counters=Counters(), deadline_s=DEADLINE_S
    )
    tier.opened(backend, backend.capabilities)
    return tier


@pytest.mark.parametrize("way", ["tcp", "region"])
def test_random_faults(run: Loop, ways: Counter[Op], tmp_path: Path, way: str) -> None:
    chance = random.Random(FAULTS)
    before = set(threading.enumerate())
    unheard: list[object] = []
    run._loop.set_exception_handler(lambda _, context: unheard.append(context))
    long = LONG[way]
    many = keys(40)
    contents = {
        key: bytes(value(i, chance.choice([100, 65536, long]))) for i, key in enumerate(many)
    }
    with ExitStack() as stack:
        region: HostRegion | None = None
        if way == "tcp":
            server = Unreliable(chance, "--unix", "none")
            stack.callback(lambda: server.running.stop())
            link = FaultyLink(server.running.port, chance)
            config = LmConfig(port=link.port, host="127.0.0.1", stall_timeout_s=STALL_S)
        else:
            server = Unreliable(chance)
            stack.callback(lambda: server.running.stop())
            assert server.running.unix
            link = FaultyLink(server.running.unix, chance, at=tmp_path / "link", cuts=SHORT_CUTS)
            config = LmConfig(path=tmp_path / "link", stall_timeout_s=STALL_S)
            owned = allocate_region(IN_REGION * long, shared=True)
            stack.callback(owned.close)
            region = owned.region
        stack.callback(link.close)

        def going_on() -> bool:
            return link.faults < FAULTS

        tier = opened(run, config, region)
        room = None if region is None else region.view
        traffic = Impatient(tier, contents, chance, DEADLINE_S + SLACK_S, room)
        flows = [traffic.flow(going_on) for _ in range(FLOWS)]

        async def together() -> None:
            await asyncio.wait_for(asyncio.gather(server.harm(going_on), *flows), 600 + FAULTS / 5)

        run._loop.run_until_complete(together())
        run(tier.backend.close())
    run.stop_own_threads()
    gc.collect()
    assert not unheard, "errors that nobody asked for, which asyncio logs"
    left = [t.name for t in threading.enumerate() if t not in before and t.is_alive()]
    seen = traffic.seen
    assert (seen["wrong"], seen["late"], left) == (0, 0, []), traffic.late
    assert seen["hits"]
    shared = {Op.OFFER, Op.STAGE, Op.BORROW}
    assert shared & ways.keys() == (shared if way == "region" else set())
    print(seen, "faults of the link:", link.faults, "kills and hangs:", server.harmed, dict(ways))
