"""The ``nixl`` backend with POSIX: how far from the agent's own calls, and from the disk?

    python3 bench/nixl_store.py            two minutes; needs nixl
    python3 bench/nixl_store.py --quick    seconds, wider spread
    python3 bench/nixl_store.py --folder /mnt/nvme

Stores and loads values as core hands them over: a frame's header and a chunk of 32 MiB or 2 MiB,
from registered memory; a call has one of the former or eight of the latter, and for a long prompt
core makes four at once. Through the page cache with io_uring, which the backend chooses, or with
Linux AIO, which NIXL does; an agent is always given the same.

    agent            NIXL's calls for as many descriptors of the same bytes, all at once, in a file
                     that is there: descriptor lists, transfer, waiting
    agent, awaited   the same, made by a thread that the event loop waits for: who must not block
                     the loop can't have it for less
    O_DIRECT         open, write or read whole pages past the page cache, and close, a file each

They move the same bytes between the same memory and pages that files have already. A run has files
of its own: how large the pieces are that the page cache keeps a file in differs from file to file,
and is worth a tenth. What is around that in the backend: threads, an index, slots, and with
O_DIRECT the last page, which goes through memory of its own. What waking a thread and the loop
costs on this machine is `agent, awaited / agent`.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import random
import statistics
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from calibrations import RawFiles, aligned
from measuring import (
    Job,
    Report,
    Result,
    Run,
    Took,
    awaited,
    parse,
    parser,
    take_turns,
    throughput,
)
from nixl import nixl_agent, nixl_agent_config

from lmcache_backend_nixl.agent import address_of
from lmcache_backend_nixl.config import PAGE_BYTES, NixlConfig
from lmcache_backend_nixl.files import NixlFileBackend
from lmcache_core.aio.daemon_pool import DaemonPool
from lmcache_core.chunks.frame import HEADER_BYTES
from lmcache_core.chunks.keys import CacheNamespace, ChunkKey
from lmcache_core.chunks.layout import DType, KVLayout, full_attention
from lmcache_core.contracts.storage import BackendContext, HostRegion, StoreOutcome

T = TypeVar("T")
SHAPES = {
    "1 x 32 MiB": (1, 1, 32 << 20),
    "8 x 2 MiB": (1, 8, 2 << 20),
    "4 calls of 8 x 2 MiB": (4, 8, 2 << 20),
}
"""Calls at once, values in each, and their length."""
WARM_UP, TURNS = 2, 8
"""Turns that don't count, in which each page is touched; and all. Half begin with either side."""
FOLDER = Path("/var/tmp")  # noqa: S108 - /tmp is memory on many machines
LAYOUT = KVLayout(256, (full_attention(layers=32, heads=8, head_size=128, dtype=DType.BF16),))


