"""A `Wire` for a thread: its socket blocks, so nothing that is awaited ever suspends.

Knows sockets, TLS and time limits. Knows nothing about what is said.
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections.abc import Coroutine, Sequence
from typing import Any, Final, Protocol, TypeVar

from lmcache_backend_redis.resp import Wire
from lmcache_core import BackendError, last_first, next_of, take_out

T = TypeVar("T")

_TIMEVAL: Final = struct.Struct("@ll")


class Socket(Protocol):
    """What this module needs of `socket.socket` and `ssl.SSLSocket`."""

    def settimeout(self, timeout: float | None, /) -> None: ...
    def setsockopt(self, level: int, option: int, value: bytes, /) -> None: ...
    def recv_into(self, buffer: memoryview, nbytes: int = 0, flags: int = 0, /) -> int: ...
    def send(self, data: memoryview, /) -> int: ...
    def sendmsg(self, buffers: Sequence[memoryview], /) -> int: ...


def at_once(work: Coroutine[Any, Any, T]) -> T:
    """What ``work`` returns, which awaits nothing but a `BlockingWire`.

    Raises:
        RuntimeError: it wanted an event loop.
    """
    try:
        work.send(None)
    except StopIteration as done:
        value: T = done.value
        return value
    work.close()
    raise RuntimeError("a thread has no event loop to wait in")


class BlockingWire(Wire):
    """``idle_s``: how long the server may be silent; ``until``: when all of it must be over, on the
    monotonic clock."""

    def __init__(self, sock: Socket, peer: str, *, idle_s: float, until: float) -> None:
        super().__init__(peer, idle_s=idle_s)
        self._sock = sock
        self._until = until
        # The kernel then waits until a buffer is full, and wakes this thread once instead of for
        # every segment; it can also send many buffers at once. TLS does neither.
        self._plain = not isinstance(sock, ssl.SSLSocket)
        self._wait_all = socket.MSG_WAITALL if self._plain else 0
        self._limit_s = 0.0
        if self._plain:
            sock.settimeout(None)  # SO_RCVTIMEO and SO_SNDTIMEO are for blocking sockets

    async def send(self, parts: Sequence[bytes | memoryview]) -> None:
        left = last_first(parts)
        while left:
            take_out(left, self._send_some(left))

    def _send_some(self, left: list[memoryview]) -> int:
        self._limit()
        try:
            if self._plain:
                return self._sock.sendmsg(next_of(left))
            return self._sock.send(left[-1])
        except OSError as error:
            raise self._failed(error) from error

    async def _receive(self, into: memoryview, *, whole: bool = False) -> int:
        self._limit()
        try:
            got = self._sock.recv_into(into, 0, self._wait_all if whole else 0)
        except OSError as error:
            raise self._failed(error) from error
        if not got:
            raise self._ended()
        return got

    def _limit(self) -> None:
        left = self._until - time.monotonic()
        if left <= 0:
            raise self._late()
        limit_s = min(left, self._idle_s)
        if limit_s == self._limit_s:
            return
        self._limit_s = limit_s
        if self._plain:
            value = _TIMEVAL.pack(int(limit_s), int(limit_s % 1 * 1e6) or 1)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)
        else:
            self._sock.settimeout(limit_s)

    def _failed(self, error: OSError) -> BackendError:
        if isinstance(error, (TimeoutError, BlockingIOError)):
            return self._late() if self._limit_s < self._idle_s else self._silent()
        return self._lost(error)
