"""``lm://`` on one machine: how far from a raw socket, and from memcpy?

    python3 bench/lm_server.py            about 3 minutes
    python3 bench/lm_server.py --quick    half a minute, wider spread

A server of ours and a raw one run in processes of their own, and so does each client. The raw
calibration moves the same bytes over one loopback TCP connection a client: blocking sockets, one
request for each batch, `sendall` from and `recv_into` (MSG_WAITALL) to memory that was touched
before. Figure and calibration take turns, run after run, and all clients of a run start together;
its rate is all bytes over the time from the first start to the last end. The backend is called as
core's tiers call it: batches of `preferred_batch`, all at once. The ratio of a line is the median
of its runs' ratios.

    tcp     against the raw connection
    shm     the same server, through shared memory, against `memmove` from and to the same buffers;
            they lie in a region that the server can map, as an engine's host memory does
    staged  stores of buffers that the server can't map
    contains   128 keys in one question, against a round trip of as many bytes on the raw connection
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lmcache_backend_lm.backend import LmBackend
from lmcache_backend_lm.config import LmConfig
from lmcache_core.chunks.keys import CacheNamespace, ChunkKey
from lmcache_core.chunks.layout import DType, KVLayout, full_attention
from lmcache_core.contracts.storage import BackendContext, StoreOutcome
from lmcache_core.memory.host_memory import allocate_region

MIB = 1 << 20
KEYS = 128
RUNS = 9
ARENA_GIB = 1.5
_RAW = struct.Struct("<BQ")
_LAYOUT = KVLayout(16, (full_attention(layers=1, heads=1, head_size=8, dtype=DType.BF16),))


@dataclass(frozen=True)
class Result:
    """One line of the table. Values in GiB/s, times in microseconds."""

    name: str
    value: float
    unit: str
    calibration: float
    ratio: float
    runs: int
    spread: float
    """Half the distance between the quartiles of the runs' ratios, by their median."""


# -- the raw server ----------------------------------------------------------------------------


def raw_server() -> None:
    """Sends, receives or echoes what it is asked to, a thread for each connection."""
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    while True:
        sock, _ = listener.accept()
        threading.Thread(target=_raw_session, args=(sock,), daemon=True).start()


