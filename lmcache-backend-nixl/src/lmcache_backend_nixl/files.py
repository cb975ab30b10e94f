"""Chunks in a pool of slots in files, moved by NIXL's POSIX, GDS, GDS_MT or HF3FS plugin.

Knows when a chunk may be read and when one has been written. Slots and indexes are `pool`'s
business, descriptors `batch`'s.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from lmcache_backend_nixl.agent import Agent, Agents, Memory
from lmcache_backend_nixl.batch import Batches, Item
from lmcache_backend_nixl.config import NixlConfig
from lmcache_backend_nixl.index import Entry
from lmcache_backend_nixl.pool import Others, Pool, data_file
from lmcache_backend_nixl.slots import Shape
from lmcache_core import (
    MISS,
    BackendCapabilities,
    BackendContext,
    BackendError,
    BackendRejected,
    BackendUnavailable,
    BlockingBackend,
    ChunkKey,
    StoreOutcome,
)

logger = logging.getLogger(__name__)

UNKNOWN_VALUE_BYTES: Final = 1 << 20
"""Bytes of a slot where core doesn't say how long values are; it does in an engine."""
VALUES_A_TRANSFER: Final = 64
_DIRECT: Final[int] = getattr(os, "O_DIRECT", 0)  # not every system has it
_REJECTED: Final = (
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
)


class _Files(NamedTuple):
    """The data files of a pool; none if they couldn't be opened."""

    fds: tuple[int, ...] = ()
    registered: Sequence[Any] = ()


