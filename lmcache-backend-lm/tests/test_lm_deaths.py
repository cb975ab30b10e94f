"""Whoever dies, and wherever in a request, gives back what it held, once.

The server's session is stopped at each place where it waits: its client goes, it is cancelled, or
what it waits for fails. Places come from the source, see `stepping`, and each ``await`` of the
modules on a request's way must have been one, or stand in `ELSEWHERE` with the reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import logging
import mmap
import os
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lm_service
import pytest
from lm_service import a_service
from stepping import Chain, Sources, Stepped, Steps

from lmcache_backend_lm import disk as disk_module
from lmcache_backend_lm import folders, greeting, intake, protocol, session, wire
from lmcache_backend_lm.proof import Side, Transcript
from lmcache_backend_lm.protocol import HEADER_BYTES, Op
from lmcache_backend_lm.session import SCRATCH_BYTES, Session
from lmcache_backend_lm.wire import Wire

MODULES = (session, intake, wire, disk_module, folders)
ELSEWHERE = {
    "wire.Wire.handshake self._attempt 1": "TLS's own greeting, before anything is held",
    "session.Session._greet self.wire.handshake 1": "the same",
    "disk.Disk._try self._folders.take 1": "the server's start",
}
STOPPING = {
    "folders.Folders.close asyncio.wait 1",
    "folders.Folders.close asyncio.wrap_future 1",
}
"""The server's own end, when no request is left: reached, but nothing to strike."""
SPACE = "5" * 16
SIZES = (100, 5_000, 70_003)
PIECE = 4096
STAGING = 8 * PIECE + 8 * 16
END_S = 20.0
WAYS = ("waits", "goes through", "tls")


class Hesitant(socket.socket):
    """A socket whose calls first say that they would have to wait, as TLS does or as others do."""

    way = "waits"

    def _turn(self, what: str) -> None:
        self.turns = {**getattr(self, "turns", {})}
        self.turns[what] = turn = self.turns.get(what, 0) + 1
        if self.way != "goes through" and turn % 2:
            raise self._wants(what, turn)

    def _wants(self, what: str, turn: int) -> OSError:
        if self.way != "tls":
            return BlockingIOError()
        if what == "send" or turn % 4 == 1:
            return ssl.SSLWantWriteError()
        return ssl.SSLWantReadError()

    def _try(self, what: str, call: Callable[..., Any], *arguments: Any) -> Any:
        self._turn(what)
        try:
            return call(*arguments)
        except BlockingIOError:
            if self.way != "tls":
                raise
            raise (ssl.SSLWantWriteError() if what == "send" else ssl.SSLWantReadError()) from None

    def recv_into(self, *arguments: Any) -> Any:
        return self._try("receive", super().recv_into, *arguments)

    def recvmsg_into(self, *arguments: Any) -> Any:
        return self._try("receive", super().recvmsg_into, *arguments)

    def recvmsg(self, *arguments: Any) -> Any:
        return self._try("receive", super().recvmsg, *arguments)

    def sendmsg(self, buffers: Any, *arguments: Any) -> Any:
        if arguments:  # with a descriptor: the first of it only
            buffers = [bytes(buffers[0])[:8]]
        return self._try("send", super().sendmsg, buffers, *arguments)