def _raw_session(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffers: dict[int, memoryview] = {}
    while head := sock.recv(_RAW.size, socket.MSG_WAITALL):
        kind, nbytes = _RAW.unpack(head)
        if nbytes not in buffers:
            buffers[nbytes] = memoryview(bytearray(b"\x01") * nbytes)
        buffer = buffers[nbytes]
        if kind == 0:
            sock.sendall(buffer)
        else:
            receive(sock, buffer)
            sock.sendall(bytes(KEYS if kind == 2 else 1))


def receive(sock: socket.socket, view: memoryview) -> None:
    at = 0
    while at < len(view):
        at += sock.recv_into(view[at:], 0, socket.MSG_WAITALL)


# -- a client ----------------------------------------------------------------------------------


class Client:
    """Does what the lines on standard input say, and answers with start and end."""

    def __init__(self, number: int, size: int, count: int, ports: tuple[int, int]) -> None:
        self.size, self.count, self.number = size, count, number
        stride = size + 4096
        self._region = allocate_region(count * stride, shared=True)
        region = self._region.region
        ctypes.memset(region.address, 1, region.nbytes)
        self.views = [region.view[i * stride : i * stride + size] for i in range(count)]
        self.loop = asyncio.new_event_loop()
        self.raw = socket.create_connection(("127.0.0.1", ports[1]))
        self.raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        namespace = CacheNamespace(f"bench {number}", _LAYOUT)
        tcp, shm = LmConfig(port=ports[0], same_host=False), LmConfig(port=ports[0])
        self.backends = {
            "tcp": self.opened(BackendContext(f"tcp-{number}", namespace), tcp),
            "shm": self.opened(BackendContext(f"shm-{number}", namespace, region), shm),
            "staged": self.opened(BackendContext(f"staged-{number}", namespace), shm),
        }
        self._plain = bytearray(b"\x02") * (count * size)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._plain))
        self._targets = [ctypes.addressof(ctypes.c_char.from_buffer(v)) for v in self.views]
        self._stored = 0
        self._keys: list[ChunkKey] = []

    def opened(self, context: BackendContext, config: LmConfig) -> LmBackend:
        backend = LmBackend(config)
        self.loop.run_until_complete(backend.open(context))
        return backend

    def serve(self) -> None:
        for line in sys.stdin:
            what, op, at = line.split()
            action = self.action(what, op)
            while time.monotonic() < float(at):
                time.sleep(0.0005)
            start = time.monotonic()
            action()
            print(json.dumps([start, time.monotonic()]), flush=True)

    def action(self, what: str, op: str) -> Callable[[], None]:
        if what == "raw":
            return {"load": self.raw_load, "store": self.raw_store, "contains": self.raw_ask}[op]
        if what == "memcpy":
            return lambda: self.memcpy(op)
        backend = self.backends[what]
        if op == "store":
            # New keys: the server reads what it has already, but doesn't keep it.
            first = self._stored
            self._stored += self.count
            self._keys = [
                ChunkKey((self.number << 64 | first + i).to_bytes(16, "little"))
                for i in range(self.count)
            ]
            return lambda: self.together(backend.store, StoreOutcome.STORED)
        if op == "load":
            return lambda: self.together(backend.load, self.size)
        keys = [ChunkKey(i.to_bytes(16, "little")) for i in range(KEYS)]
        return lambda: self.ask(backend, keys)

    def together(self, call: Callable[..., Any], expected: object) -> None:
        async def batches() -> None:
            size = self.backends["tcp"].capabilities.preferred_batch
            ranges = [slice(i, i + size) for i in range(0, self.count, size)]
            answers = await asyncio.gather(*(call(self._keys[r], self.views[r]) for r in ranges))
            assert all(one == expected for answer in answers for one in answer), answers

        self.loop.run_until_complete(batches())

    def ask(self, backend: LmBackend, keys: Sequence[ChunkKey]) -> None:
        async def often() -> None:
            for _ in range(50):
                await backend.contains(keys)

        self.loop.run_until_complete(often())

    def raw_load(self) -> None:
        self.raw.sendall(_RAW.pack(0, self.size * self.count))
        for view in self.views:
            receive(self.raw, view)

    def raw_store(self) -> None:
        self.raw.sendall(_RAW.pack(1, self.size * self.count))
        for view in self.views:
            self.raw.sendall(view)
        self.raw.recv(1)

    def raw_ask(self) -> None:
        question = bytes(32 + KEYS * 17)
        for _ in range(50):
            self.raw.sendall(_RAW.pack(2, len(question)) + question)
            self.raw.recv(KEYS, socket.MSG_WAITALL)

    def memcpy(self, op: str) -> None:
        for i, target in enumerate(self._targets):
            plain = self._address + i * self.size
            ctypes.memmove(*((target, plain) if op == "load" else (plain, target)), self.size)


# -- the measurement ---------------------------------------------------------------------------


