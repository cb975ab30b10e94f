"""What does the infinistore backend add to the calls of InfiniStore's own client?

    python3 bench/infinistore_store.py            a minute and a half; needs infinistore and gcc
    python3 bench/infinistore_store.py --quick    a third of it, wider spread

Starts the real server, with an emulated NIC, which is also preloaded into this program: it starts
itself again for that. The same 32 MiB are moved between the same memory and the server by the
library's own client, the calibration, and by the backend in this process and in one of its own,
its default. The client gets its bytes in pieces of 2 MiB, which no other size beats here: over RDMA
all in one request, from registered memory; over TCP one call after the other. It has one connection
and the backend, as configured by default, two, which serve two calls at a time. What it reads over
TCP is in memory of its own; whoever wants it elsewhere copies it, and so does the calibration.

    emulated NIC, TCP    how values travel; not real RDMA
    store, load          in one value of 32 MiB and in 16 of 2 MiB
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import infinistore
import measuring

from lmcache_backend_infinistore.backend import InfinistoreBackend
from lmcache_backend_infinistore.config import InfinistoreConfig
from lmcache_core.chunks.keys import CacheNamespace, ChunkKey, chunk_key
from lmcache_core.chunks.layout import DType, KVLayout, full_attention
from lmcache_core.contracts.storage import BackendContext, HostRegion, StorageBackend, StoreOutcome
from lmcache_core.isolation.backend import IsolatedBackend
from lmcache_core.memory.host_memory import allocate_region
from lmcache_core.metrics import Counters

sys.path.insert(0, str(Path(__file__).parents[1] / "lmcache-backend-infinistore" / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from infini_server import DEVICE, Server, emulated_nic

MIB = 1 << 20
TOTAL, PIECE = 32 * MIB, 2 * MIB
TURNS, QUICK_TURNS = 8, 4
LAYOUT = KVLayout(256, (full_attention(layers=1, heads=1, head_size=8, dtype=DType.BF16),))
TRAVEL = {"emulated NIC": "RDMA", "TCP": "TCP"}


class Raw:
    """The library's client."""

    def __init__(self, port: int, region: HostRegion, travel: str) -> None:
        self._client = infinistore.InfinityConnection(
            infinistore.ClientConfig(
                host_addr="127.0.0.1",
                service_port=port,
                connection_type=travel,
                dev_name=DEVICE,
                log_level="warning",
            )
        )
        self._client.connect()
        self._rdma = travel == infinistore.TYPE_RDMA
        self._start = region.address
        if self._rdma:
            self._client.register_mr(region.address, region.nbytes)
        self._loop = asyncio.new_event_loop()

    def put(self, blocks: Sequence[tuple[str, int]]) -> measuring.Took | None:
        """Store pieces under these names, from these offsets into the region."""
        if self._rdma:
            return self._run(self._client.rdma_write_cache_async(blocks, PIECE, self._start))
        for name, offset in blocks:
            self._client.tcp_write_cache(name, self._start + offset, PIECE)
        return None

    def get(self, blocks: Sequence[tuple[str, int]]) -> measuring.Took | None:
        """The reverse."""
        if self._rdma:
            return self._run(self._client.rdma_read_cache_async(blocks, PIECE, self._start))
        for name, offset in blocks:
            found = self._client.tcp_read_cache(name)
            ctypes.memmove(self._start + offset, found.ctypes.data, PIECE)
        return None

    def forget(self, names: Sequence[str]) -> None:
        self._client.delete_keys(names)

    def close(self) -> None:
        self._client.close()
        self._loop.close()

    def _run(self, call: Coroutine[Any, Any, Any]) -> measuring.Took:
        return measuring.awaited(self._loop, call)[1]


