"""RESP2 over a connected socket, with bulk replies read straight into the caller's memory.

redis-py reads a reply through its parser into a new object, which costs most of the bandwidth
(``bench/redis_store.py`` has the figures). Here a command's large arguments are sent from where
they lie, and a bulk reply's bytes are received where they belong; only the short lines between them
pass through a buffer of this module.

Everything a server says is bounded before it is believed: lines, bulk lengths, the number of
elements and their nesting. A reply that makes no sense raises `ProtocolError`, and the connection
is worthless.

Knows the protocol and time limits. Knows nothing about keys, chunks or how a connection came about.
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections.abc import Sequence
from typing import Final, Protocol, Union

from lmcache_core.errors import BackendError, BackendTimeout, BackendUnavailable

MAX_LINE: Final = 64 << 10
MAX_SMALL_BULK: Final = 1 << 20
MAX_ELEMENTS: Final = 1 << 20
MAX_DEPTH: Final = 4
MAX_BULK: Final = 512 << 20
"""Redis's own limit on one string (``proto-max-bulk-len``)."""

_BUFFER_BYTES = 16 << 10
_AHEAD_OF_BULK = 64
"""How much may be received along with a bulk reply's first line; it is copied once more."""
_TIMEVAL = struct.Struct("@ll")
_PARTS_PER_CALL = 256  # below IOV_MAX, which is 1024 on Linux


class ProtocolError(BackendError):
    """What came isn't RESP2, or isn't an answer to what was asked."""


class ReplyError(Exception):
    """The server's error reply, such as ``OOM command not allowed …``."""

    @property
    def code(self) -> str:
        """Its first word, such as ``OOM``, ``MOVED`` or ``READONLY``."""
        return str(self).partition(" ")[0]


Reply = Union[int, bytes, None, ReplyError, "list[Reply]"]


class Socket(Protocol):
    """What this module needs of `socket.socket` and `ssl.SSLSocket`."""

    def settimeout(self, timeout: float | None, /) -> None: ...
    def setsockopt(self, level: int, option: int, value: bytes, /) -> None: ...
    def recv_into(self, buffer: memoryview, nbytes: int = 0, flags: int = 0, /) -> int: ...
    def send(self, data: memoryview, /) -> int: ...
    def sendmsg(self, buffers: Sequence[memoryview], /) -> int: ...


def command(*arguments: bytes) -> bytes:
    """One command whose arguments are all short."""
    return b"*%d\r\n" % len(arguments) + b"".join(
        b"$%d\r\n%b\r\n" % (len(one), one) for one in arguments
    )


def commands(verb: bytes, names: Sequence[bytes]) -> bytes:
    """The same command about each of ``names``, in a row."""
    start = b"*2\r\n$%d\r\n%b\r\n$" % (len(verb), verb)
    return b"".join([b"%b%d\r\n%b\r\n" % (start, len(name), name) for name in names])


