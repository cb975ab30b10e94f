"""Which folders of the server's disk tier are open: one a namespace, a bounded number of them.

All share one pool of threads, each gets its turn there, and one that nobody asks for is closed.
Knows the ``filesystem`` backend and the event loop that all of this runs on. Knows nothing about
values.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lmcache_backend_lm.inventory import parse_description
from lmcache_backend_lm.protocol import ProtocolError
from lmcache_core import (
    BackendContext,
    BackendError,
    CacheNamespace,
    DaemonPool,
    DType,
    FilesystemBackend,
    FilesystemConfig,
    KVLayout,
    full_attention,
)

logger = logging.getLogger(__name__)
_T = TypeVar("_T")

THREADS = 16
TURNS = 8
"""So many of the threads one namespace may keep busy."""
MOST_OPEN = 64
"""More are open only while all of them are in use."""
IDLE_S = 300.0
NOTED_S = 1.0
"""What is noted of all namespaces is read again after so long."""
DESCRIBED = "described"
"""In a manifest: what clients said."""


class ForeignNamespace(CacheNamespace):
    """A namespace of which the fingerprint is known, and what clients say that it is of."""

    def __init__(self, fingerprint: str, description: str = "") -> None:
        layout = KVLayout(1, (full_attention(layers=1, heads=1, head_size=1, dtype=DType.BF16),))
        super().__init__(model="", layout=layout)
        self.__dict__["fingerprint"] = fingerprint
        self.__dict__["description"] = description

    def facts(self) -> dict[str, object]:
        text: str = self.__dict__["description"]
        if not text:
            return {"known_to": "clients of lmcache_server, which knows fingerprints only"}
        called = text.partition("\n")[0]
        return {"known_to": f"clients of lmcache_server, who call it {called}", DESCRIBED: text}


class Folder(FilesystemBackend):
    """A namespace's files, which are read and written by threads that others have, too."""

    def __init__(self, config: FilesystemConfig, pool: DaemonPool) -> None:
        super().__init__(config)
        self._pool = pool
        self._turns = asyncio.Semaphore(TURNS)

    async def open(self, context: BackendContext) -> None:
        await self._run(self.open_blocking, context)

    async def close(self) -> None:
        await self._run(self.close_blocking)

    def close_blocking(self) -> None:
        super().close_blocking()
        try:
            self._room.retire()
        except OSError as error:
            logger.warning("disk: %s can't be tidied up: %s", self._folder, error)

    async def _run(self, call: Callable[..., _T], *args: Any) -> _T:
        await self._turns.acquire()
        try:
            return await super()._run(call, *args)
        finally:
            self._turns.release()


class _Open:
    """One that is open, or opening."""

    def __init__(self, opening: asyncio.Task[Folder]) -> None:
        self.opening = opening
        self.users = 0
        self.used_at = 0.0


