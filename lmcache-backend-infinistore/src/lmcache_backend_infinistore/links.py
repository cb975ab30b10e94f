"""Connections to an InfiniStore server, through its own client library.

Knows the library: what it calls things, what it raises, what it mustn't be asked. Its calls have no
time-outs; a read over TCP of a key that isn't there never ends, and one from a server that dies at
the wrong moment ends this process. And what a server of 0.2.35 must not be asked, because it ends:
to read or delete a key whose value somebody is still sending over TCP, or was when he died. Such a
key exists; so values that go over TCP get a mark at last, which nobody reads. Over RDMA a key
exists when its value has arrived. Knows nothing about chunks.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

from lmcache_backend_infinistore.config import InfinistoreConfig
from lmcache_core.errors import BackendError, BackendUnavailable
from lmcache_core.storage import StoreOutcome

logger = logging.getLogger(__name__)

VALUES: Final = 16
"""How many a connection moves in one call: their heads have room in its memory."""
_PROBE: Final = "lmcache:probe"
_MARK: Final = ":complete"
"""How the name of a value's mark ends, where it has one."""


class Block(NamedTuple):
    """What one key of InfiniStore holds, and where in this process's memory it goes."""

    name: str
    address: int
    nbytes: int


class Parts(NamedTuple):
    """What is stored of one value: pieces, then the head, whose name is that of the value."""

    pieces: Sequence[Block]
    head: Block


class Link(ABC):
    """One connection, used by one call at a time.

    ``heads`` is room for the heads of `VALUES` values, at ``heads_address``: each ``head_bytes``.
    """

    head_bytes: int

    @abstractmethod
    def read_heads(self, blocks: Sequence[Block]) -> list[bool]:
        """Read heads; says for each if it was there, and its value complete."""

    @abstractmethod
    def read_pieces(self, blocks: Sequence[Block]) -> list[bool]:
        """Read what heads name; says for each if it was there."""

    @abstractmethod
    def store(self, values: Sequence[Parts]) -> list[StoreOutcome]:
        """Store what isn't there. Of a value for which there was no room, nothing stays."""

    def __init__(self, module: Any, config: InfinistoreConfig, **options: Any) -> None:
        self._module = module
        self._config = config
        self._options = options
        self._client: Any = None
        self._mark = _MARK if config.connection_type == module.TYPE_TCP else ""
        pages = mmap.mmap(-1, VALUES * self.head_bytes)
        self.heads = memoryview(pages)
        self.heads_address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        self._connect()

    def exists(self, name: str) -> bool:
        """Whether the value ``name`` is there, and complete."""
        return self._there(name + self._mark)

    def forget(self, name: str, pieces: Sequence[str]) -> bool:
        """Forget a value; answer if it was there. If it wasn't, its pieces stay, too."""
        if not self._delete([name + self._mark]):
            return False
        self._delete([name, *pieces] if self._mark else pieces)
        return True

    def probe(self) -> None:
        """Fail now if the server is gone: the calls that move values would hang or crash."""
        self._there(_PROBE)

    def close(self) -> None:
        """Idempotent; nothing may be under way."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _there(self, key: str) -> bool:
        return bool(self._client.check_exist(key))

    def _delete(self, keys: Sequence[str]) -> int:
        return int(self._client.delete_keys(list(keys))) if keys else 0

    def _connect(self) -> None:
        config = self._config
        host, port = config.address
        place = f"{host}:{port}"
        with reached(host, port, config.connect_timeout_s) as first:
            address = first.getpeername()[0]
        client = self._module.InfinityConnection(
            self._module.ClientConfig(
                host_addr=address, service_port=port, log_level=config.log_level, **self._options
            )
        )
        try:
            client.connect()
        except Exception as error:
            client.close()
            raise BackendUnavailable(f"InfiniStore at {place} refuses us: {error}") from error
        self._client = client


class TcpLink(Link):
    """Values travel over the socket, and are copied by the library.

    Heads are large, because small values are slow: the server sends a length and the value in two
    segments, and the second waits 40 ms for an acknowledgement of the first unless it is full.
    """

    head_bytes = 64 << 10

    def __init__(self, module: Any, config: InfinistoreConfig) -> None:
        super().__init__(module, config, connection_type=module.TYPE_TCP)

    def read_heads(self, blocks: Sequence[Block]) -> list[bool]:
        found = []
        for block in blocks:
            mark = block.name + self._mark
            if self._both_there(mark, block.name):
                found.append(self._read_now(block))
            else:
                found.append(False)
            if not found[-1] and self._there(mark):
                self._delete([mark])  # the head was evicted before it
        return found

    def read_pieces(self, blocks: Sequence[Block]) -> list[bool]:
        return [self._read(block) for block in blocks]

    def store(self, values: Sequence[Parts]) -> list[StoreOutcome]:
        outcomes: list[StoreOutcome] = []
        # Usually none is there: so one is asked about, and the others only if it is. A value that
        # is there all the same is noticed before its head is written.
        some = bool(values) and self.exists(values[0].head.name)
        for i, value in enumerate(values):
            if some and (not i or self.exists(value.head.name)):
                outcomes.append(StoreOutcome.ALREADY_PRESENT)
            elif StoreOutcome.NOT_ADMITTED in outcomes:
                # What there is no room for leaves none for the rest either.
                outcomes.append(StoreOutcome.NOT_ADMITTED)
            else:
                outcomes.append(self._store(value))
        return outcomes

    def _both_there(self, first: str, second: str) -> bool:
        """Whether both keys are there, in one round trip where they are.

        The server finds the last of a list of keys that it has, and halves the list for that: of
        three it looks at the second and the third. One that looked at all would say the same.
        """
        try:
            return int(self._client.get_match_last_index([first, first, second])) == 2
        except Exception as error:  # noqa: BLE001 - that is also how it says that it has none
            logger.debug("lookup of %s: %s", second, error)
            return self._there(first) and self._there(second)

    def _read(self, block: Block) -> bool:
        # A read of what isn't there never comes back.
        return self._there(block.name) and self._read_now(block)

    def _read_now(self, block: Block) -> bool:
        found = self._client.tcp_read_cache(block.name)
        if found.nbytes != block.nbytes:
            return False
        ctypes.memmove(block.address, found.ctypes.data, block.nbytes)
        return True

    def _store(self, value: Parts) -> StoreOutcome:
        stored: list[str] = []
        mark = Block(value.head.name + self._mark, value.head.address, 1)
        try:
            for block in (*value.pieces, value.head, mark):
                if block is value.head and self._there(mark.name):
                    # Another one was faster, and its head may be read at any moment: it mustn't be
                    # written again.
                    self._delete(stored)
                    return StoreOutcome.ALREADY_PRESENT
                self._client.tcp_write_cache(block.name, block.address, block.nbytes)
                stored.append(block.name)
        except Exception as error:  # noqa: BLE001 - the library raises nothing more precise
            # No room or no server: the same exception. No room spoils the connection, too.
            logger.debug("write of %s: %s", value.head.name, error)
            self.close()
            self._connect()
            self._delete(stored)
            return StoreOutcome.NOT_ADMITTED
        return StoreOutcome.STORED


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
            BackendUnavailable: the client library failed, whatever it raised.
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
                raise BackendUnavailable(f"InfiniStore's client: {error}") from error
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


def reached(host: str, port: int, timeout_s: float) -> socket.socket:
    """A connection to a server, over IPv4; the library knows no names and no time-outs.

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
