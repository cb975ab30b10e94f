"""Load and store through an isolated backend: how far from the same backend in process?

    python3 bench/isolated.py            about 2 minutes
    python3 bench/isolated.py --quick    some seconds, wider spread

The `memory` and `filesystem` backends (the latter on /dev/shm, where nothing but copying is left)
are opened twice: in this process, which is the calibration, and in a child that shares the arena.
Each figure is bytes of values per second; figure and calibration take turns, batch after batch, so
that whatever else the machine does hits both. The ratio of a run is that of its medians; the
reported ratio is the median of the runs.

    arena      buffers lie in shared host memory: nothing is copied on the way
    outside    they don't, as with compressing serdes: one copy through scratch memory
    call       `contains` of one key, in microseconds: what a round trip costs
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lmcache_core.builtin.filesystem import FilesystemBackend, FilesystemConfig
from lmcache_core.builtin.memory import MemoryBackend, MemoryConfig
from lmcache_core.host_memory import allocate_region
from lmcache_core.isolation.backend import IsolatedBackend
from lmcache_core.keys import CacheNamespace, ChunkKey, chunk_key
from lmcache_core.layout import DType, KVLayout, full_attention
from lmcache_core.metrics import Counters
from lmcache_core.storage import BackendContext, StorageBackend, StoreOutcome

MIB = 1 << 20
RUNS = 9
ROUNDS = 8
BATCHES = {32 * MIB: 1, 2 * MIB: 16}
"""Values a call: 32 MiB of bytes, in one value or in many."""
CALLS = 300
LAYOUT = KVLayout(256, (full_attention(layers=1, heads=1, head_size=8, dtype=DType.BF16),))


@dataclass(frozen=True)
class Result:
    """One line of the table; ``ratio`` is ``value`` by ``calibration``."""

    name: str
    value: float
    unit: str
    calibration: float
    ratio: float
    runs: int
    spread: float
    """Half the distance between the quartiles of the runs' ratios, by their median."""


Work = Callable[[], Awaitable[object]]


async def timed(work: Work) -> float:
    began = time.perf_counter()
    await work()
    return time.perf_counter() - began


async def compare(isolated: list[Work], plain: list[Work]) -> tuple[float, float]:
    """Median seconds of each, taking turns and the lead."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn, pair in enumerate(zip(isolated, plain, strict=True)):
        for side in (0, 1) if turn % 2 else (1, 0):
            times[side].append(await timed(pair[side]))
    return statistics.median(times[0]), statistics.median(times[1])


def result(name: str, seconds: list[tuple[float, float]], nbytes: int) -> Result:
    """``nbytes`` 0: the figure is microseconds, not a throughput."""
    ratios = [plain / isolated for isolated, plain in seconds]
    middle = [statistics.median(one) for one in zip(*seconds, strict=True)]
    figures = [nbytes / one / 2**30 if nbytes else one * 1e6 for one in middle]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    ratio = statistics.median(ratios)
    return Result(
        name,
        round(figures[0], 2),
        "GiB/s" if nbytes else "us",
        round(figures[1], 2),
        round(ratio, 3),
        len(seconds),
        round((quartiles[2] - quartiles[0]) / 2 / ratio, 3),
    )


class Pair:
    """One kind of backend, isolated and in process, both open."""

    def __init__(self, kind: str, folder: Path, region: Any) -> None:
        self.kind = kind
        self.region = region
        self._folder = folder
        self._number = 0
        self.both: list[StorageBackend] = []

    async def open(self) -> None:
        for side in ("isolated", "plain"):
            options: Any = MemoryConfig(max_size_gib=2)
            here: StorageBackend = MemoryBackend(options)
            if self.kind == "filesystem":
                options = FilesystemConfig(path=self._folder / side, min_free_gib=0)
                here = FilesystemBackend(options)
            if side == "isolated":
                here = IsolatedBackend(
                    self.kind, options, where="", deadline_s=60.0, counters=Counters()
                )
            namespace = CacheNamespace("bench", LAYOUT)
            await here.open(BackendContext(side, namespace, self.region, 32 * MIB))
            self.both.append(here)

    async def close(self) -> None:
        for backend in self.both:
            await backend.close()

    def keys(self, count: int) -> list[ChunkKey]:
        """Never used before: a value that is there already isn't stored again."""
        self._number += count
        return [chunk_key((self._number - i).to_bytes(16, "little")) for i in range(1, count + 1)]


