"""Everything that can go wrong between a client and a server ends as a miss, once explained."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import logging
import os
import random
import signal
import socket
import socketserver
import struct
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import xxhash
from lm_server import RunningServer, certificate
from system_packages import need

from lmcache_backend_lm import greeting, protocol
from lmcache_backend_lm.backend import LmBackend
from lmcache_backend_lm.call import Call, Stage
from lmcache_backend_lm.config import LmConfig
from lmcache_backend_lm.protocol import HEADER_BYTES, Op, Status
from lmcache_core import Cache, ConfigError, DType, KVLayout, Plugins, full_attention, load_config
from lmcache_core.chunks.keys import CacheNamespace
from lmcache_core.contracts.storage import MISS, BackendContext, HostRegion, StoreOutcome
from lmcache_core.errors import BackendError, BackendRejected, BackendTimeout, BackendUnavailable
from lmcache_core.memory.host_memory import allocate_region
from lmcache_core.testing.loop import Loop
from lmcache_core.testing.storage import LAYOUT, buffers, keys, value, views

CHUNK = 16
GROUP = full_attention(layers=3, heads=2, head_size=8, dtype=DType.BF16)
NAMESPACE = CacheNamespace("faults", LAYOUT)
LARGE = 32 << 20


@pytest.fixture
def run() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    running = RunningServer("--memory-gib", "0.5", "--metrics-port", "0", "--stall-timeout", "2")
    yield running
    assert running.stop() == 0


@pytest.fixture
def start() -> Iterator[Callable[..., RunningServer]]:
    with ExitStack() as stack:

        def start_one(*options: str, **more: Any) -> RunningServer:
            running = RunningServer("--memory-gib", "0.25", *options, **more)
            stack.callback(running.stop)
            return running

        yield start_one


def open_backend(run: Loop, **options: Any) -> LmBackend:
    backend = LmBackend(LmConfig(**options))
    run(backend.open(BackendContext("remote", NAMESPACE)))
    return backend


@pytest.fixture
def region() -> Iterator[HostRegion]:
    """Memory as an engine's is: a server on this machine can map it."""
    owned = allocate_region(LARGE, shared=True)
    yield owned.region
    owned.close()


def open_with_region(
    run: Loop, server: RunningServer, region: HostRegion, **more: Any
) -> LmBackend:
    assert server.unix
    backend = LmBackend(LmConfig(path=server.unix, **more))
    run(backend.open(BackendContext("remote", NAMESPACE, region)))
    return backend


