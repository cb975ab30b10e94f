"""A good client of ``lm://`` beside 2,000 connections that misbehave: by how much is it slower?

    python3 bench/lm_crowd.py                   about 2 minutes
    python3 bench/lm_crowd.py --at-most 10      exit status 1 where a ratio is above that

A server without a token, a crowd and a good client, a process each. The crowd's connections are all
greeted, as one without a token can be. Then, a quarter of them each, they

- announce the longest question that there is, and send a byte of it now and then;
- announce a store of 1 MiB, and send a byte of it now and then;
- ask one question after the other and never read an answer, until nothing more can be sent;
- say nothing.

Where the server closes one, another one comes. ``--bytes-a-second`` is how many bytes, or
questions, all of them together send. The good client asks for 128 keys, stores and loads a value of
256 KiB, over TCP and through shared memory, one call after the other, alone and beside the crowd in
turn. The figure is the 99th percentile of its calls in a turn beside the crowd, by that of the turn
before without one: in the name `a / b`. The last line is the memory that the server took for the
crowd at the most, by the 64 MiB that it may.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from itertools import cycle, islice
from pathlib import Path

from measuring import Report, Result, parse, parser, spread

from lmcache_backend_lm import greeting, protocol
from lmcache_backend_lm.backend import LmBackend
from lmcache_backend_lm.config import LmConfig
from lmcache_backend_lm.protocol import HEADER_BYTES, MAX_KEYS, MAX_META_BYTES, Op
from lmcache_core.chunks.keys import CacheNamespace, ChunkKey
from lmcache_core.chunks.layout import DType, KVLayout, full_attention
from lmcache_core.contracts.storage import BackendContext, StoreOutcome
from lmcache_core.memory.host_memory import allocate_region

COUNT = 2000
KEYS = 128
VALUE_BYTES = 256 << 10
CALLS, QUICK_CALLS = 1000, 300
"""Of each kind in a turn: enough for a 99th percentile."""
MAY_TAKE_MIB = 64
TICK_S = 0.01
SPARE_DESCRIPTORS = 200
_SPACE = "5" * 16
_LAYOUT = KVLayout(16, (full_attention(layers=1, heads=1, head_size=8, dtype=DType.BF16),))


def keys_from(first: int, count: int) -> list[ChunkKey]:
    return [ChunkKey((first + i).to_bytes(16, "little")) for i in range(count)]


# -- the crowd ---------------------------------------------------------------------------------


class Member:
    """One connection that misbehaves, in the way that its number says."""

    def __init__(self, port: int, number: int) -> None:
        self._port, self._number = port, number
        self._sock = self._greeted()

    def again(self) -> None:
        """Send a little more; come back if the server has hung up."""
        try:
            self._go_on()
        except BlockingIOError:
            pass
        except OSError:
            self._sock.close()
            with contextlib.suppress(OSError):
                self._sock = self._greeted()

    def _greeted(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self._port), 60)
        sock.sendall(_message(Op.HELLO, meta=greeting.hello(_SPACE, b"")))
        if not sock.recv(HEADER_BYTES):
            sock.close()
            raise ConnectionResetError("it isn't greeted")
        kind = self._number % 4
        if kind == 0:
            sock.sendall(protocol.header(Op.CONTAINS, 1, count=MAX_KEYS, meta=MAX_META_BYTES))
        elif kind == 1:
            key = keys_from(1 << 64 | self._number, 1)
            meta = protocol.names(key) + protocol.numbers([1 << 20])
            sock.sendall(_message(Op.STORE, 1, meta, 1 << 20))
        sock.setblocking(False)
        return sock

    def _go_on(self) -> None:
        kind = self._number % 4
        if kind < 2:
            self._sock.send(b"x")
        elif kind == 2:
            self._sock.send(_QUESTION)


def _message(op: Op, count: int = 0, meta: bytes = b"", payload: int = 0) -> bytes:
    return protocol.header(op, 1, count=count, meta=len(meta), payload=payload) + meta


_QUESTION = _message(Op.CONTAINS, KEYS, protocol.names(keys_from(0, KEYS)))


def crowd(port: int, count: int, a_second: float) -> None:
    """Connect so many, say that they are there, and go on until standard input ends."""
    members = [Member(port, number) for number in range(count)]
    random.Random(1).shuffle(members)
    print("ready", flush=True)
    waiting = asyncio.new_event_loop()

    async def go_on() -> None:
        ends = asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        turn = cycle(members)
        while not ends.done():
            # Where the machine is too slow for so many, there are fewer.
            for member in islice(turn, max(1, int(a_second * TICK_S))):
                member.again()
            await asyncio.sleep(TICK_S)

    waiting.run_until_complete(go_on())


@contextlib.contextmanager
def beside(port: int, count: int, a_second: float) -> Iterator[None]:
    """While a crowd is there."""
    command = [sys.executable, __file__, "--crowd", str(port), str(count), str(a_second)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if not process.stdout.readline():
            raise RuntimeError("the crowd couldn't connect")
        yield
    finally:
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()
        process.stdout.close()


# -- the good client ---------------------------------------------------------------------------


class Good:
    """One client; its calls' seconds, by their name."""

    def __init__(self, port: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._region = allocate_region(2 * VALUE_BYTES, shared=True)
        region = self._region.region
        self._views = [region.view[:VALUE_BYTES], region.view[VALUE_BYTES:]]
        self._views[0][:] = b"\x01" * VALUE_BYTES
        self._stored = 0
        self._backends = {}
        for name in ("tcp", "shm"):
            config = LmConfig(port=port, same_host=name == "shm")
            context = BackendContext(name, CacheNamespace("good", _LAYOUT), region)
            self._backends[name] = LmBackend(config)
            self._loop.run_until_complete(self._backends[name].open(context))

    def turn(self, calls: int) -> dict[str, float]:
        """The 99th percentile of so many calls of each kind, in milliseconds."""
        return self._loop.run_until_complete(self._turn(calls))

    async def _turn(self, calls: int) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for _ in range(calls):
            for way, backend in self._backends.items():
                for name, call in self._calls(backend):
                    began = time.perf_counter()
                    await call()
                    found.setdefault(f"{name}, {way}", []).append(time.perf_counter() - began)
        return {name: 1e3 * percentile(seconds, 0.99) for name, seconds in found.items()}

    def _calls(self, backend: LmBackend) -> list[tuple[str, Callable[[], Awaitable[None]]]]:
        self._stored += 1
        new, asked = keys_from(self._stored, 1), keys_from(0, KEYS)

        async def ask() -> None:
            assert len(await backend.contains(asked)) == KEYS

        async def store() -> None:
            assert await backend.store(new, self._views[:1]) == [StoreOutcome.STORED]

        async def load() -> None:
            assert await backend.load(new, self._views[1:]) == [VALUE_BYTES]

        return [("question", ask), ("store", store), ("load", load)]


def percentile(values: list[float], share: float) -> float:
    """So many of the values are at most this."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


# -- the program -------------------------------------------------------------------------------


@contextlib.contextmanager
def server() -> Iterator[tuple[int, int]]:
    """A server's port and process."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", "from lmcache_backend_lm.command import main; main()"),
            *("localhost", "0", "--memory-gib", "0.5", "--populate"),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        yield int(line.split("://")[1].split(" ")[0].rstrip(",").split(":")[1]), process.pid
    finally:
        process.terminate()
        process.communicate(timeout=30)


def resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def result(name: str, pairs: list[tuple[float, float]]) -> Result:
    """Of the percentiles beside a crowd and alone, of each run."""
    ratios = [loud / quiet for loud, quiet in pairs]
    loud, quiet = (statistics.median(values) for values in zip(*pairs, strict=True))
    ratio = round(statistics.median(ratios), 3)
    return Result(
        name, round(loud, 3), "ms", round(quiet, 3), ratio, len(pairs), round(spread(ratios), 3)
    )


def main() -> int:
    """Measure, print the table."""
    options = parser(__doc__, runs=7)
    options.add_argument("--count", type=int, default=COUNT, help="connections that misbehave")
    options.add_argument("--bytes-a-second", type=float, default=COUNT, help="by all of them")
    options.add_argument("--at-most", type=float, help="exit status 1 where a ratio is above that")
    arguments = parse(options)
    raise_limit(arguments.count)
    calls = QUICK_CALLS if arguments.quick else CALLS
    report = Report(arguments, "alone")
    with server() as (port, pid):
        good, pairs = Good(port), {}
        good.turn(calls)
        memory: list[float] = []
        for _ in range(arguments.runs):
            quiet, before = good.turn(calls), resident_mib(pid)
            with beside(port, arguments.count, arguments.bytes_a_second):
                loud = good.turn(calls)
                memory.append(resident_mib(pid) - before)
            for name in quiet:
                pairs.setdefault(name, []).append((loud[name], quiet[name]))
    for name, both in pairs.items():
        report.add(result(f"{name}: p99 beside {arguments.count:,} / alone", both))
    most = max(memory)
    ratio = round(most / MAY_TAKE_MIB, 3)
    report.add(Result("memory", round(most, 1), "MiB", MAY_TAKE_MIB, ratio, len(memory), 0.0))
    report.write()
    limit = arguments.at_most
    above = [one.name for one in report.results[:-1] if limit is not None and one.ratio > limit]
    for name in above:
        print(f"above {limit:g}: {name}")
    return 1 if above else 0


def raise_limit(count: int) -> None:
    """Let this process's children have so many descriptors.

    Raises:
        SystemExit: they can't.
    """
    needed = count + SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < needed:
        if hard < needed:
            raise SystemExit(f"a process may have {hard} descriptors here; {needed} are needed")
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


if __name__ == "__main__":
    if "--crowd" in sys.argv:
        crowd(int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
    else:
        sys.exit(main())
