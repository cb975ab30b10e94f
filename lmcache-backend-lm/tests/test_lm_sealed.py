"""What others get of memory can be read, never written, and only this user's processes get it."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lm_server import RunningServer

from lmcache_backend_lm import greeting, protocol
from lmcache_backend_lm.arena import Arena
from lmcache_backend_lm.backend import LmBackend
from lmcache_backend_lm.config import LmConfig
from lmcache_backend_lm.greeting import Welcome
from lmcache_backend_lm.mapping import is_sealed, may_share
from lmcache_backend_lm.protocol import HEADER_BYTES, Op, Status
from lmcache_backend_lm.shared import Staging, open_for_reading
from lmcache_core.chunks.keys import CacheNamespace
from lmcache_core.contracts.storage import BackendContext, HostRegion
from lmcache_core.memory.host_memory import allocate_region, reader_of
from lmcache_core.metrics import Counters
from lmcache_core.testing.loop import Loop
from lmcache_core.testing.storage import LAYOUT
from lmcache_core.tiers.tiers import Tiers

NBYTES = 1 << 20
NOBODY = 65534
FUTURE_WRITE = 0x10  # Python has no name for the seal
NAMESPACE = CacheNamespace("sealed", LAYOUT)

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")


@pytest.fixture
def run() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@contextlib.contextmanager
def another_user() -> Iterator[None]:
    """What is connected to, or listened on, meanwhile is another user's."""
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user can look into."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def tiers(region: HostRegion) -> None:
    """Open no tiers, as a cache does: from then on nobody else writes into ``region``."""
    Tiers.open([], None, namespace=NAMESPACE, region=region, loop=None, counters=Counters())  # type: ignore[arg-type]


# -- what a descriptor can -----------------------------------------------------------------------


@contextlib.contextmanager
def host_memory() -> Iterator[int]:
    owned = allocate_region(NBYTES, shared=True)
    tiers(owned.region)
    fd = open_for_reading(owned.region)
    assert fd is not None
    owned.region.view[:4] = b"ours"
    try:
        yield fd
    finally:
        os.close(fd)
        assert bytes(owned.region.view[:4]) == b"ours"
        owned.close()


@contextlib.contextmanager
def arena() -> Iterator[int]:
    made = Arena(NBYTES)
    assert made.reader is not None
    made.view[:4] = b"ours"
    yield made.reader
    assert bytes(made.view[:4]) == b"ours"
    made.close()


@contextlib.contextmanager
def staging() -> Iterator[int]:
    made = Staging()
    made.fill(0, memoryview(bytearray(b"ours")))
    yield made.fd
    made.close()


SHARED = [host_memory, arena, staging]


@pytest.mark.parametrize("shared", SHARED)
def test_what_others_get_cannot_be_written(
    shared: Callable[[], contextlib.AbstractContextManager[int]],
) -> None:
    with shared() as fd:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        wanted = FUTURE_WRITE | fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
        assert seals & wanted == wanted
        assert os.fstat(fd).st_mode & 0o777 == 0o400
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(fd, b"theirs", 0)
        with pytest.raises(PermissionError):
            mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        with mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ) as readable:
            assert readable[:4] == b"ours"
        # Root may open what it likes; the seal holds all the same.
        with contextlib.suppress(PermissionError):
            again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
            try:
                with pytest.raises(PermissionError):
                    os.pwrite(again, b"theirs", 0)
                with pytest.raises(PermissionError):
                    mmap.mmap(again, 4096)
                with pytest.raises(PermissionError):
                    os.ftruncate(again, 0)
            finally:
                os.close(again)


@as_root
@pytest.mark.parametrize("shared", SHARED)
def test_its_own_user_cannot_open_it_for_writing(
    shared: Callable[[], contextlib.AbstractContextManager[int]],
) -> None:
    """Without root's rights the mode counts, whatever the kernel knows about seals."""
    with shared() as fd:
        os.fchown(fd, NOBODY, -1)

        def opened(how: str) -> bool:
            command = ["sh", "-c", f"exec 3{how}/proc/self/fd/{fd}"]
            child = subprocess.run(command, pass_fds=[fd], user=NOBODY, capture_output=True)
            return child.returncode == 0

        assert opened("<")
        assert not opened("<>")


def test_an_isolated_backend_still_writes_into_host_memory() -> None:
    """Its process has the descriptor that the memory was made with, and it has no other."""
    owned = allocate_region(NBYTES, shared=True)
    assert owned.region.fd is not None
    assert fcntl.fcntl(owned.region.fd, fcntl.F_GET_SEALS) & FUTURE_WRITE == 0
    with mmap.mmap(os.dup(owned.region.fd), NBYTES) as writable:
        writable[:4] = b"more"
    assert bytes(owned.region.view[:4]) == b"more"
    owned.close()


# -- who gets one --------------------------------------------------------------------------------


def test_the_same_user_may_share() -> None:
    with contextlib.ExitStack() as stack:
        for sock in socket.socketpair():
            assert may_share(stack.enter_context(sock))


def test_another_user_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    credentials = b"\1\0\0\0" + (4711).to_bytes(4, "little") + bytes(4)

    class Sock:
        def getsockopt(self, *what: int) -> bytes:
            assert what[:2] == (socket.SOL_SOCKET, socket.SO_PEERCRED)
            return credentials

    sock: socket.socket = Sock()  # type: ignore[assignment]
    assert not may_share(sock)
    monkeypatch.setattr("lmcache_backend_lm.mapping.os.geteuid", lambda: 4711)
    assert may_share(sock)
    credentials = b"\1\0\0\0" + bytes(8)  # root
    assert may_share(sock)


