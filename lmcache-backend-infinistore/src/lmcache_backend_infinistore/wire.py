"""The protocol that an InfiniStore server of 0.2.35 speaks over TCP, and a connection to one.

    request     magic, operation, length of the body; the body; to put, then the value
    answer      a code, 200 if it was done; then a number, or for a value its length and itself

A body is a name, or a table of flatbuffers. The client library speaks it, too, but doesn't answer
every failure with an error, copies what it receives, and waits for each answer before it asks for
more. Here, questions are asked together, and values are
sent while earlier ones haven't been confirmed, if they have far to go; the server answers in order.
Values are received one at a time, because a server that is asked for the next one sends both at
once. What may be asked when is `links`' business.
"""

from __future__ import annotations

import ctypes
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple, TypeAlias

from lmcache_core import IOV_MAX, BackendUnavailable, last_first, next_of, take_out

_HEADER: Final = struct.Struct("<IcI")
_MAGIC: Final = 0xDEADBEEF
_EXISTS: Final = b"C"
_DELETE: Final = b"X"
_VALUE: Final = b"L"
_PUT: Final = b"P"
_GET: Final = b"G"

_ROOT: Final = struct.Struct("<I2x")
"""Where a flatbuffer's table is; what describes it follows."""
_VALUE_TABLE: Final = struct.Struct("<5HI3xcII")
"""Where its fields are; operation, name (which comes next), length of the value."""
_NAMES_TABLE: Final = struct.Struct("<3HII")
"""Where its field is; the list of names (which comes next)."""

_ANSWER: Final = struct.Struct("<II")
_WORD: Final = struct.Struct("<I")
DONE: Final = 200
MISSING: Final = 404
NO_ROOM: Final = 507

_TOGETHER: Final = 128
"""Questions that are asked before an answer is read."""
_AHEAD_BYTES: Final = 2 << 20
"""What may be on its way, unconfirmed, when the next value is sent: enough for the server never to
wait for us. To a server on this machine nothing is: no time is lost on a way."""
_LOCAL_BUFFER: Final = 208 << 10
"""What a socket holds on one machine, so that the server copies from a cache what we copied there;
what Linux allows everybody. How much is on a longer way, it finds out by itself."""
_AT_ONCE: Final = 256 << 10
"""Less than this is sent together with what comes after it."""
_DRAINED: Final = 1 << 20
_ACKNOWLEDGE: Final = (socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
"""Before each read: the server holds a small segment back until the one before is acknowledged,
which Linux delays by 40 ms, unless it was told so just before."""
_CLOSED: Final = "the server has closed the connection"

Pending: TypeAlias = Callable[[], list[bool]]
"""What was begun: waits for it, and answers for each. It has to be called."""


class Block(NamedTuple):
    """What one key of InfiniStore holds, and where in this process's memory it goes."""

    name: str
    address: int
    nbytes: int


class Wire:
    """One connection, used by one call at a time; of no use any more after an error."""

    def __init__(self, host: str, port: int, timeout_s: float) -> None:
        self._socket = reached(host, port, timeout_s)
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.address: str = self._socket.getpeername()[0]
        local = self.address == self._socket.getsockname()[0]
        if local:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LOCAL_BUFFER)
        self._ahead_bytes = 0 if local else _AHEAD_BYTES
        self._answers = bytearray()  # to `put`, that were read and not yet looked at

    def exist(self, keys: Sequence[str]) -> list[bool]:
        """Whether each key is there, if only in part."""
        parts = (keys[first : first + _TOGETHER] for first in range(0, len(keys), _TOGETHER))
        return [there for part in parts for there in self.ask(part)()]

    def ask(self, keys: Sequence[str]) -> Pending:
        """Begin what `exist` does, for a few keys; nothing else may be asked meanwhile."""
        self._socket.sendall(b"".join(_request(_EXISTS, key.encode()) for key in keys))

        def answered() -> list[bool]:
            answers = bytearray(len(keys) * _ANSWER.size)
            self._receive(memoryview(answers))
            found = []
            for code, absent in _ANSWER.iter_unpack(answers):
                _check(code)
                found.append(not absent)
            return found

        return answered

    def delete(self, keys: Sequence[str]) -> int:
        """Forget keys; how many were there."""
        if not keys:
            return 0
        self._socket.sendall(_request(_DELETE, _names(keys)))
        _check(self._number())
        return self._number()

    def put(self, blocks: Iterable[Block], stored: list[str]) -> Callable[[], bool]:
        """Send blocks to be stored, one after the other; the answer says if there was room for all.

        The last ones aren't confirmed before it is called for; something else may be asked first.
        ``stored`` gets the names of those that were, also when this raises. Without room, the
        server takes what was sent for requests, and closes the connection.
        """
        sent: deque[Block] = deque()
        unsent: list[bytes | memoryview] = []
        ahead = waiting = 0  # bytes: unconfirmed, and of these not yet sent

        def confirmed() -> bool:
            nonlocal ahead
            if not self._put_is_done(len(sent)):
                return False
            block = sent.popleft()
            stored.append(block.name)
            ahead -= block.nbytes
            return True

        def all_confirmed() -> bool:
            return all(confirmed() for _ in range(len(sent)))

        for block in blocks:
            while ahead - waiting > self._ahead_bytes:
                if not confirmed():
                    return lambda: False
            unsent += (_request(_VALUE, _value(_PUT, block.name, block.nbytes)), _memory(block))
            sent.append(block)
            ahead += block.nbytes
            waiting += block.nbytes
            if waiting >= _AT_ONCE or len(unsent) >= IOV_MAX:
                self._send(unsent)
                unsent, waiting = [], 0
        self._send(unsent)
        return all_confirmed

    def get(self, block: Block) -> bool:
        """Receive a value; false if it isn't there, or has another length."""
        self._socket.sendall(_request(_VALUE, _value(_GET, block.name, 0)))
        code = self._number()
        if code == MISSING:
            return False
        _check(code)
        nbytes = self._number()
        if nbytes == block.nbytes:
            self._receive(_memory(block))
            return True
        while nbytes:
            drained = bytearray(min(nbytes, _DRAINED))
            self._receive(memoryview(drained))
            nbytes -= len(drained)
        return False

    def ended(self) -> bool:
        """Whether the system knows that the other end is gone; nothing may be under way."""
        try:
            self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()

    def _put_is_done(self, expected: int) -> bool:
        """The next answer, of as many as are ``expected``."""
        while len(self._answers) < _WORD.size:
            self._socket.setsockopt(*_ACKNOWLEDGE)
            got = self._socket.recv(expected * _WORD.size - len(self._answers))
            if not got:
                raise ConnectionError(_CLOSED)
            self._answers += got
        (code,) = _WORD.unpack_from(self._answers)
        del self._answers[: _WORD.size]
        if code != NO_ROOM:
            _check(code)
        return bool(code == DONE)

    def _send(self, parts: Sequence[bytes | memoryview]) -> None:
        left = last_first(parts)
        while left:
            take_out(left, self._socket.sendmsg(next_of(left)))

    def _number(self) -> int:
        word = bytearray(_WORD.size)
        self._receive(memoryview(word))
        number: int = _WORD.unpack(word)[0]
        return number

    def _receive(self, into: memoryview) -> None:
        while into.nbytes:
            self._socket.setsockopt(*_ACKNOWLEDGE)
            got = self._socket.recv_into(into, into.nbytes, socket.MSG_WAITALL)
            if not got:
                raise ConnectionError(_CLOSED)
            into = into[got:]


