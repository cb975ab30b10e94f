"""The engine's side of an isolated backend: an ordinary `StorageBackend`.

Knows where buffers lie, and when a dead child is followed by another. What a
child is and how it is told apart from a hanging one is `process`' business.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel

from lmcache_core.aio.daemon_pool import DaemonPool
from lmcache_core.chunks.keys import ChunkKey
from lmcache_core.contracts.storage import (
    MISS,
    BackendCapabilities,
    BackendContext,
    HostRegion,
    StorageBackend,
    StoreOutcome,
)
from lmcache_core.errors import (
    BackendError,
    BackendProcessLost,
    BackendRejected,
    BackendTimeout,
    BackendUnavailable,
    LMCacheError,
)
from lmcache_core.isolation.process import Child
from lmcache_core.isolation.scratch import Scratch, copy_all, loaded, placed, rounded
from lmcache_core.isolation.wire import (
    ARENA,
    SCRATCH,
    Place,
    context_to_plain,
    options_to_plain,
)
from lmcache_core.memory.host_memory import address_of, share
from lmcache_core.metrics import Counters

logger = logging.getLogger(__name__)
_T = TypeVar("_T")

GRACE_S = 2.0
"""A call that is this much later than its deadline will not come back: its process is killed."""
OPEN_PATIENCE_S = 120.0
"""Opening may read a long index, or import half the world."""
FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 30.0
STEADY_AFTER_S = 60.0
"""A child that lived for so long isn't part of a series of failures."""
SCRATCH_BYTES = 64 << 20
_SCRATCH_VALUES = 4


