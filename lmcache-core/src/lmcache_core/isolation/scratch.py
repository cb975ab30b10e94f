"""Shared memory for values that don't lie in the host arena, such as compressed frames.

Knows ranges of one bounded region, who waits for one, and copies to and from
it. Knows nothing about why somebody keeps a range for long.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections import deque
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Any

from lmcache_core.contracts.storage import MISS, HostRegion
from lmcache_core.isolation.wire import SCRATCH, Place
from lmcache_core.memory.host_memory import PAGE_BYTES, address_of
from lmcache_core.memory.leases import Lease, Ledger
from lmcache_core.metrics import Counters


class Extent:
    """A range of the region that belongs to one call until it is released. A lease.

    As a context manager it is released at the end, but for a call that is cancelled: whoever works
    for it may still be at it, and then nobody else gets the range any more.
    """

    __slots__ = ("_lease", "nbytes", "start")

    def __init__(self, start: int, nbytes: int, lease: Lease) -> None:
        self.start = start
        self.nbytes = nbytes
        self._lease = lease

    def release(self) -> None:
        """Give it back; nobody may touch the range any more.

        Raises:
            LeaseError: that was done before.
        """
        self._lease.release()

    def __enter__(self) -> Extent:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, asyncio.CancelledError):
            self._lease.abandon()
        else:
            self._lease.release()


class Scratch:
    """Hands out ranges, first come first served. Lives on one event loop.

    The lowest range that is long enough is taken, so that memory beyond what is really used at one
    time is never touched, and costs nothing.
    """

    def __init__(self, region: HostRegion, counters: Counters) -> None:
        self.region = region
        self.leases = Ledger("scratch memory", counters)
        self._free = [(0, region.nbytes)]
        self._waiting: deque[tuple[int, asyncio.Future[Extent]]] = deque()

    async def take(self, nbytes: int) -> Extent:
        """A range of at least ``nbytes``, which are rounded up to whole pages; may have to wait.

        Raises:
            ValueError: the region is smaller than that.
        """
        nbytes = rounded(nbytes)
        if nbytes > self.region.nbytes:
            raise ValueError(f"{nbytes} bytes of scratch memory: there are {self.region.nbytes}")
        extent = None if self._waiting else self._cut(nbytes)
        if extent is not None:
            return extent
        turn: asyncio.Future[Extent] = asyncio.get_running_loop().create_future()
        self._waiting.append((nbytes, turn))
        try:
            return await turn
        except BaseException:
            if not turn.cancel() and not turn.cancelled():  # it came at the same moment
                turn.result().release()
            raise

    def _give_back(self, start: int, nbytes: int) -> None:
        merged: list[tuple[int, int]] = []
        for one in sorted([*self._free, (start, nbytes)]):
            if merged and sum(merged[-1]) == one[0]:
                merged[-1] = merged[-1][0], merged[-1][1] + one[1]
            else:
                merged.append(one)
        self._free = merged
        while self._waiting:
            wanted, turn = self._waiting[0]
            if not turn.done():
                found = self._cut(wanted)
                if found is None:
                    return
                turn.set_result(found)
            self._waiting.popleft()

    def _cut(self, nbytes: int) -> Extent | None:
        for index, (start, room) in enumerate(self._free):
            if room >= nbytes:
                rest = (start + nbytes, room - nbytes)
                self._free[index : index + 1] = [rest] if rest[1] else []
                end = partial(self._give_back, start, nbytes)
                return Extent(start, nbytes, self.leases.lease(end, f"of {nbytes} bytes"))
        return None


def rounded(nbytes: int) -> int:
    """``nbytes`` as whole pages, at least one: ranges start where O_DIRECT wants them to."""
    return max(-(-nbytes // PAGE_BYTES), 1) * PAGE_BYTES


def placed(
    extent: Extent,
    buffers: Sequence[memoryview],
    places: Sequence[Place | None],
    scratch: memoryview,
) -> tuple[list[Place], dict[int, tuple[memoryview, memoryview]]]:
    """A place for every buffer; for those in ``extent`` also (buffer, its stand-in) by position."""
    found: list[Place] = []
    copies: dict[int, tuple[memoryview, memoryview]] = {}
    start = extent.start
    for position, (buffer, place) in enumerate(zip(buffers, places, strict=True)):
        if place is None:
            place = (SCRATCH, start, buffer.nbytes)
            copies[position] = buffer, scratch[start : start + buffer.nbytes]
            start += rounded(buffer.nbytes)
        found.append(place)
    return found, copies


def loaded(
    copies: dict[int, tuple[memoryview, memoryview]], sizes: Any
) -> list[tuple[memoryview, memoryview]]:
    """What has to be copied back; sizes that make no sense are left to whoever asked."""
    pairs: list[tuple[memoryview, memoryview]] = []
    for position, (buffer, stand_in) in copies.items():
        size = sizes[position] if isinstance(sizes, list) and position < len(sizes) else MISS
        if isinstance(size, int) and 0 < size <= buffer.nbytes:
            pairs.append((buffer[:size], stand_in[:size]))
    return pairs


def copy_all(pairs: list[tuple[memoryview, memoryview]]) -> None:
    """Copy each second to the first, without the interpreter's lock where Python lets us."""
    while pairs:
        target, source = pairs.pop()
        if source.readonly or not source.nbytes:
            target[: source.nbytes] = source
        else:
            ctypes.memmove(address_of(target), address_of(source), source.nbytes)
