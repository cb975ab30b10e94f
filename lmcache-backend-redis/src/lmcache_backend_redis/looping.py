"""A `Wire` that is awaited on an event loop: no thread is woken on the way there and back.

For plain sockets and calls of a few MiB: bytes are copied on the loop's thread, at most a socket's
buffer in one go, and what is awaited is filled by the loop's callback, straight into the caller's
memory. Once a wait has ended, by a reply, an error or a cancellation, nothing here knows that
memory any more.

Knows sockets, the loop and time limits. Knows nothing about what is said.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Sequence
from typing import Final

from lmcache_backend_redis.resp import Wire
from lmcache_core import last_first, next_of, take_out

_RECEIVES_A_TURN: Final = 16
"""After so many that needn't have waited, others have their turn: a fast server may never let the
socket run dry."""


class LoopWire(Wire):
    """One connection during many calls, one after the other, each with a `begin`.

    ``idle_s``: how long the server may be silent.
    """

    def __init__(self, sock: socket.socket, peer: str, *, idle_s: float) -> None:
        super().__init__(peer, idle_s=idle_s)
        sock.setblocking(False)
        self._sock = sock
        self._fd = sock.fileno()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._looks_at = self._until = self._moved_at = 0.0
        self._receives = 0
        self._registered = False
        self._waits: asyncio.Future[None] | None = None
        self._into: memoryview | None = None
        """What is being filled; ``None`` while nobody reads."""
        self._whole = False
        self._got = 0

    def begin(self, until: float) -> None:
        """A call begins on the running loop; ``until``: when it must be over, monotonic."""
        self._loop = asyncio.get_running_loop()
        self._until = until
        self._receives = 0

    def leave(self) -> None:
        """Let go of the loop; before the socket is closed, and on the loop."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._unregister()

    def is_quiet(self) -> bool:
        """Whether the connection stands, and nobody said anything between two calls."""
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    async def send(self, parts: Sequence[bytes | memoryview]) -> None:
        left = last_first(parts)
        try:
            while left:
                self._send_some(left)
        except BlockingIOError:
            await self._sent(left)
        except OSError as error:
            raise self._lost(error) from error

    def _send_some(self, left: list[memoryview]) -> None:
        take_out(left, self._sock.sendmsg(next_of(left)))

    async def _receive(self, into: memoryview, *, whole: bool = False) -> int:
        self._receives += 1
        if self._receives > _RECEIVES_A_TURN:
            self._receives = 0
            await asyncio.sleep(0)
            if time.monotonic() >= self._until:
                raise self._late()
        try:
            got = self._sock.recv_into(into)
        except BlockingIOError:
            return await self._filled(into, whole)
        except OSError as error:
            raise self._lost(error) from error
        if not got:
            raise self._ended()
        if whole and got < into.nbytes:
            got += await self._filled(into[got:], whole)
        return got

    # -- waiting ---------------------------------------------------------------------------

    async def _filled(self, into: memoryview, whole: bool) -> int:
        """Wait until something is in ``into``, or all of it; answer how much."""
        if not self._registered:
            self._running.add_reader(self._fd, self._on_readable)
            self._registered = True
        self._into, self._whole, self._got = into, whole, 0
        try:
            await self._wait()
        finally:
            self._into = self._waits = None
        self._receives = 0
        return self._got

    def _on_readable(self) -> None:
        # Stays registered between reads and calls, and fills what is waited for by itself: that
        # saves two system calls and a turn of the loop for each part of a value.
        into, waits = self._into, self._waits
        if into is None or waits is None:
            self._unregister()  # too early, or the end of an idle connection
            return
        if waits.done():
            return
        try:
            got = self._sock.recv_into(into)
        except BlockingIOError:
            return
        except OSError as error:
            waits.set_exception(self._lost(error))
            return
        if not got:
            waits.set_exception(self._ended())
            return
        self._moved_at = time.monotonic()
        self._got += got
        if got == into.nbytes or not self._whole:
            waits.set_result(None)
        else:
            self._into = into[got:]

    async def _sent(self, left: list[memoryview]) -> None:
        """Wait until all of ``left`` is sent."""
        waits = self._wait()
        self._running.add_writer(self._fd, self._on_writable, left, waits)
        try:
            await waits
        finally:
            self._running.remove_writer(self._fd)
            self._waits = None

    def _on_writable(self, left: list[memoryview], waits: asyncio.Future[None]) -> None:
        if waits.done():
            return
        try:
            self._send_some(left)
        except BlockingIOError:
            return
        except OSError as error:
            waits.set_exception(self._lost(error))
            return
        self._moved_at = time.monotonic()
        if not left:
            waits.set_result(None)

    @property
    def _running(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            raise RuntimeError("no call has begun")
        return self._loop

    def _unregister(self) -> None:
        if self._registered and self._loop is not None:
            self._loop.remove_reader(self._fd)
            self._registered = False

    def _wait(self) -> asyncio.Future[None]:
        """What to await now; the server's time counts from here."""
        self._moved_at = time.monotonic()
        self._waits = self._running.create_future()
        if self._timer is None or self._looks_at > self._until:
            self._watch()
        return self._waits

    def _watch(self) -> None:
        """See whether time is up, and when to look again: seldom, however often a byte moves."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waits is None or self._waits.done():
            return  # whoever waits next looks again
        now = time.monotonic()
        self._looks_at = min(self._moved_at + self._idle_s, self._until)
        if self._looks_at > now:
            self._timer = self._running.call_later(self._looks_at - now, self._watch)
        else:
            self._waits.set_exception(self._late() if now >= self._until else self._silent())
