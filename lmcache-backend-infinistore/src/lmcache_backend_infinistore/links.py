"""Connections to an InfiniStore server, and in which order parts of values are asked for and sent.

Over RDMA a key exists when its value has arrived. Over TCP it exists before; so values that go that
way get a mark at last, which nobody reads, and nothing but the mark is asked about until it is
there: that is this module's promise to a server of 0.2.35. Knows nothing about chunks.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import compress
from typing import Final, NamedTuple

from lmcache_backend_infinistore.config import InfinistoreConfig
from lmcache_backend_infinistore.wire import Block, Pending, Wire
from lmcache_core import BackendError, BackendUnavailable, StoreOutcome

logger = logging.getLogger(__name__)

VALUES: Final = 16
"""How many a connection moves in one call: their heads have room in its memory."""
HEAD_BYTES: Final = 4 << 10
PROBE: Final = "lmcache:probe"
_MARK: Final = ":complete"
"""How the name of a value's mark ends, where it has one."""


class Parts(NamedTuple):
    """What is stored of one value: pieces, then the head, whose name is that of the value."""

    pieces: Sequence[Block]
    head: Block


class Link(ABC):
    """One connection, used by one call at a time.

    ``heads`` is room for the heads of `VALUES` values, at ``heads_address``: each `HEAD_BYTES`.
    """

    @abstractmethod
    def read_heads(self, blocks: Sequence[Block]) -> list[bool]:
        """Read heads; says for each if it was there, and its value complete."""

    @abstractmethod
    def read_pieces(self, blocks: Sequence[Block]) -> Pending:
        """Begin to read what heads name; says for each if it was there."""

    @abstractmethod
    def store(self, names: Sequence[str], values: Iterable[Parts]) -> list[StoreOutcome]:
        """Store what isn't there. Of a value for which there was no room, nothing stays.

        ``values``, one for each of ``names``, may be made as they are asked for: while the server
        looks for what it has, or receives those before.
        """

    def __init__(self, config: InfinistoreConfig) -> None:
        self._config = config
        self._mark = _MARK if config.connection_type == "TCP" else ""
        pages = mmap.mmap(-1, VALUES * HEAD_BYTES)
        self.heads = memoryview(pages)
        self.heads_address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        self._wire = Wire(*config.address, config.connect_timeout_s)

    def exist(self, names: Sequence[str]) -> list[bool]:
        """Whether each value is there, and complete."""
        return self._wire.exist([self._mark_of(name) for name in names])

    def forget(self, name: str, pieces: Sequence[str]) -> bool:
        """Forget a value; answer if it was there. If it wasn't, its pieces stay, too."""
        if not self._wire.delete([self._mark_of(name)]):
            return False
        self._wire.delete([name, *pieces] if self._mark else pieces)
        return True

    def probe(self) -> None:
        """Fail now if the server is gone, or is another one."""
        self._wire.exist([PROBE])

    def close(self) -> None:
        """Idempotent; nothing may be under way."""
        self._wire.close()

    def _mark_of(self, name: str) -> str:
        return name + self._mark


class TcpLink(Link):
    """Values travel over the connection itself, straight from and to their memory."""

    def read_heads(self, blocks: Sequence[Block]) -> list[bool]:
        complete = self.exist([block.name for block in blocks])
        found = [
            there and self._wire.get(block) for there, block in zip(complete, blocks, strict=True)
        ]
        # Those whose heads were evicted before them.
        self._wire.delete(
            [
                self._mark_of(block.name)
                for block, there, read in zip(blocks, complete, found, strict=True)
                if there and not read
            ]
        )
        return found

    def read_pieces(self, blocks: Sequence[Block]) -> Pending:
        found = [self._wire.get(block) for block in blocks]
        return lambda: found

    def store(self, names: Sequence[str], values: Iterable[Parts]) -> list[StoreOutcome]:
        present = self.exist(names)
        outcomes = {
            name: StoreOutcome.ALREADY_PRESENT if there else StoreOutcome.NOT_ADMITTED
            for name, there in zip(names, present, strict=True)
        }
        new: list[Parts] = []
        stored: list[str] = []

        def pieces() -> Iterator[Block]:
            for value, there in zip(values, present, strict=True):
                if not there:
                    new.append(value)
                    yield from value.pieces

        there = self._put(pieces(), stored, lambda: [self._mark_of(one.head.name) for one in new])
        # What there was no room for leaves none for what came after it.
        arrived = set(stored)
        whole = [one for one in new if arrived.issuperset(piece.name for piece in one.pieces)]
        # A head that is there may be read at any moment, and mustn't be written again.
        ready = [value.head.name for value in whole]
        late = set(compress(ready, self.exist(ready) if there is None else there))
        heads = [value.head for value in whole if value.head.name not in late]
        # All heads before the first mark: so they are written soon after the question.
        self._put(
            [*heads, *(Block(self._mark_of(one.name), one.address, 1) for one in heads)], stored
        )
        arrived = set(stored)
        left: list[str] = []
        for value in new:
            name = value.head.name
            if self._mark_of(name) in arrived:
                outcomes[name] = StoreOutcome.STORED
            else:
                left += [part.name for part in (*value.pieces, value.head) if part.name in arrived]
                if name in late:
                    outcomes[name] = StoreOutcome.ALREADY_PRESENT
        self._wire.delete(left)
        return list(outcomes.values())

    def _put(
        self,
        blocks: Iterable[Block],
        stored: list[str],
        then_ask: Callable[[], Sequence[str]] = tuple,
    ) -> list[bool] | None:
        """Store blocks, and say which keys are there then; ``None`` if there was no room for all.

        ``stored`` gets the names of the blocks that were.
        """
        answer: Pending | None = None
        try:
            confirmed = self._wire.put(blocks, stored)
            with suppress(OSError):  # what was answered before can still be read
                answer = self._wire.ask(then_ask())
            if confirmed() and answer is not None:
                return answer()
        except OSError as error:
            # No room and no server look the same, once the server has closed the connection.
            logger.debug("store: %s", error)
        self._wire.close()
        self._wire = Wire(*self._config.address, self._config.connect_timeout_s)
        return None


class Links:
    """Connections of one kind: opened when needed, lent to one call, closed if that fails."""

    def __init__(self, connect: Callable[[], Link], most: int) -> None:
        self._connect = connect
        self._turns = threading.BoundedSemaphore(most)
        self._lock = threading.Lock()
        self._idle: list[Link] = []
        self._closed = False

    @contextmanager
    def lend(self) -> Iterator[Link]:
        """A connection for one call.

        Raises:
            BackendUnavailable: the connection or the client library failed, whatever it raised.
        """
        with self._turns:
            link = self._take()
            try:
                yield link
            except BaseException as error:
                link.close()
                self._drop_idle()  # the same has happened to them
                if isinstance(error, BackendError) or not isinstance(error, Exception):
                    raise
                raise BackendUnavailable(f"InfiniStore: {error}") from error
            self._give_back(link)

    def close(self) -> None:
        """Close what isn't lent now, and the rest when it comes back."""
        with self._lock:
            self._closed = True
        self._drop_idle()

    def _take(self) -> Link:
        with self._lock:
            if self._closed:
                raise BackendUnavailable("the backend isn't open")
            if self._idle:
                return self._idle.pop()
        return self._connect()

    def _give_back(self, link: Link) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(link)
                return
        link.close()

    def _drop_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for link in idle:
            link.close()
