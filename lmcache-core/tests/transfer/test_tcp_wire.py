"""What the ``tcp`` channel's owner does with connections that aren't a peer's, or a bad one's."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import Future

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_core.contracts.storage import HostRegion
from lmcache_core.contracts.transfer import (
    MAX_NOTE_BYTES,
    Note,
    PeerDescriptor,
    Range,
    TransferContext,
)
from lmcache_core.errors import BackendError, BackendRejected, BackendUnavailable
from lmcache_core.memory.host_memory import allocate_region
from lmcache_core.transfer_tcp import wire
from lmcache_core.transfer_tcp.channel import TcpChannel
from lmcache_core.transfer_tcp.config import TcpChannelConfig
from lmcache_core.transfer_tcp.owner import Owner
from lmcache_core.transfer_tcp.wire import Op, Status, WireError

NBYTES = 1 << 16
PATIENCE_S = 20.0


class Served:
    """An owner of a region of bytes 1, and the notes that it handed over."""

    def __init__(self, *, writable: bool = True, **options: object) -> None:
        self.memory = allocate_region(NBYTES)
        self.notes: list[Note] = []
        self.region: HostRegion = self.memory.region
        self.region.view[:] = b"\1" * NBYTES
        config = TcpChannelConfig.model_validate({"connect_timeout_s": 1.0, **options})
        self.owner = Owner(
            config, self.region, writable=writable, hand_over=self._take, name="test"
        )

    def connection(self, *, secret: bytes | None = None) -> socket.socket:
        """A connection that was let in, if the secret is right."""
        sock = self.plain()
        nonce = wire.parse_greeting(memoryview(received(sock, wire.GREETING.size)))
        address = self.owner.address
        proof = wire.prove(secret or address.secret, b"client", nonce, bytes(16), b"me")
        sock.sendall(wire.hello(b"me", bytes(16), proof))
        status, said = wire.WELCOME.unpack(received(sock, wire.WELCOME.size))
        right = wire.prove(address.secret, b"owner", nonce, bytes(16), b"me")
        assert (status == Status.OK) == (said == right) == (secret is None)
        return sock

    def plain(self) -> socket.socket:
        """A connection that has said nothing yet."""
        return socket.create_connection(("127.0.0.1", self.owner.address.port), PATIENCE_S)

    def _take(self, note: Note) -> Future[None]:
        self.notes.append(note)
        done: Future[None] = Future()
        done.set_result(None)
        return done


@pytest.fixture
def served() -> Iterator[Served]:
    one = Served()
    yield one
    one.owner.close()


def received(sock: socket.socket, nbytes: int) -> bytes:
    data = b""
    while len(data) < nbytes and (got := sock.recv(nbytes - len(data))):
        data += got
    return data


def ended(sock: socket.socket) -> bool:
    """Whether the other end closed it, before long and without a word."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def works(served: Served) -> bool:
    """Whether somebody else is served."""
    with served.connection() as sock:
        sock.sendall(wire.request(Op.READ, [(0, 4)], 4, b""))
        return received(sock, 5) == b"\0" + bytes(served.region.view[:4])


def test_a_request_is_answered_as_documented(served: Served) -> None:
    with served.connection() as sock:
        sock.sendall(struct.pack("<BxIIQQQ", 1, 0, 1, 3, 10, 3))
        assert received(sock, 4) == b"\0\1\1\1"
        sock.sendall(struct.pack("<BxIIQQQ", 2, 2, 1, 3, 10, 3) + b"hi" + b"abc")
        assert received(sock, 1) == b"\0"
        assert served.region.view[9:14] == b"\1abc\1"
    assert served.notes == [Note("me", b"hi")]


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\n\r\n" + bytes(100), bytes(200)])
def test_rubbish_is_cut_off(served: Served, said: bytes) -> None:
    with served.plain() as sock:
        received(sock, wire.GREETING.size)
        sock.sendall(said)  # nothing: for as long as a greeting may take
        assert ended(sock)
    assert works(served)


def test_another_secret_is_refused(served: Served) -> None:
    with served.connection(secret=bytes(32)) as sock:
        assert ended(sock)