def content(key: bytes, nbytes: int) -> bytes:
    return (key * (nbytes // len(key) + 1))[:nbytes]


class Peer:
    """A client that does what it is told, and reads every answer."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.number = 0
        self._loop = asyncio.get_running_loop()

    async def receive(self, nbytes: int) -> bytes:
        data = b""
        while len(data) < nbytes:
            more = await self._loop.sock_recv(self.sock, nbytes - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    async def _send(self, message: bytes, *stops: int) -> None:
        for start, stop in zip((0, *stops), stops, strict=False):
            await self._loop.sock_sendall(self.sock, message[start:stop])
            for _ in range(4):  # until the server has read that, and waits for the rest
                await asyncio.sleep(0)
        await self._loop.sock_sendall(self.sock, message[stops[-1] :])

    async def ask(
        self, op: Op, count: int = 0, meta: bytes = b"", payload: bytes = b"", announce: int = -1
    ) -> tuple[bytes, bytes]:
        self.number += 1
        length = len(payload) if announce < 0 else announce
        head = protocol.header(op, self.number, count=count, meta=len(meta), payload=length)
        stops = (10, HEADER_BYTES + 3) if payload else (10,)
        sending = asyncio.ensure_future(self._send(head + meta + payload, *stops))
        try:
            if op in (Op.RETURN, Op.DESCRIBE):
                return b"", b""
            while True:
                answer = protocol.parse_header(await self.receive(HEADER_BYTES))
                meta = await self.receive(answer.meta)
                payload = await self.receive(answer.payload)
                if answer.op is not Op.ACK:
                    return meta, payload
        finally:
            await sending


# -- what clients do -----------------------------------------------------------------------


def named(first: int, count: int = len(SIZES)) -> list[Any]:
    return [bytes([65 + first + i]) * 16 for i in range(count)]


async def hello(peer: Peer) -> None:
    token = TRIALS[0].service.token
    meta = greeting.hello(SPACE, bytes(32), proves=bool(token))
    challenge, _ = await peer.ask(Op.HELLO, meta=meta)
    if token:
        proof = Transcript(meta, challenge, b"unix").proof(token, Side.CLIENT)
        welcome, _ = await peer.ask(Op.PROVE, meta=proof)
        assert greeting.parse_welcome(memoryview(welcome)).instance == bytes(16)


async def store(peer: Peer, keys: Sequence[Any]) -> None:
    values = [content(key, size) for key, size in zip(keys, SIZES, strict=False)]
    meta = protocol.names(keys) + protocol.numbers([len(value) for value in values])
    await peer.ask(Op.STORE, len(keys), meta, b"".join(values))


async def load(peer: Peer, keys: Sequence[Any], op: Op = Op.LOAD) -> int:
    meta = protocol.names(keys) + protocol.numbers([1 << 17] * len(keys))
    _, payload = await peer.ask(op, len(keys), meta)
    return len(payload)


async def ordinary(peer: Peer) -> None:
    keys = named(0)
    await store(peer, keys)
    await store(peer, keys)  # there already, so that it is drained
    await store(peer, [*named(20, 1), keys[1]])
    await load(peer, keys)
    for op in (Op.CONTAINS, Op.COUNT):
        await peer.ask(op, 1, protocol.names(named(9, 1)))
        await peer.ask(op, len(keys), protocol.names(keys))
    await peer.ask(Op.CONTAINS, 12, protocol.names(named(0, 12)))  # in parts
    await peer.ask(Op.USAGE)
    await peer.ask(Op.DELETE, 1, protocol.names(keys[:1]))
    await peer.ask(Op.CLEAR)
    await peer.ask(Op.DESCRIBE, meta=b"a model")
    await store(peer, keys[:1])
    await peer.ask(Op.LIST, meta=bytes(16))
    await peer.ask(Op.STATUS)
    await peer.ask(Op.PURGE, meta=SPACE.encode())


async def large(peer: Peer) -> None:
    """The second value has room only when the first one can be evicted."""
    first, second = named(0, 2)
    room = (1 << 20) - 4096
    meta = protocol.names([first, second]) + protocol.numbers([100, room + 4096])
    await peer.ask(Op.STORE, 2, meta, content(first, 100) + content(second, room + 4096))


async def crowded(peer: Peer) -> None:
    """A value gets memory as it comes, until there is no more; another one comes before it."""
    kept, short, long = named(0, 3)
    await store(peer, [kept])
    with TRIALS[0].values.acquire(SPACE, [kept], [1 << 17]):
        meta = protocol.names([short, long]) + protocol.numbers([100, 1 << 20])
        await peer.ask(Op.STORE, 2, meta, content(short, 100) + content(long, 1 << 20))


async def sharing(peer: Peer) -> None:
    keys, more, last = named(0), named(3), named(6, 2)
    await store(peer, keys)
    fds = [os.memfd_create("test", os.MFD_ALLOW_SEALING) for _ in range(2)]
    try:
        for fd, nbytes in zip(fds, (STAGING, 1 << 17), strict=True):
            os.ftruncate(fd, nbytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        meta = greeting.share(STAGING, PIECE, 1 << 17)
        message = protocol.header(Op.SHARE, peer.number + 1, meta=len(meta)) + meta
        peer.number += 1
        socket.send_fds(peer.sock, [message], fds)
        await peer.receive(HEADER_BYTES + 16)
        with mmap.mmap(fds[0], STAGING) as staging, mmap.mmap(fds[1], 1 << 17) as region:
            for _ in range(2):
                await load(peer, [*keys, *more], Op.BORROW)
            await peer.ask(Op.RETURN, meta=protocol.number(peer.number - 1))
            slots = b""
            for index, key in enumerate(more[:2]):
                staging[index * PIECE : (index + 1) * PIECE] = content(key, PIECE)
                slots += protocol.slot(index)
            meta = protocol.names(more[:2]) + protocol.numbers([PIECE, PIECE])
            await peer.ask(Op.STAGE, 2, meta, slots)
            region[:PIECE] = content(last[0], PIECE)
            region[PIECE : 2 * PIECE] = content(last[1], PIECE)
            meta = protocol.names(last) + protocol.numbers([PIECE, PIECE, 0, PIECE])
            place = 8 * PIECE + (peer.number + 1) % 16 * 8
            staging[place : place + 8] = protocol.number(peer.number + 1)
            await peer.ask(Op.OFFER, 2, meta)
            await load(peer, last)
    finally:
        for fd in fds:
            os.close(fd)


async def with_files(peer: Peer) -> None:
    keys = named(0)
    await store(peer, keys)
    await peer.ask(Op.DELETE, 1, protocol.names(keys[:1]))  # while its file is written
    while TRIALS[0].writes:
        await asyncio.sleep(0.001)
    TRIALS[0].values.clear(SPACE)
    await load(peer, keys)
    await load(peer, [*named(9, 1), *keys[1:]])
    await peer.ask(Op.COUNT, 3, protocol.names(keys))
    await store(peer, named(3))
    await peer.ask(Op.CLEAR)


async def ask_files(peer: Peer) -> None:
    await peer.ask(Op.CONTAINS, 1, protocol.names(named(0, 1)))


async def clear_files(peer: Peer) -> None:
    await peer.ask(Op.CLEAR)


async def delete_files(peer: Peer) -> None:
    await peer.ask(Op.DELETE, 1, protocol.names(named(0, 1)))


async def list_files(peer: Peer) -> None:
    await peer.ask(Op.STATUS)
    await store(peer, named(0))
    await peer.ask(Op.LIST, meta=bytes(16))


async def purge_files(peer: Peer) -> None:
    await store(peer, named(0))
    await peer.ask(Op.PURGE, meta=SPACE.encode())


async def rude(peer: Peer) -> None:
    await store(peer, named(0, 1))
    await peer.ask(Op.LOAD, 1, protocol.names(named(0, 1)), announce=70_000, payload=bytes(70_000))


async def proven(peer: Peer) -> None:
    """After a greeting with a token, which `hello` did."""
    await peer.ask(Op.USAGE)


SCRIPTS: dict[str, Callable[[Peer], Any]] = {
    "token": proven,
    "ordinary": ordinary,
    "sharing": sharing,
    "large": large,
    "crowded": crowded,
    "files": with_files,
    "files asked": ask_files,
    "files cleared": clear_files,
    "files deleted": delete_files,
    "files listed": list_files,
    "files purged": purge_files,
    "rude": rude,
}
TRIALS: list[Trial] = []
"""The one that runs now: a script empties its memory, to read from files."""

# -- how they die --------------------------------------------------------------------------


class Trial:
    """One server with one client, and what must hold when both are gone."""

    def __init__(self, steps: Steps, folder: Path | None, token: bytes) -> None:
        self.service = a_service(1 << 20, folder, token=token)
        self.values = self.service.values
        self.steps = steps
        if self.service.disk is not None:
            steps.watch(self.service.disk._loop._loop)

    @property
    def writes(self) -> bool:
        """Whether files are being written."""
        return self.service.disk is not None and bool(self.service.disk._writes)

    async def run(self, script: Callable[[Peer], Any], way: str, fault: str) -> None:
        loop = asyncio.get_running_loop()
        TRIALS[:] = [self]
        ours, theirs = socket.socketpair()
        for sock in (ours, theirs):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        server = Hesitant(fileno=ours.detach())
        server.way = way
        live = Session(
            self.service,
            Wire(server, passes_descriptors=script is sharing),
            "a test",
            memoryview(bytearray(SCRATCH_BYTES)),
        )
        peer = Peer(theirs)
        serving = loop.create_task(live.run())

        finished: list[bool] = []

        async def client() -> None:
            with contextlib.suppress(OSError, EOFError, protocol.ProtocolError):
                await hello(peer)
                await script(peer)
                finished.append(True)

        talking = loop.create_task(client())

        def go() -> None:
            talking.cancel()
            talking.add_done_callback(lambda _: theirs.close())

        def strike(stepped: Stepped) -> None:
            if fault == "fails":
                # What these wait for fails in a task of its own, where it is struck, too.
                if self.steps.sources.inside(stepped.inner) not in ("wait_for", "_wait"):
                    stepped.error = OSError("struck")
            elif fault == "cancelled":
                task = stepped.task
                assert task is not None
                task.get_loop().call_soon(task.cancel)
            else:
                loop.call_soon_threadsafe(go)

        self.steps.fault = strike
        await asyncio.wait([serving, talking], timeout=END_S, return_when=asyncio.FIRST_COMPLETED)
        assert fault or finished or script is rude, "the script didn't come to its end"
        go()
        done, _ = await asyncio.wait([serving, talking], timeout=END_S)
        assert len(done) == 2, "it didn't end"
        for task in done:
            if not task.cancelled():
                task.exception()
        live.end()
        theirs.close()
        until = loop.time() + END_S
        while self.writes:
            assert loop.time() < until, "files are written for ever"
            await asyncio.sleep(0.001)

    def at_rest(self) -> None:
        """Nothing is held, nothing is lost, and what is there is right."""
        lm_service.check_at_rest(self.service, content)

    def close(self) -> None:
        lm_service.close(self.service)


def sources() -> Sources:
    return Sources(MODULES)


def left() -> Counter[str]:
    """Threads and descriptors that there are."""
    TRIALS.clear()
    gc.collect()
    return Counter(threads=threading.active_count(), descriptors=len(os.listdir("/proc/self/fd")))


@contextlib.contextmanager
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Turns and batches so small that tests reach what comes after them."""
    for module, name, number in (
        (wire, "_YIELD_BYTES", 8192),
        (session, "META_BYTES", 160),
        (intake, "_TURN_BYTES", 2048),
        (folders, "TURNS", 1),
        (folders, "MOST_OPEN", 0),
        (intake, "_TOGETHER_BYTES", 60_000),
    ):
        monkeypatch.setattr(module, name, number)
    yield


def tried(steps: Steps, name: str, way: str, at: Chain | None, fault: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    token = b"a token" if name == "token" else b""
    trial = Trial(steps, folder if name.startswith("files") else None, token)
    steps.at, steps.fault = at, None
    loop = asyncio.new_event_loop()
    steps.watch(loop)
    try:
        loop.run_until_complete(trial.run(SCRIPTS[name], way, fault))
        trial.at_rest()
    except AssertionError as error:
        raise AssertionError(f"{name}, {way}, {fault} at {at}: {error}") from error
    finally:
        trial.close()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def test_death_at_every_await(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Records that pytest keeps hold errors, and those hold frames with their buffers.
    caplog.set_level(logging.CRITICAL, "lmcache_backend_lm")
    known = sources()
    reached: set[str] = set()
    trials = 0
    with small(monkeypatch):
        tried(Steps(known), "sharing", "waits", None, "", tmp_path / "warm")
        before = left()
        for name in SCRIPTS:
            for way in WAYS:
                steps = Steps(known)
                tried(steps, name, way, None, "", tmp_path / f"{name}{way}")
                chains = [chain for chain in steps.seen if chain and chain[0] not in STOPPING]
                for chain in chains:
                    for fault in ("goes", "cancelled", "fails"):
                        at = tmp_path / f"{name}{way}{trials}"
                        tried(steps, name, way, chain, fault, at)
                        trials += 1
                reached |= {point for chain in steps.seen for point in chain}
        until = time.monotonic() + END_S  # threads that were told to end do so a little later
        while not left() <= before and time.monotonic() < until:
            time.sleep(0.02)
    missing = known.names - reached - ELSEWHERE.keys()
    print(f"{trials} deaths at {len(reached)} of {len(known.names)} awaits")
    assert not missing, f"no request waits at {sorted(missing)}"
    assert not ELSEWHERE.keys() & reached, "a reason in ELSEWHERE is out of date"
    assert ELSEWHERE.keys() | STOPPING <= known.names
    assert left() <= before
