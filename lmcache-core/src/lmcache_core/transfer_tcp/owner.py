"""The passive end of the ``tcp`` channel: lets peers read and write one region.

A thread accepts, and each connection has one that serves it, so that a peer that is slow, stuck or
talks rubbish is nobody else's concern. Knows who may come in and what they may touch. Knows nothing
about the peers that this process itself connects to.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import ssl
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from lmcache_core.aio.stream import PlainStream, Stream, TlsStream
from lmcache_core.aio.tls import server_context
from lmcache_core.contracts.storage import HostRegion
from lmcache_core.contracts.transfer import Note
from lmcache_core.errors import BackendError, BackendRejected, BackendUnavailable
from lmcache_core.logging import Seldom
from lmcache_core.transfer_tcp import wire
from lmcache_core.transfer_tcp.config import TcpChannelConfig
from lmcache_core.transfer_tcp.line import Line, pieces
from lmcache_core.transfer_tcp.wire import Op, Status, WireError

logger = logging.getLogger(__name__)

_BACKLOG = 128
_TICK_S = 0.5
_NOTES_AHEAD = 64
"""Notes of one connection that core may be late with; then it waits, so that none fills memory."""


class Owner:
    """Serves ``region`` until `close`."""

    def __init__(
        self,
        config: TcpChannelConfig,
        region: HostRegion,
        *,
        writable: bool,
        hand_over: Callable[[Note], Future[None]],
        name: str,
    ) -> None:
        """Listen.

        Raises:
            BackendRejected: the address isn't this machine's, or the certificate is no use.
            BackendUnavailable: the port is taken.
        """
        self._config = config
        self._region = region
        self._writable = writable
        self._hand_over = hand_over
        self._name = name
        self._seldom = Seldom(logger)
        self._secret = secrets.token_bytes(wire.SECRET_BYTES)
        self._tls = _tls_context(config)
        self._lock = threading.Lock()
        self._lines: dict[threading.Thread, Line | None] = {}
        self._closing = threading.Event()
        self._listener = _listen(config)
        self._acceptor = threading.Thread(target=self._accept, name=f"{name}-accept", daemon=True)
        self._acceptor.start()

    @property
    def address(self) -> wire.Address:
        """Where it can be reached, and how."""
        host, port = self._listener.getsockname()[:2]
        return wire.Address(
            self._config.advertise or host, port, self._secret, self._tls is not None
        )

    def close(self) -> None:
        """Let nobody in any more, cut off who is, and wait until the region is at rest."""
        self._closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the acceptor
        self._acceptor.join()
        self._listener.close()
        with self._lock:
            threads = list(self._lines)
            for line in self._lines.values():
                if line is not None:
                    line.shutdown()
        for thread in threads:
            thread.join()

    # -- the acceptor's thread -------------------------------------------------------------

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                sock, peer = self._listener.accept()
            except OSError as error:  # it was shut down, or there are no descriptors left
                if self._closing.wait(0.05):
                    return
                logger.debug("%s: can't accept a connection: %s", self._name, error)
                continue
            where = f"{peer[0]}:{peer[1]}"
            thread = threading.Thread(
                target=self._serve, args=(sock, where), name=f"{self._name}-serve", daemon=True
            )
            with self._lock:
                full = len(self._lines) >= self._config.max_connections
                if not full:
                    self._lines[thread] = None
            if full:
                self._seldom.warn(
                    "full",
                    "%s: %s is turned away: there are %d connections (max_connections)",
                    self._name,
                    where,
                    self._config.max_connections,
                )
                sock.close()
                continue
            try:
                thread.start()
            except RuntimeError as error:  # the system has no more threads
                self._seldom.warn("threads", "%s: %s is turned away: %s", self._name, where, error)
                with self._lock:
                    del self._lines[thread]
                sock.close()

    # -- a connection's thread -------------------------------------------------------------

    def _serve(self, sock: socket.socket, where: str) -> None:
        line: Line | None = None
        try:
            line = Line(self._stream(sock), where, self._config.connect_timeout_s)
            with self._lock:
                self._lines[threading.current_thread()] = line
            if self._closing.is_set():
                return
            sender = self._greet(line)
            if sender is not None:
                line.stall_timeout_s = self._config.stall_timeout_s
                notes: deque[Future[None]] = deque()
                while self._answer(line, sender, notes):
                    while len(notes) > _NOTES_AHEAD:
                        self._await(notes.popleft())
        except (OSError, EOFError, BackendError) as error:
            logger.debug("%s: %s left: %r", self._name, where, error)
        except WireError as error:
            self._seldom.warn("rubbish", "%s: %s is cut off: %s", self._name, where, error)
        finally:
            with self._lock:
                del self._lines[threading.current_thread()]
                if line is not None:
                    line.close()
            sock.close()

    def _stream(self, sock: socket.socket) -> Stream:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if self._tls is None:
            return PlainStream(sock)
        return TlsStream(sock, self._tls, None, self._config.connect_timeout_s)

    def _greet(self, line: Line) -> str | None:
        """The client's name, once it has proved that it knows the secret; ``None``: it doesn't."""
        nonce = secrets.token_bytes(wire.NONCE_BYTES)
        line.send([memoryview(wire.greeting(nonce))])
        hello = wire.parse_hello(_filled(line, wire.HELLO.size))
        name = bytes(_filled(line, hello.name_bytes))
        right = wire.prove(self._secret, b"client", nonce, hello.nonce, name)
        known = wire.proves(hello.proof, right)
        ours = wire.prove(self._secret, b"owner", nonce, hello.nonce, name)
        status = Status.OK if known else Status.DENIED
        line.send([memoryview(wire.WELCOME.pack(status, ours if known else b""))])
        if not known:
            self._seldom.warn(
                "secret", "%s: %s has another descriptor and is refused", self._name, line.where
            )
            return None
        return name.decode(errors="replace")

    def _answer(self, line: Line, sender: str, notes: deque[Future[None]]) -> bool:
        """Serve one request; ``False``: what comes after it can't be trusted."""
        head = memoryview(bytearray(wire.REQUEST.size))
        line.fill([head], patient=True)
        asked = wire.parse_request(head)
        rest = _filled(line, asked.rest_bytes)
        places = wire.parse_places(rest, asked)
        if not self._allowed(asked, places):
            line.send([memoryview(bytes([Status.OUTSIDE]))])
            self._seldom.warn(
                "outside",
                "%s: %s asked for what it may not touch, and is cut off",
                self._name,
                line.where,
            )
            return False
        views = pieces(self._region.view, places)
        done = memoryview(bytes([Status.OK]))
        if asked.op is Op.READ:
            line.send([done, *views])
            return True
        line.fill(views)
        del views
        if asked.note_bytes:  # before the answer: whoever has that may write on another connection
            notes.append(self._hand_over(Note(sender, bytes(rest[-asked.note_bytes :]))))
        line.send([done])
        return True

    def _allowed(self, asked: wire.Request, places: list[tuple[int, int]]) -> bool:
        if asked.op is Op.WRITE and places and not self._writable:
            return False
        end = self._region.nbytes
        return all(offset + nbytes <= end for offset, nbytes in places)

    def _await(self, taken: Future[None]) -> None:
        over = threading.Event()
        taken.add_done_callback(lambda _: over.set())
        while not over.wait(_TICK_S):
            if self._closing.is_set():
                raise EOFError


def _filled(line: Line, nbytes: int) -> memoryview:
    view = memoryview(bytearray(nbytes))
    line.fill([view])
    return view


def _listen(config: TcpChannelConfig) -> socket.socket:
    where = f"host {config.host!r}, port {config.port}"
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise BackendRejected(
            f"{where}: {error.strerror}; use an address of this machine"
        ) from error
    family, _, _, _, address = found[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise BackendUnavailable(
            f"{where}: can't listen there: {error.strerror}; use an address of this machine and a "
            "free port, or 0"
        ) from error
    return listener


def _tls_context(config: TcpChannelConfig) -> ssl.SSLContext | None:
    if config.tls_cert is None:
        return None
    try:
        return server_context(config.tls_cert, config.tls_key)
    except OSError as error:
        raise BackendRejected(
            f"tls_cert {config.tls_cert}, tls_key {config.tls_key}: {error}"
        ) from error