def said_hello(sock: socket.socket) -> Welcome:
    hello = greeting.hello("0" * 16, b"")
    sock.sendall(protocol.header(Op.HELLO, 0, meta=len(hello)) + hello)
    head = protocol.parse_header(sock.recv(HEADER_BYTES, socket.MSG_WAITALL))
    assert head.status is Status.OK
    return greeting.parse_welcome(memoryview(sock.recv(head.meta, socket.MSG_WAITALL)))


@as_root
def test_a_server_shares_nothing_with_another_user(public: Path) -> None:
    path = public / "socket"
    server = RunningServer("--memory-gib", "0.01", "--unix", str(path))
    try:
        path.chmod(0o777)
        with socket.socket(socket.AF_UNIX) as sock, staging() as fd:
            sock.settimeout(20)
            with another_user():
                sock.connect(str(path))
            assert not said_hello(sock).shares_memory
            meta = greeting.share(8192, 4096, 0)
            socket.send_fds(sock, [protocol.header(Op.SHARE, 1, meta=len(meta)) + meta], [fd])
            data, fds, _, _ = socket.recv_fds(sock, HEADER_BYTES, 4)
            assert protocol.parse_header(data).status is Status.DENIED
            assert fds == []
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(20)
            sock.connect(str(path))
            assert said_hello(sock).shares_memory
    finally:
        assert server.stop() == 0


@as_root
@pytest.mark.parametrize("way", ["unix", "tcp"])
def test_an_engine_shares_nothing_with_another_users_server(
    run: Loop, public: Path, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Over TCP it names a Unix socket: the engine has a look at who listens there, and stays."""
    path = public / "socket"
    got: list[bytes] = []
    received: list[int] = []

    def serve(listener: socket.socket, unix_path: str) -> None:
        listener.settimeout(20)
        with listener.accept()[0] as sock:
            sock.settimeout(20)
            while True:
                data, fds, _, _ = socket.recv_fds(sock, HEADER_BYTES, 4, socket.MSG_WAITALL)
                received.extend(fds)
                if not data:
                    return
                head = protocol.parse_header(data)
                got.append(data + sock.recv(head.meta, socket.MSG_WAITALL))
                if head.op is Op.DESCRIBE:
                    continue
                reply = greeting.welcome(Welcome(bytes(16), True, 1 << 30, (0, 0), unix_path))
                if head.op is Op.USAGE:
                    reply = protocol.usage(0, 0)
                answer = protocol.header(head.op, head.request, meta=len(reply))
                sock.sendall(answer + reply)

    with contextlib.ExitStack() as stack:
        unix = stack.enter_context(socket.socket(socket.AF_UNIX))
        unix.bind(str(path))
        path.chmod(0o777)
        with another_user():
            unix.listen()
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        ours = (tcp, str(path)) if way == "tcp" else (unix, "")
        thread = threading.Thread(target=serve, args=ours)
        thread.start()
        owned = allocate_region(NBYTES, shared=True)
        port = tcp.getsockname()[1]
        where = LmConfig(host="127.0.0.1", port=port) if way == "tcp" else LmConfig(path=path)
        backend = LmBackend(where)
        with caplog.at_level(logging.WARNING, "lmcache_backend_lm"):
            run(backend.open(BackendContext("remote", NAMESPACE, owned.region)))
        run(backend.close())
        thread.join()
        owned.close()
        if way == "tcp":
            unix.setblocking(False)
            with unix.accept()[0] as visitor:
                assert visitor.recv(1) == b""
    ops = [protocol.parse_header(data[:HEADER_BYTES]).op for data in got]
    assert ops == [Op.HELLO, Op.DESCRIBE, Op.USAGE]
    assert received == []
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert "another user" in lines[0]


def test_memory_that_can_shrink_is_not_mapped(run: Loop, public: Path) -> None:
    """Reading behind its end would end the engine."""
    path = public / "socket"

    def serve(listener: socket.socket) -> None:
        with listener.accept()[0] as sock:
            head = protocol.parse_header(sock.recv(HEADER_BYTES, socket.MSG_WAITALL))
            sock.recv(head.meta, socket.MSG_WAITALL)
            reply = greeting.welcome(Welcome(bytes(16), True, 1 << 30, (0, 0), ""))
            sock.sendall(protocol.header(Op.HELLO, 0, meta=len(reply)) + reply)
            data, fds, _, _ = socket.recv_fds(sock, HEADER_BYTES, 4, socket.MSG_WAITALL)
            sock.recv(protocol.parse_header(data).meta, socket.MSG_WAITALL)
            for fd in fds:
                os.close(fd)
            loose = os.memfd_create("test", os.MFD_ALLOW_SEALING)
            os.ftruncate(loose, NBYTES)
            assert not is_sealed(loose)
            reply = greeting.shared(NBYTES, 0)
            head_bytes = protocol.header(Op.SHARE, 0, meta=len(reply))
            socket.send_fds(sock, [head_bytes + reply], [loose])
            os.close(loose)
            with contextlib.suppress(OSError):
                sock.recv(1)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        backend = LmBackend(LmConfig(path=path))
        with pytest.raises(Exception, match="must be sealed"):
            run(backend.open(BackendContext("remote", NAMESPACE)))
        thread.join()


def test_a_system_without_proc_shares_no_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    owned = allocate_region(NBYTES, shared=True)

    def no_proc(*_: object) -> int:
        raise FileNotFoundError

    monkeypatch.setattr("lmcache_core.memory.host_memory.os.open", no_proc)
    assert owned.region.fd is not None
    assert reader_of(owned.region.fd) is None
    assert open_for_reading(owned.region) is None
    owned.close()