async def throughput(pair: Pair, place: str, nbytes: int, runs: int, rounds: int) -> list[Result]:
    """Store and load of batches of 32 MiB."""
    count = BATCHES[nbytes]
    total = count * nbytes
    outside = bytearray(2 * total)
    memory = pair.region.view if place == "arena" else memoryview(outside)
    memory[: 2 * total] = bytes(range(256)) * (2 * total // 256)
    cut = [memory[i * nbytes : (i + 1) * nbytes] for i in range(2 * count)]
    sources, into = cut[:count], cut[count:]
    stores: list[tuple[float, float]] = []
    loads: list[tuple[float, float]] = []

    def work(backend: StorageBackend, names: list[ChunkKey], *, store: bool) -> Work:
        async def storing() -> None:
            assert await backend.store(names, sources) == [StoreOutcome.STORED] * count

        async def loading() -> None:
            assert await backend.load(names, into) == [nbytes] * count

        return storing if store else loading

    for run in range(runs + 1):
        batches = [pair.keys(count) for _ in range(rounds)]
        for store, figures in ((True, stores), (False, loads)):
            works = [[work(b, names, store=store) for names in batches] for b in pair.both]
            seconds = await compare(*works)
            if run:  # the first one maps pages and fills caches
                figures.append(seconds)
        for backend in pair.both:
            for names in batches:
                await backend.delete(names)  # type: ignore[attr-defined]
    title = f"{pair.kind}/{place}/{nbytes // MIB}MiB"
    return [result(f"{title}/store", stores, total), result(f"{title}/load", loads, total)]


async def round_trips(pair: Pair, runs: int) -> Result:
    names = pair.keys(1)
    works = [[lambda b=b: b.contains(names) for _ in range(CALLS)] for b in pair.both]
    seconds = [await compare(*works) for _ in range(runs)]  # type: ignore[arg-type]
    return result(f"{pair.kind}/call", seconds, 0)


async def measure(arguments: argparse.Namespace) -> list[Result]:
    runs = 3 if arguments.quick else RUNS
    rounds = 4 if arguments.quick else ROUNDS
    region = allocate_region(2 * 32 * MIB, shared=True, populate=True).region
    shm = Path("/dev/shm")  # noqa: S108 - memory, so that no disk is measured
    folder = Path(tempfile.mkdtemp(dir=shm if shm.is_dir() else None))
    results: list[Result] = []
    try:
        for kind in ("memory", "filesystem"):
            pair = Pair(kind, folder, region)
            await pair.open()
            for place in ("arena", "outside"):
                for nbytes in BATCHES:
                    for one in await throughput(pair, place, nbytes, runs, rounds):
                        results.append(one)
                        show(one)
            results.append(await round_trips(pair, runs))
            show(results[-1])
            await pair.close()
    finally:
        shutil.rmtree(folder)
    return results


def show(one: Result) -> None:
    print(
        f"{one.name:32} {one.value:8.2f} {one.unit:5}   in process {one.calibration:8.2f}   "
        f"ratio {one.ratio:5.2f} ± {one.spread:4.0%}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    print(f"{len(os.sched_getaffinity(0))} CPUs, load {os.getloadavg()[0]:.1f}")
    results = asyncio.run(measure(arguments))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(one) for one in results], indent=1))


if __name__ == "__main__":
    main()