class Store:
    """The backend, an agent of our own and raw files, with as many values a call."""

    def __init__(
        self, folder: Path, calls: int, values: int, nbytes: int, *, direct: bool, aio: bool
    ) -> None:
        self._each = values
        values *= calls
        framed = HEADER_BYTES + nbytes
        slot = -(-framed // PAGE_BYTES) * PAGE_BYTES
        params = {"use_aio": "true"} if aio else {} if direct else {"use_uring": "true"}
        self.count, self.nbytes, self._slot = values, values * framed, slot
        self._framed = framed
        arena = aligned(2 * values * slot)
        arena[: values * slot] = random.Random(0).randbytes(values * slot)
        address = address_of(arena)
        self._views = [arena[i * slot : i * slot + framed] for i in range(2 * values)]
        self._pages = [arena[i * slot : (i + 1) * slot] for i in range(2 * values)]
        self._addresses = [address + i * slot for i in range(2 * values)]
        self._loop = asyncio.new_event_loop()
        self._backend = NixlFileBackend(
            NixlConfig.model_validate(
                {
                    "backend": "POSIX",
                    "path": folder / "pool",
                    "pool_size": 2 * values,
                    "direct_io": direct,
                    "backend_params": params if aio else {},  # else what it chooses itself
                }
            )
        )
        region = HostRegion(address, 2 * values * slot, arena)
        context = BackendContext("bench", CacheNamespace("bench", LAYOUT), region, framed)
        self._loop.run_until_complete(self._backend.open(context))
        for made in (folder / "pool").iterdir():
            os.utime(made, (1, 1))  # as if a while ago: folders that just changed are listed anew
        self._agent = nixl_agent("raw", nixl_agent_config(backends=[]))
        self._agent.create_backend("POSIX", params)
        self._agent.register_memory([(address, 2 * values * slot, 0, "")], "DRAM")
        flags = os.O_RDWR | os.O_CREAT | (os.O_DIRECT if direct else 0)
        self._fds = [os.open(folder / uuid.uuid4().hex, flags, 0o600) for _ in range(2)]
        for fd in self._fds:
            os.posix_fallocate(fd, 0, 2 * values * slot)
            self._agent.register_memory([(0, 2 * values * slot, fd, "")], "FILE")
        self._thread = DaemonPool(1, "bench")
        self._moved = slot if direct else framed
        self._raw = RawFiles(folder, direct=True, sync=False)

    def job(self, who: str, what: str) -> Job:
        """What a turn of ``who`` is: one of a title's two names."""
        jobs = {
            "agent, awaited": (self.awaited_store, self.awaited_load),
            "agent": (self.agent_store, self.agent_load),
            "O_DIRECT": (self.raw_store, self.raw_load),
        }
        return jobs.get(who, (self.store, self.load))[what == "load"]

    def store(self, turn: int) -> Took:
        call = self._calls(self._backend.store, turn, self._views[: self.count])
        outcomes, took = awaited(self._loop, call)
        assert outcomes == [StoreOutcome.STORED] * self.count, outcomes
        return took

    def load(self, turn: int) -> Took:
        call = self._calls(self._backend.load, turn, self._views[self.count :])
        sizes, took = awaited(self._loop, call)
        assert sum(sizes) == self.nbytes, sizes
        return took

    def agent_store(self, turn: int) -> None:
        self._agent_moves("WRITE", turn, 0, self._fds[0])

    def agent_load(self, turn: int) -> None:
        self._agent_moves("READ", turn, self.count, self._fds[0])

    def awaited_store(self, turn: int) -> Took:
        return awaited(self._loop, self._on_thread("WRITE", turn, 0))[1]

    def awaited_load(self, turn: int) -> Took:
        return awaited(self._loop, self._on_thread("READ", turn, self.count))[1]

    def raw_store(self, turn: int) -> None:
        for index, pages in enumerate(self._pages[: self.count]):
            self._raw.write(f"{turn}-{index}", pages)

    def raw_load(self, turn: int) -> None:
        for index, pages in enumerate(self._pages[self.count :]):
            self._raw.read(f"{turn}-{index}", pages)

    def same(self) -> bool:
        half = self.count
        pairs = zip(self._views[:half], self._views[half:], strict=True)
        return all(bytes(a) == bytes(b) for a, b in pairs)  # views compare item by item

    def forget(self, turn: int) -> None:
        self._loop.run_until_complete(self._backend.delete(self._keys(turn)))

    def close(self) -> None:
        self._raw.__exit__()
        self._loop.run_until_complete(self._backend.close())
        self._loop.close()
        self._thread.shutdown()
        for fd in self._fds:
            os.close(fd)

    async def _calls(
        self, one: Callable[..., Awaitable[list[T]]], turn: int, views: list[memoryview]
    ) -> list[T]:
        keys, each = self._keys(turn), self._each
        if len(keys) == each:
            return await one(keys, views)
        starts = range(0, len(keys), each)
        parts = [one(keys[start : start + each], views[start : start + each]) for start in starts]
        return list(itertools.chain(*await asyncio.gather(*parts)))

    async def _on_thread(self, op: str, turn: int, first: int) -> None:
        await self._thread.run(self._agent_moves, op, turn, first, self._fds[1])

    def _agent_moves(self, op: str, turn: int, first: int, fd: int) -> None:
        half = turn % 2 * self.count
        each, slots = self._moved, range(self.count)
        memory = [(self._addresses[first + i], each, 0) for i in slots]
        places = [((half + i) * self._slot, each, fd) for i in slots]
        handle = self._agent.initialize_xfer(
            op,
            self._agent.get_xfer_descs(memory, "DRAM"),
            self._agent.get_xfer_descs(places, "FILE"),
            "raw",
        )
        state = self._agent.transfer(handle)
        while state == "PROC" and (state := self._agent.check_xfer_state(handle)) == "PROC":
            time.sleep(0)
        self._agent.release_xfer_handle(handle)
        assert state == "DONE", state

    def _keys(self, turn: int) -> list[ChunkKey]:
        return [ChunkKey(bytes([i]) * 8 + turn.to_bytes(8, "big")) for i in range(self.count)]


def measure(make: Callable[[Path], Store], folder: Path, runs: int, pair: str) -> list[Result]:
    """Turns of store and load, each with its calibration, in files of their own for each run."""
    ours, theirs = pair.split(" / ")
    found: dict[str, list[Run]] = {"store": [], "load": []}
    nbytes = 0
    for _ in range(runs):
        took: dict[str, tuple[list[float], list[float]]] = {"store": ([], []), "load": ([], [])}
        with tempfile.TemporaryDirectory(prefix="bench-nixl-", dir=folder) as place:
            store = make(Path(place))
            nbytes = store.nbytes
            for turn in range(TURNS):
                for what, columns in took.items():
                    seconds = take_turns(
                        store.job(ours, what), store.job(theirs, what), 1, first=turn
                    )
                    if turn >= WARM_UP:
                        for column, (value,) in zip(columns, seconds, strict=True):
                            column.append(value)
                store.job(ours, "load")(turn)
                assert store.same(), "what was loaded isn't what was stored"
                store.forget(turn)
            store.close()
        for what, columns in took.items():
            found[what].append(Run(*map(statistics.median, columns)))
    return [throughput(what, nbytes, one) for what, one in found.items()]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--folder", type=Path, default=FOLDER, help="on the disk to measure")
    options.add_argument("--only", default="", help="figures with this in their names")
    arguments = parse(options)
    report = Report(arguments, "calibration")
    for shape, (calls, values, nbytes) in SHAPES.items():
        for pair, direct, aio in (
            ("agent, awaited / agent", False, False),
            ("buffered / agent", False, False),
            ("buffered / agent, awaited", False, False),
            ("buffered, AIO / agent", False, True),
            ("buffered, AIO / agent, awaited", False, True),
            ("direct / agent", True, False),
            ("direct / O_DIRECT", True, False),
        ):
            if arguments.only not in f"{pair}, {shape}":
                continue
            if calls > 1 and not pair.endswith("/ agent"):
                continue
            make = functools.partial(
                Store, calls=calls, values=values, nbytes=nbytes, direct=direct, aio=aio
            )
            for found in measure(make, arguments.folder, arguments.runs, pair):
                report.add(replace(found, name=f"{pair}, {shape}, {found.name}"))
    report.write()


if __name__ == "__main__":
    main()