class Folders:
    """The folders below ``config.path``. Everything but `__init__` on one event loop."""

    def __init__(
        self,
        config: FilesystemConfig,
        describe: Callable[[str], str] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._describe = describe if describe is not None else lambda _: ""
        self._top = config.path.expanduser().absolute()
        self._clock = clock
        self._pool = DaemonPool(THREADS, "lmcache-server-disk")
        self._open: OrderedDict[str, _Open] = OrderedDict()
        """The one that was used last comes last."""
        self._closing: dict[str, asyncio.Task[None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._noting: asyncio.Future[dict[str, int]] | None = None
        self._noted_at = 0.0

    def __len__(self) -> int:
        return len(self._open)

    async def take(self, space: str, *, make: bool = False) -> Folder | None:
        """A namespace's folder, until `give`.

        ``None``: there is none, and it isn't to be made; or all were closed.

        Raises:
            BackendError: it can't be used.
        """
        if space not in self._open and not make and not await self._is_there(space):
            return None
        # Whoever closes one may be about to remove it.
        while (closing := self._closing.get(space)) is not None:
            await asyncio.wait([closing])
        entry = self._open.get(space)
        if entry is None:
            if self._closed:
                return None
            entry = self._open[space] = _Open(asyncio.ensure_future(self._opened(space)))
            # Whoever waits for it may be gone when it fails.
            entry.opening.add_done_callback(lambda task: task.cancelled() or task.exception())
        self._open.move_to_end(space)
        entry.users += 1
        self._close_beyond(MOST_OPEN)
        try:
            return await asyncio.shield(entry.opening)
        except BaseException:
            opening = entry.opening
            if opening.done() and (opening.cancelled() or opening.exception() is not None):
                if self._open.get(space) is entry:
                    del self._open[space]  # the next one tries again
            else:
                self.give(space)
            raise

    def give(self, space: str) -> None:
        """Somebody who took it doesn't need it any more."""
        entry = self._open.get(space)
        if entry is None:  # all were closed meanwhile
            return
        entry.users -= 1
        entry.used_at = self._clock()
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(IDLE_S, self._look)
        self._close_beyond(MOST_OPEN)

    def close_idle(self, idle_s: float) -> None:
        """Begin to close what nobody used for so long."""
        until = self._clock() - idle_s
        for space, entry in list(self._open.items()):
            if not entry.users and entry.used_at <= until:
                self._close_soon(space)

    async def close(self) -> None:
        """Close all, after whatever is opening or closing; nothing is opened any more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for space in list(self._open):
            self._close_soon(space)
        if self._closing:
            await asyncio.wait(list(self._closing.values()))
        for ended in self._pool.shutdown():
            await asyncio.wrap_future(ended)
        self._pool.join(1.0)

    def _look(self) -> None:
        self._timer = None
        self.close_idle(IDLE_S)
        if self._open:
            self._timer = asyncio.get_running_loop().call_later(IDLE_S / 2, self._look)

    def _close_beyond(self, most: int) -> None:
        if len(self._open) <= most:
            return
        for space, entry in list(self._open.items()):
            if not entry.users:
                self._close_soon(space)
                if len(self._open) <= most:
                    return

    def _close_soon(self, space: str) -> None:
        entry = self._open.pop(space)
        task = asyncio.ensure_future(self._close(space, entry))
        self._closing[space] = task
        task.add_done_callback(lambda _: self._closing.pop(space, None))

    async def _close(self, space: str, entry: _Open) -> None:
        await asyncio.wait([entry.opening])
        if entry.opening.cancelled() or entry.opening.exception() is not None:
            return
        try:
            await entry.opening.result().close()
        except (BackendError, OSError, RuntimeError) as error:  # others are closed all the same
            logger.warning("disk: folder %s wasn't closed: %s", space, error)

    async def usage(self) -> dict[str, int]:
        """Bytes of each namespace: of those that are open as they are, of others as was noted.

        Raises:
            RuntimeError: all were closed.
        """
        noting = self._noting
        if noting is None or (noting.done() and self._clock() - self._noted_at > NOTED_S):
            self._noted_at = self._clock()
            noting = self._noting = asyncio.ensure_future(
                self._pool.run(FilesystemBackend.usage_below, self._top)
            )
        found = dict(await asyncio.shield(noting))
        for space, entry in self._open.items():
            opening = entry.opening
            if opening.done() and not opening.cancelled() and opening.exception() is None:
                found[space] = opening.result().usage()[1]
        return found

    async def described(self, spaces: Sequence[str]) -> dict[str, str]:
        """What the folders of ``spaces`` say that they are of; empty where they don't.

        Raises:
            RuntimeError: all were closed.
        """
        return await self._pool.run(lambda: {one: _described(self._top, one) for one in spaces})

    async def free_bytes(self) -> int:
        """What the file system has left.

        Raises:
            OSError: it doesn't say.
            RuntimeError: all were closed.
        """
        return await self._pool.run(lambda: shutil.disk_usage(self._top).free)

    async def _opened(self, space: str) -> Folder:
        folder = Folder(self._config, self._pool)
        said = self._describe(space) or (await self.described([space]))[space]
        await folder.open(BackendContext("lmcache_server", ForeignNamespace(space, said)))
        return folder

    async def _is_there(self, space: str) -> bool:
        return not self._closed and await self._pool.run(os.path.isdir, self._top / space)


def _described(top: Path, space: str) -> str:
    said = FilesystemBackend.manifest_of(top, space).get(DESCRIBED, "")
    try:
        return parse_description(memoryview(str(said).encode()))
    except (ProtocolError, UnicodeEncodeError):
        return ""
