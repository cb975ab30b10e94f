"""Connections to an InfiniStore server over the client library: blocks in and out of memory.

Knows what the library must never be asked: nothing after ``close``, no read over TCP of a key that
may not be there, nothing on a connection that failed once. What it may still do, hang or crash when
the server dies at the wrong moment, is why this runs in a process of its own. Knows nothing about
chunks.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import logging
import socket
import threading
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from lmcache_backend_infinistore import devices
from lmcache_backend_infinistore.config import InfinistoreConfig
from lmcache_core.errors import BackendError, BackendRejected, BackendUnavailable
from lmcache_core.storage import HostRegion

logger = logging.getLogger(__name__)

INSTALL: Final = (
    "pip install infinistore uvloop==0.21.0 (there are wheels for Python 3.10 to 3.12; without "
    "CUDA, install a CPU build of torch first, or pip fetches CUDA's libraries)"
)
_REQUEST_BYTES: Final = 32 << 20
"""In one RDMA request. The server evicts before a request if it is 95 % full, so one must need
less than the other 5 %."""
_REQUEST_BLOCKS: Final = 128
_NO_SPACE: Final = "ret = 507"
_PROBE: Final = "lmcache:probe"


def library() -> Any:
    """The module ``infinistore``.

    Raises:
        BackendRejected: it isn't there, or can't be loaded; says what to install.
    """
    try:
        return importlib.import_module("infinistore")
    except ModuleNotFoundError as error:
        raise BackendRejected(
            f"InfiniStore's client isn't installed ({error}): {INSTALL}"
        ) from error
    except ImportError as error:
        remedy = "apt-get install libibverbs1" if "ibverbs" in str(error) else INSTALL
        raise BackendRejected(
            f"InfiniStore's client can't be loaded ({error}): {remedy}"
        ) from error


@dataclass(frozen=True)
class Block:
    """What one key of InfiniStore holds, and where in this process's memory it goes."""

    name: str
    address: int
    nbytes: int


