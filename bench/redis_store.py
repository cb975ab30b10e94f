"""Chunks into Redis and out of it: how far from a raw socket that exchanges the same commands?

    python3 bench/redis_store.py            about 2 minutes; needs redis-server
    python3 bench/redis_store.py --quick    a quarter of it, wider spread
    python3 bench/redis_store.py --binary /path/to/valkey-server

Starts a server on loopback with room for a few values, so that it evicts, as a full cache does.
The backend's ``load`` and ``store`` are called as core calls them: with batches of eight at most.
The calibration is a blocking socket that sends the same commands for as many values and receives
into a prepared buffer, with nothing checked; figure and calibration take turns. `redis-py` is a
client that reads replies into new objects, against the same calibration. ``contains`` of 128 keys
is compared with one PING on a raw socket.

    1 x 32 MiB, 8 x 2 MiB, 1 x 2 MiB    values in one call
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import redis
from measuring import Report, Took, awaited, duration, parse, parser, runs_of, throughput

from lmcache_backend_redis.backend import RedisBackend
from lmcache_backend_redis.config import RedisConfig
from lmcache_backend_redis.layout import HEAD, Head, Names
from lmcache_backend_redis.loading import IN_FLIGHT_BYTES
from lmcache_backend_redis.resp import command
from lmcache_core.chunks.frame import HEADER_BYTES
from lmcache_core.chunks.keys import CacheNamespace, ChunkKey, chunk_key
from lmcache_core.chunks.layout import DType, KVLayout, full_attention
from lmcache_core.contracts.storage import BackendContext

MIB = 1 << 20
VALUES = 8  # of each size, used in turn
SHAPES = {"1 x 32 MiB": (1, 32 * MIB), "8 x 2 MiB": (8, 2 * MIB), "1 x 2 MiB": (1, 2 * MIB)}
NAMESPACE = CacheNamespace(
    "bench", KVLayout(16, (full_attention(layers=1, heads=1, head_size=8, dtype=DType.BF16),))
)


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


class Values:
    """One shape of values in one server: what is stored and loaded, by whom."""

    def __init__(self, port: int, raw: Raw, count: int, nbytes: int) -> None:
        framed = nbytes + HEADER_BYTES
        self.nbytes = count * framed
        self.client = redis.Redis(port=port)
        self._raw = raw
        self._sources = [memoryview(bytearray(os.urandom(framed))) for _ in range(VALUES)]
        self._into = [memoryview(bytearray(framed)) for _ in range(count)]
        self._turns = itertools.count()
        self._stored: dict[str, list[ChunkKey]] = {}

    def raw_store(self, _turn: int) -> None:
        self._raw.store(*self._fresh("raw"))

    def raw_load(self, _turn: int) -> None:
        self._raw.load(self._stored["raw"], self._into)

    def client_store(self, _turn: int) -> None:
        pipe = self.client.pipeline(transaction=False)
        for key, value in zip(*self._fresh("redis-py"), strict=True):
            pipe.set(key, value)
        pipe.execute()

    def client_load(self, _turn: int) -> None:
        pipe = self.client.pipeline(transaction=False)
        for key in self._stored["redis-py"]:
            pipe.get(key)
        assert len(pipe.execute()[0]) == self._into[0].nbytes

    def our_store(self, bench: Bench) -> Took:
        return bench.timed(bench.backend.store(*self._fresh("ours")))[1]

    def our_load(self, bench: Bench) -> Took:
        sizes, took = bench.timed(bench.backend.load(self._stored["ours"], self._into))
        assert sizes == [one.nbytes for one in self._into]
        return took

    def _fresh(self, whose: str) -> tuple[list[ChunkKey], list[memoryview]]:
        """Keys that nobody had, and values for them."""
        keys = self._stored[whose] = [chunk_key(os.urandom(16)) for _ in self._into]
        return keys, [self._sources[next(self._turns) % VALUES] for _ in keys]


class Bench:
    """An open backend and a raw socket."""

    def __init__(self, port: int) -> None:
        config = RedisConfig(url=f"redis://127.0.0.1:{port}")
        self.port = port
        self.backend = RedisBackend(config)
        self._loop = asyncio.new_event_loop()
        self.call(self.backend.open(BackendContext("bench", NAMESPACE)))
        self.raw = Raw(port, config.piece_bytes, Names(config.prefix, NAMESPACE.fingerprint))

    def call(self, work: Awaitable[Any]) -> Any:
        return self._loop.run_until_complete(work)

    def timed(self, work: Coroutine[Any, Any, Any]) -> tuple[Any, Took]:
        return awaited(self._loop, work)

    def values(self, report: Report, shape: str, runs: int) -> None:
        values = Values(self.port, self.raw, *SHAPES[shape])
        turns = max(4, 64 * MIB // values.nbytes)
        stores = {"": lambda _: values.our_store(self), ", redis-py": values.client_store}
        loads = {"": lambda _: values.our_load(self), ", redis-py": values.client_load}
        for who, job in stores.items():
            seconds = runs_of(job, values.raw_store, runs=runs, turns=turns)
            report.add(throughput(f"{shape}/store{who}", values.nbytes, seconds))
        values.client.flushall()  # so that nothing of what is loaded is evicted
        for store in (values.raw_store, *stores.values()):
            store(0)
        for who, job in loads.items():
            seconds = runs_of(job, values.raw_load, runs=runs, turns=turns)
            report.add(throughput(f"{shape}/load{who}", values.nbytes, seconds))

    def lookups(self, report: Report, runs: int) -> None:
        keys = [chunk_key(os.urandom(16)) for _ in range(128)]
        seconds = runs_of(
            lambda _: self.timed(self.backend.contains(keys))[1],
            lambda _: self.raw.ping(),
            runs=runs,
            turns=200,
        )
        report.add(duration("contains of 128 keys, against one PING", seconds))

    def close(self) -> None:
        self.call(self.backend.close())
        self._loop.close()


def main() -> int:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--binary", default="redis-server", help="the server to start")
    arguments = parse(options)
    binary = shutil.which(arguments.binary)
    if binary is None:
        print(f"there is no {arguments.binary}; apt-get install -y redis-server", file=sys.stderr)
        return 1
    report = Report(arguments, "raw socket")
    with server(binary) as port:
        bench = Bench(port)
        for shape in SHAPES:
            bench.values(report, shape, arguments.runs)
        bench.lookups(report, arguments.runs)
        bench.close()
    report.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
