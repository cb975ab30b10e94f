"""One connection of the ``tcp`` channel: whole messages out of and into many pieces of memory.

Pieces are handed to the kernel as they are, some hundreds in one call, and not copied before.
Knows when the other end makes no progress. Knows nothing about what messages say.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Sequence

from lmcache_core.aio.pieces import last_first, next_of, take_out
from lmcache_core.aio.stream import PlainStream, Stream
from lmcache_core.errors import BackendTimeout


class Line:
    """A stream with whole reads and writes. One thread at a time; `shutdown` from any."""

    def __init__(self, stream: Stream, where: str, stall_timeout_s: float) -> None:
        self.where = where
        """For messages."""
        self._stream = stream
        self.stall_timeout_s = stall_timeout_s
        self._down = False

    def fill(self, views: Sequence[memoryview], *, patient: bool = False) -> None:
        """Fill ``views`` one after the other; ``patient``: however long the first byte takes.

        Raises:
            EOFError: the connection ended before that, or `shutdown` was called.
            BackendTimeout: nothing moved for a while.
            OSError: the connection broke.
        """
        self._move(views, self._stream.receive, patient)

    def send(self, views: Sequence[memoryview]) -> None:
        """Send ``views`` one after the other.

        Raises:
            EOFError, BackendTimeout, OSError: as `fill`.
        """
        self._move(views, self._stream.send, False)

    def idle(self) -> bool:
        """Whether it is still there, with nothing to read: fit for another request."""
        stream = self._stream
        if not isinstance(stream, PlainStream):
            return not self._down
        try:
            stream.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return not self._down
        except OSError:
            return False
        return False

    def shutdown(self) -> None:
        """Wake whoever reads or writes, with an error. Idempotent."""
        self._down = True
        self._stream.shutdown()

    def close(self) -> None:
        """Give the descriptor back, once nobody uses it."""
        self._down = True
        self._stream.close()

    def _move(
        self,
        views: Sequence[memoryview],
        some: Callable[[Sequence[memoryview]], int],
        patient: bool,
    ) -> None:
        left, moved_at = last_first(views), time.monotonic()
        while left:
            try:
                moved = some(next_of(left))
            except BlockingIOError:  # a tick
                quiet_s = time.monotonic() - moved_at
                if not patient and quiet_s > self.stall_timeout_s and not self._down:
                    raise BackendTimeout(
                        f"{self.where}: nothing moved for {quiet_s:.0f} s"
                    ) from None
                moved = -1
            if not moved or self._down:
                raise EOFError
            if moved < 0:
                continue
            moved_at, patient = time.monotonic(), False
            take_out(left, moved)


def pieces(region: memoryview, places: Sequence[tuple[int, int]]) -> list[memoryview]:
    """``region`` at ``places``, each an offset and a length; neighbours in one piece."""
    return [region[start:end] for start, end in _joined(places)]


def _joined(places: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    start = end = 0
    for offset, nbytes in places:
        if offset == end:
            end += nbytes
            continue
        if end > start:
            yield start, end
        start, end = offset, offset + nbytes
    if end > start:
        yield start, end
