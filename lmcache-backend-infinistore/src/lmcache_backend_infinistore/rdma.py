"""RDMA to an InfiniStore server: registered memory, and requests that wait for no other.

The server does the requests of one connection one after the other, in the order in which they came.
So a caller that asks for more before it waits costs no round trip. Requests go to the client's
``conn``, which says from a thread of its own when one is done: its coroutines do that, too, but
wake an event loop first, which takes as long as to read a head. Knows nothing about chunks.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress, islice
from queue import SimpleQueue
from typing import Any, Final

from lmcache_backend_infinistore import devices
from lmcache_backend_infinistore.config import InfinistoreConfig
from lmcache_backend_infinistore.links import PROBE, Link, Parts
from lmcache_backend_infinistore.wire import DONE, MISSING, NO_ROOM, Block, Pending
from lmcache_core import BackendRejected, BackendUnavailable, HostRegion, StoreOutcome

_REQUEST_BYTES: Final = 32 << 20
"""In one request. The server evicts before a request if it is 95 % full, so one must need less than
the other 5 %."""
_REQUEST_BLOCKS: Final = 128
_UNDER_WAY: Final = 8
"""Requests at the same time: enough that none waits for an answer, few for the client's buffers."""
_ALIGNED: Final = 64
_HEARD_S: Final = 1.0
"""How long an answer counts while our own connection is there. It could outlive the client's, if
something between here and the server ends those that do nothing."""


class _Request:
    """One request under way, until the server's answer is known."""

    def __init__(self) -> None:
        self._codes: SimpleQueue[int] = SimpleQueue()
        self._code: int | None = None

    def answered(self, code: int) -> None:
        """For the client's thread."""
        self._codes.put(code)

    def wait(self) -> int:
        """The server's answer; without a time-out, as nothing of the client has one."""
        if self._code is None:
            self._code = self._codes.get()
        return self._code


