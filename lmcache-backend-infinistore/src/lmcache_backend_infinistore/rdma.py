"""RDMA to an InfiniStore server: registered memory, and requests that wait for no other.

The server does the requests of one connection one after the other, in the order in which they came.
So a caller that asks for more before it waits costs no round trip. Knows nothing about chunks.
"""

from __future__ import annotations

import asyncio
import ctypes
import mmap
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator, Sequence
from itertools import compress, islice
from typing import Any, Final

from lmcache_backend_infinistore import devices
from lmcache_backend_infinistore.config import InfinistoreConfig
from lmcache_backend_infinistore.links import Block, Link, Parts
from lmcache_core.errors import BackendRejected
from lmcache_core.storage import HostRegion, StoreOutcome

_Pending = Callable[[], list[bool]]
"""Waits for what was begun, and answers for each block. It has to be called."""

_REQUEST_BYTES: Final = 32 << 20
"""In one request. The server evicts before a request if it is 95 % full, so one must need less than
the other 5 %."""
_REQUEST_BLOCKS: Final = 128
_UNDER_WAY: Final = 8
"""Requests at the same time: enough that none waits for an answer, few for the client's buffers."""
_ALIGNED: Final = 64
_NO_SPACE: Final = "ret = 507"


class RdmaLink(Link):
    """The server reads and writes registered memory: that of chunks, of heads, a staging area."""

    head_bytes = 4 << 10

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
        super().__init__(
            module,
            config,
            connection_type=module.TYPE_RDMA,
            dev_name=device,
            ib_port=config.ib_port,
            link_type=link,
        )
        self._loop = asyncio.new_event_loop()
        self._under_way: list[asyncio.Task[Any]] = []
        self._staging = mmap.mmap(-1, config.staging_bytes)
        self._staged = ctypes.addressof(ctypes.c_char.from_buffer(self._staging))
        self._registered = [(self.heads_address, self.heads.nbytes)]
        if region is not None:
            self._registered.append((region.address, region.nbytes))
        try:
            for address, nbytes in [(self._staged, config.staging_bytes), *self._registered]:
                self._register(address, nbytes)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._loop.is_closed():
            return
        # No time-out: as long as the server may still write to our memory, a call isn't over.
        for task in self._under_way:
            self._loop.run_until_complete(asyncio.wait([task]))
            task.exception()  # or asyncio complains that nobody asked
        super().close()
        self._loop.close()

    def read_heads(self, blocks: Sequence[Block]) -> list[bool]:
        self.probe()  # a server that is gone answers no request, and doesn't refuse one
        return self._begin(blocks, write=False)()

    def read_pieces(self, blocks: Sequence[Block]) -> list[bool]:
        return self._begin(blocks, write=False)()

    def store(self, values: Sequence[Parts]) -> list[StoreOutcome]:
        # Usually none is there: so one is asked about, and the others while they are on their way.
        present = [self.exists(value.head.name) for value in values[:1]]
        if any(present):
            present += [self.exists(value.head.name) for value in values[1:]]
        moved = [i for i in range(len(values)) if not any(present[i : i + 1])]
        pieces = self._begin([one for i in moved for one in values[i].pieces], write=True)
        present += [self.exists(value.head.name) for value in values[len(present) :]]
        new = [i for i, there in enumerate(present) if not there]
        heads = self._begin([values[i].head for i in new], write=True)

        arrived: list[list[bool]] = [[] for _ in values]
        answers = iter(pieces())
        for i in moved:
            arrived[i] = list(islice(answers, len(values[i].pieces)))
        for i, head in zip(new, heads(), strict=True):
            arrived[i].append(head)
        return [self._outcome(*one) for one in zip(values, present, arrived, strict=True)]

    def _outcome(self, value: Parts, present: bool, arrived: list[bool]) -> StoreOutcome:
        if not present and all(arrived):
            return StoreOutcome.STORED
        blocks = zip((*value.pieces, value.head), arrived, strict=False)
        self._delete([block.name for block, there in blocks if there])
        return StoreOutcome.ALREADY_PRESENT if present else StoreOutcome.NOT_ADMITTED

    def _register(self, address: int, nbytes: int) -> None:
        try:
            self._client.register_mr(address, nbytes)
        except Exception as error:
            raise BackendRejected(
                f"InfiniStore's client can't register {nbytes / 2**30:.1f} GiB of host memory "
                f"({error}); `ulimit -l` has to allow that much for each of `connections`"
            ) from error

    def _begin(self, blocks: Sequence[Block], *, write: bool) -> _Pending:
        answers = [False] * len(blocks)
        started: list[tuple[list[int], list[Block], asyncio.Task[Any]]] = []
        for positions, base in self._requests(blocks):
            part = [blocks[i] for i in positions]
            if base is None:
                for i, answer in zip(positions, self._staged_now(part, write=write), strict=True):
                    answers[i] = answer
            else:
                places = [(block.name, block.address - base) for block in part]
                task = self._started(places, part[0].nbytes, base, write=write)
                started.append((positions, part, task))

        def finish() -> list[bool]:
            for positions, part, task in started:
                done = self._done(task)
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
            there = [self._there(block.name) for block in blocks]
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
    ) -> asyncio.Task[Any]:
        while len(self._under_way) >= _UNDER_WAY:
            self._loop.run_until_complete(asyncio.wait(self._under_way[:1]))
            del self._under_way[0]
        ask = self._client.rdma_write_cache_async if write else self._client.rdma_read_cache_async
        call: Coroutine[Any, Any, Any] = ask(places, nbytes, base)
        task = self._loop.create_task(call)
        self._under_way.append(task)
        self._loop.run_until_complete(asyncio.sleep(0))  # so that it is on its way
        return task

    def _done(self, task: asyncio.Task[Any]) -> bool:
        """Wait for a request; false if a key is missing, or there is no room."""
        try:
            self._loop.run_until_complete(task)
        except self._module.InfiniStoreKeyNotFound:
            return False
        except Exception as error:
            if _NO_SPACE not in str(error):
                raise
            return False
        finally:
            if task in self._under_way:
                self._under_way.remove(task)
        return True


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
