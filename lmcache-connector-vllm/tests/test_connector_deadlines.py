"""Both halves of the connector have one deadline for a lookup and for closing, whatever takes part.

The clock stands still unless a test moves it: no test waits for a deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]

pytest.importorskip("vllm.distributed.kv_events")

from lmcache_connector_vllm.scheduler import SchedulerSide  # noqa: E402
from lmcache_connector_vllm.settings import Settings  # noqa: E402
from lmcache_connector_vllm.worker import WorkerSide  # noqa: E402
from lmcache_core.chunks.keys import CacheNamespace, ChunkKey  # noqa: E402
from lmcache_core.chunks.layout import DType, KVLayout, full_attention  # noqa: E402
from lmcache_core.config import load_config  # noqa: E402
from lmcache_core.plugins.manager import Plugins  # noqa: E402

RANKS, CLOSING_S, LOOKUP_S = 2, 8.0, 3.0
WAIT_S = 30.0
NAMESPACE = CacheNamespace(
    model="m",
    layout=KVLayout(16, (full_attention(layers=1, heads=2, head_size=8, dtype=DType.BF16),)),
)
KEYS = [ChunkKey(bytes([n]) * 16) for n in range(3)]


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    extra = {
        "lmcache.chunk_size": 16,
        "lmcache.max_local_cpu_size": 0.001,
        "lmcache.local_disk": str(tmp_path),
        "lmcache.max_local_disk_size": 1,
        "lmcache.blocking_timeout_secs": CLOSING_S,
        "lmcache.lookup_timeout_ms": int(1000 * LOOKUP_S),
    }
    plugins = Plugins()
    config = load_config(plugins, engine=("test", extra))
    return Settings(config, plugins, saves=True, asynchronous=False, layerwise=False)


@pytest.fixture
def scheduler(settings: Settings, clock: Clock) -> Iterator[SchedulerSide]:
    side = SchedulerSide(settings, NAMESPACE, ranks=RANKS, block_tokens=16, clock=clock)
    loop, tiers = side._loop, list(side._tiers)
    yield side
    for one in tiers:
        one.close()
    assert loop is not None
    loop.close(WAIT_S)


class Step:
    """A part that takes all the time that it is given when it is closed or waited for."""

    def __init__(self, clock: Clock, given: list[float], answer: object = None) -> None:
        self._clock, self._given, self._answer = clock, given, answer

    def _take(self, timeout_s: float) -> object:
        self._given.append(timeout_s)
        self._clock.now += timeout_s
        return self._answer

    close = flush = join = _take

    def shutdown(self) -> None:
        pass


def test_every_part_is_asked_at_the_same_time_with_one_deadline(scheduler: SchedulerSide) -> None:
    asked: list[float | None] = []
    everybody = asyncio.Event()
    answers = iter([[0, 0, -1], [0, 1, -1]])
    assert len(scheduler._tiers) == RANKS

    async def locate(_: Sequence[ChunkKey], deadline_s: float | None = None) -> list[int]:
        asked.append(deadline_s)
        answer = next(answers)
        if len(asked) == RANKS:
            everybody.set()
        await everybody.wait()
        return answer

    for tiers in scheduler._tiers:
        tiers.locate = locate  # type: ignore[method-assign]
    found = scheduler._locate(KEYS).result(WAIT_S)
    assert found == [0, -1, -1], "the second chunk's parts lie in different tiers"
    assert asked == [LOOKUP_S] * RANKS


def test_closing_a_scheduler_has_one_deadline_for_all_ranks(
    scheduler: SchedulerSide, clock: Clock
) -> None:
    given: list[float] = []
    scheduler._tiers = [Step(clock, given) for _ in range(RANKS)]  # type: ignore[misc]
    scheduler._loop = Step(clock, given)  # type: ignore[assignment]
    began = clock.now
    scheduler.close()
    assert len(given) == RANKS + 1
    assert min(given) > 0
    assert clock.now - began <= CLOSING_S


def test_closing_a_worker_has_one_deadline_for_all_its_parts(
    settings: Settings, clock: Clock
) -> None:
    engine: Any = SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=1))
    plain = replace(settings.config, backends=())
    worker = WorkerSide(
        Settings(plain, settings.plugins, saves=True, asynchronous=False, layerwise=False),
        NAMESPACE,
        engine,
        rank=0,
        weights="",
        clock=clock,
    )
    given: list[float] = []
    parts = Step(clock, given, answer=False)
    worker._background = worker._mover = parts  # type: ignore[assignment]
    worker._tiers = worker._loop = parts  # type: ignore[assignment]
    began = clock.now
    worker.close()
    assert len(given) == 5, "loads, the queue, the tiers, the loop, the mover's threads"
    assert min(given) > 0
    assert clock.now - began <= CLOSING_S