class Clients:
    """Client processes that act at the same time."""

    def __init__(self, count: int, size: int, values: int, ports: tuple[int, int]) -> None:
        self.bytes = count * size * values
        command = [sys.executable, __file__, "--client"]
        arguments = [str(size), str(values), *map(str, ports)]
        self._processes = [
            subprocess.Popen(
                [*command, str(number), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(count)
        ]
        for process in self._processes:
            assert process.stdout is not None
            process.stdout.readline()

    def seconds(self, what: str, op: str) -> float:
        at = time.monotonic() + 0.02
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{what} {op} {at}\n")
            process.stdin.flush()
        times = []
        for process in self._processes:
            assert process.stdout is not None
            times.append(json.loads(process.stdout.readline()))
        return max(end for _, end in times) - min(start for start, _ in times)

    def close(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            process.wait(30)
            process.stdout.close()


def measure(
    name: str, clients: Clients, figure: str, calibration: str, op: str, runs: int
) -> Result:
    """Ratios of rates: how fast the figure is, by its calibration."""
    ratios, figures, calibrations = [], [], []
    for run in range(runs + 1):
        ours = clients.seconds(figure, op)
        plain = clients.seconds(calibration, op)
        if run:  # the first one connects, and touches memory
            ratios.append(plain / ours)
            figures.append(ours)
            calibrations.append(plain)
    low, _, high = statistics.quantiles(ratios, n=4)
    ratio = statistics.median(ratios)
    if op == "contains":
        unit, show = "µs", lambda seconds: seconds / 50 * 1e6
        ratio = 1 / ratio
    else:
        unit, show = "GiB/s", lambda seconds: clients.bytes / seconds / 2**30
    return Result(
        name,
        show(statistics.median(figures)),
        unit,
        show(statistics.median(calibrations)),
        ratio,
        runs,
        (high - low) / 2 / statistics.median(ratios),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer runs")
    parser.add_argument("--runs", type=int)
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    runs = arguments.runs or (3 if arguments.quick else RUNS)
    raw = subprocess.Popen(
        [sys.executable, __file__, "--raw-server"], stdout=subprocess.PIPE, text=True
    )
    ours = subprocess.Popen(
        [
            *(sys.executable, "-c", "from lmcache_backend_lm.command import main; main()"),
            *("localhost", "0", "--memory-gib", str(ARENA_GIB), "--populate"),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    results: list[Result] = []
    try:
        assert raw.stdout is not None
        assert ours.stderr is not None
        port = ours.stderr.readline().split("://")[1].split(" ")[0].rstrip(",").split(":")[1]
        ports = (int(port), int(raw.stdout.readline()))
        print(f"{len(os.sched_getaffinity(0))} CPUs, load {os.getloadavg()[0]:.1f}")
        for count in (1, 8):
            for size in (2 * MIB, 32 * MIB):
                bench(count, size, ports, runs, arguments.only, results)
    finally:
        for process in (raw, ours):
            process.terminate()
            process.wait(30)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(one) for one in results], indent=1))
    else:
        print(json.dumps([asdict(one) for one in results]))


def bench(
    count: int, size: int, ports: tuple[int, int], runs: int, only: str, results: list[Result]
) -> None:
    values = max(2, (256 * MIB if count == 1 else 64 * MIB) // size)
    cases = [
        (f"{figure}/{op}/{count}c/{size // MIB}M", figure, calibration, op)
        for op in ("store", "load", "contains")
        for figure, calibration in (("tcp", "raw"), ("shm", "memcpy"))
    ]
    cases = [(name, f, "raw" if op == "contains" else c, op) for name, f, c, op in cases]
    cases.append((f"staged/store/{count}c/{size // MIB}M", "staged", "memcpy", "store"))
    cases = [
        case
        for case in cases
        if only in case[0] and (case[3] != "contains" or (count == 1 and size == 2 * MIB))
    ]
    if not cases:
        return
    clients = Clients(count, size, values, ports)
    try:
        clients.seconds("tcp", "store")
        for name, figure, calibration, op in cases:
            result = measure(name, clients, figure, calibration, op, runs)
            results.append(result)
            print(
                f"{result.name:20} {result.value:7.2f} {result.unit:6} calibration "
                f"{result.calibration:7.2f}   ratio {result.ratio:5.2f} ± {result.spread:4.0%}",
                flush=True,
            )
    finally:
        clients.close()


if __name__ == "__main__":
    if "--raw-server" in sys.argv:
        raw_server()
    elif "--client" in sys.argv:
        number, size, values, *ports = map(int, sys.argv[2:])
        client = Client(number, size, values, (ports[0], ports[1]))
        print("ready", flush=True)
        client.serve()
    else:
        main()
