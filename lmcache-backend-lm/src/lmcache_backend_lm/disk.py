"""The server's disk tier: values that were stored go to files too, and come back from there.

Writing is behind: a store is acknowledged from memory, and where the disk can't keep up, the newest
values aren't written. Knows the event loop that files are asked for on. Knows nothing about
connections, nor about which folders are open.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lmcache_backend_lm.arena import Arena
from lmcache_backend_lm.folders import Folder, Folders
from lmcache_backend_lm.values import Held, Value, Values
from lmcache_core import (
    MISS,
    BackendError,
    ChunkKey,
    Counters,
    FilesystemConfig,
    IOLoop,
    Seldom,
    StoreOutcome,
)

logger = logging.getLogger(__name__)
_T = TypeVar("_T")
_FAILURES = (BackendError, RuntimeError, OSError)
"""What the disk, or its loop that is ending, answers to a call."""

WAITING_BYTES = 1 << 30
"""Values that wait to be written stay leased, so at most this, or a quarter of the memory, may."""


class Disk:
    """Files below one folder. Every method may be called from any event loop.

    ``describe`` says what a namespace is of, for people who look into its folder.
    """

    def __init__(
        self,
        path: Path,
        max_size_gib: float | None,
        *,
        values: Values,
        arena: Arena,
        counters: Counters,
        describe: Callable[[str], str] | None = None,
    ) -> None:
        options = {"path": path, "max_size_gib": max_size_gib}
        self._config = FilesystemConfig.model_validate(options)
        self._values = values
        self._arena = arena
        self._counters = counters
        self._loop = IOLoop("server-disk")
        self._folders = Folders(self._config, describe)
        self._known_totals: dict[str, int] = {}
        self._lock = threading.Lock()
        self._waiting_bytes = 0
        self._most_waiting = min(WAITING_BYTES, arena.capacity // 4)
        self._writes: set[Future[None]] = set()
        self._storing: dict[str, set[asyncio.Future[None]]] = {}
        self._seldom = Seldom(logger)

    def check(self) -> None:
        """Make sure that the folder can be used.

        Raises:
            BackendError: it can't.
        """
        self._loop.run(self._try(), 60.0)

    # -- from sessions ---------------------------------------------------------------------

    async def contains(self, space: str, keys: Sequence[ChunkKey]) -> list[bool]:
        """Which of ``keys`` have a file."""
        return [size > 0 for size in await self.sizes(space, keys)]

    async def sizes(self, space: str, keys: Sequence[ChunkKey]) -> list[int]:
        """Bytes of each key's file, 0 where there is none."""

        absent = [0] * len(keys)
        return await self._run(
            "contains", self._in(space, lambda folder: folder.sizes(keys), absent), absent
        )

    async def fetch(
        self,
        space: str,
        keys: Sequence[ChunkKey],
        sizes: Sequence[int],
        into: Held,
        at: Sequence[int],
    ) -> None:
        """Bring values from files of these ``sizes`` into memory.

        Those that came are in ``into`` then, at ``at``.
        """
        with self._values.hold() as coming:
            places: list[int] = []
            for key, size, place in zip(keys, sizes, at, strict=True):
                if isinstance(coming.reserve(space, key, size, one_piece=True), Value):
                    places.append(place)
            mine = [value for value in coming.values if value is not None]

            def read(folder: Folder) -> Awaitable[list[int]]:
                targets = [self._arena.views(value.parts, value.nbytes)[0] for value in mine]
                return folder.load([value.key for value in mine], targets)

            nothing = [MISS] * len(mine)
            came = nothing
            try:
                reading = asyncio.wrap_future(self._loop.submit(self._in(space, read, nothing)))
                try:
                    came = await asyncio.shield(reading)
                finally:
                    # Whatever happens here, files are read into memory that nobody else may have.
                    await _patiently(reading)
            except _FAILURES as error:
                self._failed("load", error)
            for nbytes in came:
                result = "miss" if nbytes == MISS else "hit"
                self._counters.add("server_disk_loads", result=result)
            coming.settle([None if nbytes == MISS else nbytes for nbytes in came])
            into.take_over(coming, places)

    def write_behind(self, space: str, keys: Sequence[ChunkKey]) -> None:
        """Write values that were just stored to files, if the disk can keep up."""
        for key in keys:
            held = self._values.acquire(space, [key], [self._most_waiting])
            (value,) = held.values
            if value is None or not self._queue(value):
                held.release()
                continue
            try:
                future = self._loop.submit(self._write(value))
            except RuntimeError:  # stopping
                self._written(value.nbytes, held)
                continue
            self._writes.add(future)
            # Where even a write that never began ends.
            future.add_done_callback(partial(self._written, value.nbytes, held))

    async def delete(self, space: str, keys: Sequence[ChunkKey]) -> int:
        """Forget files; answer how many."""

        async def forget() -> int:
            await self._stored(space)
            return await self._in(space, lambda folder: folder.delete(keys), 0)

        return await self._run("delete", forget(), 0)

    async def clear(self, space: str) -> int:
        """Forget a namespace's files; answer how many."""

        async def forget() -> int:
            await self._stored(space)
            return await self._in(space, lambda folder: folder.clear(), 0)

        return await self._run("clear", forget(), 0)

    async def purge(self, space: str, most: int) -> tuple[int, int, bool]:
        """Forget up to ``most`` of a namespace's files.

        Answers how many, their bytes, and whether there may be more.
        """
        nothing = (0, 0, False)

        async def forget() -> tuple[int, int, bool]:
            await self._stored(space)
            return await self._in(space, lambda folder: folder.purge(most), nothing)

        return await self._run("clear", forget(), nothing)

    async def spaces(self) -> dict[str, int]:
        """Bytes of each namespace's files, whoever wrote them, as far as was noted."""
        return await self._run("look", self._folders.usage(), {})

    async def described(self, spaces: Sequence[str]) -> dict[str, str]:
        """What these namespaces are of, as their folders say; empty where they don't."""
        nothing = dict.fromkeys(spaces, "")
        return await self._run("look", self._folders.described(spaces), nothing)

    async def totals(self) -> dict[str, int]:
        """Numbers for operators."""
        return await self._run("look", self._totals(), {})

    def totals_blocking(self, patience_s: float) -> dict[str, int]:
        """The same on a thread; what was known last if the disk doesn't answer so soon."""
        try:
            self._known_totals = self._loop.run(self._totals(), patience_s)
        except (BackendError, RuntimeError, TimeoutError, OSError) as error:
            logger.debug("disk: no numbers: %s", error)
        return self._known_totals

    def close(self, patience_s: float) -> None:
        """Write what waits, and end, in about ``patience_s`` at most. Not on an event loop."""
        until = time.monotonic() + patience_s
        while self._writes and time.monotonic() < until:
            time.sleep(0.02)
        try:
            # Before the loop ends: what runs on it then is cancelled, and folders' threads stay.
            self._loop.run(self._folders.close(), max(0.1, until - time.monotonic()))
        except (RuntimeError, TimeoutError) as error:
            logger.warning("disk: %s wasn't closed: %s", self._config.path, error)
        self._loop.close(max(0.1, until - time.monotonic()))

    # -- on the disk's own loop ------------------------------------------------------------

    async def _try(self) -> None:
        space = "0" * 16
        await self._folders.take(space, make=True)
        self._folders.give(space)
        self._folders.close_idle(0.0)

    async def _in(self, space: str, ask: Callable[[Folder], Awaitable[_T]], otherwise: _T) -> _T:
        """What a namespace's folder answers; ``otherwise`` if there is none."""
        folder = await self._folders.take(space)
        if folder is None:
            return otherwise
        try:
            return await ask(folder)
        finally:
            self._folders.give(space)

    async def _totals(self) -> dict[str, int]:
        usage = await self._folders.usage()
        found = {
            "server_disk_bytes": sum(usage.values()),
            "server_disk_namespaces": sum(map(bool, usage.values())),
            "server_disk_free_bytes": await self._folders.free_bytes(),
            "server_disk_waiting_bytes": self._waiting_bytes,
        }
        if self._config.max_size_gib is not None:
            found["server_disk_limit_bytes"] = int(self._config.max_size_gib * 2**30)
        return found

    async def _stored(self, space: str) -> None:
        """Wait for files that are being written of values that were just forgotten in memory."""
        if storing := self._storing.get(space):
            await asyncio.wait(storing)

    async def _write(self, value: Value) -> None:
        # Known before it is asked for: who forgets it afterwards waits until its file is there.
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        storing = self._storing.setdefault(value.space, set())
        storing.add(done)
        try:
            if not value.linked:  # forgotten meanwhile
                return
            folder = await self._folders.take(value.space, make=True)
            if folder is None:  # stopping
                return
            try:
                views = self._arena.views(value.parts, value.nbytes)
                source = views[0] if len(views) == 1 else memoryview(b"".join(views))
                (outcome,) = await folder.store([value.key], [source])
            finally:
                self._folders.give(value.space)
            if outcome is StoreOutcome.NOT_ADMITTED:
                self._counters.add("server_disk_dropped", reason="full")
                self._seldom.warn(
                    "full", "the disk is full: %s takes no more values", self._config.path
                )
            else:
                self._counters.add("server_disk_stores")
        finally:
            storing.discard(done)
            done.set_result(None)

    def _queue(self, value: Value) -> bool:
        with self._lock:
            if self._waiting_bytes + value.nbytes <= self._most_waiting:
                self._waiting_bytes += value.nbytes
                return True
        self._counters.add("server_disk_dropped", reason="queue")
        return False

    def _written(self, nbytes: int, held: Held, future: Future[None] | None = None) -> None:
        with self._lock:
            self._waiting_bytes -= nbytes
        held.release()
        if future is not None:
            self._writes.discard(future)
            if not future.cancelled() and (error := future.exception()) is not None:
                self._failed("store", error)

    # -- failing ---------------------------------------------------------------------------

    async def _run(self, operation: str, work: Coroutine[Any, Any, _T], otherwise: _T) -> _T:
        try:
            return await asyncio.wrap_future(self._loop.submit(work))
        except _FAILURES as error:
            self._failed(operation, error)
            return otherwise

    def _failed(self, operation: str, error: BaseException) -> None:
        self._counters.add("server_disk_errors", operation=operation)
        self._seldom.warn(operation, "disk: %s failed: %s", operation, error)


async def _patiently(work: asyncio.Future[Any]) -> None:
    """Wait for ``work``, whatever happens meanwhile."""
    while not work.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([work])