def counted(url: str, name: str) -> float:
    """The sum of a metric's series."""
    text = urllib.request.urlopen(url, timeout=10).read().decode()
    lines = [line for line in text.splitlines() if line.startswith(f"lmcache_{name}")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def eventually(true: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


def is_free(buffer: bytearray) -> bool:
    """Whether nobody has a view of ``buffer``."""
    gc.collect()  # an error's traceback has frames with views in them
    try:
        buffer.append(0)
    except BufferError:
        return False
    del buffer[-1]
    return True


# -- a cache, as a user has it -----------------------------------------------------------------


@contextmanager
def cache(url: str, *more: str, model: str = "m", chunk: int = CHUNK) -> Iterator[Cache]:
    options = [f"chunk_size={chunk}", "max_local_cpu_size=0.01", "local_cpu=false", *more]
    config = load_config(Plugins(), environ={}, assignments=[*options, f"remote_url={url}"])
    with Cache.open(model=model, layout=KVLayout(chunk, (GROUP,)), config=config) as opened:
        yield opened


def tokens(count: int) -> list[int]:
    dice = random.Random(0)
    return [dice.randrange(50_000) for _ in range(count)]


def kv(count: int) -> bytearray:
    return bytearray(random.Random(1).randbytes(GROUP.chunk_bytes(count)))


def failures(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_two_caches_share_what_one_stored(start: Callable[..., RunningServer]) -> None:
    url = start().url
    with cache(url, "remote_serde=naive") as one, cache(url) as two:
        one.store(tokens(64), kv(64))
        assert one.flush()
        loaded = bytearray(len(kv(64)))
        assert two.load(tokens(64), loaded) == 64
        assert loaded == kv(64)


def test_no_server_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with cache(f"lm://127.0.0.1:{port}") as opened:
        assert opened.lookup(tokens(64)) == 0
        assert opened.load(tokens(64), bytearray(len(kv(64)))) == 0
    said = [line for line in failures(caplog) if f"lm://127.0.0.1:{port}" in line]
    assert len(said) == 1
    assert "is lmcache_server running there?" in said[0]


def test_killed_and_restarted_empty(
    start: Callable[..., RunningServer], caplog: pytest.LogCaptureFixture
) -> None:
    server = start()
    with cache(server.url) as opened:
        opened.store(tokens(64), kv(64))
        assert opened.flush()
        assert opened.lookup(tokens(64)) == 64
        server.kill()
        assert opened.lookup(tokens(64)) == 0
        assert opened.load(tokens(64), bytearray(len(kv(64)))) == 0
        errors = [n for (name, _), n in opened.counters.snapshot().items() if "errors" in name]
        assert sum(errors) >= 1
        assert any(server.url in line for line in failures(caplog))
        start(port=server.port)
        assert opened.lookup(tokens(64)) == 0
        opened.store(tokens(64), kv(64))
        assert opened.flush()
        assert opened.lookup(tokens(64)) == 64


def test_a_value_of_another_version_is_a_miss(server: RunningServer, run: Loop) -> None:
    model = "another version"
    with cache(server.url, model=model) as writer:
        writer.store(tokens(64), kv(64))
        assert writer.flush()
        names = writer._keys(tokens(64), "")
    namespace = CacheNamespace(model, KVLayout(CHUNK, (GROUP,))).placed("frame=3;serde=1")
    backend = LmBackend(LmConfig(port=server.port))
    run(backend.open(BackendContext("remote", namespace)))
    frames = buffers(len(names), 1 << 16)
    sizes = run(backend.load(names, views(frames)))
    assert run(backend.delete(names)) == len(names)
    later = [memoryview(frame)[:size] for frame, size in zip(frames, sizes, strict=True)]
    for frame in later:
        struct.pack_into("<H", frame, 8, 65535)
        struct.pack_into("<Q", frame, 120, xxhash.xxh3_64_intdigest(frame[:120]))
    run(backend.store(names, later))
    run(backend.close())
    with cache(server.url, model=model) as reader:
        assert reader.load(tokens(64), bytearray(len(kv(64)))) == 0
        series = reader.counters.snapshot()
    rejected = {dict(labels)["reason"] for name, labels in series if name == "frame_rejected"}
    assert rejected == {"version"}


# -- credentials and other protocols -----------------------------------------------------------


@pytest.mark.parametrize("way", ["tcp", "unix"])
@pytest.mark.parametrize("token", [None, "wrong"])
def test_a_wrong_token(
    start: Callable[..., RunningServer], run: Loop, token: str | None, way: str
) -> None:
    server = start(LMCACHE_SERVER_TOKEN="right")
    where: dict[str, Any] = {"port": server.port} if way == "tcp" else {"path": server.unix}
    with pytest.raises(BackendRejected, match="token"):
        open_backend(run, token=token, **where)
    backend = open_backend(run, token="right", **where)
    assert run(backend.contains(keys(1))) == [False]
    run(backend.close())
    eventually(lambda: "the token is wrong" in server.text or "token is needed" in server.text)
    assert "right" not in server.text.replace("right away", "")


def test_a_wrong_token_is_an_error_at_start(start: Callable[..., RunningServer]) -> None:
    server = start(LMCACHE_SERVER_TOKEN="right")
    with pytest.raises(ConfigError, match="token is needed"), cache(server.url):
        pass


def test_a_token_file(start: Callable[..., RunningServer], run: Loop, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("from a file\n")
    server = start("--token-file", str(file))
    backend = open_backend(run, port=server.port, token_file=file)
    assert run(backend.contains(keys(1))) == [False]
    run(backend.close())


class _Http(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        line = self.rfile.readline()
        self.wfile.write(b"HTTP/1.0 400 Bad request: " + line[:10] + b"\r\n\r\n")


class _Mute(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while self.request.recv(4096):
            pass


@contextmanager
def other_server(handler: type[socketserver.BaseRequestHandler]) -> Iterator[int]:
    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = True
        daemon_threads = True

    with Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def test_http_on_the_port(run: Loop) -> None:
    with (
        other_server(_Http) as port,
        pytest.raises(BackendRejected, match=r"starts with b'HTTP.*is it an lmcache_server\?"),
    ):
        open_backend(run, port=port)


def test_a_server_that_says_nothing(run: Loop) -> None:
    with (
        other_server(_Mute) as port,
        pytest.raises(BackendTimeout, match="no greeting came within"),
    ):
        open_backend(run, port=port, connect_timeout_s=0.3)


@pytest.mark.parametrize(
    ("answer", "ends", "expected", "said"),
    [
        (b"", True, BackendUnavailable, "closed the connection"),
        (protocol.header(Op.SHARE, 0, meta=16)[:9], True, BackendUnavailable, "closed the connect"),
        (b"", False, BackendTimeout, "no greeting came within"),
    ],
    ids=["nothing", "half a header", "silence"],
)
def test_a_server_that_ends_while_memory_is_shared(
    run: Loop, tmp_path: Path, answer: bytes, ends: bool, expected: type[Exception], said: str
) -> None:
    """It is a server that was stopped at that moment, not one that refuses."""
    path = tmp_path / "socket"
    hello = greeting.welcome(greeting.Welcome(bytes(16), True, 1 << 30, (0, 0), ""))

    def serve(listener: socket.socket) -> None:
        with listener.accept()[0] as sock:
            head = protocol.parse_header(sock.recv(HEADER_BYTES, socket.MSG_WAITALL))
            sock.recv(head.meta, socket.MSG_WAITALL)
            sock.sendall(protocol.header(Op.HELLO, 0, meta=len(hello)) + hello)
            head = protocol.parse_header(sock.recv(HEADER_BYTES, socket.MSG_WAITALL))
            sock.recv(head.meta, socket.MSG_WAITALL)
            sock.sendall(answer)
            while not ends and sock.recv(1):
                pass

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        with pytest.raises(expected, match=said):
            open_backend(run, path=path, connect_timeout_s=0.3)
        thread.join()


def test_redis_on_the_port(run: Loop) -> None:
    need("redis-server")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    redis = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:

        def answers() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        eventually(answers)
        with pytest.raises(BackendRejected, match=r"is it an lmcache_server\?"):
            open_backend(run, port=port)
    finally:
        redis.terminate()
        redis.wait(30)


def test_another_version_of_the_protocol(
    server: RunningServer, run: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def later(fingerprint: str, nonce: bytes, *, proves: bool) -> bytes:
        return original(fingerprint, nonce, proves=proves, version=4)

    original = greeting.hello
    monkeypatch.setattr(greeting, "hello", later)
    with pytest.raises(BackendRejected, match=r"speaks version 4 .* speaks version 3"):
        open_backend(run, port=server.port)


def test_tls(start: Callable[..., RunningServer], run: Loop, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    server = start("--tls-cert", str(cert), "--tls-key", str(key), LMCACHE_SERVER_TOKEN="t")
    assert server.url.startswith("lm+tls://")
    options = {"port": server.port, "token": "t"}
    with pytest.raises(BackendRejected, match="isn't trusted"):
        open_backend(run, tls=True, **options)
    with pytest.raises((BackendRejected, BackendUnavailable)):
        open_backend(run, **options)  # no TLS
    backend = open_backend(run, tls=True, ca_file=cert, **options)
    stored = [value(i, 5 << 20) for i in range(4)]
    loaded = buffers(4, 5 << 20)

    async def both_ways() -> None:
        others = [backend.store(keys(4, seed), views(stored)) for seed in range(1, 5)]
        await asyncio.gather(backend.store(keys(4), views(stored)), *others)
        got = await asyncio.gather(
            backend.load(keys(4), views(loaded)), *(backend.contains(keys(4)) for _ in range(9))
        )
        assert got[0] == [5 << 20] * 4

    run(both_ways())
    assert loaded == stored
    run(backend.close())


# -- while values move -------------------------------------------------------------------------


class Proxy:
    """Passes bytes between one client and a server until it is told to stop half-way."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.left = 1 << 60
        self.silent = False
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._spawn(self._accept)

    def _spawn(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            upstream = socket.create_connection(("127.0.0.1", self._target))
            self._sockets += [client, upstream]
            self._spawn(self._pump, client, upstream)
            self._spawn(self._pump, upstream, client)

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(64 << 10):
                self.left -= len(data)
                if self.left < 0:
                    if self.silent:
                        return
                    break
                target.sendall(data)
        except OSError:
            pass
        for one in (source, target):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.left, self.silent = -1, False
        for one in self._sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for one in self._sockets:
            one.close()


@pytest.fixture
def proxy(server: RunningServer) -> Iterator[Proxy]:
    made = Proxy(server.port)
    yield made
    made.close()


def clear(run: Loop, server: RunningServer) -> None:
    backend = open_backend(run, port=server.port)
    run(backend.clear())
    run(backend.close())


@pytest.mark.parametrize("operation", ["load", "store"])
def test_a_connection_that_breaks_half_way(
    server: RunningServer, proxy: Proxy, run: Loop, operation: str
) -> None:
    clear(run, server)
    backend = open_backend(run, port=proxy.port, same_host=False, connections=1)
    source, target = value(1, LARGE), bytearray(LARGE)
    if operation == "load":
        run(backend.store(keys(1), views([source])))
    proxy.left = LARGE // 2
    broken, buffer = (backend.load, target) if operation == "load" else (backend.store, source)
    with pytest.raises(BackendUnavailable):
        run(broken(keys(1), views([buffer])))
    eventually(lambda: is_free(source) and is_free(target))
    proxy.left = 1 << 60
    there = operation == "load"
    assert run(backend.contains(keys(1))) == [there]  # half a value is none; it reconnected
    if operation == "store":
        assert run(backend.store(keys(1), views([source]))) == [StoreOutcome.STORED]
    assert run(backend.load(keys(1), views([target]))) == [LARGE]
    assert target == source
    run(backend.close())


def test_a_connection_that_stands_still(server: RunningServer, proxy: Proxy, run: Loop) -> None:
    clear(run, server)
    backend = open_backend(run, port=proxy.port, same_host=False, stall_timeout_s=1.0)
    run(backend.store(keys(1), views([value(1, LARGE)])))
    proxy.left, proxy.silent = LARGE // 2, True
    with pytest.raises(BackendTimeout, match="nothing moved for"):
        run(backend.load(keys(1), views([bytearray(LARGE)])))
    run(backend.close())


@pytest.mark.parametrize("moment", ["before it is sent", "half-way"])
@pytest.mark.parametrize("operation", ["load", "store"])
def test_a_cancelled_call(
    server: RunningServer, proxy: Proxy, run: Loop, operation: str, moment: str
) -> None:
    """Its buffer is left alone afterwards, and the next call gets its own answer."""
    clear(run, server)
    backend = open_backend(run, port=proxy.port, same_host=False, connections=1)
    source = value(1, LARGE)
    if operation == "load":
        run(backend.store(keys(1), views([source])))
    if moment == "half-way":
        proxy.left, proxy.silent = LARGE // 2, True
    buffer = bytearray(LARGE) if operation == "load" else source

    async def cancelled() -> None:
        call = backend.load if operation == "load" else backend.store
        task = asyncio.ensure_future(call(keys(1), views([buffer])))
        await asyncio.sleep(0)
        if moment == "half-way":
            while proxy.left > 0:
                await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(cancelled())
    eventually(lambda: is_free(buffer))
    before = bytes(buffer)
    proxy.left = 1 << 60
    assert run(backend.store(keys(1, 5), views([value(5)]))) == [StoreOutcome.STORED]
    (loaded,) = buffers(1)
    assert run(backend.load(keys(1, 5), views([loaded]))) == [len(loaded)]
    assert loaded == value(5)
    assert buffer == before
    run(backend.close())


def test_an_error_that_comes_after_the_caller_left(
    server: RunningServer, proxy: Proxy, run: Loop
) -> None:
    """It is on its way from a thread when the caller is cancelled; asyncio would log it."""
    unheard: list[object] = []
    run._loop.set_exception_handler(lambda _, context: unheard.append(context))
    backend = open_backend(run, port=proxy.port, same_host=False)
    proxy.left, proxy.silent = 0, True

    async def crossing() -> None:
        call = Call(Op.CONTAINS, 1, protocol.names(keys(1)))
        connection = backend._connection(-1)
        task = asyncio.ensure_future(connection.call(call))
        await asyncio.sleep(0)
        call.settle(None, BackendUnavailable("gone"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(crossing())
    gc.collect()
    assert unheard == []
    run(backend.close())


@pytest.mark.parametrize("way", ["tcp", "shm", "region"])
@pytest.mark.parametrize("operation", ["load", "store"])
def test_the_server_is_killed_meanwhile(
    start: Callable[..., RunningServer], run: Loop, region: HostRegion, operation: str, way: str
) -> None:
    server = start()
    config = LmConfig(port=server.port, same_host=way != "tcp", stall_timeout_s=2.0)
    backend = LmBackend(config)
    run(backend.open(BackendContext("remote", NAMESPACE, region if way == "region" else None)))
    size = 4 << 20
    stored = [value(i, size) for i in range(8)]
    sources = views(stored)
    if way == "region":
        sources = [region.view[i * size : (i + 1) * size] for i in range(8)]
        for source, one in zip(sources, stored, strict=True):
            source[:] = one
    run(backend.store(keys(8), sources))
    loaded = buffers(8, size)

    async def meanwhile() -> list[Any]:
        if operation == "load":
            calls = [backend.load(keys(8), views(loaded)) for _ in range(3)]
        else:
            calls = [backend.store(keys(8, 10 + n), sources) for n in range(3)]
        tasks = [asyncio.ensure_future(call) for call in calls]
        await asyncio.sleep(0.005)
        server.process.kill()
        return list(await asyncio.gather(*tasks, return_exceptions=True))

    for answer in run(meanwhile()):
        assert isinstance(answer, (list, BackendError)), answer
    with pytest.raises(BackendUnavailable):
        run(backend.contains(keys(1)))
    start(port=server.port)
    assert run(backend.contains(keys(8))) == [False] * 8
    run(backend.close())


# -- values that the server copies itself ------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("lm://localhost:1", True),
        ("lm://127.0.0.1:1", True),
        ("lm://[::1]:1", True),
        ("lm+unix:///run/a.sock", True),
        ("lm://cache.internal:1", False),
        ("lm+tls://localhost:1", False),
        ("lm://localhost:1?same_host=false", False),
    ],
)
def test_host_memory_can_be_mapped_where_the_server_is_near(url: str, expected: bool) -> None:
    config = load_config(Plugins(), environ={}, assignments=[f"remote_url={url}"])
    assert config.shares_region is expected


def test_a_cache_stores_with_one_copy(
    start: Callable[..., RunningServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmcache_backend_lm.connection import Connection

    ways: list[Op] = []
    original = Connection._sent
    monkeypatch.setattr(
        Connection, "_sent", lambda self, call: (ways.append(call.op), original(self, call))[1]
    )
    count = 16 * CHUNK * 16
    with cache(start().url, "remote_serde=naive", chunk=16 * CHUNK) as opened:
        opened.store(tokens(count), kv(count))
        assert opened.flush()
        loaded = bytearray(len(kv(count)))
        assert opened.load(tokens(count), loaded) == count
        assert loaded == kv(count)
    assert Op.OFFER in ways
    assert Op.STAGE not in ways


def test_an_offer_that_is_given_up_is_not_stored(
    server: RunningServer, run: Loop, region: HostRegion
) -> None:
    """Its buffer is the caller's again at once, whatever the server is doing with it."""
    clear(run, server)
    used = counted(server.metrics, "server_memory_used_bytes")
    backend = open_with_region(run, server, region, connections=1)
    size = LARGE // 2
    buffer, other = region.view[:size], region.view[size : 2 * size]
    buffer[:], other[:] = value(1, size), value(2, size)
    assert run(backend.store(keys(1, 9), [other])) == [StoreOutcome.STORED]

    async def given_up() -> None:
        task = asyncio.ensure_future(backend.store(keys(1), [buffer]))
        connection = backend._connections[0]
        while not connection._pending or any(
            call.stage is not Stage.SENT for call in list(connection._pending.values())
        ):
            await asyncio.sleep(0)
        (call,) = connection._pending.values()
        assert call.op is Op.OFFER
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert connection.alive

    server.process.send_signal(signal.SIGSTOP)
    try:
        run(given_up())
        buffer[:] = value(3, size)
    finally:
        server.process.send_signal(signal.SIGCONT)
    assert run(backend.store(keys(1, 9), [other])) == [StoreOutcome.ALREADY_PRESENT]
    assert run(backend.contains([*keys(1), *keys(1, 9)])) == [False, True]
    assert run(backend.store(keys(1), [buffer])) == [StoreOutcome.STORED]
    loaded = bytearray(size)
    assert run(backend.load(keys(1), views([loaded]))) == [size]
    assert loaded == value(3, size)
    run(backend.close())
    clear(run, server)
    assert counted(server.metrics, "server_memory_used_bytes") == used


def test_a_broken_connection_takes_its_offers_back(
    server: RunningServer, run: Loop, region: HostRegion
) -> None:
    clear(run, server)
    backend = open_with_region(run, server, region, connections=1)
    buffer = region.view[: 8 << 20]
    buffer[:] = value(1, len(buffer))
    run(backend.store(keys(1, 9), [buffer]))
    server.process.send_signal(signal.SIGSTOP)
    try:

        async def broken() -> None:
            task = asyncio.ensure_future(backend.store(keys(1), [buffer]))
            connection = backend._connections[0]
            while not any(c.stage is Stage.SENT for c in list(connection._pending.values())):
                await asyncio.sleep(0)
            connection._fail(BackendUnavailable("broken"))
            with pytest.raises(BackendUnavailable):
                await task

        run(broken())
        buffer[:] = value(3, len(buffer))
    finally:
        server.process.send_signal(signal.SIGCONT)
    eventually(lambda: counted(server.metrics, "server_stores_total") >= 2)
    assert run(backend.contains(keys(1))) == [False]
    run(backend.close())


def test_buffers_elsewhere_are_stored_too(
    server: RunningServer, run: Loop, region: HostRegion
) -> None:
    clear(run, server)
    backend = open_with_region(run, server, region)
    size = 1 << 20
    region.view[:size] = value(1, size)
    sources = [region.view[:size], memoryview(value(2, size)), memoryview(bytes(value(3, size)))]
    assert run(backend.store(keys(3), sources)) == [StoreOutcome.STORED] * 3
    loaded = buffers(3, size)
    assert run(backend.load(keys(3), views(loaded))) == [size] * 3
    assert loaded == [value(i, size) for i in (1, 2, 3)]
    run(backend.close())


def shared_with(
    server: RunningServer, sealed: bool = True, region: int = 4096, region_fd: int | None = None
) -> socket.socket:
    """A Unix socket on which hello was said and memory was sent."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    sock.connect(str(server.unix))
    hello = greeting.hello("0" * 16, b"")
    sock.sendall(protocol.header(Op.HELLO, 0, meta=len(hello)) + hello)
    assert answer(sock)[0].status is Status.OK
    fds = [os.memfd_create("test", os.MFD_ALLOW_SEALING) for _ in range(2)]
    for fd in fds:
        os.pwrite(fd, bytes(8192), 0)
        if sealed:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    if region_fd is not None:
        fcntl.fcntl(region_fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        os.dup2(region_fd, fds[1])
    meta = greeting.share(8192, 4096, region)
    head = protocol.header(Op.SHARE, 0, meta=len(meta))
    socket.send_fds(sock, [head + meta], fds)
    for fd in fds:
        os.close(fd)
    return sock


def answer(sock: socket.socket) -> tuple[protocol.Header, bytes]:
    head = protocol.parse_header(sock.recv(HEADER_BYTES, socket.MSG_WAITALL))
    return head, sock.recv(head.meta, socket.MSG_WAITALL)


@pytest.mark.parametrize(
    ("sizes", "offsets", "said"),
    [([4096], [1 << 20], "of a region of"), ([8193], [0], "of a region of"), ([1], [], "numbers")],
)
def test_offers_outside_the_region_are_refused(
    server: RunningServer, sizes: list[int], offsets: list[int], said: str
) -> None:
    with shared_with(server) as sock:
        assert answer(sock)[0].status is Status.OK
        meta = protocol.names(keys(1)) + protocol.numbers([*sizes, *offsets])
        sock.sendall(protocol.header(Op.OFFER, 1, count=1, meta=len(meta)) + meta)
        head, text = answer(sock)
        assert head.status is Status.MALFORMED
        assert said in text.decode()


def test_an_offer_without_a_voucher_is_not_stored(server: RunningServer, run: Loop) -> None:
    with shared_with(server) as sock:
        assert answer(sock)[0].status is Status.OK
        meta = protocol.names(keys(1, 60)) + protocol.numbers([4096, 0])
        sock.sendall(protocol.header(Op.OFFER, 1, count=1, meta=len(meta)) + meta)
        head, outcomes = answer(sock)
        assert (head.op, head.status) == (Op.OFFER, Status.OK)
        assert outcomes[-1] == 2
    healthy(server, run)


def test_an_offer_of_what_nobody_wrote_takes_no_memory(server: RunningServer, run: Loop) -> None:
    """Reading it would make the system take as much as a client can announce."""
    sizes = (64 << 20, (64 << 20) - 4096)
    sparse = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(sparse, sizes[0])
    os.pwrite(sparse, b"x", 0)
    used = os.fstat(sparse).st_blocks
    evicted = counted(server.metrics, "evicted_chunks_total")
    with shared_with(server, region=sizes[0], region_fd=sparse) as sock:
        assert answer(sock)[0].status is Status.OK
        for number, (size, offset) in enumerate(zip(sizes, (0, 4096), strict=True), 1):
            meta = protocol.names(keys(1, 70 + number)) + protocol.numbers([size, offset])
            sock.sendall(protocol.header(Op.OFFER, number, count=1, meta=len(meta)) + meta)
            head, outcomes = answer(sock)
            assert (head.op, head.status) == (Op.OFFER, Status.OK)
            assert outcomes[-1] == 2
    assert os.fstat(sparse).st_blocks == used
    os.close(sparse)
    assert counted(server.metrics, "evicted_chunks_total") == evicted
    healthy(server, run)


@pytest.mark.parametrize(
    ("sealed", "region", "said"), [(False, 4096, "sealed"), (True, 1 << 20, "less than")]
)
def test_a_region_that_could_end_the_server_is_refused(
    server: RunningServer, run: Loop, sealed: bool, region: int, said: str
) -> None:
    with shared_with(server, sealed, region) as sock:
        head, text = answer(sock)
        assert head.status is Status.MALFORMED
        assert said in text.decode()
    healthy(server, run)


# -- what a server must bear -------------------------------------------------------------------


def connect(server: RunningServer, namespace: str = "0" * 16) -> socket.socket:
    """A connection on which hello was said."""
    sock = socket.create_connection(("127.0.0.1", server.port))
    sock.settimeout(20)
    hello = greeting.hello(namespace, b"")
    sock.sendall(protocol.header(Op.HELLO, 0, meta=len(hello)) + hello)
    head = protocol.parse_header(sock.recv(HEADER_BYTES, socket.MSG_WAITALL))
    assert head.status is Status.OK
    sock.recv(head.meta, socket.MSG_WAITALL)
    return sock


def healthy(server: RunningServer, run: Loop) -> None:
    backend = open_backend(run, port=server.port, same_host=False)
    assert run(backend.store(keys(1, 77), views([value(7)])))
    (loaded,) = buffers(1)
    assert run(backend.load(keys(1, 77), views([loaded]))) == [len(loaded)]
    assert loaded == value(7)
    run(backend.close())


def store_head(size: int, payload: int | None = None) -> bytes:
    meta = protocol.names(keys(1, 50)) + protocol.numbers([size])
    payload = size if payload is None else payload
    return protocol.header(Op.STORE, 1, count=1, meta=len(meta), payload=payload) + meta


ABSURD = {
    "payload": protocol.header(Op.STORE, 1, payload=1 << 63),
    "meta": protocol.header(Op.CONTAINS, 1, count=1, meta=(1 << 32) - 1),
    "count": protocol.header(Op.CONTAINS, 1, count=(1 << 32) - 1),
    "size": store_head((1 << 64) - 1, 1 << 40),
    "sizes that don't add up": store_head(100, 99),
    "operation": protocol.MAGIC + b"\xff" + bytes(27),
    "noise": bytes(range(64)),
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


@pytest.mark.parametrize("what", ABSURD)
def test_absurd_messages_are_refused_with_a_reason(
    server: RunningServer, run: Loop, what: str
) -> None:
    refused = counted(server.metrics, "server_refused_total")
    with connect(server) as sock:
        sock.sendall(ABSURD[what])
        head = protocol.parse_header(sock.recv(HEADER_BYTES, socket.MSG_WAITALL))
        assert head.status is not Status.OK
        assert sock.recv(head.meta, socket.MSG_WAITALL)
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""
    assert counted(server.metrics, "server_refused_total") == refused + 1
    healthy(server, run)


def test_a_value_longer_than_the_memory_is_not_admitted(server: RunningServer) -> None:
    size = (1 << 30) + 1
    with connect(server) as sock:
        sock.sendall(store_head(size))
        block = bytes(1 << 20)
        for _ in range(size // len(block)):
            sock.sendall(block)
        sock.sendall(b"x")
        head = protocol.parse_header(sock.recv(HEADER_BYTES, socket.MSG_WAITALL))
        assert sock.recv(head.meta, socket.MSG_WAITALL)[-1] == 2


@pytest.mark.parametrize("part", [1, HEADER_BYTES - 1, HEADER_BYTES + 5, -1000])
def test_half_a_frame_leaves_nothing(server: RunningServer, run: Loop, part: int) -> None:
    used = counted(server.metrics, "server_memory_used_bytes")
    message = store_head(100_000) + bytes(100_000)
    with connect(server) as sock:
        sock.sendall(message[:part])
    eventually(lambda: counted(server.metrics, "server_memory_used_bytes") == used)
    healthy(server, run)
    with connect(server) as sock:
        meta = protocol.names(keys(1, 50))
        sock.sendall(protocol.header(Op.CONTAINS, 2, count=1, meta=len(meta)) + meta)
        answer = sock.recv(HEADER_BYTES + 1, socket.MSG_WAITALL)
    assert answer[-1] == 0


def test_noise_on_many_connections(server: RunningServer, run: Loop) -> None:
    dice = random.Random(3)
    for _ in range(150):
        with connect(server) as sock:
            op = dice.choice(list(Op))
            head = protocol.header(op, dice.randrange(9), count=dice.randrange(4), meta=40)
            sock.sendall(dice.choice([head, b""]) + dice.randbytes(dice.randrange(120)))
    healthy(server, run)


def test_a_client_that_stops_in_a_store_is_dropped(server: RunningServer, run: Loop) -> None:
    used = counted(server.metrics, "server_memory_used_bytes")
    with connect(server) as sock:
        sock.sendall(store_head(1 << 20) + bytes(1000))
        eventually(lambda: counted(server.metrics, "server_memory_used_bytes") > used)
        healthy(server, run)
        assert sock.recv(1) == b""  # the server's patience is over
    eventually(lambda: counted(server.metrics, "server_memory_used_bytes") == used)


def test_a_client_that_does_not_read_is_dropped_and_nobody_waits_for_it(
    server: RunningServer, run: Loop
) -> None:
    backend = open_backend(run, port=server.port, same_host=False)
    run(backend.store(keys(1), views([value(1, LARGE)])))
    stalled = counted(server.metrics, "server_stalled_connections_total")
    with ExitStack() as stack:
        for _ in range(8):
            sock = stack.enter_context(connect(server, NAMESPACE.fingerprint))
            meta = protocol.names(keys(1)) + protocol.numbers([LARGE])
            sock.sendall(protocol.header(Op.LOAD, 1, count=1, meta=len(meta)) + meta)
        loaded = bytearray(LARGE)
        for _ in range(10):
            assert run(backend.load(keys(1), views([loaded]))) == [LARGE]
        metric = "server_stalled_connections_total"
        eventually(lambda: counted(server.metrics, metric) == stalled + 8)
    run(backend.close())


def test_a_reader_that_never_returns_its_lease_gets_a_miss(
    server: RunningServer, run: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value that is read directly keeps its place until the server has said that it doesn't."""
    from lmcache_backend_lm.mapping import ReadOnlyMapping

    backend = open_backend(run, path=server.unix)
    run(backend.store(keys(1), views([value(1, 1 << 20)])))
    original = ReadOnlyMapping.copy
    revoked = counted(server.metrics, "server_revoked_leases_total")

    def slow(self: ReadOnlyMapping, *arguments: Any) -> None:
        metric = "server_revoked_leases_total"
        eventually(lambda: counted(server.metrics, metric) > revoked)
        original(self, *arguments)

    monkeypatch.setattr(ReadOnlyMapping, "copy", slow)
    assert run(backend.load(keys(1), views([bytearray(1 << 20)]))) == [MISS]
    monkeypatch.undo()
    assert run(backend.load(keys(1), views([bytearray(1 << 20)]))) == [1 << 20]
    run(backend.close())


def test_a_thousand_idle_connections(server: RunningServer, run: Loop) -> None:
    with ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(connect(server))
        healthy(server, run)


def test_too_many_connections(start: Callable[..., RunningServer], run: Loop) -> None:
    server = start("--max-connections", "3", "--metrics-port", "0")
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(connect(server))
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            assert sock.recv(1) == b""
    eventually(lambda: "no more are accepted" in server.text)


# -- the disk tier -----------------------------------------------------------------------------


def test_the_disk_keeps_what_memory_cannot(tmp_path: Path, run: Loop) -> None:
    options = ("localhost", "0", str(tmp_path), "--memory-gib", "0.03", "--metrics-port", "0")
    server = RunningServer(*options)
    size = 4 << 20
    stored = [value(i, size) for i in range(16)]
    backend = open_backend(run, port=server.port)
    written = 0

    def is_written() -> bool:
        return counted(server.metrics, "server_disk_stores_total") == written

    for name, source in zip(keys(16), stored, strict=True):
        run(backend.store([name], views([source])))
        written += 1
        eventually(is_written)
    assert counted(server.metrics, "server_values") < 16
    assert run(backend.count_leading_hits(keys(16))) == 16
    for name, source in zip(keys(16), stored, strict=True):
        loaded = bytearray(size)
        assert run(backend.load([name], views([loaded]))) == [size]
        assert loaded == source
    run(backend.close())
    assert server.stop() == 0
    server = RunningServer(*options)
    backend = open_backend(run, port=server.port)
    assert run(backend.contains(keys(16))) == [True] * 16
    loaded = bytearray(size)
    assert run(backend.load(keys(1), views([loaded]))) == [size]
    assert loaded == stored[0]
    assert run(backend.delete(keys(1))) == 1
    assert run(backend.contains(keys(2))) == [False, True]
    run(backend.close())
    assert server.stop() == 0


def test_a_full_disk(run: Loop, tmp_path: Path) -> None:
    """A file system of 1 MiB: values stay in memory, and one line says so."""
    mount = f'mount -t tmpfs -o size=1m tmpfs {tmp_path} && exec "$@"'
    flags = "-m" if os.geteuid() == 0 else "-Urm"
    wrapper = ("unshare", flags, "sh", "-c", mount, "sh")
    options = ("localhost", "0", str(tmp_path), "--memory-gib", "0.03", "--metrics-port", "0")
    server = RunningServer(*options, wrapper=wrapper)
    backend = open_backend(run, port=server.port)
    for seed in range(3):
        assert run(backend.store(keys(1, seed), views([value(1, 2 << 20)])))[0].name == "STORED"
    eventually(lambda: counted(server.metrics, "server_disk_dropped_total") == 3)
    assert run(backend.load(keys(1, 2), views([bytearray(2 << 20)]))) == [2 << 20]
    assert server.text.count("the disk is full") == 1
    run(backend.close())
    assert server.stop() == 0
