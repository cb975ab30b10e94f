"""RESP2, with bulk replies read straight into the caller's memory.

redis-py reads a reply through its parser into a new object, which costs most of the bandwidth
(``bench/redis_store.py`` has the figures). Here a command's large arguments are sent from where
they lie, and a bulk reply's bytes are received where they belong; only the short lines between them
pass through a buffer of this module.

Everything a server says is bounded before it is believed: lines, bulk lengths, the number of
elements and their nesting. A reply that makes no sense raises `ProtocolError`, and the connection
is worthless.

`Wire` has the protocol and is awaited; how bytes come and go is its subclasses' business:
`blocking` has the one for threads, which never suspends, and `looping` the one for an event loop.

Knows the protocol. Knows nothing about sockets, keys, chunks or how a connection came about.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final, Union

from lmcache_core import BackendError, BackendTimeout, BackendUnavailable

MAX_LINE: Final = 64 << 10
MAX_SMALL_BULK: Final = 1 << 20
MAX_ELEMENTS: Final = 1 << 20
MAX_DEPTH: Final = 4
MAX_BULK: Final = 512 << 20
"""Redis's own limit on one string (``proto-max-bulk-len``)."""

_BUFFER_BYTES = 16 << 10
_AHEAD_OF_BULK = 64
"""How much may be received along with a bulk reply's first line; it is copied once more."""


class ProtocolError(BackendError):
    """What came isn't RESP2, or isn't an answer to what was asked."""


class ReplyError(Exception):
    """The server's error reply, such as ``OOM command not allowed …``."""

    @property
    def code(self) -> str:
        """Its first word, such as ``OOM``, ``MOVED`` or ``READONLY``."""
        return str(self).partition(" ")[0]


Reply = Union[int, bytes, None, ReplyError, "list[Reply]"]


def command(*arguments: bytes) -> bytes:
    """One command whose arguments are all short."""
    return b"*%d\r\n" % len(arguments) + b"".join(
        b"$%d\r\n%b\r\n" % (len(one), one) for one in arguments
    )


def commands(verb: bytes, names: Sequence[bytes]) -> bytes:
    """The same command about each of ``names``, in a row."""
    start = b"*2\r\n$%d\r\n%b\r\n$" % (len(verb), verb)
    return b"".join([b"%b%d\r\n%b\r\n" % (start, len(name), name) for name in names])


