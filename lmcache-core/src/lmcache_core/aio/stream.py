"""Blocking byte streams for the client's threads: TCP, Unix sockets, TLS.

`PlainStream.receive` asks the kernel to fill all buffers (MSG_WAITALL), so all values of an answer
cost one system call and take the interpreter's lock once, however busy the engine's own threads
keep it. Every call comes back after `TICK_S` at the latest, so that its
caller can look at the clock.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from lmcache_core.aio.tls import binding_of

TICK_S = 0.5
WAKE_BYTES = 1 << 20
"""Whoever waits for more than twice as many bytes is woken when so many are there, not for each
segment: with eight clients on two CPUs that is a tenth of the time."""
_RECORDS_BYTES = 256 << 10
"""Handed to OpenSSL at a time: it encrypts 16 KiB a record, and the lock is held meanwhile."""


class Stream(Protocol):
    """Bytes in both directions; one thread reads, another writes."""

    same_host: bool
    """The other end is on this machine."""

    @property
    def binding(self) -> bytes:
        """What a proof for this connection covers; see `tls.binding_of`, which may raise."""

    def receive(self, views: Sequence[memoryview]) -> int:
        """Fill the beginning of ``views``, at most `views.IOV_MAX`; how many bytes, 0 at the end.

        `BlockingIOError` after a tick.
        """

    def send(self, views: Sequence[memoryview]) -> int:
        """Send the beginning of ``views``, at most `views.IOV_MAX`; how many bytes.

        `BlockingIOError` after a tick.
        """

    def shutdown(self) -> None:
        """Wake whoever reads or writes, with an end or an error. Idempotent."""

    def close(self) -> None:
        """Give the descriptor back, once nobody uses it."""


class PlainStream:
    """A connected socket without encryption. It is closed with this, and if this can't be made.

    Raises:
        OSError: the other end has gone already.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        with _closed_on_failure(sock):
            sock.settimeout(None)
            tick = struct.pack("@ll", int(TICK_S), int(TICK_S % 1 * 1e6))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, tick)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, tick)
            self.same_host = _is_same_host(sock)

    @property
    def binding(self) -> bytes:
        return binding_of(self.sock)

    def receive(self, views: Sequence[memoryview]) -> int:
        early = _all_but_last(views, WAKE_BYTES)
        if not early:
            return self._receive(views)
        # What follows these views is always enough to wake us.
        wake_from(self.sock, WAKE_BYTES)
        try:
            return self._receive(early)
        finally:
            wake_from(self.sock, 1)

    def _receive(self, views: Sequence[memoryview]) -> int:
        if len(views) == 1:
            return self.sock.recv_into(views[0], 0, socket.MSG_WAITALL)
        return self.sock.recvmsg_into(views, 0, socket.MSG_WAITALL)[0]

    def send(self, views: Sequence[memoryview]) -> int:
        return self.sock.sendmsg(views)

    def shutdown(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.sock.close()


class TlsStream:
    """A connected socket with TLS. OpenSSL wants one call at a time, so no call waits inside it.

    ``name`` is the server's, which its certificate must have; ``None``: this end is the server. The
    socket is closed with this, and if this can't be made.

    Raises:
        OSError: the other end has gone already, or isn't trusted.
    """

    same_host = False

    def __init__(
        self, sock: socket.socket, context: ssl.SSLContext, name: str | None, timeout_s: float
    ) -> None:
        with _closed_on_failure(sock):
            sock.settimeout(timeout_s)
            self._tls = context.wrap_socket(sock, server_side=name is None, server_hostname=name)
        self._tls.settimeout(0)
        self._lock = threading.Lock()
        self._closed = False

    @property
    def binding(self) -> bytes:
        return binding_of(self._tls)

    def receive(self, views: Sequence[memoryview]) -> int:
        return self._attempt(self._tls.recv_into, views[0])

    def send(self, views: Sequence[memoryview]) -> int:
        return self._attempt(self._tls.send, views[0][:_RECORDS_BYTES])

    def shutdown(self) -> None:
        # Below TLS: a polite end would wait for its turn.
        self._closed = True
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._tls, socket.SHUT_RDWR)

    def close(self) -> None:
        self._tls.close()

    def _attempt(self, call: Callable[[memoryview], int], view: memoryview) -> int:
        until = time.monotonic() + TICK_S
        while not self._closed:
            with self._lock:
                try:
                    return call(view)
                except ssl.SSLWantReadError:
                    events = select.POLLIN
                except ssl.SSLWantWriteError:
                    events = select.POLLOUT
                except ssl.SSLEOFError:
                    return 0
            left = until - time.monotonic()
            if left <= 0:
                raise BlockingIOError
            poll = select.poll()
            poll.register(self._tls.fileno(), events)
            poll.poll(left * 1000)
        raise ConnectionError("the connection was given up")


def wake_from(sock: socket.socket, nbytes: int) -> None:
    """Let whoever waits for bytes from ``sock`` be woken when so many are there.

    As many must be on their way, or nobody is woken before the connection ends.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, nbytes)


def _all_but_last(views: Sequence[memoryview], nbytes: int) -> list[memoryview]:
    """``views`` without their last ``nbytes``; nothing if that isn't most of them."""
    rest = sum(view.nbytes for view in views) - nbytes
    if rest < nbytes:
        return []
    found: list[memoryview] = []
    for view in views:
        found.append(view[:rest])
        rest -= found[-1].nbytes
        if not rest:
            break
    return found


def dial(host: str, port: int, timeout_s: float) -> socket.socket:
    """A TCP connection.

    Raises:
        OSError: nobody answers there.
    """
    sock = socket.create_connection((host, port), timeout_s)
    with _closed_on_failure(sock):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return sock


def dial_unix(path: Path | str, timeout_s: float) -> socket.socket:
    """A connection to a Unix socket.

    Raises:
        OSError: nobody answers there, or this user may not.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with _closed_on_failure(sock):
        sock.settimeout(timeout_s)
        sock.connect(str(path))
    return sock


@contextlib.contextmanager
def _closed_on_failure(sock: socket.socket) -> Iterator[None]:
    try:
        yield
    except BaseException:
        sock.close()
        raise


def _is_same_host(sock: socket.socket) -> bool:
    """Whether both ends have one address, which no other machine can have."""
    if sock.family == socket.AF_UNIX:
        return True
    return bool(sock.getsockname()[0] == sock.getpeername()[0])
