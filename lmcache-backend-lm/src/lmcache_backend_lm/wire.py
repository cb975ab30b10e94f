"""A non-blocking socket of the server, on one event loop: exact reads straight into memory.

Not asyncio's streams, which copy what they receive, nor its transports, which up to
Python 3.11 copy what they can't send at once. Works with TLS as well.

Knows when a peer makes no progress. Knows nothing about messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import Callable, Sequence

from lmcache_core import WAKE_BYTES, last_first, next_of, take_out, wake_from

MIN_PROGRESS_BYTES = 64 << 10
"""Fewer than so many bytes in a stall time-out are no progress, or a peer that sends a byte now and
then could hold memory for ever."""
MAX_FDS = 4
_YIELD_BYTES = 4 << 20
_RECORDS_BYTES = 256 << 10
_WANTS = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Wire:
    """One connection. ``idle`` is whether it waits for the first byte of a message."""

    def __init__(self, sock: socket.socket, *, passes_descriptors: bool = False) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.idle = False
        self.received_fds: list[int] = []
        """Those that came with the message that `read_first` began."""
        self.lost_fds = False
        """Whether more came with one."""
        self._passes_descriptors = passes_descriptors
        self._loop = asyncio.get_running_loop()
        self._fd = sock.fileno()
        self._tls = isinstance(sock, ssl.SSLSocket)
        self._reader: asyncio.Future[None] | None = None
        self._rest: list[memoryview] | None = None
        self._due = 0
        self._threshold = 1
        self._reading = False
        self._moved = 0
        self._since_turn = 0
        self._next = memoryview(bytearray(1))
        self._begun = False
        self._mark = (self._loop.time(), 0)

    async def handshake(self) -> None:
        """TLS's own greeting; nothing without TLS.

        Raises:
            OSError: the peer speaks something else.
        """
        if isinstance(self.sock, ssl.SSLSocket):
            shake = self.sock.do_handshake

            def step() -> int:
                shake()
                return 1

            await self._attempt(step)

    async def read(self, *views: memoryview) -> None:
        """Fill all of ``views``, one after the other.

        Raises:
            EOFError: the peer ended before that.
            OSError: the connection broke.
        """
        left = last_first(views)
        if self._begun and left:
            left[-1][0] = self._next[0]
            take_out(left, 1)
            self._begun = False
        while left:
            try:
                got = self._receive_some(left)
            except BlockingIOError:
                await self._readable(left)
                return
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as wants:
                await self._wanted(wants)
                continue
            await self.took(got)  # a fast peer may never let the socket run dry

    async def read_along(self, view: memoryview) -> None:
        """Fill ``view``; if the first byte of what follows is there, `begun` doesn't wait for it.

        Raises:
            EOFError, OSError: as `read`.
        """
        got = 0
        if view.nbytes and not self._tls:
            with contextlib.suppress(*_WANTS):
                got = self.sock.recvmsg_into([view, self._next])[0]
                if not got:
                    raise EOFError
            self._moved += got
        self._begun = got > view.nbytes
        if got < view.nbytes:
            await self.read(view[got:])

    async def begun(self) -> None:
        """Wait for the first byte of what comes next, which `read` puts where it belongs.

        Raises:
            EOFError, OSError: as `read`.
        """
        if not self._begun:
            await self.read(self._next)
            self._begun = True

    async def drain(self, nbytes: int, scratch: memoryview) -> None:
        """Read ``nbytes`` that nobody wants.

        Raises:
            EOFError, OSError: as `read`.
        """
        while nbytes > 0:
            length = min(nbytes, len(scratch))
            await self.read(scratch[:length])
            nbytes -= length

    async def took(self, nbytes: int) -> None:
        """So many bytes came, on any way; after some, others have their turn."""
        self._moved += nbytes
        self._since_turn += nbytes
        if self._since_turn >= _YIELD_BYTES:
            self._since_turn = 0
            await asyncio.sleep(0)

    async def read_first(self, view: memoryview) -> None:
        """Fill ``view``, waiting for its first byte as long as it takes; keeps descriptors.

        Raises:
            EOFError, OSError: as `read`.
        """
        self.idle = True
        if self._passes_descriptors:
            got = await self._attempt(lambda: self._recv_with_fds(view))
        else:
            got = await self._attempt(lambda: self.sock.recv_into(view))
        self.idle = not got  # one that ends between messages breaks nothing
        self._mark = (self._loop.time(), self._moved)
        if not got:
            raise EOFError
        await self.read(view[got:])

    async def write(self, views: Sequence[memoryview | bytes]) -> None:
        """Send all of ``views``.

        Raises:
            OSError: the connection broke.
        """
        left = last_first(views)
        while left:
            sent = _now(lambda: self._send_some(left))
            if isinstance(sent, BlockingIOError):
                await self._writable(left)
            elif isinstance(sent, OSError):
                await self._wanted(sent)

    async def write_with_fd(self, data: bytes, fd: int) -> None:
        """Send a short message with a descriptor."""
        while isinstance(sent := _now(lambda: socket.send_fds(self.sock, [data], [fd])), OSError):
            await self._writable()  # never with TLS, which might have to read first
        await self.write([data[sent:]])

    def is_stalled(self, stall_s: float) -> bool:
        """Whether a message is under way and hasn't moved for ``stall_s``. Asked now and then."""
        now = self._loop.time()
        since, moved = self._mark
        if self.idle or self._moved - moved >= MIN_PROGRESS_BYTES:
            self._mark = (now, self._moved)
            return False
        return now - since > stall_s

    def drop_fds(self) -> None:
        """Close the descriptors that came."""
        fds, self.received_fds = self.received_fds, []
        for fd in fds:
            os.close(fd)

    def close(self) -> None:
        """End it. Whoever waits must be cancelled before."""
        self.drop_fds()
        if self._reading:
            self._loop.remove_reader(self._fd)
            self._reading = False
        with contextlib.suppress(OSError):
            self.sock.close()

    # -- waiting ---------------------------------------------------------------------------

    def _recv_with_fds(self, view: memoryview) -> int:
        data, fds, flags, _ = socket.recv_fds(
            self.sock, view.nbytes, MAX_FDS, socket.MSG_CMSG_CLOEXEC
        )
        self.received_fds += fds
        if flags & socket.MSG_CTRUNC:
            self.lost_fds = True
        view[: len(data)] = data
        return len(data)

    async def _attempt(self, call: Callable[[], int]) -> int:
        while isinstance(done := _now(call), OSError):
            await self._wanted(done)
        return done

    def _send_some(self, left: list[memoryview]) -> int:
        """Send the beginning of ``left``, which is last in it, and take it out."""
        if self._tls:
            sent = self.sock.send(left[-1][:_RECORDS_BYTES])
        else:
            sent = self.sock.sendmsg(next_of(left))
        self._moved += sent
        take_out(left, sent)
        return sent

    def _receive_some(self, left: list[memoryview]) -> int:
        """Fill the beginning of ``left``, which is last in it, and take it out.

        Raises:
            EOFError: the peer ended.
        """
        if self._tls or len(left) == 1:
            got = self.sock.recv_into(left[-1])
        else:
            got = self.sock.recvmsg_into(next_of(left))[0]
        if not got:
            raise EOFError
        take_out(left, got)
        return got

    async def _wanted(self, wants: OSError) -> None:
        if isinstance(wants, ssl.SSLWantWriteError):
            await self._writable()
        else:
            await self._readable()

    async def _readable(self, rest: list[memoryview] | None = None) -> None:
        """Wait until there is something to read, or until all of ``rest`` is filled, last first.

        Raises:
            EOFError, OSError: as `read`, with ``rest``.
        """
        future = self._reader = self._loop.create_future()
        self._rest = rest
        self._due = sum(view.nbytes for view in rest) if rest else 0
        self._set_threshold()
        if not self._reading:
            self._loop.add_reader(self._fd, self._on_readable)
            self._reading = True
        self._since_turn = 0
        try:
            await future
        finally:
            self._reader = self._rest = None
            self._due = 0
            self._set_threshold()

    def _set_threshold(self) -> None:
        """Let the kernel wake this loop when so much is there, as long as more than that comes."""
        threshold = WAKE_BYTES if self._due >= 2 * WAKE_BYTES and not self._tls else 1
        if threshold != self._threshold:
            wake_from(self.sock, threshold)
            self._threshold = threshold

    def _on_readable(self) -> None:
        # Stays registered between reads, and fills what is waited for by itself: while a value
        # streams in, that saves two system calls and a turn of the loop for each of its parts.
        future = self._reader
        if future is None:
            self._loop.remove_reader(self._fd)
            self._reading = False
        elif not future.done() and (self._rest is None or self._fill(self._rest, future)):
            future.set_result(None)

    def _fill(self, rest: list[memoryview], future: asyncio.Future[None]) -> bool:
        """Read into ``rest`` once; whether it is full."""
        try:
            got = self._receive_some(rest)
        except BlockingIOError:
            return False
        except (OSError, EOFError) as error:
            future.set_exception(error)
            return False
        self._moved += got
        self._due -= got
        self._set_threshold()
        return not rest

    async def _writable(self, left: list[memoryview] | None = None) -> None:
        """Wait until something can be sent, or until all of ``left`` is.

        Raises:
            OSError: the connection broke, with ``left``.
        """
        future: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_writer(self._fd, self._on_writable, left, future)
        try:
            await future
        finally:
            self._loop.remove_writer(self._fd)

    def _on_writable(self, left: list[memoryview] | None, future: asyncio.Future[None]) -> None:
        if future.done():
            return
        try:
            if left:
                self._send_some(left)
        except BlockingIOError:
            return
        except OSError as error:
            future.set_exception(error)
            return
        if not left:
            future.set_result(None)


def _now(call: Callable[[], int]) -> int | OSError:
    """What ``call`` answers, or what it waits for."""
    try:
        return call()
    except _WANTS as wants:
        return wants