class IsolatedBackend(StorageBackend):
    """Stands for a backend of type ``kind`` that lives in a child process.

    Has the optional methods that the real one has, once it is open. Nothing of the plugin is
    imported or run in this process.

    ``where`` names the section in errors; ``deadline_s`` is how long core waits for a call;
    ``memory_gib`` what the child may take, not counting what is shared with it.
    """

    def __init__(
        self,
        kind: str,
        options: BaseModel,
        *,
        where: str,
        deadline_s: float,
        counters: Counters,
        memory_gib: float | None = None,
        grace_s: float = GRACE_S,
    ) -> None:
        self._kind = kind
        self._options = options
        self._where = where
        self._patience_s = deadline_s + grace_s
        self._counters = counters
        self._memory_bytes = None if memory_gib is None else int(memory_gib * 2**30)
        self._name = kind
        self._context: BackendContext | None = None
        self._capabilities: BackendCapabilities | None = None
        self._arena_end = self._arena_start = 0
        self._scratch: Scratch | None = None
        self._copies: DaemonPool | None = None
        self._child: Child | None = None
        self._started_at = 0.0
        self._delay_s = FIRST_DELAY_S
        self._restarting: asyncio.Task[None] | None = None
        self._sheltered: set[asyncio.Task[Any]] = set()

    @property
    def capabilities(self) -> BackendCapabilities:
        if self._capabilities is None:
            raise BackendUnavailable(f"{self._name}: the backend isn't open")
        return self._capabilities

    async def open(self, context: BackendContext) -> None:
        """Start the child and open the backend there.

        Raises:
            NotCreated: the plugin can't be used; the same as without isolation.
            BackendUnavailable: the child didn't survive it, besides the usual reasons.
        """
        self._name, self._context = context.name, context
        self._copies = DaemonPool(1, f"lmcache-{self._name}-copies")
        region = context.region
        if region is not None and region.fd is not None:
            self._arena_start, self._arena_end = region.address, region.address + region.nbytes
        elif region is not None:
            logger.warning(
                "%s: host memory can't be shared with its process, so values are copied once more",
                self._name,
            )
        try:
            methods = await self._start(context)
        except BaseException:
            await self._end_copies()
            raise
        # Instance attributes, because that is where `isinstance(…, SupportsDelete)` looks.
        optional: dict[str, Callable[..., Any]] = {
            "count_leading_hits": lambda keys: self._ask_about("count_leading_hits", keys),
            "delete": lambda keys: self._ask_about("delete", keys),
            "clear": lambda: self._ask("clear"),
            "usage": self._usage,
        }
        for name in methods:
            setattr(self, name, optional[name])

    async def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        found: list[bool] = await self._ask_about("contains", keys)
        return found

    async def load(self, keys: Sequence[ChunkKey], into: Sequence[memoryview]) -> list[int]:
        places = self._places(into)
        if None not in places:
            sizes: list[int] = await self._ask_about("load", keys, places=places)
            return sizes
        return await self._shelter(self._in_parts("load", keys, into, places))

    async def store(
        self, keys: Sequence[ChunkKey], sources: Sequence[memoryview]
    ) -> list[StoreOutcome]:
        places = self._places(sources)
        if None not in places:
            names = await self._ask_about("store", keys, places=places)
        else:
            names = await self._shelter(self._in_parts("store", keys, sources, places))
        try:
            return [StoreOutcome[name] for name in names]
        except (KeyError, TypeError):
            raise BackendError(
                f"{self._name}: the {self._kind} backend answered store with {names!r:.80}, which "
                "isn't what the storage contract says; this is a mistake in the plugin"
            ) from None

    async def close(self) -> None:
        context, self._context = self._context, None
        if context is None:
            return
        if self._restarting is not None:
            self._restarting.cancel()
            await asyncio.wait([self._restarting])
        child, self._child = self._child, None
        try:
            if child is not None and child.alive:
                await asyncio.shield(child.ask("close", OPEN_PATIENCE_S))
        finally:
            try:
                if child is not None:
                    await _finish(child)
            finally:  # also where nobody waits for the child's end any more
                await self._end_copies()

    # -- the child -------------------------------------------------------------------------

    async def _start(self, context: BackendContext) -> list[str]:
        """A child with an open backend; answers the optional methods that it has."""
        if self._scratch is None:
            self._scratch = Scratch(self._share(context.max_value_bytes or 0), self._counters)
        arena, scratch = context.region, self._scratch.region
        child = Child(self._name, memory_bytes=self._memory_bytes)
        memory = [
            None if region is None or region.fd is None else (region.fd, region.nbytes)
            for region in (arena, scratch)
        ]
        try:
            await child.start([one[0] for one in memory if one is not None])
            opening = child.ask(
                "open",
                OPEN_PATIENCE_S,
                type=self._kind,
                where=self._where,
                options=options_to_plain(self._options),
                context=context_to_plain(context),
                sys_path=sys.path,
                log_level=logger.getEffectiveLevel(),
                memory=memory,
            )
            facts = await asyncio.shield(opening)
            # What is cancelled here goes on in the child.
            stated = {**facts["capabilities"], "cancellable": False}
            self._capabilities = BackendCapabilities(**stated)
            methods: list[str] = facts["methods"]
        except BaseException as error:
            await _finish(child)
            if isinstance(error, BackendUnavailable) and child.reason != "closed":
                # Now that it is read, with the last that it printed.
                raise BackendUnavailable(f"{self._name}: {_obituary(child)}") from error
            raise
        self._child, self._started_at = child, time.monotonic()
        child.gone.add_done_callback(lambda _: self._lost(child))
        child.watch()
        return methods

    def _share(self, value_bytes: int) -> HostRegion:
        try:
            return share(max(SCRATCH_BYTES, _SCRATCH_VALUES * rounded(value_bytes)))
        except OSError as error:
            raise BackendRejected(
                f"it is isolated, but this system gives no memory to share: {error.strerror}"
            ) from error

    def _lost(self, child: Child) -> None:
        context = self._context
        if context is None or child is not self._child:
            return  # closed
        self._child = None
        self._counters.add("isolated_restarts", backend=self._name, reason=child.reason)
        if time.monotonic() - self._started_at >= STEADY_AFTER_S:
            self._delay_s = FIRST_DELAY_S
        restarting = self._restart(context, _obituary(child))
        self._restarting = asyncio.get_running_loop().create_task(restarting)

    async def _restart(self, context: BackendContext, why: str) -> None:
        told = ""
        while self._child is None:
            delay, self._delay_s = self._delay_s, min(2 * self._delay_s, LONGEST_DELAY_S)
            logger.log(
                logging.DEBUG if why == told else logging.WARNING,
                "%s: %s. Its chunks are misses until it runs again; starting it in %g s",
                self._name,
                why,
                delay,
            )
            told = why
            await asyncio.sleep(delay)
            try:
                await self._start(context)
            except (LMCacheError, OSError, EOFError) as error:
                why = str(error)
            else:
                logger.info("%s: runs again", self._name)

    # -- calls -----------------------------------------------------------------------------

    async def _ask(self, what: str, **facts: Any) -> Any:
        child = self._child
        if child is None:
            raise BackendProcessLost(f"{self._name}: its process isn't running")
        return await asyncio.shield(child.ask(what, self._patience_s, **facts))

    async def _ask_about(self, what: str, keys: Sequence[ChunkKey], **facts: Any) -> Any:
        return await self._ask(what, keys=[key.hex() for key in keys], **facts)

    def _usage(self) -> tuple[int, int]:
        child = self._child
        return (0, 0) if child is None or child.usage is None else child.usage

    # -- buffers ---------------------------------------------------------------------------

    def _places(self, buffers: Sequence[memoryview]) -> list[Place | None]:
        """Where each buffer lies in shared memory; ``None`` for those that don't."""
        places: list[Place | None] = []
        for buffer in buffers:
            start, nbytes = address_of(buffer), buffer.nbytes
            if not nbytes:
                places.append((SCRATCH, 0, 0))
            elif self._arena_start <= start and start + nbytes <= self._arena_end:
                places.append((ARENA, start - self._arena_start, nbytes))
            else:
                places.append(None)
        return places

    async def _in_parts(
        self,
        what: str,
        keys: Sequence[ChunkKey],
        buffers: Sequence[memoryview],
        places: Sequence[Place | None],
    ) -> list[Any]:
        """A call with buffers that have to be copied, as many at a time as there is room for."""
        scratch = self._scratch
        if scratch is None:
            raise BackendUnavailable(f"{self._name}: the backend isn't open")
        until = asyncio.get_running_loop().time() + self._patience_s
        answers: list[Any] = []
        start, room = 0, 0
        # Half of it, so that another call has a chance.
        limit = scratch.region.nbytes // 2
        needs = [
            rounded(buffer.nbytes) if place is None else 0
            for buffer, place in zip(buffers, places, strict=True)
        ]
        for stop in range(1, len(keys) + 1):
            room += needs[stop - 1]
            if stop < len(keys) and room + needs[stop] <= limit:
                continue
            part = slice(start, stop)
            answers += await self._part(
                what, keys[part], buffers[part], places[part], room, scratch, until
            )
            start, room = stop, 0
        return answers

    async def _part(
        self,
        what: str,
        keys: Sequence[ChunkKey],
        buffers: Sequence[memoryview],
        places: Sequence[Place | None],
        room: int,
        scratch: Scratch,
        until: float,
    ) -> Sequence[Any]:
        if room > scratch.region.nbytes:  # a single value that is longer than core said
            return [StoreOutcome.NOT_ADMITTED.name if what == "store" else MISS]
        with await scratch.take(room) as extent:
            if asyncio.get_running_loop().time() > until:
                raise BackendTimeout(f"{self._name}: {what} waited too long for scratch memory")
            places, copies = placed(extent, buffers, places, scratch.region.view)
            if what == "store":
                await self._copy([(there, here) for here, there in copies.values()])
            answers = await self._ask_about(what, keys, places=places)
            if what == "load":
                await self._copy(loaded(copies, answers))
        if not isinstance(answers, list) or len(answers) != len(keys):
            raise BackendError(
                f"{self._name}: the {self._kind} backend answered {what} for {len(keys)} keys "
                f"with {answers!r:.80}; this is a mistake in the plugin"
            )
        return answers

    async def _copy(self, pairs: list[tuple[memoryview, memoryview]]) -> None:
        """Copy each second to the first, off the loop and without the interpreter's lock."""
        if self._copies is not None and pairs:
            await self._copies.run(copy_all, pairs)

    async def _shelter(self, call: Coroutine[Any, Any, _T]) -> _T:
        """Await ``call``, which goes on when its caller is cancelled: it leases scratch memory."""
        task = asyncio.get_running_loop().create_task(call)
        self._sheltered.add(task)
        task.add_done_callback(self._sheltered.discard)
        return await asyncio.shield(task)

    async def _end_copies(self) -> None:
        pool, self._copies = self._copies, None
        if pool is not None:
            for ended in pool.shutdown():
                await asyncio.wrap_future(ended)
            pool.join(1.0)


async def _finish(child: Child) -> None:
    """Kill ``child`` if it isn't dead, and wait until it is."""
    child.kill("closed")
    await asyncio.shield(child.gone)
    child.join()


def _obituary(child: Child) -> str:
    printed = f". It printed last: {child.last_lines}" if child.last_lines else ""
    return child.end + printed