class Bench:
    """One backend beside the library's client."""

    def __init__(self, label: str, backend: StorageBackend, raw: Raw, region: HostRegion) -> None:
        self._label = label
        self._backend = backend
        self._raw = raw
        self._view = region.view
        self._loop = asyncio.new_event_loop()
        self._numbers = itertools.count(1)
        context = BackendContext("bench", CacheNamespace("bench", LAYOUT), region, TOTAL)
        self._run(backend.open(context))

    def transfers(self, count: int, runs: int, turns: int) -> list[measuring.Result]:
        size = TOTAL // count
        sources = [self._view[i * size : (i + 1) * size] for i in range(count)]
        into = [self._view[TOTAL + i * size : TOTAL + (i + 1) * size] for i in range(count)]
        last = max(2, runs * turns)
        keys = [[self._key() for _ in range(count)] for _ in range(last)]
        names = [[f"raw-{self._key().hex()}" for _ in range(TOTAL // PIECE)] for _ in range(last)]
        there: set[int] = set()

        def forget() -> None:
            """What is there, so that the pool never fills up and all is stored anew."""
            for turn in there:
                self._run(self._backend.delete(keys[turn]))  # type: ignore[attr-defined]
                self._raw.forget(names[turn])
            there.clear()

        def store(turn: int) -> measuring.Took:
            outcomes, took = self._in_batches(self._backend.store, keys[turn], sources)
            assert outcomes == [StoreOutcome.STORED] * count, outcomes
            there.add(turn)
            return took

        def put(turn: int) -> measuring.Took | None:
            there.add(turn)
            return self._raw.put([(name, i * PIECE) for i, name in enumerate(names[turn])])

        def load(_: int) -> measuring.Took:
            sizes, took = self._in_batches(self._backend.load, keys[0], into)
            assert sizes == [size] * count
            return took

        def get(_: int) -> measuring.Took | None:
            return self._raw.get([(name, TOTAL + i * PIECE) for i, name in enumerate(names[0])])

        title = f"{self._label}: {{}}, {count} × {size // MIB} MiB"
        stores = measuring.runs_of(store, put, runs=runs, turns=turns, before=forget)
        forget()
        store(0)
        put(0)
        for move in (load, get):
            self._view[TOTAL : 2 * TOTAL] = bytes(TOTAL)
            move(0)
            assert self._view[:TOTAL] == self._view[TOTAL : 2 * TOTAL]
        loads = measuring.runs_of(load, get, runs=runs, turns=turns)
        forget()
        return [
            measuring.throughput(title.format("store"), TOTAL, stores),
            measuring.throughput(title.format("load"), TOTAL, loads),
        ]

    def close(self) -> None:
        self._run(self._backend.close())
        self._loop.close()

    def _in_batches(
        self, call: Callable[..., Any], keys: list[ChunkKey], values: list[memoryview]
    ) -> tuple[list[Any], measuring.Took]:
        """What a call answers that is cut into the backend's batches, as core does it."""
        size = self._backend.capabilities.preferred_batch
        parts = [slice(first, first + size) for first in range(0, len(keys), size)]

        async def all_parts() -> list[Any]:
            answers = await asyncio.gather(*(call(keys[part], values[part]) for part in parts))
            return [one for answer in answers for one in answer]

        return measuring.awaited(self._loop, all_parts())

    def _key(self) -> ChunkKey:
        return chunk_key(next(self._numbers).to_bytes(16, "little"))

    def _run(self, call: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(call)


def backends(options: InfinistoreConfig) -> dict[str, Callable[[], StorageBackend]]:
    def isolated() -> StorageBackend:
        return IsolatedBackend(
            "infinistore", options, where="bench", deadline_s=60.0, counters=Counters()
        )

    return {"in process": lambda: InfinistoreBackend(options), "isolated": isolated}


def measure(port: int, arguments: Any) -> None:
    """Every figure, against the server at ``port``."""
    turns = QUICK_TURNS if arguments.quick else TURNS
    region = allocate_region(2 * TOTAL, shared=True, populate=True).region
    region.view[:TOTAL] = os.urandom(MIB) * (TOTAL // MIB)
    report = measuring.Report(arguments, "client")
    for means, travel in TRAVEL.items():
        if arguments.only not in means:
            continue
        raw = Raw(port, region, travel)
        options = InfinistoreConfig.model_validate(
            {"url": f"infinistore://127.0.0.1:{port}", "connection_type": travel}
        )
        for where, make in backends(options).items():
            bench = Bench(f"{means}, {where}", make(), raw, region)
            for count in (1, 16):
                report.add(*bench.transfers(count, arguments.runs, turns))
            bench.close()
        raw.close()
    report.write()


def main() -> int:
    options = measuring.parser(__doc__)
    options.add_argument("--port", type=int, help="of a server; for the program itself")
    options.add_argument("--only", default="", help="means of transport with this in their names")
    arguments = measuring.parse(options)
    if arguments.port is not None:
        measure(arguments.port, arguments)
        return 0
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        nic = emulated_nic(Path(folder))
        with Server(nic) as server:
            command = [sys.executable, __file__, *sys.argv[1:], f"--port={server.port}"]
            preloaded = {**os.environ, "LD_PRELOAD": str(nic)}
            return subprocess.run(command, env=preloaded, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
