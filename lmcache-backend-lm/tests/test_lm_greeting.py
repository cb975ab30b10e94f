"""Both sides prove the token, neither sends it, and nothing else is said before."""

from __future__ import annotations

import contextlib
import secrets
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lm_server import RunningServer, certificate

from lmcache_backend_lm import greeting, protocol
from lmcache_backend_lm.backend import LmBackend
from lmcache_backend_lm.config import LmConfig
from lmcache_backend_lm.greeting import Welcome
from lmcache_backend_lm.proof import PROOF_BYTES, Side, Transcript
from lmcache_backend_lm.protocol import HEADER_BYTES, Op, Status
from lmcache_core.aio.tls import binding_of
from lmcache_core.chunks.keys import CacheNamespace
from lmcache_core.contracts.storage import BackendContext
from lmcache_core.errors import BackendRejected
from lmcache_core.memory.host_memory import allocate_region
from lmcache_core.testing.loop import Loop
from lmcache_core.testing.storage import LAYOUT

TOKEN = "a token that nobody may see"
SPACE = "0" * 16
NAMESPACE = CacheNamespace("greeting", LAYOUT)


@pytest.fixture
def run() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def start() -> Iterator[Callable[..., RunningServer]]:
    with contextlib.ExitStack() as stack:

        def start_one(*options: str, **more: str) -> RunningServer:
            running = RunningServer("--memory-gib", "0.01", *options, **more)
            stack.callback(running.stop)
            return running

        yield start_one


def ask(sock: socket.socket, op: Op, meta: bytes) -> tuple[protocol.Header, bytes]:
    sock.sendall(protocol.header(op, 0, meta=len(meta)) + meta)
    head = protocol.parse_header(sock.recv(HEADER_BYTES, socket.MSG_WAITALL))
    return head, sock.recv(head.meta, socket.MSG_WAITALL)


def dialled(server: RunningServer) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", server.port))
    sock.settimeout(20)
    return sock


# -- a server that isn't the real one --------------------------------------------------------


class Stranger:
    """Took the server's port. Keeps all that it is told, and answers ``says(op, meta)``."""

    def __init__(self, path: Path, says: Callable[[Op, bytes], bytes]) -> None:
        self.heard = b""
        self.ops: list[Op] = []
        self.fds: list[int] = []
        self._says = says
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.settimeout(20)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with self._listener, self._listener.accept()[0] as sock:
            sock.settimeout(20)
            with contextlib.suppress(OSError):
                while True:
                    data, fds, _, _ = socket.recv_fds(sock, HEADER_BYTES, 4, socket.MSG_WAITALL)
                    self.fds += fds
                    if not data:
                        return
                    head = protocol.parse_header(data)
                    meta = sock.recv(head.meta, socket.MSG_WAITALL)
                    self.heard += data + meta
                    self.ops.append(head.op)
                    reply = self._says(head.op, meta)
                    sock.sendall(protocol.header(head.op, 0, meta=len(reply)) + reply)

    def close(self) -> None:
        self._thread.join()


def welcome(proof: bytes = bytes(PROOF_BYTES)) -> bytes:
    return greeting.welcome(Welcome(bytes(16), True, 1 << 30, (0, 0), "", proof))


def noise(op: Op, meta: bytes) -> bytes:
    """As a real one, but for the token."""
    if op is Op.HELLO:
        return greeting.challenge(secrets.token_bytes(32))
    return welcome(secrets.token_bytes(PROOF_BYTES))


def mirror(op: Op, meta: bytes) -> bytes:
    """Gives the client's own proof back, and its nonce before."""
    return greeting.challenge(meta[-32:]) if op is Op.HELLO else welcome(meta)


def open_door(op: Op, meta: bytes) -> bytes:
    """Says that no token is needed."""
    return welcome()


def old(op: Op, meta: bytes) -> bytes:
    """A server of version 1."""
    return struct.pack("<HH16sQQQH", 1, 1, bytes(16), 1 << 30, 0, 0, 0)


@pytest.mark.parametrize(
    ("says", "ops", "said"),
    [
        (noise, [Op.HELLO, Op.PROVE], "doesn't know the token"),
        (mirror, [Op.HELLO, Op.PROVE], "doesn't know the token"),
        (open_door, [Op.HELLO], "whether there is a token"),
        (old, [Op.HELLO], "speaks version 1 .* this client speaks version 3"),
    ],
)
def test_whoever_took_the_port_learns_no_secret_and_gets_no_memory(
    run: Loop, tmp_path: Path, says: Callable[[Op, bytes], bytes], ops: list[Op], said: str
) -> None:
    stranger = Stranger(tmp_path / "socket", says)
    owned = allocate_region(1 << 20, shared=True)
    owned.region.view[:5] = b"bytes"
    backend = LmBackend(LmConfig(path=tmp_path / "socket", token=TOKEN))
    with pytest.raises(BackendRejected, match=said):
        run(backend.open(BackendContext("remote", NAMESPACE, owned.region)))
    run(backend.close())
    stranger.close()
    owned.close()
    assert stranger.ops == ops
    assert stranger.fds == []
    assert TOKEN.encode() not in stranger.heard