def test_strangers_fill_no_log(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(5):
        with served.connection(secret=bytes(32)) as sock:
            assert ended(sock)
        with served.plain() as sock:
            received(sock, wire.GREETING.size)
            sock.sendall(bytes(200))
            assert ended(sock)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len([line for line in said if "another descriptor" in line]) == 1
    assert len([line for line in said if "cut off" in line]) == 1
    assert works(served)


def test_a_proof_is_of_no_use_twice(served: Served) -> None:
    with served.plain() as one, served.plain() as two:
        nonces = [
            wire.parse_greeting(memoryview(received(sock, wire.GREETING.size)))
            for sock in (one, two)
        ]
        proof = wire.prove(served.owner.address.secret, b"client", nonces[0], bytes(16), b"me")
        two.sendall(wire.hello(b"me", bytes(16), proof))
        status, _ = wire.WELCOME.unpack(received(two, wire.WELCOME.size))
        assert status == Status.DENIED


OUTSIDE = [(NBYTES - 1, 2), (NBYTES, 1), (1 << 63, 8), ((1 << 64) - 8, 16)]


@pytest.mark.parametrize("place", OUTSIDE, ids=str)
@pytest.mark.parametrize("op", Op, ids=str)
def test_the_owner_checks_ranges(served: Served, op: Op, place: tuple[int, int]) -> None:
    with served.connection() as sock:
        head = struct.pack("<BxIIQ4Q", op, 0, 2, 8 + place[1], 0, 8, *place)
        sock.sendall(head + b"x" * 8)
        assert received(sock, 1)[0] == Status.OUTSIDE
        assert ended(sock)
    assert served.region.view == b"\1" * NBYTES
    assert works(served)


def test_the_owner_refuses_writes_to_what_is_only_read() -> None:
    served = Served(writable=False)
    with served.connection() as sock:
        sock.sendall(wire.request(Op.WRITE, [(0, 8)], 8, b""))
        assert received(sock, 1)[0] == Status.OUTSIDE
    assert served.region.view == b"\1" * NBYTES
    served.owner.close()


@pytest.mark.parametrize(
    "head",
    [
        struct.pack("<BxIIQ", 3, 0, 0, 0),
        struct.pack("<BxIIQ", 1, 0, wire.MAX_RANGES + 1, 0),
        struct.pack("<BxIIQ", 1, 0, (1 << 32) - 1, (1 << 64) - 1),
        struct.pack("<BxIIQ", 2, MAX_NOTE_BYTES + 1, 0, 0),
        struct.pack("<BxIIQ", 1, 1, 0, 0),
        struct.pack("<BxIIQQQ", 1, 0, 1, 9, 0, 8),
    ],
    ids=["operation", "ranges", "absurd", "note", "note of a read", "sum"],
)
def test_absurd_requests_are_cut_off(served: Served, head: bytes) -> None:
    with served.connection() as sock:
        sock.sendall(head)
        assert ended(sock)
    assert works(served)


def test_half_a_write_is_no_write(served: Served) -> None:
    with served.connection() as sock:
        sock.sendall(wire.request(Op.WRITE, [(0, 8)], 8, b"note") + b"half")
    served.owner.close()
    assert served.notes == []
    assert served.region.view[8:] == b"\1" * (NBYTES - 8)


def test_too_many_connections_are_turned_away() -> None:
    served = Served(max_connections=2)
    with served.connection(), served.connection(), served.plain() as third:
        assert ended(third)
    served.owner.close()


def test_who_says_nothing_in_the_middle_is_cut_off() -> None:
    served = Served(stall_timeout_s=1.0)
    with served.connection() as sock:
        sock.sendall(wire.request(Op.WRITE, [(0, 8)], 8, b"") + b"half")
        assert ended(sock)
    served.owner.close()


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_parsers_accept_nothing_by_accident(data: bytes) -> None:
    for size, parse in (
        (wire.GREETING.size, wire.parse_greeting),
        (wire.HELLO.size, wire.parse_hello),
        (wire.REQUEST.size, wire.parse_request),
    ):
        try:
            found = parse(memoryview(data.ljust(size, b"\0")[:size]))
        except WireError:
            continue
        if isinstance(found, wire.Request):
            assert found.count <= wire.MAX_RANGES
            assert found.note_bytes <= MAX_NOTE_BYTES
    with contextlib.suppress(WireError):
        wire.Address.decode(data)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_descriptors_accept_nothing_by_accident(data: bytes) -> None:
    whole = PeerDescriptor("tcp", "name", NBYTES, True, data)
    assert PeerDescriptor.decode(whole.encode(), "tcp") == whole
    with pytest.raises(BackendRejected):
        PeerDescriptor.decode(data, "tcp")
    with pytest.raises(BackendRejected, match="version 2"):
        PeerDescriptor.decode(whole.encode().replace(b"LMPD\1", b"LMPD\2", 1), "tcp")


# -- what a client does with a bad owner -----------------------------------------------------


def test_whoever_listens_there_by_now_is_found_out() -> None:
    """An owner that can't prove that it made the descriptor, and something else altogether."""

    async def connect(answers: bytes) -> BackendError:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            memory = allocate_region(NBYTES)
            channel = TcpChannel(TcpChannelConfig(connect_timeout_s=1.0))
            await channel.open(TransferContext("here", memory.region))
            address = wire.Address("127.0.0.1", port, bytes(32), False)
            forged = PeerDescriptor("tcp", "them", NBYTES, True, address.encode())
            connecting = asyncio.ensure_future(channel.connect(forged.encode()))
            other, _ = await asyncio.to_thread(server.accept)
            with other:
                other.sendall(answers)
                try:
                    await connecting
                except BackendError as error:
                    return error
                finally:
                    await channel.close()
        raise AssertionError("it was believed")

    liar = wire.greeting(bytes(16)) + wire.WELCOME.pack(Status.OK, bytes(32))
    for answers in (liar, b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(64), b""):
        assert isinstance(asyncio.run(connect(answers)), BackendError)


def test_a_range_beyond_what_was_published_is_refused_by_the_owner(served: Served) -> None:
    async def read() -> None:
        memory = allocate_region(NBYTES)
        channel = TcpChannel(TcpChannelConfig())
        await channel.open(TransferContext("here", memory.region))
        body = served.owner.address.encode()
        peer = await channel.connect(PeerDescriptor("tcp", "x", 1 << 40, True, body).encode())
        try:
            await channel.read(peer, [Range(0, 1 << 39, 8)])
        finally:
            await channel.close()

    with pytest.raises(BackendRejected, match="refuses a range"):
        asyncio.run(read())


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(BackendUnavailable, match=f"port {port}.*free port"):
            Served(port=port)