class Wire(ABC):
    """One connection during one call. Not thread-safe.

    Every method may raise `BackendTimeout`, `BackendUnavailable` or `ProtocolError`; after that,
    and after an error reply, the connection must not be used again. ``broken`` says so.
    """

    def __init__(self, peer: str, *, idle_s: float) -> None:
        self.peer = peer
        self.broken = False
        self._idle_s = idle_s
        """How long the server may be silent."""
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0

    @property
    def at_rest(self) -> bool:
        """Whether every byte that came was part of a reply, and none of an error."""
        return not self.broken and self._start == self._end

    @abstractmethod
    async def send(self, parts: Sequence[bytes | memoryview]) -> None:
        """Send ``parts`` one after the other, from where they lie."""

    @abstractmethod
    async def _receive(self, into: memoryview, *, whole: bool = False) -> int:
        """Receive something into ``into``; ``whole``: there is no use in less than all of it."""

    # -- reading bulk replies --------------------------------------------------------------

    async def bulk_length(self) -> int | None:
        """The length of the bulk reply that comes next; ``None`` for nil.

        Raises:
            ReplyError: the server answered with an error instead.
        """
        line = await self._line(_AHEAD_OF_BULK)
        if line[:1] == b"-":
            raise self._refusal(line)
        if line[:1] != b"$":
            raise self._nonsense(f"{line[:40]!r} where a bulk reply was expected")
        return self._length(line, MAX_BULK)

    async def read_into(self, target: memoryview) -> None:
        """Receive exactly ``target.nbytes`` bytes of a bulk reply."""
        done = min(target.nbytes, self._end - self._start)
        target[:done] = self._view[self._start : self._start + done]
        self._start += done
        while done < target.nbytes:
            done += await self._receive(target[done:], whole=True)

    async def take(self, count: int) -> bytes:
        """The next ``count`` bytes of a bulk reply; for a few."""
        if count <= self._end - self._start:  # as usual
            self._start += count
            return bytes(self._view[self._start - count : self._start])
        taken = bytearray(count)
        with memoryview(taken) as view:
            await self.read_into(view)
        return bytes(taken)

    async def skip(self, count: int) -> None:
        """Receive and forget ``count`` bytes of a bulk reply."""
        scratch = memoryview(bytearray(min(count, 256 << 10)))
        while count:
            part = scratch[: min(count, scratch.nbytes)]
            await self.read_into(part)
            count -= part.nbytes

    async def end_bulk(self) -> None:
        """The line break after a bulk reply's bytes, and with it the next reply's first line."""
        while self._end - self._start < 2:
            with self._room(_AHEAD_OF_BULK) as into:
                self._end += await self._receive(into)
        if self._buffer[self._start : self._start + 2] != b"\r\n":
            raise self._nonsense("a bulk reply longer than it said")
        self._start += 2

    # -- reading everything else -----------------------------------------------------------

    async def reply(self) -> Reply:
        """Any reply whose strings are short. Error replies are returned, not raised."""
        return await self._reply(MAX_DEPTH, [MAX_ELEMENTS])

    async def came(self, expected: bytes) -> bool:
        """Whether the next replies are ``expected`` to the byte; only then they are read.

        Waits for as many bytes and is woken once: for the usual answer to several commands, where
        no other one is shorter. Of more than fits into the buffer it says no.
        """
        if len(expected) > _BUFFER_BYTES:
            return False
        while (missing := self._start + len(expected) - self._end) > 0:
            with self._room(missing) as into:
                self._end += await self._receive(into, whole=True)
        if not self._buffer.startswith(expected, self._start):
            return False
        self._start += len(expected)
        return True

    async def integers(self, count: int) -> list[int]:
        """``count`` integer replies, faster than one by one.

        Raises:
            ReplyError: one of them is an error.
        """
        found: list[int] = []
        while len(found) < count:
            first = await self._line(_BUFFER_BYTES)
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

    async def _reply(self, depth: int, elements: list[int]) -> Reply:
        line = await self._line(_BUFFER_BYTES)
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
            text = await self.take(length)
            await self.end_bulk()
            return text
        if kind == b"*":
            length = self._length(line, MAX_ELEMENTS)
            if length is None:
                return None
            elements[0] -= length
            if not depth or elements[0] < 0:
                raise self._nonsense("a reply that is nested too deeply or has too many elements")
            return [await self._reply(depth - 1, elements) for _ in range(length)]
        raise self._nonsense(f"{line[:40]!r}")

    # -- inside ----------------------------------------------------------------------------

    async def _line(self, ahead: int) -> bytes:
        """The next line without its end; ``ahead`` bytes at the most are received at a time."""
        searched = self._start
        while (end := self._buffer.find(b"\r\n", searched, self._end)) < 0:
            if self._end - self._start > MAX_LINE:
                raise self._nonsense("a line without an end")
            searched = max(self._start, self._end - 1) - self._start
            with self._room(ahead) as into:
                self._end += await self._receive(into)
        line = bytes(self._view[self._start : end])
        self._start = end + 2
        return line

    def _room(self, ahead: int) -> memoryview:
        """Where the next ``ahead`` bytes go, or some of them.

        What is unread is moved to the front; lines longer than the buffer double it.
        """
        unread = self._end - self._start
        if self._start:
            self._buffer[:unread] = self._buffer[self._start : self._end]
            self._start, self._end = 0, unread
        if unread == len(self._buffer):
            self._view.release()
            self._buffer.extend(bytes(unread))
            self._view = memoryview(self._buffer)
        return self._view[self._end : self._end + ahead]

    def _lost(self, error: OSError) -> BackendError:
        self.broken = True
        return BackendUnavailable(f"the connection to {self.peer} broke: {error}")

    def _ended(self) -> BackendError:
        self.broken = True
        return BackendUnavailable(f"{self.peer} closed the connection")

    def _silent(self) -> BackendTimeout:
        self.broken = True
        return BackendTimeout(f"{self.peer} was silent for {self._idle_s:g} s (timeout_s)")

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
