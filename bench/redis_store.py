"""Chunks into Redis and out of it: how far from a raw socket that exchanges the same commands?

    python3 bench/redis_store.py            about 2 minutes; needs redis-server
    python3 bench/redis_store.py --quick    a quarter of it, wider spread
    python3 bench/redis_store.py --binary /path/to/valkey-server

Starts a server on loopback with room for a few values, so that it evicts, as a full cache does.
The backend's ``load`` and ``store`` are called as core calls them: with batches of eight at most.
The calibration is a blocking socket that sends the same commands for as many values and receives
into a prepared buffer, with nothing checked; figure and calibration take turns. `redis-py` is
what a client does that reads replies into new objects. ``contains`` of 128 keys is compared with
one PING on a raw socket: the ratio is that of their times, and 1 would be a batch that costs no
more than asking whether the server is there.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import redis

from lmcache_backend_redis.backend import IN_FLIGHT_BYTES, RedisBackend
from lmcache_backend_redis.config import RedisConfig
from lmcache_backend_redis.layout import HEAD, Head, Names
from lmcache_backend_redis.resp import command
from lmcache_core.frame import HEADER_BYTES
from lmcache_core.keys import CacheNamespace, ChunkKey, chunk_key
from lmcache_core.layout import DType, KVLayout, full_attention
from lmcache_core.storage import BackendContext

MIB = 1 << 20
VALUES = 8  # of each size, used in turn
RUNS = 9
NAMESPACE = CacheNamespace(
    "bench", KVLayout(16, (full_attention(layers=1, heads=1, head_size=8, dtype=DType.BF16),))
)


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    name: str
    value: float
    unit: str
    calibration: float
    ratio: float
    runs: int
    spread: float
    """Half the distance between the quartiles of the runs' ratios, by their median."""


