"""What does the mooncake backend add to the calls of Mooncake's own client?

    python3 bench/mooncake_store.py            about 3 minutes
    python3 bench/mooncake_store.py --quick    half a minute, wider spread

A real `mooncake_master` and a process that gives it memory are started on loopback. Three clients
move the same 32 MiB between the same registered memory and that process: the library's own
`batch_put_from` and `batch_get_into`, the calibration; the backend in this process; and the backend
in a process of its own, its default. What the machine can do over loopback TCP is in both figures.

    store, load     in one value of 32 MiB and in 16 of 2 MiB
    contains        of 64 keys, in microseconds
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import measuring
import mooncake

from lmcache_backend_mooncake.backend import MooncakeBackend
from lmcache_backend_mooncake.config import MooncakeConfig
from lmcache_core.chunks.keys import CacheNamespace, ChunkKey, chunk_key
from lmcache_core.chunks.layout import DType, KVLayout, full_attention
from lmcache_core.contracts.storage import BackendContext, HostRegion, StorageBackend, StoreOutcome
from lmcache_core.isolation.backend import IsolatedBackend
from lmcache_core.memory.host_memory import allocate_region
from lmcache_core.metrics import Counters

MIB = 1 << 20
TOTAL = 32 * MIB
SEGMENT = 1536 * MIB
TURNS, QUICK_TURNS = 8, 4
LAYOUT = KVLayout(256, (full_attention(layers=1, heads=1, head_size=8, dtype=DType.BF16),))
PEER_TO_PEER = "P2PHANDSHAKE"
HOLD = """
import sys
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
assert store.setup("127.0.0.1", sys.argv[2], int(sys.argv[3]), 0, "tcp", "", sys.argv[1]) == 0
print("ready", flush=True)
sys.stdin.read()
"""


def start_master() -> tuple[list[subprocess.Popen[Any]], str]:
    """A master, and a process with a segment."""
    with socket.socket() as one, socket.socket() as two:
        for probe in (one, two):
            probe.bind(("127.0.0.1", 0))
        port, metrics = one.getsockname()[1], two.getsockname()[1]
    binary = Path(mooncake.__path__[0]) / "mooncake_master"
    flags = ["--rpc_address=127.0.0.1", f"--rpc_port={port}", "--metrics_host=127.0.0.1"]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    master = subprocess.Popen([binary, *flags, f"--metrics_port={metrics}"], **quiet)
    until = time.monotonic() + 20.0
    while not listens(port):
        assert time.monotonic() < until, "mooncake_master doesn't start"
        time.sleep(0.05)
    address = f"127.0.0.1:{port}"
    command = [sys.executable, "-c", HOLD, address, PEER_TO_PEER, str(SEGMENT)]
    holder = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"ready\n"
    return [holder, master], address


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Raw:
    """The library's client with registered memory."""

    def __init__(self, address: str, region: HostRegion) -> None:
        from mooncake.store import MooncakeDistributedStore

        self.store = MooncakeDistributedStore()
        code = self.store.setup("127.0.0.1", PEER_TO_PEER, 0, 0, "tcp", "", address)
        assert code == 0, code
        assert self.store.register_buffer(region.address, region.nbytes) == 0


