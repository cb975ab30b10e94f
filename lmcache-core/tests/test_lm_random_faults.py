"""Faults at random between the lm:// client and its server: no wrong byte, no late answer.

``LM_FAULTS=10000 pytest test_lm_random_faults.py -s`` runs them for long.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
from faulty_link import FaultyLink, Traffic
from lm_server import RunningServer

from lmcache_core.builtin.raw import RawSerde
from lmcache_core.errors import BackendError
from lmcache_core.guard import Guard
from lmcache_core.keys import CacheNamespace
from lmcache_core.lm.backend import LmBackend
from lmcache_core.lm.config import LmConfig
from lmcache_core.metrics import Counters
from lmcache_core.storage import BackendContext
from lmcache_core.testing.loop import Loop
from lmcache_core.testing.storage import LAYOUT, keys, value
from lmcache_core.tier import Tier

FAULTS = int(os.environ.get("LM_FAULTS", "200"))
NAMESPACE = CacheNamespace("random faults", LAYOUT)
LONG = 300_077
DEADLINE_S = 1.0
SLACK_S = 3.0
"""What a loaded machine may add. A call that hangs doesn't end within it either."""
OPTIONS = ("--memory-gib", "0.1", "--unix", "none", "--stall-timeout", "2")


@pytest.fixture
def run() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


def test_random_faults(run: Loop) -> None:
    chance = random.Random(FAULTS)
    before = set(threading.enumerate())
    server = RunningServer(*OPTIONS)
    port = server.port
    link = FaultyLink(port, chance)
    backend = LmBackend(LmConfig(host="127.0.0.1", port=link.port))
    until = time.monotonic() + 30
    while True:
        with suppress(BackendError):
            run(backend.open(BackendContext("faults", NAMESPACE)))
            break
        assert time.monotonic() < until, "no connection without a fault"
    guard = Guard(
        "faults", deadline_s=DEADLINE_S, breaker_threshold=1 << 30, counters=Counters()
    )  # never opens: every operation meets the faults
    tier = Tier(
        "faults", backend, RawSerde(), guard=guard, counters=Counters(), deadline_s=DEADLINE_S
    )
    tier.opened(backend, backend.capabilities)
    many = keys(40)
    contents = {key: value(i, chance.choice([100, 65536, LONG])) for i, key in enumerate(many)}
    traffic = Traffic(tier, contents, chance, DEADLINE_S + SLACK_S)
    seen = traffic.seen
    harmed = 0
    unheard: list[object] = []
    run._loop.set_exception_handler(lambda _, context: unheard.append(context))

    def going_on() -> bool:
        return link.faults < FAULTS

    def restart() -> RunningServer:
        server.kill()
        return RunningServer(*OPTIONS, port=port)

    async def harm() -> None:
        nonlocal server, harmed
        loop = asyncio.get_running_loop()
        while going_on():
            await asyncio.sleep(chance.uniform(0.2, 1.5))
            harmed += 1
            if chance.random() < 0.5:
                server.process.send_signal(signal.SIGSTOP)
                await asyncio.sleep(chance.uniform(0.05, 0.6))
                server.process.send_signal(signal.SIGCONT)
            else:
                server = await loop.run_in_executor(None, restart)

    async def together() -> None:
        await asyncio.wait_for(
            asyncio.gather(harm(), *(traffic.flow(going_on) for _ in range(6))), 600 + FAULTS / 5
        )

    try:
        run._loop.run_until_complete(together())
        run(backend.close())
    finally:
        link.close()
        server.stop()
    run.stop_own_threads()
    gc.collect()
    assert not unheard, "errors that nobody asked for, which asyncio logs"
    left = [t.name for t in threading.enumerate() if t not in before and t.is_alive()]
    assert (seen["wrong"], seen["late"], left) == (0, 0, []), traffic.late
    assert seen["hits"]
    print(seen, "faults of the link:", link.faults, "kills and hangs:", harmed)