@contextmanager
def server(binary: str) -> Iterator[int]:
    """A server on a free port; the answer is the port."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
    options = {"port": port, "bind": "127.0.0.1", "save": "", "appendonly": "no"}
    options |= {"maxmemory": "768mb", "maxmemory-policy": "allkeys-lru"}
    with tempfile.TemporaryDirectory() as folder:
        arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        process = subprocess.Popen([binary, *arguments, "--dir", folder], stdout=subprocess.DEVNULL)
        try:
            for _ in range(200):
                try:
                    redis.Redis(port=port).ping()
                    break
                except redis.ConnectionError:
                    time.sleep(0.05)
            yield port
        finally:
            process.kill()
            process.wait()


class Raw:
    """The same commands over a blocking socket, nothing checked."""

    def __init__(self, port: int, piece_bytes: int, names: Names) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._piece_bytes = piece_bytes
        self._names = names
        self._heads: dict[ChunkKey, Head] = {}
        self._small = memoryview(bytearray(1 << 16))

    def ping(self) -> None:
        self._socket.sendall(b"PING\r\n")
        self._exactly(7)

    def store(self, keys: list[ChunkKey], sources: list[memoryview]) -> None:
        last = b"%d" % (HEAD.size - 1)
        names = [self._names.head(key) for key in keys]
        asking = [command(b"GETRANGE", n, b"0", last) + command(b"STRLEN", n) for n in names]
        self._socket.sendall(b"".join(asking))
        self._exactly(len(b"$0\r\n\r\n:0\r\n") * len(keys))
        parts: list[bytes | memoryview] = []
        commit: list[bytes] = []
        answers = replies = 0
        for key, name, source in zip(keys, names, sources, strict=True):
            head = self._heads[key] = Head.of(source.nbytes, self._piece_bytes)
            for piece, place in head.pieces(name) or [(name, slice(0, source.nbytes))]:
                front = b"" if head.piece_bytes else head.pack()
                size = len(front) + place.stop - place.start
                options = (b"EX", b"90") if head.piece_bytes else (b"NX",)
                start = command(b"SET", piece, b"", *options).partition(b"$0\r\n\r\n")
                parts += [start[0] + b"$%d\r\n" % size + front, source[place], b"\r\n" + start[2]]
                replies += 1
            if head.piece_bytes:
                kept = [command(b"PERSIST", piece) for piece, _ in head.pieces(name)]
                kept.append(command(b"SET", name, head.pack(), b"NX"))
                commit.append(command(b"MULTI") + b"".join(kept) + command(b"EXEC"))
                count = len(kept)
                answers += 5 + 9 * count + len(b"*%d\r\n" % count) + 4 * (count - 1) + 5
        self._send(parts)
        self._exactly(len(b"+OK\r\n") * replies)
        self._socket.sendall(b"".join(commit))
        self._exactly(answers)

    def load(self, keys: list[ChunkKey], into: list[memoryview]) -> None:
        names = [self._names.head(key) for key in keys]
        heads = [self._heads[key] for key in keys]
        self._socket.sendall(b"".join(command(b"GET", name) for name in names))
        self._exactly((len(b"$24\r\n\r\n") + HEAD.size) * len(keys))
        pieces = [
            (piece, target[place])
            for name, head, target in zip(names, heads, into, strict=True)
            for piece, place in head.pieces(name)
        ]
        window = max(1, IN_FLIGHT_BYTES // self._piece_bytes)
        self._socket.sendall(b"".join(command(b"GET", piece) for piece, _ in pieces[:window]))
        for i, (_, target) in enumerate(pieces):
            self._exactly(len(b"$%d\r\n" % target.nbytes))
            self._into(target)
            self._exactly(2)
            if i + window < len(pieces):
                self._socket.sendall(command(b"GET", pieces[i + window][0]))

    def _exactly(self, count: int) -> None:
        self._into(self._small[:count])

    def _into(self, target: memoryview) -> None:
        done = 0
        while done < target.nbytes:
            done += self._socket.recv_into(target[done:], 0, socket.MSG_WAITALL)

    def _send(self, parts: list[bytes | memoryview]) -> None:
        left = [memoryview(part) for part in parts]
        while left:
            sent = self._socket.sendmsg(left[:256])
            while left and sent >= left[0].nbytes:
                sent -= left.pop(0).nbytes
            if sent:
                left[0] = left[0][sent:]


class Bench:
    """One server, one open backend, one raw socket."""

    def __init__(self, port: int, runs: int) -> None:
        self.runs = runs
        self.client = redis.Redis(port=port)
        config = RedisConfig(url=f"redis://127.0.0.1:{port}")
        self.backend = RedisBackend(config)
        self.loop = asyncio.new_event_loop()
        self.loop.run_until_complete(self.backend.open(BackendContext("bench", NAMESPACE)))
        names = Names(config.prefix, NAMESPACE.fingerprint)
        self.raw = Raw(port, config.piece_bytes, names)
        self._turns = itertools.count()

    def compared(
        self, ours: Callable[[], float], theirs: Callable[[], float], rounds: int
    ) -> list[tuple[float, float]]:
        """Medians of both for each run."""
        pairs = []
        for _ in range(self.runs):
            took = [(ours(), theirs()) for _ in range(rounds)]
            pairs.append(
                (statistics.median(o for o, _ in took), statistics.median(t for _, t in took))
            )
        return pairs

    def values(self, mebibytes: int, batch: int) -> list[Result]:
        each = mebibytes * MIB + HEADER_BYTES
        sources = [memoryview(bytearray(os.urandom(each))) for _ in range(VALUES)]
        into = [memoryview(bytearray(each)) for _ in range(batch)]
        stored: dict[str, list[ChunkKey]] = {}
        loaded: list[int] = []

        def fresh(whose: str) -> tuple[list[ChunkKey], list[memoryview]]:
            keys = stored[whose] = [chunk_key(os.urandom(16)) for _ in range(batch)]
            return keys, [sources[next(self._turns) % VALUES] for _ in keys]

        def our_store() -> float:
            call = self.backend.store(*fresh("ours"))
            return seconds(lambda: self.loop.run_until_complete(call))

        def raw_store() -> float:
            keys, values = fresh("raw")
            return seconds(lambda: self.raw.store(keys, values))

        def our_load() -> float:
            call = self.backend.load(stored["ours"], into)
            took = seconds(lambda: loaded.extend(self.loop.run_until_complete(call)))
            assert loaded == [each] * batch
            loaded.clear()
            return took

        def raw_load() -> float:
            return seconds(lambda: self.raw.load(stored["raw"], into))

        def client_store() -> float:
            keys, values = fresh("redis-py")
            pipe = self.client.pipeline(transaction=False)
            for key, value in zip(keys, values, strict=True):
                pipe.set(key, value)
            return seconds(pipe.execute)

        def client_load() -> float:
            pipe = self.client.pipeline(transaction=False)
            for key in stored["redis-py"]:
                pipe.get(key)
            return seconds(pipe.execute)

        rounds = max(4, 64 // mebibytes // batch)
        what = f"{batch} × {mebibytes} MiB" if batch > 1 else f"{mebibytes} MiB"
        calls = {
            f"store {what}": (our_store, raw_store),
            f"load {what}": (our_load, raw_load),
            f"store {what}, redis-py": (client_store, raw_store),
            f"load {what}, redis-py": (client_load, raw_load),
        }
        size = each * batch
        results = []
        for name, (ours, theirs) in calls.items():
            if name.startswith("load"):  # in a server that has room: nothing may be evicted
                self.client.flushall()
                for store in (our_store, raw_store, client_store):
                    store()
            results.append(self.throughput(name, size, ours, theirs, rounds))
        return results

    def throughput(
        self,
        name: str,
        size: int,
        ours: Callable[[], float],
        theirs: Callable[[], float],
        rounds: int,
    ) -> Result:
        pairs = self.compared(ours, theirs, rounds)
        ratios = [their / our for our, their in pairs]
        return Result(
            name,
            statistics.median(size / our for our, _ in pairs) / 1e9,
            "GB/s",
            statistics.median(size / their for _, their in pairs) / 1e9,
            statistics.median(ratios),
            self.runs,
            spread(ratios),
        )

    def lookups(self) -> Result:
        keys = [chunk_key(os.urandom(16)) for _ in range(128)]

        def ours() -> float:
            call = self.backend.contains(keys)
            return seconds(lambda: self.loop.run_until_complete(call))

        pairs = self.compared(ours, lambda: seconds(self.raw.ping), 200)
        ratios = [our / ping for our, ping in pairs]
        return Result(
            "contains of 128 keys ÷ PING",
            statistics.median(our for our, _ in pairs) * 1e6,
            "µs",
            statistics.median(ping for _, ping in pairs) * 1e6,
            statistics.median(ratios),
            self.runs,
            spread(ratios),
        )

    def close(self) -> None:
        self.loop.run_until_complete(self.backend.close())
        self.loop.close()


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(ratios: list[float]) -> float:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return (high - low) / 2 / middle


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--binary", default="redis-server", help="the server to start")
    arguments = parser.parse_args()
    binary = shutil.which(arguments.binary)
    if binary is None:
        print(f"there is no {arguments.binary}; apt-get install -y redis-server", file=sys.stderr)
        return 1
    with server(binary) as port:
        bench = Bench(port, 3 if arguments.quick else RUNS)
        results = [
            *bench.values(32, 1),
            *bench.values(2, 8),
            *bench.values(2, 1),
            bench.lookups(),
        ]
        bench.close()
    print(f"{'':28} {'value':>8} {'':6} {'calibration':>12} {'ratio':>6} {'spread':>7}")
    for one in results:
        print(
            f"{one.name:28} {one.value:8.2f} {one.unit:6} {one.calibration:12.2f} "
            f"{one.ratio:6.2f} {one.spread:7.1%}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(one) for one in results], indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