def reached(host: str, port: int, timeout_s: float) -> socket.socket:
    """A connection to a server, over IPv4, as the client library's are.

    Raises:
        BackendUnavailable: there is none.
    """
    try:
        found = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)
        return socket.create_connection((str(found[0][4][0]), port), timeout_s)
    except OSError as error:
        raise BackendUnavailable(
            f"InfiniStore at {host}:{port} can't be reached: {error}"
        ) from error


def _check(code: int) -> None:
    if code != DONE:
        raise BackendUnavailable(f"the server answers with {code}")


def _memory(block: Block) -> memoryview:
    return memoryview((ctypes.c_char * block.nbytes).from_address(block.address)).cast("B")


def _request(operation: bytes, body: bytes) -> bytes:
    return _HEADER.pack(_MAGIC, operation, len(body)) + body


def _value(operation: bytes, name: str, nbytes: int) -> bytes:
    # The table is at 16, 10 behind what says where its fields are; the name is 8 behind the third.
    fields = _VALUE_TABLE.pack(10, 16, 8, 12, 7, 10, operation, 8, nbytes)
    return _ROOT.pack(16) + fields + _string(name)


def _names(names: Sequence[str]) -> bytes:
    strings = [_string(name) for name in names]
    words, at = [len(names)], 4 * len(names)
    for string in strings:
        words.append(at)  # counted from where this word is
        at += len(string) - 4
    table = _ROOT.pack(12) + _NAMES_TABLE.pack(6, 8, 4, 6, 4)
    return table + struct.pack(f"<{len(words)}I", *words) + b"".join(strings)


def _string(text: str) -> bytes:
    data = text.encode()
    return _WORD.pack(len(data)) + data + bytes(4 - len(data) % 4)