class Wire:
    """One connection during one call. Not thread-safe.

    ``idle_s``: how long the server may be silent; ``until``: when all of it must be over, on the
    monotonic clock. Every method may raise `BackendTimeout`, `BackendUnavailable` or
    `ProtocolError`; after that, and after an error reply, the connection must not be used again.
    ``broken`` says so.
    """

    def __init__(self, sock: Socket, peer: str, *, idle_s: float, until: float) -> None:
        self.peer = peer
        self.broken = False
        self._sock = sock
        self._idle_s = idle_s
        self._until = until
        # The kernel then waits until a buffer is full, and wakes this thread once instead of for
        # every segment; it can also send many buffers at once. TLS does neither.
        self._plain = not isinstance(sock, ssl.SSLSocket)
        self._wait_all = socket.MSG_WAITALL if self._plain else 0
        self._limit_s = 0.0
        if self._plain:
            sock.settimeout(None)  # SO_RCVTIMEO and SO_SNDTIMEO are for blocking sockets
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0

    # -- sending ---------------------------------------------------------------------------

    def send(self, parts: Sequence[bytes | memoryview]) -> None:
        """Send ``parts`` one after the other, from where they lie."""
        left = [memoryview(part) for part in parts if len(part)]
        left.reverse()
        while left:
            sent = self._send_some(left)
            while left and sent >= left[-1].nbytes:
                sent -= left.pop().nbytes
            if sent:
                left[-1] = left[-1][sent:]

    def _send_some(self, left: list[memoryview]) -> int:
        self._limit()
        try:
            if self._plain:
                return self._sock.sendmsg(left[: -_PARTS_PER_CALL - 1 : -1])
            return self._sock.send(left[-1])
        except OSError as error:
            raise self._lost(error) from error

    # -- reading bulk replies --------------------------------------------------------------

    def bulk_length(self) -> int | None:
        """The length of the bulk reply that comes next; ``None`` for nil.

        Raises:
            ReplyError: the server answered with an error instead.
        """
        line = self._line(_AHEAD_OF_BULK)
        if line[:1] == b"-":
            raise self._refusal(line)
        if line[:1] != b"$":
            raise self._nonsense(f"{line[:40]!r} where a bulk reply was expected")
        return self._length(line, MAX_BULK)

    def read_into(self, target: memoryview) -> None:
        """Receive exactly ``target.nbytes`` bytes of a bulk reply."""
        done = min(target.nbytes, self._end - self._start)
        target[:done] = self._view[self._start : self._start + done]
        self._start += done
        while done < target.nbytes:
            done += self._receive(target[done:], self._wait_all)

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes of a bulk reply; for a few."""
        taken = bytearray(count)
        with memoryview(taken) as view:
            self.read_into(view)
        return bytes(taken)

    def skip(self, count: int) -> None:
        """Receive and forget ``count`` bytes of a bulk reply."""
        scratch = memoryview(bytearray(min(count, 256 << 10)))
        while count:
            part = scratch[: min(count, scratch.nbytes)]
            self.read_into(part)
            count -= part.nbytes

    def end_bulk(self) -> None:
        """The line break after a bulk reply's bytes, and with it the next reply's first line."""
        while self._end - self._start < 2:
            self._fill(_AHEAD_OF_BULK)
        if self._buffer[self._start : self._start + 2] != b"\r\n":
            raise self._nonsense("a bulk reply longer than it said")
        self._start += 2

    # -- reading everything else -----------------------------------------------------------

    def reply(self) -> Reply:
        """Any reply whose strings are short. Error replies are returned, not raised."""
        return self._reply(MAX_DEPTH, [MAX_ELEMENTS])

    def came(self, expected: bytes) -> bool:
        """Whether the next replies are ``expected`` to the byte; only then they are read.

        Waits for as many bytes and is woken once: for the usual answer to several commands, where
        no other one is shorter. Of more than fits into the buffer it says no.
        """
        if len(expected) > _BUFFER_BYTES:
            return False
        self._make_room()
        while (missing := self._start + len(expected) - self._end) > 0:
            into = self._view[self._end : self._end + missing]
            self._end += self._receive(into, self._wait_all)
        if not self._buffer.startswith(expected, self._start):
            return False
        self._start += len(expected)
        return True

    def integers(self, count: int) -> list[int]:
        """``count`` integer replies, faster than one by one.

        Raises:
            ReplyError: one of them is an error.
        """
        found: list[int] = []
        while len(found) < count:
            first = self._line(_BUFFER_BYTES)
            end = self._buffer.rfind(b"\r\n", self._start, self._end)
            lines = [first]
            if end >= 0 and len(found) + 1 < count:
                rest = bytes(self._view[self._start : end]).split(b"\r\n")
                lines += rest[: count - len(found) - 1]
                self._start += sum(map(len, lines)) - len(first) + 2 * (len(lines) - 1)
            for line in lines:
                if line[:1] == b"-":
                    raise self._refusal(line)
                if line[:1] != b":":
                    raise self._nonsense(f"{line[:40]!r} where a number was expected")
                found.append(self._number(line))
        return found

    def _reply(self, depth: int, elements: list[int]) -> Reply:
        line = self._line(_BUFFER_BYTES)
        kind = line[:1]
        if kind == b"+":
            return line[1:]
        if kind == b"-":
            return self._refusal(line)
        if kind == b":":
            return self._number(line)
        if kind == b"$":
            length = self._length(line, MAX_SMALL_BULK)
            if length is None:
                return None
            text = self.take(length)
            self.end_bulk()
            return text
        if kind == b"*":
            length = self._length(line, MAX_ELEMENTS)
            if length is None:
                return None
            elements[0] -= length
            if not depth or elements[0] < 0:
                raise self._nonsense("a reply that is nested too deeply or has too many elements")
            return [self._reply(depth - 1, elements) for _ in range(length)]
        raise self._nonsense(f"{line[:40]!r}")

    # -- inside ----------------------------------------------------------------------------

    def _line(self, ahead: int) -> bytes:
        """The next line without its end; ``ahead`` bytes at the most are received at a time."""
        searched = self._start
        while (end := self._buffer.find(b"\r\n", searched, self._end)) < 0:
            if self._end - self._start > MAX_LINE:
                raise self._nonsense("a line without an end")
            searched = max(self._start, self._end - 1) - self._start
            self._fill(ahead)
        line = bytes(self._view[self._start : end])
        self._start = end + 2
        return line

    def _fill(self, ahead: int) -> None:
        """Receive what is there, ``ahead`` bytes at the most."""
        self._make_room()
        self._end += self._receive(self._view[self._end : self._end + ahead])

    def _make_room(self) -> None:
        """Move what is unread to the front; lines longer than the buffer double it."""
        unread = self._end - self._start
        if self._start:
            self._buffer[:unread] = self._buffer[self._start : self._end]
            self._start, self._end = 0, unread
        if unread == len(self._buffer):
            self._view.release()
            self._buffer.extend(bytes(unread))
            self._view = memoryview(self._buffer)

    def _receive(self, into: memoryview, flags: int = 0) -> int:
        self._limit()
        try:
            got = self._sock.recv_into(into, 0, flags)
        except OSError as error:
            raise self._lost(error) from error
        if not got:
            self.broken = True
            raise BackendUnavailable(f"{self.peer} closed the connection")
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

    def _lost(self, error: OSError) -> BackendError:
        self.broken = True
        if isinstance(error, (TimeoutError, BlockingIOError)):
            if self._limit_s < self._idle_s:
                return self._late()
            return BackendTimeout(f"{self.peer} was silent for {self._idle_s:g} s (timeout_s)")
        return BackendUnavailable(f"the connection to {self.peer} broke: {error}")

    def _late(self) -> BackendTimeout:
        self.broken = True
        return BackendTimeout(f"{self.peer} didn't finish in time (call_timeout_s)")

    def _refusal(self, line: bytes) -> ReplyError:
        self.broken = True
        return ReplyError(line[1:].decode("utf-8", "replace"))

    def _nonsense(self, what: str) -> ProtocolError:
        self.broken = True
        return ProtocolError(f"{self.peer} answered with {what}; is it a Redis or Valkey server?")

    def _number(self, line: bytes) -> int:
        digits = line[2:] if line[1:2] == b"-" else line[1:]
        if not digits.isdigit() or len(digits) > 19:
            raise self._nonsense(f"{line[:40]!r}, which has no number")
        return int(line[1:])

    def _length(self, line: bytes, most: int) -> int | None:
        length = self._number(line)
        if length == -1:
            return None
        if not 0 <= length <= most:
            raise self._nonsense(f"a length of {length}")
        return length