class Link(ABC):
    """One connection, used by one call at a time."""

    @abstractmethod
    def read(self, blocks: Sequence[Block]) -> list[bool]:
        """Fill ``blocks``; say for each if it was there, in its length."""

    @abstractmethod
    def write(self, blocks: Sequence[Block]) -> list[bool]:
        """Store ``blocks``; say for each if there was room."""

    def __init__(self, module: Any, config: InfinistoreConfig, **options: Any) -> None:
        self._module = module
        self._config = config
        self._options = options
        self._client: Any = None
        self._connect()

    def exists(self, name: str) -> bool:
        return bool(self._client.check_exist(name))

    def probe(self) -> None:
        """Fail now if the server is gone: the calls that move values would hang or crash."""
        self.exists(_PROBE)

    def delete(self, names: Sequence[str]) -> int:
        """Forget ``names``; answer how many there were."""
        return int(self._client.delete_keys(list(names))) if names else 0

    def close(self) -> None:
        """Idempotent; nothing may be under way."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _connect(self) -> None:
        config = self._config
        host, port = config.address
        place = f"{host}:{port}"
        address = _reached(host, port, config.connect_timeout_s)
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
    """Values travel over the socket, and are copied by the library."""

    def __init__(self, module: Any, config: InfinistoreConfig) -> None:
        super().__init__(module, config, connection_type=module.TYPE_TCP)

    def read(self, blocks: Sequence[Block]) -> list[bool]:
        return [self._read_one(block) for block in blocks]

    def write(self, blocks: Sequence[Block]) -> list[bool]:
        done = 0
        try:
            for block in blocks:
                self._client.tcp_write_cache(block.name, block.address, block.nbytes)
                done += 1
        except Exception as error:  # noqa: BLE001 - the library raises nothing more precise
            # No room or no server: the same exception. No room spoils the connection, too.
            logger.debug("write of %s: %s", blocks[done].name, error)
            self.close()
            self._connect()
        return [True] * done + [False] * (len(blocks) - done)

    def _read_one(self, block: Block) -> bool:
        # A read of what isn't there never comes back.
        if not self.exists(block.name):
            return False
        found = self._client.tcp_read_cache(block.name)
        if found.nbytes != block.nbytes:
            return False
        ctypes.memmove(block.address, found.ctypes.data, block.nbytes)
        return True


class RdmaLink(Link):
    """The server reads and writes registered memory: that of chunks, and a staging area."""

    def __init__(
        self, module: Any, config: InfinistoreConfig, device: str, region: HostRegion | None
    ) -> None:
        link: str = config.link_type
        if link == "auto":
            link = devices.link_type(device, config.ib_port) or module.LINK_IB
        super().__init__(
            module,
            config,
            connection_type=module.TYPE_RDMA,
            dev_name=device,
            ib_port=config.ib_port,
            link_type=link,
        )
        self._loop = asyncio.new_event_loop()
        self._staging = (ctypes.c_char * config.staging_bytes)()
        self._staged = ctypes.addressof(self._staging)
        self._region = (region.address, region.address + region.nbytes) if region else (0, 0)
        try:
            self._register(self._staged, config.staging_bytes)
            if region is not None:
                self._register(region.address, region.nbytes)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        super().close()
        self._loop.close()

    def read(self, blocks: Sequence[Block]) -> list[bool]:
        return self._in_requests(blocks, self._read_request)

    def write(self, blocks: Sequence[Block]) -> list[bool]:
        return self._in_requests(blocks, self._write_request)

    def _register(self, address: int, nbytes: int) -> None:
        try:
            self._client.register_mr(address, nbytes)
        except Exception as error:
            raise BackendRejected(
                f"InfiniStore's client can't register {nbytes / 2**30:.1f} GiB of host memory "
                f"({error}); `ulimit -l` has to allow that much for each of `connections`"
            ) from error

    def _in_requests(
        self, blocks: Sequence[Block], ask: Callable[[list[Block]], list[bool]]
    ) -> list[bool]:
        """``ask`` about all blocks, many of one length and kind of memory at a time."""
        alike: dict[tuple[int, bool], list[int]] = defaultdict(list)
        for position, block in enumerate(blocks):
            alike[block.nbytes, self._is_registered(block)].append(position)
        answers = [False] * len(blocks)
        for (nbytes, registered), positions in alike.items():
            room = _REQUEST_BYTES if registered else min(_REQUEST_BYTES, len(self._staging))
            most = max(1, min(_REQUEST_BLOCKS, room // nbytes))
            for first in range(0, len(positions), most):
                part = positions[first : first + most]
                for position, answer in zip(part, ask([blocks[i] for i in part]), strict=True):
                    answers[position] = answer
        return answers

    def _read_request(self, blocks: list[Block]) -> list[bool]:
        base, places = self._places(blocks)
        call = self._client.rdma_read_cache_async(places, blocks[0].nbytes, base)
        try:
            self._wait(call)
        except self._module.InfiniStoreKeyNotFound:
            # One of them is missing; it doesn't say which.
            if len(blocks) == 1:
                return [False]
            return [found for one in blocks for found in self._read_request([one])]
        if base == self._staged:
            for block, (_, offset) in zip(blocks, places, strict=True):
                ctypes.memmove(block.address, base + offset, block.nbytes)
        return [True] * len(blocks)

    def _write_request(self, blocks: list[Block]) -> list[bool]:
        base, places = self._places(blocks)
        if base == self._staged:
            for block, (_, offset) in zip(blocks, places, strict=True):
                ctypes.memmove(base + offset, block.address, block.nbytes)
        try:
            self._wait(self._client.rdma_write_cache_async(places, blocks[0].nbytes, base))
        except Exception as error:
            if _NO_SPACE not in str(error):
                raise
            if len(blocks) == 1:
                return [False]
            half = len(blocks) // 2
            first = self._write_request(blocks[:half])
            # What there is no room for leaves none for the rest either.
            rest = len(blocks) - half
            return first + (self._write_request(blocks[half:]) if all(first) else [False] * rest)
        return [True] * len(blocks)

    def _places(self, blocks: list[Block]) -> tuple[int, list[tuple[str, int]]]:
        """The registered memory of a request, and where in it each block goes."""
        if self._is_registered(blocks[0]):
            base = self._region[0]
            return base, [(block.name, block.address - base) for block in blocks]
        nbytes = blocks[0].nbytes
        return self._staged, [(block.name, i * nbytes) for i, block in enumerate(blocks)]

    def _is_registered(self, block: Block) -> bool:
        start, end = self._region
        return start <= block.address and block.address + block.nbytes <= end

    def _wait(self, call: Coroutine[Any, Any, Any]) -> None:
        # No time-out: as long as the server may still write to our memory, the call isn't over.
        self._loop.run_until_complete(call)


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


def chosen_device(config: InfinistoreConfig) -> str:
    """The RDMA device to use.

    Raises:
        BackendRejected: there is none, or not the one that is configured.
    """
    there = devices.names()
    if not there:
        raise BackendRejected(
            "this machine has no RDMA device (`ibv_devices` shows them); values can travel over "
            "TCP instead: connection_type: TCP"
        )
    if config.device is None:
        return there[0]
    if config.device not in there:
        raise BackendRejected(
            f"device: this machine has no RDMA device {config.device!r}; it has {', '.join(there)}"
        )
    return config.device


def _reached(host: str, port: int, timeout_s: float) -> str:
    """The IPv4 address at which a server listens; the library knows no names and no time-outs.

    Raises:
        BackendUnavailable: there is none.
    """
    try:
        found = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)
        address = str(found[0][4][0])
        with socket.create_connection((address, port), timeout_s):
            return address
    except OSError as error:
        raise BackendUnavailable(
            f"InfiniStore at {host}:{port} can't be reached: {error}"
        ) from error