class NixlFileBackend(BlockingBackend):
    """One pool for each process; every process reads from all of them."""

    def __init__(self, config: NixlConfig) -> None:
        if config.path is None:
            raise BackendRejected("path (nixl_path) is missing")
        self._config = config
        self._folder = config.path.expanduser().absolute()
        self._shape = Shape.for_values(UNKNOWN_VALUE_BYTES)
        self._lookup_only = False
        self._agents: Agents | None = None
        self._memory: Memory | None = None
        self._batches: Batches | None = None
        self._slots: Pool | None = None
        self._index: Pool | Others | None = None
        """Says where values are; for lookups, all pools are somebody else's."""
        self._files: dict[str, _Files] = {}
        """Of other processes' pools."""
        self._calls = 0
        """That may use them at the moment."""
        self._lock = threading.Lock()

    @property
    def capabilities(self) -> BackendCapabilities:
        return BackendCapabilities(
            shared=True,
            persistent=self._config.persist,
            max_chunk_bytes=self._shape.slot_bytes,
            preferred_batch=min(8, self._config.pool_size),
            max_concurrency=self._config.calls,
        )

    # -- opening and closing ---------------------------------------------------------------

    def open_blocking(self, context: BackendContext) -> None:
        top = self._folder
        self._folder = top / context.namespace.fingerprint
        self._lookup_only = context.lookup_only
        if context.max_value_bytes is not None:
            self._shape = Shape.for_values(context.max_value_bytes)
        if context.lookup_only:
            self._index = Others(self._folder)
            return
        for notice in self._config.notices():
            logger.warning("%s: %s", context.name, notice)
        agents = Agents(self._started(context.name), calls=self._config.calls)
        memory = Memory(
            agents,
            context.region,
            lanes=self._config.calls,
            values=VALUES_A_TRANSFER,
            slot_bytes=self._shape.slot_bytes,
            buffer_bytes=self._config.buffer_bytes,
        )
        pool = self._open_pool(top)
        try:
            agents.register("FILE", [(0, pool.bytes_in_each, fd, "") for fd in pool.fds])
        except BackendError:
            pool.close(keep=True)
            raise
        self._agents, self._memory, self._slots = agents, memory, pool
        self._index = pool
        direct = self._config.direct_io
        self._batches = Batches(agents, memory, "FILE", whole_pages=direct)
        count, nbytes = pool.usage()
        logger.info(
            "%s: found %d chunks, %d bytes, in pool %s of %s",
            context.name,
            count,
            nbytes,
            pool.name,
            self._folder,
        )

    def close_blocking(self) -> None:
        if self._slots is not None:
            self._slots.close(keep=self._config.persist)
        elif isinstance(self._index, Others):
            self._index.close()
        if self._agents is not None:
            self._agents.close()
        with self._lock:
            for files in self._files.values():
                _close(files.fds)
            self._files.clear()
        self._agents = self._memory = self._batches = self._slots = self._index = None

    def _started(self, name: str) -> list[Agent]:
        """An agent for each data file."""
        first, *second = self._config.ways()
        try:
            return self._agents_with(first)
        except BackendRejected as error:
            if not second:
                raise
            refusal = error
        agents = self._agents_with(second[0])  # if that fails too, it wasn't io_uring
        logger.info(
            "%s: NIXL can't use io_uring here, which containers often forbid (%s); it takes Linux "
            "AIO, with which stores are slower",
            name,
            refusal,
        )
        return agents

    def _agents_with(self, params: dict[str, str]) -> list[Agent]:
        return [Agent(self._config.backend, params) for _ in range(self._shape.files)]

    def _open_pool(self, top: Path) -> Pool:
        remedy = "make it a folder that this user can write to, or set path (nixl_path) to another"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            flags = _DIRECT if self._config.direct_io else 0
            return Pool(self._folder, self._config.pool_size, self._shape, flags=flags)
        except OSError as error:
            if error.errno == errno.EINVAL and self._config.direct_io:
                raise BackendRejected(
                    f"the file system of {top} has no O_DIRECT; take use_direct_io (direct_io) "
                    "out, or set path (nixl_path) to a folder on another one"
                ) from error
            kind = BackendRejected if error.errno in _REJECTED else BackendUnavailable
            raise kind(f"can't use {top}: {error.strerror}; {remedy}") from error

    # -- calls -----------------------------------------------------------------------------

    def contains_blocking(self, keys: Sequence[ChunkKey]) -> list[bool]:
        if self._index is None:
            raise BackendUnavailable("the backend isn't open")
        return [entry is not None for entry in self._index.find(keys)]

    def load_blocking(self, keys: Sequence[ChunkKey], into: Sequence[memoryview]) -> list[int]:
        with self._using_files():
            return self._load(keys, into)

    def store_blocking(
        self, keys: Sequence[ChunkKey], sources: Sequence[memoryview]
    ) -> list[StoreOutcome]:
        with self._using_files():
            return self._store(keys, sources)

    async def delete(self, keys: Sequence[ChunkKey]) -> int:
        return await self._run(self._delete, keys)

    async def clear(self) -> int:
        return await self._run(self._delete, None)

    def usage(self) -> tuple[int, int]:
        return (0, 0) if self._slots is None else self._slots.usage()

    # -- inside ----------------------------------------------------------------------------

    def _load(self, keys: Sequence[ChunkKey], into: Sequence[memoryview]) -> list[int]:
        memory, batches, pool = self._opened()
        sizes = [MISS] * len(keys)
        entries: dict[int, Entry] = {}
        items: list[Item] = []
        for index, (entry, buffer) in enumerate(zip(pool.find(keys), into, strict=True)):
            if entry is None or entry.nbytes > min(buffer.nbytes, self._shape.slot_bytes):
                continue
            if fds := self._files_of(entry):
                entries[index] = entry
                items.append(Item(index, buffer[: entry.nbytes], entry.places, fds))
        if not items:
            return sizes
        try:
            with memory.lane() as lane:
                done = batches.read(items, lane)
        except BackendError as error:
            raise self._about(error, "read from") from error
        for index in done:
            if pool.still(keys[index], entries[index]):
                sizes[index] = entries[index].nbytes
        return sizes

    def _store(self, keys: Sequence[ChunkKey], sources: Sequence[memoryview]) -> list[StoreOutcome]:
        _, _, pool = self._opened()
        outcomes = [StoreOutcome.ALREADY_PRESENT] * len(keys)
        wanted = [
            index
            for index, entry in enumerate(pool.find(keys))
            if entry is None or not self._files_of(entry)
        ]
        slots = pool.reserve([(keys[index], sources[index].nbytes) for index in wanted])
        items: list[Item] = []
        values: list[tuple[int, ChunkKey, int]] = []
        for index, slot in zip(wanted, slots, strict=True):
            if slot is None:
                outcomes[index] = StoreOutcome.NOT_ADMITTED
                continue
            source = sources[index]
            values.append((slot, keys[index], source.nbytes))
            items.append(Item(index, source, pool.shape.places(slot), pool.fds))
        if not items:
            return outcomes
        try:
            self._write(items)
        except BaseException:  # whatever it is, the slots are free again
            pool.give_back(slots)
            raise
        for item, published in zip(items, pool.publish(values), strict=True):
            if published:
                outcomes[item.position] = StoreOutcome.STORED
        if self._config.fsync:
            pool.sync_index()
        return outcomes

    def _write(self, items: Sequence[Item]) -> None:
        memory, batches, pool = self._opened()
        try:
            with memory.lane() as lane:
                batches.write(items, lane)
            if self._config.fsync:
                pool.sync()
        except BackendError as error:
            raise self._about(error, "write to") from error

    def _delete(self, keys: Sequence[ChunkKey] | None) -> int:
        _, _, pool = self._opened()
        return pool.delete(keys)

    def _files_of(self, entry: Entry) -> tuple[int, ...]:
        """The open data files of its pool, registered; none if it is gone or can't be read."""
        if self._slots is None or self._agents is None:
            return ()
        if entry.pool == self._slots.name:
            return self._slots.fds
        with self._lock:
            if entry.pool not in self._files:
                self._files[entry.pool] = self._open_other(self._agents, entry)
            return self._files[entry.pool].fds

    def _open_other(self, agents: Agents, entry: Entry) -> _Files:
        if entry.files > self._shape.files:
            return _Files()  # of a version to come
        flags = os.O_RDONLY | os.O_CLOEXEC | (_DIRECT if self._config.direct_io else 0)
        fds: list[int] = []
        try:
            files = (data_file(self._folder, entry.pool, i) for i in range(entry.files))
            fds.extend(os.open(file, flags) for file in files)  # closed below if one is missing
            descriptors = [(0, os.fstat(fd).st_size, fd, "") for fd in fds]
            return _Files(tuple(fds), agents.register("FILE", descriptors))
        except (OSError, BackendError):
            _close(fds)
            return _Files()  # gone, or somebody else's and not to be read

    @contextmanager
    def _using_files(self) -> Iterator[None]:
        """Files of pools that vanished are closed once no call uses any: they take room on disk."""
        with self._lock:
            self._calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                if not self._calls and self._slots is not None and self._agents is not None:
                    for pool in self._slots.take_gone() & self._files.keys():
                        files = self._files.pop(pool)
                        self._agents.deregister(files.registered)
                        _close(files.fds)

    def _opened(self) -> tuple[Memory, Batches, Pool]:
        if self._memory is None or self._batches is None or self._slots is None:
            why = "was opened for lookups only" if self._lookup_only else "isn't open"
            raise BackendUnavailable(f"the backend {why}")
        return self._memory, self._batches, self._slots

    def _about(self, error: BackendError, doing: str) -> BackendError:
        """``error`` with what may be its cause: NIXL itself doesn't tell."""
        room = os.statvfs(self._config.path or "/")
        return type(error)(
            f"can't {doing} the pools in {self._folder}: {error}. NIXL names no cause; "
            f"{room.f_bavail * room.f_frsize} bytes are free there, and a file that was cut short "
            "or a disk that fails looks like this: see the kernel's log"
        )


def _close(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)
