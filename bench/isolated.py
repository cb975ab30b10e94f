"""A backend in a process of its own: how far from the same backend in this process?

    python3 bench/isolated.py            two minutes
    python3 bench/isolated.py --quick    some seconds, wider spread

Stores and loads 32 MiB a call, in one value or in sixteen. The calibration is the same call to the
same kind of backend, here. Both use the same host memory, which the child maps too; `filesystem`
writes to /dev/shm, where nothing but copying is left, so that isolation shows as much as it can.

    arena      buffers lie in that memory: nothing is copied on the way
    outside    they don't, as with serdes that compress: one copy more, through scratch memory
    call       `contains` of one key: what a round trip costs
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from measuring import Report, Run, duration, parse, parser, runs_of, take_turns, throughput

from lmcache_core.builtin.filesystem import FilesystemBackend, FilesystemConfig
from lmcache_core.builtin.memory import MemoryBackend, MemoryConfig
from lmcache_core.chunks.keys import CacheNamespace, ChunkKey
from lmcache_core.chunks.layout import DType, KVLayout, full_attention
from lmcache_core.contracts.storage import BackendContext, HostRegion, StorageBackend, StoreOutcome
from lmcache_core.isolation.backend import IsolatedBackend
from lmcache_core.memory.host_memory import allocate_region
from lmcache_core.metrics import Counters

SHAPES = {"1 x 32 MiB": (1, 32 << 20), "16 x 2 MiB": (16, 2 << 20)}
CALL_BYTES = 32 << 20
KINDS = ("memory", "filesystem")
TURNS = 8
CALLS = 300
SHM = Path("/dev/shm")  # noqa: S108 - memory, on purpose
LAYOUT = KVLayout(256, (full_attention(layers=32, heads=8, head_size=128, dtype=DType.BF16),))
_T = TypeVar("_T")


class Side:
    """One open backend, with room for what a call stores and loads."""

    def __init__(self, loop: asyncio.AbstractEventLoop, backend: StorageBackend) -> None:
        self._loop = loop
        self._backend: Any = backend

    def open(self, region: HostRegion) -> None:
        context = BackendContext("bench", CacheNamespace("bench", LAYOUT), region, CALL_BYTES)
        self.run(self._backend.open(context))

    def use(self, memory: memoryview, values: int, nbytes: int) -> None:
        """Store from the first half of ``memory``, load into the second."""
        cut = [memory[i * nbytes : (i + 1) * nbytes] for i in range(2 * values)]
        self._sources, self._into = cut[:values], cut[values:]
        self._nbytes = nbytes

    def store(self, turn: int) -> None:
        outcomes = self.run(self._backend.store(self._keys(turn), self._sources))
        assert outcomes == [StoreOutcome.STORED] * len(outcomes), outcomes

    def load(self, turn: int) -> None:
        sizes = self.run(self._backend.load(self._keys(turn), self._into))
        assert sizes == [self._nbytes] * len(sizes), sizes

    def forget(self, turn: int) -> None:
        self.run(self._backend.delete(self._keys(turn)))

    def call(self, turn: int) -> None:
        self.run(self._backend.contains([ChunkKey(turn.to_bytes(16, "big"))]))

    def close(self) -> None:
        self.run(self._backend.close())

    def run(self, work: Awaitable[_T]) -> _T:
        async def awaited() -> _T:
            return await work

        return self._loop.run_until_complete(awaited())

    def _keys(self, turn: int) -> list[ChunkKey]:
        values = range(len(self._sources))
        return [ChunkKey(bytes([index]) * 8 + turn.to_bytes(8, "big")) for index in values]


@contextmanager
def opened(kind: str, region: HostRegion) -> Iterator[tuple[Side, Side]]:
    """The isolated backend and the one here."""
    loop = asyncio.new_event_loop()
    with tempfile.TemporaryDirectory(dir=SHM if SHM.is_dir() else None) as folder:
        options: list[Any] = [MemoryConfig(max_size_gib=2)] * 2
        here: StorageBackend = MemoryBackend(options[1])
        if kind == "filesystem":
            options = [FilesystemConfig(path=Path(folder) / side) for side in ("there", "here")]
            here = FilesystemBackend(options[1])
        there = IsolatedBackend(kind, options[0], where=kind, deadline_s=60.0, counters=Counters())
        sides = Side(loop, there), Side(loop, here)
        for side in sides:
            side.open(region)
        yield sides
        for side in sides:
            side.close()
    loop.close()


def measure(sides: tuple[Side, Side], runs: int) -> dict[str, list[Run]]:
    """Some turns of store, then of load, a run."""
    found: dict[str, list[Run]] = {"store": [], "load": []}
    for number in range(-1, runs):  # the first one maps pages, and doesn't count
        first = (number + 1) * TURNS
        for what, done in found.items():
            jobs = [getattr(side, what) for side in sides]
            seconds = take_turns(*jobs, TURNS, first=first)
            if number >= 0:
                done.append(Run(*map(statistics.median, seconds)))
        for turn in range(first, first + TURNS):
            for side in sides:
                side.forget(turn)
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--only", default="", help="names that contain this")
    arguments = parse(options)
    report = Report(arguments, "in process")
    region = allocate_region(2 * CALL_BYTES, shared=True, populate=True).region
    outside = memoryview(bytearray(2 * CALL_BYTES))
    for kind in KINDS:
        with opened(kind, region) as sides:
            for place, memory in (("arena", region.view), ("outside", outside)):
                memory[:CALL_BYTES] = bytes(range(256)) * (CALL_BYTES // 256)
                for shape, (values, nbytes) in SHAPES.items():
                    title = f"{kind}/{place}/{shape}"
                    if arguments.only not in title:
                        continue
                    for side in sides:
                        side.use(memory, values, nbytes)
                    for what, runs in measure(sides, arguments.runs).items():
                        report.add(throughput(f"{title}/{what}", CALL_BYTES, runs))
                    assert memory[:CALL_BYTES] == memory[CALL_BYTES:]
            if arguments.only in f"{kind}/call":
                there, here = sides
                calls = runs_of(there.call, here.call, runs=arguments.runs, turns=CALLS)
                report.add(duration(f"{kind}/call", calls))
    report.write()


if __name__ == "__main__":
    main()