def test_a_challenge_nobody_asked_for_is_no_greeting(run: Loop, tmp_path: Path) -> None:
    stranger = Stranger(tmp_path / "socket", noise)
    backend = LmBackend(LmConfig(path=tmp_path / "socket"))
    with pytest.raises(BackendRejected, match="whether there is a token"):
        run(backend.open(BackendContext("remote", NAMESPACE)))
    stranger.close()
    assert stranger.ops == [Op.HELLO]


# -- clients that aren't what they say ---------------------------------------------------------


def test_a_client_of_the_first_version_is_refused(start: Callable[..., RunningServer]) -> None:
    with dialled(start()) as sock:
        hello = struct.pack("<HH16sH", 1, 0, SPACE.encode(), 5) + b"token"
        head, text = ask(sock, Op.HELLO, hello)
    assert head.status is Status.VERSION
    assert b"speaks version 1" in text
    assert b"this server speaks version 3" in text


def test_without_a_token_one_round_trip_is_all(start: Callable[..., RunningServer]) -> None:
    with dialled(start()) as sock:
        head, meta = ask(sock, Op.HELLO, greeting.hello(SPACE, bytes(32)))
        assert head.status is Status.OK
        assert greeting.parse_welcome(memoryview(meta)).proof == bytes(PROOF_BYTES)
        assert ask(sock, Op.USAGE, b"")[0].status is Status.OK


def test_a_client_with_a_token_and_a_server_without(
    start: Callable[..., RunningServer], run: Loop
) -> None:
    """It would have to talk to somebody who proves nothing."""
    backend = LmBackend(LmConfig(port=start().port, token=TOKEN))
    with pytest.raises(BackendRejected, match="this server has none; start it with --token-file"):
        run(backend.open(BackendContext("remote", NAMESPACE)))


def test_a_proof_is_of_no_use_a_second_time(start: Callable[..., RunningServer]) -> None:
    server = start(LMCACHE_SERVER_TOKEN=TOKEN)
    hello, proofs = greeting.hello(SPACE, bytes(32), proves=True), []
    for again in (False, True):
        with dialled(server) as sock:
            _, challenge = ask(sock, Op.HELLO, hello)
            spoken = Transcript(hello, challenge, b"tcp")
            proofs.append(spoken.proof(TOKEN.encode(), Side.CLIENT))
            head, meta = ask(sock, Op.PROVE, proofs[0])
            if again:
                assert head.status is Status.DENIED
                assert meta.startswith(b"the token is wrong")
            else:
                reply = greeting.parse_welcome(memoryview(meta))
                assert spoken.proves(reply.proof, TOKEN.encode(), Side.SERVER)
    assert proofs[0] != proofs[1]


@pytest.mark.parametrize("op", [Op.USAGE, Op.CLEAR, Op.HELLO, Op.SHARE])
def test_nothing_is_served_before_the_proof(start: Callable[..., RunningServer], op: Op) -> None:
    with dialled(start(LMCACHE_SERVER_TOKEN=TOKEN)) as sock:
        assert ask(sock, Op.HELLO, greeting.hello(SPACE, bytes(32), proves=True))[0].op is Op.HELLO
        head, text = ask(sock, op, b"")
    assert head.status is Status.MALFORMED
    assert b"isn't a PROVE" in text


# -- what a proof is bound to ------------------------------------------------------------------


def both_ends(
    cert: tuple[Path, Path], version: ssl.TLSVersion
) -> tuple[ssl.SSLSocket, ssl.SSLSocket]:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(*cert)
    client = ssl.create_default_context(cafile=str(cert[0]))
    for context in (server, client):
        context.minimum_version = context.maximum_version = version
    one, two = socket.socketpair()
    accepted: list[Any] = []
    thread = threading.Thread(
        target=lambda: accepted.append(server.wrap_socket(one, server_side=True))
    )
    thread.start()
    dialling = client.wrap_socket(two, server_hostname="localhost")
    thread.join()
    return accepted[0], dialling


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_with_tls_a_proof_holds_on_one_connection(tmp_path: Path, version: ssl.TLSVersion) -> None:
    """So that one between two connections can't pass it on."""
    cert = certificate(tmp_path)
    seen = set()
    for _ in range(2):
        ends = both_ends(cert, version)
        one, two = map(binding_of, ends)
        assert one == two
        assert one.startswith(b"tls")
        assert len(one) > 12
        seen.add(one)
        for end in ends:
            end.close()
    assert len(seen) == 2


def test_without_tls_the_kind_of_socket_is_all() -> None:
    one, two = socket.socketpair()
    with one, two, socket.socket() as tcp:
        assert (binding_of(one), binding_of(tcp)) == (b"unix", b"tcp")