class Bench:
    """One backend beside the library's client."""

    def __init__(self, label: str, backend: StorageBackend, raw: Raw, region: HostRegion) -> None:
        self.label = label
        self.backend = backend
        self.raw = raw.store
        self.region = region
        self.loop = asyncio.new_event_loop()
        self._numbers = itertools.count(1)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    def timed(self, work: Coroutine[Any, Any, Any]) -> tuple[Any, measuring.Took]:
        return measuring.awaited(self.loop, work)

    def keys(self, count: int) -> list[ChunkKey]:
        """Never used before: what is there isn't stored again."""
        return [chunk_key(next(self._numbers).to_bytes(16, "little")) for _ in range(count)]

    def transfers(self, count: int, runs: int, turns: int) -> list[measuring.Result]:
        size = TOTAL // count
        view, start = self.region.view, self.region.address
        sources = [view[i * size : (i + 1) * size] for i in range(count)]
        into = [view[TOTAL + i * size : TOTAL + (i + 1) * size] for i in range(count)]
        puts = [start + i * size for i in range(count)]
        gets = [start + TOTAL + i * size for i in range(count)]
        sizes = [size] * count
        names: list[str] = []
        keys: list[ChunkKey] = []

        def fresh() -> None:
            """Nothing is there, so that the segment never fills up."""
            self.raw.remove_all(True)
            names[:] = [f"raw-{key.hex()}" for key in self.keys(count)]
            keys[:] = self.keys(count)

        def store(_: int) -> measuring.Took:
            outcomes, took = self.timed(self.backend.store(keys, sources))
            assert outcomes == [StoreOutcome.STORED] * count
            return took

        def put(_: int) -> None:
            assert self.raw.batch_put_from(names, puts, sizes) == [0] * count

        def load(_: int) -> measuring.Took:
            found, took = self.timed(self.backend.load(keys, into))
            assert found == sizes
            return took

        def get(_: int) -> None:
            assert self.raw.batch_get_into(names, gets, sizes) == sizes

        title = f"{self.label}: {{}}, {count} × {size // MIB} MiB"
        fresh()
        stores = measuring.runs_of(store, put, runs=runs, turns=turns, before=fresh)
        fresh()
        store(0)
        put(0)
        ctypes.memset(start + TOTAL, 0, TOTAL)
        loads = measuring.runs_of(load, get, runs=runs, turns=turns)
        assert view[:TOTAL] == view[TOTAL : 2 * TOTAL]
        return [
            measuring.throughput(title.format("store"), TOTAL, stores),
            measuring.throughput(title.format("load"), TOTAL, loads),
        ]

    def lookups(self, runs: int, turns: int) -> measuring.Result:
        keys = self.keys(64)
        names = [key.hex() for key in keys]
        runs_ = measuring.runs_of(
            lambda _: self.timed(self.backend.contains(keys))[1],
            lambda _: self.raw.batch_is_exist(names),
            runs=runs,
            turns=25 * turns,
        )
        return measuring.duration(f"{self.label}: contains, 64 keys", runs_)


def backends(address: str) -> list[tuple[str, Callable[[], StorageBackend]]]:
    options = MooncakeConfig(
        master_server_address=address, local_hostname="127.0.0.1", global_segment_size=0
    )

    def isolated() -> StorageBackend:
        return IsolatedBackend(
            "mooncake", options, where="bench", deadline_s=60.0, counters=Counters()
        )

    return [("in process", lambda: MooncakeBackend(options)), ("isolated", isolated)]


def main() -> None:
    arguments = measuring.parse(measuring.parser(__doc__))
    turns = QUICK_TURNS if arguments.quick else TURNS
    os.environ.setdefault("MC_TCP_BIND_ADDRESS", "127.0.0.1")
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
    owned = allocate_region(2 * TOTAL, shared=True, populate=True)
    owned.region.view[:TOTAL] = os.urandom(MIB) * (TOTAL // MIB)
    report = measuring.Report(arguments, "client")
    processes, address = start_master()
    try:
        raw = Raw(address, owned.region)
        for label, make in backends(address):
            bench = Bench(label, make(), raw, owned.region)
            context = BackendContext("bench", CacheNamespace("bench", LAYOUT), owned.region, TOTAL)
            bench.run(bench.backend.open(context))
            for count in (1, 16):
                report.add(*bench.transfers(count, arguments.runs, turns))
            report.add(bench.lookups(arguments.runs, turns))
            bench.run(bench.backend.close())
            bench.loop.close()
        raw.store.close()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    report.write()


if __name__ == "__main__":
    main()
