"""What a client can make the server spend: it follows bytes that came, not what was announced."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
import threading
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import lm_service
import pytest
from lm_server import RunningServer
from lm_service import a_service

from lmcache_backend_lm import accepting as accepting_module
from lmcache_backend_lm import folders as folders_module
from lmcache_backend_lm import greeting, protocol
from lmcache_backend_lm.accepting import (
    DEFAULT_CONNECTIONS,
    RESERVED_DESCRIPTORS,
    Accepting,
    connections,
)
from lmcache_backend_lm.arena import Arena, whole_pages
from lmcache_backend_lm.folders import MOST_OPEN, THREADS, TURNS, Folders
from lmcache_backend_lm.protocol import HEADER_BYTES, MAX_KEYS, MAX_META_BYTES, Op, Status
from lmcache_backend_lm.session import META_BYTES, SCRATCH_BYTES, Session
from lmcache_backend_lm.shares import Budget, Shares
from lmcache_backend_lm.values import UNSENT_PART, Value, Values
from lmcache_backend_lm.wire import MAX_FDS, Wire
from lmcache_core.builtin.filesystem import FilesystemConfig
from lmcache_core.chunks.keys import ChunkKey
from lmcache_core.contracts.storage import StoreOutcome
from lmcache_core.errors import ConfigError
from lmcache_core.metrics import Counters

PAGE = 4096
MIB = 1 << 20
SPACE = "5" * 16
OTHERS = "6" * 16


def key(number: int) -> ChunkKey:
    return ChunkKey(number.to_bytes(16, "little"))


def content(number: int, nbytes: int) -> bytes:
    return (number.to_bytes(4, "little") * (nbytes // 4 + 1))[:nbytes]


class Served:
    """The sessions of a server, on this event loop."""

    def __init__(self, nbytes: int, folder: Path | None = None) -> None:
        self.service = a_service(nbytes, folder)
        self.counters, self.arena = self.service.counters, self.service.arena
        self.values = self.service.values
        self.scratch = memoryview(bytearray(SCRATCH_BYTES))
        self.sessions: list[Session] = []
        self._open: list[tuple[asyncio.Task[None], Peer]] = []

    async def peer(self, space: str = SPACE, client: str = "a") -> Peer:
        """A client that was greeted."""
        ours, theirs = socket.socketpair()
        wire = Wire(ours, passes_descriptors=True)
        session = Session(self.service, wire, "a test", self.scratch, client)
        peer = Peer(theirs)
        self.sessions.append(session)
        self._open.append((asyncio.get_running_loop().create_task(session.run()), peer))
        await peer.ask(Op.HELLO, meta=greeting.hello(space, b""))
        return peer

    def fill(self, nbytes: int, space: str = SPACE) -> list[ChunkKey]:
        """Values of so many bytes until the memory is full."""
        keys = [key(1000 + i) for i in range(self.arena.capacity // whole_pages(nbytes))]
        for one in keys:
            with self.values.hold() as filling:
                assert isinstance(filling.reserve(space, one, nbytes), Value)
                filling.commit()
        return keys

    def counted(self, name: str, **labels: str) -> float:
        wanted = set(labels.items())
        series = self.counters.snapshot().items()
        return sum(n for (one, has), n in series if one == name and wanted <= set(has))

    @property
    def evicted(self) -> float:
        return self.counted("evicted_chunks")

    async def until(self, true: Callable[[], bool]) -> None:
        """Let sessions run until that is so."""
        for _ in range(20_000):
            if true():
                return
            await asyncio.sleep(0.001)
        raise AssertionError("it never came to that")

    async def end(self) -> None:
        for task, peer in self._open:
            peer.sock.close()
            await asyncio.wait([task])


class Peer:
    """A client that says what it is told."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._loop = asyncio.get_running_loop()

    async def say(self, data: bytes) -> None:
        await self._loop.sock_sendall(self.sock, data)

    async def receive(self, nbytes: int) -> bytes:
        data = b""
        while len(data) < nbytes:
            more = await self._loop.sock_recv(self.sock, nbytes - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    async def answer(self) -> tuple[protocol.Header, bytes, bytes]:
        head = protocol.parse_header(await self.receive(HEADER_BYTES))
        return head, await self.receive(head.meta), await self.receive(head.payload)

    async def ask(self, op: Op, count: int = 0, meta: bytes = b"", payload: bytes = b"") -> bytes:
        sending = asyncio.ensure_future(self.say(message(op, count, meta, len(payload)) + payload))
        head, meta, payload = await self.answer()
        await sending
        assert head.status is Status.OK, meta
        return meta + payload

    async def store(self, numbers: Sequence[int], nbytes: int) -> list[int]:
        payload = b"".join(content(number, nbytes) for number in numbers)
        meta = stored([key(number) for number in numbers], [nbytes] * len(numbers))
        return list((await self.ask(Op.STORE, len(numbers), meta, payload))[16:])


def message(op: Op, count: int = 0, meta: bytes = b"", payload: int = 0) -> bytes:
    return protocol.header(op, 1, count=count, meta=len(meta), payload=payload) + meta


def stored(keys: Sequence[ChunkKey], sizes: Sequence[int]) -> bytes:
    return protocol.names(keys) + protocol.numbers(sizes)


def announced(numbers: Sequence[int], nbytes: int) -> bytes:
    meta = stored([key(number) for number in numbers], [nbytes] * len(numbers))
    return message(Op.STORE, len(numbers), meta, nbytes * len(numbers))


def served(
    nbytes: int, work: Callable[[Served], Awaitable[None]], folder: Path | None = None
) -> None:
    """Do ``work`` with a server; at the end nothing is held."""

    async def run() -> None:
        server = Served(nbytes, folder)
        try:
            await work(server)
            await server.end()
            assert server.values.totals()["server_unsent_bytes"] == 0
            lm_service.check_at_rest(server.service)
        finally:
            await asyncio.get_running_loop().run_in_executor(None, lm_service.close, server.service)

    asyncio.run(run())


@pytest.fixture
def connect() -> Iterator[Callable[..., socket.socket]]:
    with ExitStack() as stack:

        def one(server: RunningServer, address: str = "127.0.0.1") -> socket.socket:
            there, here = ("127.0.0.1", server.port), (address, 0)
            sock = socket.create_connection(there, 20, source_address=here)
            return stack.enter_context(sock)

        yield one


def greet(sock: socket.socket) -> None:
    sock.sendall(message(Op.HELLO, meta=greeting.hello(SPACE, b"")))
    assert sock.recv(HEADER_BYTES)


# -- stores that are announced ---------------------------------------------------------------


@pytest.mark.parametrize("numbers", [[1], list(range(1, 40))], ids=["one", "many"])
def test_stores_that_are_only_announced_evict_nothing(numbers: list[int]) -> None:
    async def work(server: Served) -> None:
        there = server.fill(64 << 10)
        used = server.values.totals()["server_memory_used_bytes"]
        for i in range(32):
            peer = await server.peer(OTHERS)
            await peer.say(announced([n + 100 * i for n in numbers], MIB))
        await server.until(lambda: server.counted("server_requests", op="store") == 32)
        await asyncio.sleep(0.01)
        assert server.evicted == 0
        assert all(server.values.contains(SPACE, there))
        assert server.values.totals()["server_memory_used_bytes"] == used
        assert server.values.totals()["server_unsent_bytes"] == 0

    served(16 * MIB, work)


def test_a_byte_of_each_store_evicts_a_part_at_most() -> None:
    """And whoever stores all that it announces does so meanwhile, and gets it back."""

    async def work(server: Served) -> None:
        there = server.fill(64 << 10)
        peers = [await server.peer(OTHERS) for _ in range(32)]
        for i, peer in enumerate(peers):
            await peer.say(announced([i], MIB) + content(i, MIB)[:1])
        await server.until(lambda: server.values.leases.out == 32)
        unsent = server.values.totals()["server_unsent_bytes"]
        bound = server.arena.capacity // UNSENT_PART + 32 * PAGE
        assert 0 < unsent <= bound
        assert server.evicted * (64 << 10) <= bound + (64 << 10)
        assert sum(server.values.contains(SPACE, there)) >= len(there) * 3 // 4
        good = await server.peer()
        assert await good.store([5000, 5001], MIB + 5) == [0, 0]
        loaded = await good.ask(Op.LOAD, 2, stored([key(5000), key(5001)], [2 * MIB] * 2))
        assert loaded[16:] == content(5000, MIB + 5) + content(5001, MIB + 5)
        # Those that go on in the end are stored as well, in the parts that they got.
        for i, peer in enumerate(peers[:8]):
            await peer.say(content(i, MIB)[1:])
            assert (await peer.answer())[1][16:] == b"\0"
        loaded = await peers[0].ask(Op.LOAD, 8, stored([key(i) for i in range(8)], [MIB] * 8))
        assert loaded[64:] == b"".join(content(i, MIB) for i in range(8))

    served(16 * MIB, work)


def test_a_value_of_the_usual_size_lies_in_one_piece() -> None:
    """Also where the memory is full, and several come at once."""

    async def work(server: Served) -> None:
        server.fill(256 << 10)
        peers = [await server.peer(OTHERS) for _ in range(3)]
        for i, peer in enumerate(peers):
            await peer.say(announced([i], 256 << 10) + b"x")
        await server.until(lambda: server.values.leases.out == 3)
        for i, peer in enumerate(peers):
            await peer.say(content(i, 256 << 10)[1:])
            await peer.answer()
        with server.values.acquire(OTHERS, [key(i) for i in range(3)], [MIB] * 3) as held:
            assert [len(value.extents()) for value in held.values if value] == [1, 1, 1]
        assert server.evicted == 3

    served(16 * MIB, work)


def test_a_value_that_finds_no_more_room_half_way_is_not_admitted() -> None:
    async def work(server: Served) -> None:
        there = server.fill(64 << 10)
        peer = await server.peer(OTHERS)
        size = server.arena.capacity
        await peer.say(announced([1], size) + content(1, MIB))
        await server.until(lambda: server.values.leases.out == 1)
        with server.values.acquire(SPACE, there[-8:], [MIB] * 8):  # which may not go then
            for _ in range(size // MIB - 1):
                await peer.say(bytes(MIB))
            assert (await peer.answer())[1][16:] == b"\2"
        assert await peer.store([2], MIB) == [0]  # the next message is understood

    served(16 * MIB, work)


def test_a_value_as_long_as_the_memory() -> None:
    async def work(server: Served) -> None:
        server.fill(64 << 10)
        peer = await server.peer()
        assert await peer.store([1, 2], server.arena.capacity // 2 - 1) == [0, 0]
        assert await peer.store([3], server.arena.capacity) == [0]

    served(4 * MIB, work)


def test_memory_grows_with_what_came() -> None:
    """Twice as much each time where nothing may be ahead; in one piece if there is one."""
    arena = Arena(16 * MIB)
    values = Values(arena, Counters())
    try:
        others = values._unsent.bound
        values._unsent.take(OTHERS, others)
        with values.hold() as coming:
            value = coming.expect(SPACE, key(1), 5 * MIB + 3)
            assert isinstance(value, Value)
            assert value.room == PAGE
            steps = 0
            while value.room < value.nbytes:
                before = value.room
                assert coming.grow(value)
                assert value.room <= 2 * before
                steps += 1
            assert steps <= 12
            assert [length for _, length in value.extents()] == [5 * MIB + 3]
            assert coming.commit() == [StoreOutcome.STORED]
        values._unsent.give(OTHERS, others)
        assert values.totals()["server_unsent_bytes"] == 0
    finally:
        arena.close()


def test_nobody_takes_all_of_what_is_shared() -> None:
    shares = Shares(100)
    shares.take("a", 50)
    assert (shares.left("a"), shares.left("b")) == (0, 50)
    shares.take("b", 25)
    assert (shares.left("a"), shares.left("b"), shares.left("c")) == (-25, 0, 25)
    shares.give("a", 50)
    assert (shares.taken, shares.left("a"), shares.left("b")) == (25, 75, 50)


# -- requests that are announced -------------------------------------------------------------


def test_a_header_takes_no_memory_for_what_it_announces() -> None:
    count = 64

    async def work(server: Served) -> None:
        peers = [await server.peer() for _ in range(count)]
        head = protocol.header(Op.CONTAINS, 1, count=MAX_KEYS, meta=MAX_META_BYTES)
        before = tracemalloc.get_traced_memory()[0]
        for peer in peers:
            await peer.say(head)
        await server.until(lambda: not any(one.wire.idle for one in server.sessions))
        assert tracemalloc.get_traced_memory()[0] - before < count * (META_BYTES + (4 << 10))
        await peers[0].say(bytes(3 * META_BYTES))
        await server.until(lambda: server.service.requests.taken > 0)
        # As much as came is awaited, from each.
        assert server.service.requests.taken <= 8 * META_BYTES

    tracemalloc.start()
    try:
        served(MIB, work)
    finally:
        tracemalloc.stop()


def test_long_requests_share_what_there_is_between_clients() -> None:
    keys = [key(i) for i in range(1000)]
    names = protocol.names(keys)

    async def work(server: Served) -> None:
        server.service.requests = Budget(2 * len(names))
        peer = await server.peer(client="a")
        assert await peer.ask(Op.CONTAINS, len(keys), names) == bytes(len(keys))
        assert server.service.requests.taken == 0
        greedy = [await server.peer(client="a") for _ in range(2)]
        for one in greedy:  # neither ends
            await one.say(message(Op.CONTAINS, len(keys), names)[:-1])
        head, text, _ = await greedy[1].answer()
        assert (head.status, text) == (Status.BUSY, b"too many long requests are under way")
        assert server.counted("server_refused", reason="busy") == 1
        other = await server.peer(client="b")
        assert await other.ask(Op.CONTAINS, 100, protocol.names(keys[:100])) == bytes(100)
        some = protocol.names(keys[:500])
        assert await other.ask(Op.CONTAINS, 500, some) == bytes(500)

    served(MIB, work)


def test_two_thousand_connections_take_little(connect: Callable[..., socket.socket]) -> None:
    """Each was greeted, and announces the longest request that there is."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(2000, limits[1] - 200)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    server = RunningServer("--memory-gib", "0.1", "--unix", "none")
    try:
        head = protocol.header(Op.CONTAINS, 1, count=MAX_KEYS, meta=MAX_META_BYTES)
        before = resident(server)
        for _ in range(count):
            sock = connect(server)
            greet(sock)
            sock.sendall(head + b"x")
        greet(connect(server))
        assert resident(server) - before < 64 * MIB
    finally:
        server.stop()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def resident(server: RunningServer) -> int:
    """Bytes of memory that the server's process has."""
    pages = Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


# -- loads from files --------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [16 * MIB, 1 << 40])
def test_a_capacity_evicts_nothing(tmp_path: Path, capacity: int) -> None:
    """What comes from a file takes as much memory as the file has bytes."""

    async def work(server: Served) -> None:
        peer = await server.peer()
        await peer.store([1, 2], 5000)
        await server.until(lambda: server.counted("server_disk_stores") == 2)
        server.values.clear(SPACE)
        there = server.fill(64 << 10, OTHERS)
        loaded = await peer.ask(Op.LOAD, 3, stored(list(map(key, (1, 2, 3))), [capacity] * 3))
        assert loaded[24:] == content(1, 5000) + content(2, 5000)
        assert server.evicted == 1
        assert sum(server.values.contains(OTHERS, there)) == len(there) - 1
        server.values.clear(SPACE)
        loaded = await peer.ask(Op.LOAD, 1, stored([key(1)], [4999]))  # longer than that
        assert loaded == protocol.number(protocol.MISSING)

    served(16 * MIB, work, tmp_path)


# -- connections and descriptors -------------------------------------------------------------


class Starved(socket.socket):
    """A listener in a process that has no descriptor left."""

    asked = 0
    starved = True

    def accept(self) -> tuple[socket.socket, object]:
        self.asked += 1
        if self.starved:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().accept()


def test_accepting_rests_while_there_are_no_descriptors() -> None:
    taken: list[socket.socket] = []
    errors: list[int | None] = []

    async def turns() -> None:
        for _ in range(50):
            await asyncio.sleep(0)

    async def run() -> None:
        accepting = Accepting(
            lambda sock, address, encrypted: taken.append(sock),
            lambda error: errors.append(error.errno),
        )
        listener = Starved()
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        accepting.listen(listener, encrypted=False)
        with socket.create_connection(listener.getsockname()):
            while not errors:
                await asyncio.sleep(0)
            await turns()
            assert (listener.asked, errors) == (1, [errno.EMFILE])
            accepting.freed()  # for something else
            await turns()
            assert (listener.asked, errors) == (2, [errno.EMFILE] * 2)
            listener.starved = False
            accepting.freed()
            while not taken:
                await asyncio.sleep(0)
            await turns()
        accepting.close()
        taken[0].close()

    asyncio.run(run())


def test_accepting_goes_on_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where others had the descriptors, nobody says when they are free."""
    monkeypatch.setattr(accepting_module, "REST_S", 0.001)
    taken: list[socket.socket] = []

    async def run() -> None:
        accepting = Accepting(lambda sock, *_: taken.append(sock), lambda error: None)
        listener = Starved()
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        accepting.listen(listener, encrypted=False)
        with socket.create_connection(listener.getsockname()):
            while listener.asked < 3:
                await asyncio.sleep(0.001)
            listener.starved = False
            while not taken:
                await asyncio.sleep(0.001)
        accepting.close()
        taken[0].close()

    asyncio.run(run())


def test_connections_that_do_not_fit_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(100, 1000)]
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda which, asked: limits.append(asked))
    assert connections(None) == 1000 - RESERVED_DESCRIPTORS
    assert limits[-1] == (1000, 1000)
    assert connections(900) == 900
    with pytest.raises(ConfigError, match=r"--max-connections 1000: .* 1000 descriptors"):
        connections(1000)
    limits.append((1 << 20, 1 << 20))
    assert connections(None) == DEFAULT_CONNECTIONS


def test_one_client_leaves_connections_to_others(connect: Callable[..., socket.socket]) -> None:
    server = RunningServer("--max-connections", "4", "--unix", "none", "--memory-gib", "0.1")
    try:
        for _ in range(3):
            greet(connect(server))
        assert connect(server).recv(1) == b""
        greet(connect(server, "127.0.0.2"))
    finally:
        server.stop()
    assert server.text.count("no more are accepted") == 1


def test_who_says_nothing_makes_room(connect: Callable[..., socket.socket]) -> None:
    options = ("--max-connections", "3", "--threads", "1", "--unix", "none")
    server = RunningServer(*options, "--memory-gib", "0.1")
    try:
        silent, greeted, later = connect(server), connect(server), connect(server)
        greet(greeted)
        greet(connect(server, "127.0.0.2"))
        assert silent.recv(1) == b""
        greet(later)
        assert connect(server, "127.0.0.2").recv(1) == b""
    finally:
        server.stop()


def test_descriptors_that_nobody_asked_for_are_closed() -> None:
    async def work(server: Served) -> None:
        peer = await server.peer()
        names = protocol.names([key(1)])
        before = len(os.listdir("/proc/self/fd"))
        with open(os.devnull) as file:
            for _ in range(20):
                question = message(Op.CONTAINS, 1, names)
                socket.send_fds(peer.sock, [question], [file.fileno()] * MAX_FDS)
                assert (await peer.answer())[1] == b"\0"
                assert len(os.listdir("/proc/self/fd")) == before + 1
            socket.send_fds(peer.sock, [question], [file.fileno()] * (MAX_FDS + 1))
            head, text, _ = await peer.answer()
            assert head.status is Status.MALFORMED
            assert b"descriptors" in text

    served(MIB, work)


# -- namespaces of the disk tier ---------------------------------------------------------------


def space(number: int) -> str:
    return f"{number:016x}"


class Files:
    """A disk's folders, on this event loop, with a clock that stands still."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now = 0.0
        self.folders = Folders(FilesystemConfig(path=path), clock=lambda: self.now)

    async def store(self, number: int) -> None:
        folder = await self.folders.take(space(number), make=True)
        assert folder is not None
        value = memoryview(b"value")
        assert await folder.store([key(1)], [value]) == [StoreOutcome.STORED]
        self.folders.give(space(number))

    async def has(self, number: int) -> bool | None:
        folder = await self.folders.take(space(number))
        if folder is None:
            return None
        try:
            return (await folder.contains([key(1)]))[0]
        finally:
            self.folders.give(space(number))

    async def closed(self) -> None:
        while self.folders._closing:
            await asyncio.sleep(0.001)


def with_files(path: Path, work: Callable[[Files], Awaitable[None]]) -> None:
    async def run() -> None:
        files = Files(path)
        try:
            await work(files)
        finally:
            await files.folders.close()
        assert not [one for one in threading.enumerate() if "server-disk" in one.name]

    asyncio.run(run())


def test_a_namespace_that_is_asked_for_takes_no_folder_and_no_thread(tmp_path: Path) -> None:
    async def work(server: Served) -> None:
        for number in range(40):
            peer = await server.peer(space(number))
            names = protocol.names([key(1)])
            assert await peer.ask(Op.CONTAINS, 1, names) == b"\0"
            assert (await peer.ask(Op.COUNT, 1, names)) == protocol.number(0)
            assert (await peer.ask(Op.DELETE, 1, names))[16:] == protocol.number(0)
            assert (await peer.ask(Op.CLEAR))[16:] == protocol.number(0)
        assert server.service.disk is not None
        assert len(server.service.disk._folders) == 0
        assert namespaces(tmp_path) == []
        names_of_threads = [one.name for one in threading.enumerate()]
        assert sum("server-disk" in name for name in names_of_threads) <= THREADS + 1

    served(MIB, work, tmp_path)


def test_a_bounded_number_of_namespaces_is_open(tmp_path: Path) -> None:
    """Those that were used last; what the others hold is still found."""

    async def work(files: Files) -> None:
        count = MOST_OPEN + 20
        for number in range(count):
            await files.store(number)
            assert len(files.folders) <= MOST_OPEN
        await files.closed()
        assert list(files.folders._open) == [space(n) for n in range(20, count)]
        names = [one.name for one in threading.enumerate()]
        assert sum("server-disk" in name for name in names) <= THREADS
        assert [await files.has(number) for number in range(count)] == [True] * count

    with_files(tmp_path, work)


def test_a_namespace_in_use_is_not_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders_module, "MOST_OPEN", 2)

    async def work(files: Files) -> None:
        first = await files.folders.take(space(0), make=True)
        assert first is not None
        for number in range(1, 6):
            await files.store(number)
        assert space(0) in files.folders._open
        assert len(files.folders) == 2
        assert await first.store([key(1)], [memoryview(b"value")]) == [StoreOutcome.STORED]
        files.folders.give(space(0))

    with_files(tmp_path, work)


def test_a_namespace_that_nobody_uses_is_closed(tmp_path: Path) -> None:
    async def work(files: Files) -> None:
        await files.store(1)
        files.now = 50.0
        await files.store(2)
        files.folders.close_idle(60.0)
        assert len(files.folders) == 2
        files.now = 70.0
        files.folders.close_idle(60.0)
        assert list(files.folders._open) == [space(2)]
        assert await files.has(1)  # it waits until it is closed, and opens again

    with_files(tmp_path, work)


def namespaces(top: Path) -> list[str]:
    """Their folders; beside them is the ledger of what the whole takes."""
    return [one.name for one in top.iterdir() if not one.name.startswith(".")]


def test_a_namespace_that_holds_nothing_leaves_no_folder(tmp_path: Path) -> None:
    async def work(files: Files) -> None:
        await files.store(1)
        await files.store(2)
        folder = await files.folders.take(space(1))
        assert folder is not None
        assert await folder.clear() == 1
        files.folders.give(space(1))
        files.folders.close_idle(0.0)
        await files.closed()
        assert namespaces(tmp_path) == [space(2)]
        assert await files.has(1) is None

    with_files(tmp_path, work)


def test_the_start_leaves_no_folder(tmp_path: Path) -> None:
    async def work(server: Served) -> None:
        disk = server.service.disk
        assert disk is not None
        await asyncio.get_running_loop().run_in_executor(None, disk.check)
        await server.until(lambda: not disk._folders._closing)
        assert namespaces(tmp_path) == []

    served(MIB, work, tmp_path)


def test_one_namespace_does_not_take_every_thread(tmp_path: Path) -> None:
    """While one waits for its disk with all that it may, another one is served."""
    going = threading.Event()
    waiting = threading.Semaphore(0)

    def hang() -> None:
        waiting.release()
        assert going.wait(60)

    async def work(files: Files) -> None:
        await files.store(2)
        busy = await files.folders.take(space(1), make=True)
        assert busy is not None
        calls = [asyncio.ensure_future(busy._run(hang)) for _ in range(4 * THREADS)]
        for _ in range(TURNS):
            while not waiting.acquire(blocking=False):
                await asyncio.sleep(0.001)
        assert await files.has(2)
        assert not waiting.acquire(blocking=False)
        going.set()
        await asyncio.gather(*calls)
        files.folders.give(space(1))

    try:
        with_files(tmp_path, work)
    finally:
        going.set()