class RdmaLink(Link):
    """The server reads and writes registered memory: that of chunks, of heads, a staging area."""

    def __init__(
        self,
        module: Any,
        config: InfinistoreConfig,
        device: str,
        region: HostRegion | None,
    ) -> None:
        link: str = config.link_type
        if link == "auto":
            link = devices.link_type(device, config.ib_port) or module.LINK_IB
        super().__init__(config)
        self._module = module
        self._client: Any = None
        self._under_way: list[_Request] = []
        self._staging = mmap.mmap(-1, config.staging_bytes)
        self._staged = ctypes.addressof(ctypes.c_char.from_buffer(self._staging))
        self._registered = [(self.heads_address, self.heads.nbytes)]
        if region is not None:
            self._registered.append((region.address, region.nbytes))
        self._heard_at = -math.inf
        try:
            self._connect(device, link)
            for address, nbytes in [(self._staged, config.staging_bytes), *self._registered]:
                self._register(address, nbytes)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        # No time-out: as long as the server may still write to our memory, a call isn't over.
        while self._under_way:
            self._under_way.pop().wait()
        super().close()
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def probe(self) -> None:
        # Requests have no time-out, so who is there is asked before. What the server has just said
        # holds while the system knows of no end: that closes what a program had open.
        if time.monotonic() - self._heard_at > _HEARD_S or self._wire.ended():
            self._client.check_exist(PROBE)
            self._heard_at = time.monotonic()

    def read_heads(self, blocks: Sequence[Block]) -> list[bool]:
        self.probe()
        return self._begin(blocks, write=False)()

    def read_pieces(self, blocks: Sequence[Block]) -> Pending:
        return self._begin(blocks, write=False)

    def store(self, names: Sequence[str], values: Iterable[Parts]) -> list[StoreOutcome]:
        self.probe()
        asked = self._wire.ask(names)
        values = list(values)
        present = asked()
        new = [value for value, there in zip(values, present, strict=True) if not there]
        # The server does the second request after the first.
        pieces = self._begin([piece for value in new for piece in value.pieces], write=True)
        heads = self._begin([value.head for value in new], write=True)

        arrived, visible = iter(pieces()), iter(heads())
        return [
            StoreOutcome.ALREADY_PRESENT
            if there
            else self._outcome(value, [*islice(arrived, len(value.pieces)), next(visible)])
            for value, there in zip(values, present, strict=True)
        ]

    def _outcome(self, value: Parts, arrived: list[bool]) -> StoreOutcome:
        if all(arrived):
            return StoreOutcome.STORED
        self._wire.delete(
            [*compress((block.name for block in (*value.pieces, value.head)), arrived)]
        )
        return StoreOutcome.NOT_ADMITTED

    def _connect(self, device: str, link: str) -> None:
        config, module = self._config, self._module
        host, port = config.address
        client = module.InfinityConnection(
            module.ClientConfig(
                host_addr=self._wire.address,
                service_port=port,
                log_level=config.log_level,
                connection_type=module.TYPE_RDMA,
                dev_name=device,
                ib_port=config.ib_port,
                link_type=link,
            )
        )
        try:
            client.connect()
        except Exception as error:
            client.close()
            raise BackendUnavailable(f"InfiniStore at {host}:{port} refuses us: {error}") from error
        self._client = client

    def _register(self, address: int, nbytes: int) -> None:
        try:
            self._client.register_mr(address, nbytes)
        except Exception as error:
            raise BackendRejected(
                f"InfiniStore's client can't register {nbytes / 2**30:.1f} GiB of host memory "
                f"({error}); `ulimit -l` has to allow that much for each of `connections`"
            ) from error

    def _begin(self, blocks: Sequence[Block], *, write: bool) -> Pending:
        answers = [False] * len(blocks)
        started: list[tuple[list[int], list[Block], _Request]] = []
        for positions, base in self._requests(blocks):
            part = [blocks[i] for i in positions]
            if base is None:
                for i, answer in zip(positions, self._staged_now(part, write=write), strict=True):
                    answers[i] = answer
            else:
                places = [(block.name, block.address - base) for block in part]
                request = self._started(places, part[0].nbytes, base, write=write)
                started.append((positions, part, request))

        def finish() -> list[bool]:
            for positions, part, request in started:
                done = self._done(request)
                found = [True] * len(part) if done else self._again(part, write=write)
                for i, answer in zip(positions, found, strict=True):
                    answers[i] = answer
            return answers

        return finish

    def _requests(self, blocks: Sequence[Block]) -> Iterator[tuple[list[int], int | None]]:
        """Positions of blocks for one request: of one length, in one kind of memory.

        With the base of that memory; ``None`` for what has to be staged.
        """
        alike: dict[tuple[int, int | None], list[int]] = defaultdict(list)
        for position, block in enumerate(blocks):
            alike[block.nbytes, self._base(block)].append(position)
        for (nbytes, base), positions in alike.items():
            room = min(_REQUEST_BYTES, len(self._staging)) if base is None else _REQUEST_BYTES
            most = max(1, min(_REQUEST_BLOCKS, room // _aligned(nbytes)))
            for first in range(0, len(positions), most):
                yield positions[first : first + most], base

    def _base(self, block: Block) -> int | None:
        for address, nbytes in self._registered:
            if address <= block.address and block.address + block.nbytes <= address + nbytes:
                return address
        return None

    def _staged_now(self, blocks: list[Block], *, write: bool) -> list[bool]:
        """One request through the staging area, which is one request's at a time."""
        nbytes = blocks[0].nbytes
        places = [(block.name, i * _aligned(nbytes)) for i, block in enumerate(blocks)]
        if write:
            for block, (_, offset) in zip(blocks, places, strict=True):
                ctypes.memmove(self._staged + offset, block.address, nbytes)
        if not self._done(self._started(places, nbytes, self._staged, write=write)):
            return self._again(blocks, write=write)
        if not write:
            for block, (_, offset) in zip(blocks, places, strict=True):
                ctypes.memmove(block.address, self._staged + offset, nbytes)
        return [True] * len(blocks)

    def _again(self, blocks: list[Block], *, write: bool) -> list[bool]:
        """What one request couldn't do for all of them, in smaller ones."""
        if len(blocks) == 1:
            return [False]
        if not write:  # some are missing; it isn't said which
            there = self._wire.exist([block.name for block in blocks])
            if not all(there):
                left = iter(self._begin(list(compress(blocks, there)), write=False)())
                return [one and next(left) for one in there]
            return [answer for one in blocks for answer in self._begin([one], write=False)()]
        half = len(blocks) // 2
        first = self._begin(blocks[:half], write=True)()
        # What there is no room for leaves none for the rest either.
        if not all(first):
            return first + [False] * (len(blocks) - half)
        return first + self._begin(blocks[half:], write=True)()

    def _started(
        self, places: list[tuple[str, int]], nbytes: int, base: int, *, write: bool
    ) -> _Request:
        while len(self._under_way) >= _UNDER_WAY:
            self._under_way.pop(0).wait()
        connection = self._client.conn
        ask = connection.w_rdma_async if write else connection.r_rdma_async
        names, offsets = zip(*places, strict=True)
        request = _Request()
        code = ask(names, offsets, nbytes, base, request.answered)
        if code < 0:
            raise BackendUnavailable(f"a request of {len(names)} keys can't be sent ({code})")
        self._under_way.append(request)
        return request

    def _done(self, request: _Request) -> bool:
        """Wait for a request; false if a key is missing, or there is no room."""
        code = request.wait()
        if request in self._under_way:
            self._under_way.remove(request)
        if code not in (DONE, MISSING, NO_ROOM):
            raise BackendUnavailable(f"the server answers a request with {code}")
        self._heard_at = time.monotonic()
        return code == DONE


def _aligned(nbytes: int) -> int:
    """Copies between memory that is aligned differently take twice as long."""
    return -(-nbytes // _ALIGNED) * _ALIGNED


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
