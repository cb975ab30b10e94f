"""Chunks in a pool of slots in a file, moved by NIXL's POSIX, GDS, GDS_MT or HF3FS plugin.

Knows when a chunk may be read and when one has been written. Slots and the index are `pool`'s
business, descriptors `batch`'s.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from lmcache_backend_nixl.agent import Agent, Memory
from lmcache_backend_nixl.batch import Batches, Item
from lmcache_backend_nixl.config import PAGE_BYTES, NixlConfig
from lmcache_backend_nixl.pool import Entry, Links, Pool, remove_orphans
from lmcache_core.errors import BackendError, BackendRejected, BackendUnavailable
from lmcache_core.keys import ChunkKey
from lmcache_core.storage import (
    MISS,
    BackendCapabilities,
    BackendContext,
    BlockingBackend,
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


class NixlFileBackend(BlockingBackend):
    """One pool for each process; every process reads from all of them."""

    def __init__(self, config: NixlConfig) -> None:
        if config.path is None:
            raise BackendRejected("path (nixl_path) is missing")
        self._config = config
        self._links = Links(config.path.expanduser().absolute())
        self._slot_bytes = UNKNOWN_VALUE_BYTES
        self._lookup_only = False
        self._agent: Agent | None = None
        self._memory: Memory | None = None
        self._batches: Batches | None = None
        self._slots: Pool | None = None
        self._others: dict[str, int | None] = {}
        """Open files of other processes' pools; ``None`` for one that is gone."""
        self._lock = threading.Lock()

    @property
    def capabilities(self) -> BackendCapabilities:
        return BackendCapabilities(
            shared=True,
            persistent=self._config.persist,
            max_chunk_bytes=self._slot_bytes,
            preferred_batch=min(8, self._config.pool_size),
            max_concurrency=self._config.calls,
        )

    # -- opening and closing ---------------------------------------------------------------

    def open_blocking(self, context: BackendContext) -> None:
        top = self._links.folder
        self._links = Links(top / context.namespace.fingerprint)
        self._lookup_only = context.lookup_only
        if context.max_value_bytes is not None:
            self._slot_bytes = -(-context.max_value_bytes // PAGE_BYTES) * PAGE_BYTES
        if context.lookup_only:
            return  # links are all that it reads
        for notice in self._config.notices():
            logger.warning("%s: %s", context.name, notice)
        agent = Agent(self._config.backend, self._config.params())
        memory = Memory(
            agent,
            context.region,
            lanes=self._config.calls,
            values=VALUES_A_TRANSFER,
            slot_bytes=self._slot_bytes,
            buffer_bytes=self._config.buffer_bytes,
        )
        pool = self._open_pool(top)
        try:
            agent.register("FILE", [(0, pool.nbytes, pool.fd, "")])
        except BackendError:
            pool.close(keep=True)
            raise
        self._agent, self._memory, self._slots = agent, memory, pool
        direct = self._config.direct_io
        self._batches = Batches(agent, memory, "FILE", whole_pages=direct)
        count, nbytes = pool.usage()
        logger.info("%s: found %d chunks, %d bytes, in %s", context.name, count, nbytes, pool.path)

    def close_blocking(self) -> None:
        if self._slots is not None:
            self._slots.close(keep=self._config.persist)
        if self._agent is not None:
            self._agent.close()
        with self._lock:
            for fd in self._others.values():
                if fd is not None:
                    os.close(fd)
            self._others.clear()
        self._agent = self._memory = self._batches = self._slots = None

    def _open_pool(self, top: Path) -> Pool:
        remedy = "make it a folder that this user can write to, or set path (nixl_path) to another"
        try:
            self._links.make_folders()
            flags = _DIRECT if self._config.direct_io else 0
            pool = Pool(self._links, self._config.pool_size, self._slot_bytes, flags=flags)
            remove_orphans(self._links, self._links.oldest_first())
            return pool
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
        found = [self._links.read(key) for key in keys]
        pools = {entry.pool for entry in found if entry is not None}
        there = {pool for pool in pools if self._links.data_file(pool).exists()}
        return [entry is not None and entry.pool in there for entry in found]

    def load_blocking(self, keys: Sequence[ChunkKey], into: Sequence[memoryview]) -> list[int]:
        memory, batches, pool = self._opened()
        sizes = [MISS] * len(keys)
        entries: dict[int, Entry] = {}
        items: list[Item] = []
        for index, (entry, buffer) in enumerate(zip(pool.entries(keys), into, strict=True)):
            if entry is None or entry.nbytes > min(buffer.nbytes, self._slot_bytes):
                continue
            fd = self._file_of(entry.pool)
            if fd is None:
                continue
            entries[index] = entry
            items.append(Item(index, buffer[: entry.nbytes], entry.offset, fd))
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

    def store_blocking(
        self, keys: Sequence[ChunkKey], sources: Sequence[memoryview]
    ) -> list[StoreOutcome]:
        memory, batches, pool = self._opened()
        outcomes = [StoreOutcome.NOT_ADMITTED] * len(keys)
        entries: dict[int, Entry] = {}
        items: list[Item] = []
        try:
            for index, found in enumerate(pool.entries(keys)):
                if found is not None:
                    if self._file_of(found.pool) is not None:
                        outcomes[index] = StoreOutcome.ALREADY_PRESENT
                        continue
                    self._links.remove(keys[index])  # its pool is gone
                source = sources[index]
                if entry := pool.reserve(source.nbytes):
                    entries[index] = entry
                    items.append(Item(index, source, entry.offset, pool.fd))
            if items:
                with memory.lane() as lane:
                    batches.write(items, lane)
                if self._config.fsync:
                    os.fdatasync(pool.fd)
            for index in list(entries):
                published = pool.publish(keys[index], entries[index])
                del entries[index]  # it has been published or given back
                outcomes[index] = StoreOutcome.STORED if published else StoreOutcome.ALREADY_PRESENT
        except OSError as error:
            raise BackendUnavailable(f"can't sync {pool.path}: {error.strerror}") from error
        except BackendError as error:
            raise self._about(error, "write to") from error
        finally:
            for entry in entries.values():
                pool.give_back(entry)
        return outcomes

    async def delete(self, keys: Sequence[ChunkKey]) -> int:
        return await self._run(self._delete, keys)

    async def clear(self) -> int:
        return await self._run(self._clear)

    def usage(self) -> tuple[int, int]:
        return (0, 0) if self._slots is None else self._slots.usage()

    # -- one chunk -------------------------------------------------------------------------

    def _delete(self, keys: Iterable[ChunkKey]) -> int:
        _, _, pool = self._opened()
        count = 0
        for key in keys:
            count += self._links.remove(key)
            pool.forget(key)
        return count

    def _clear(self) -> int:
        return self._delete([key for key, _ in self._links.oldest_first()])

    def _file_of(self, pool: str) -> int | None:
        """The open file of a pool, registered; ``None`` if it is gone."""
        if self._slots is None or self._agent is None:
            return None
        if pool == self._slots.name:
            return self._slots.fd
        with self._lock:
            if pool not in self._others:
                self._others[pool] = self._open_other(self._agent, pool)
            return self._others[pool]

    def _open_other(self, agent: Agent, pool: str) -> int | None:
        flags = os.O_RDONLY | os.O_CLOEXEC | (_DIRECT if self._config.direct_io else 0)
        try:
            fd = os.open(self._links.data_file(pool), flags)
        except OSError:
            return None  # gone, or somebody else's and not to be read
        try:
            agent.register("FILE", [(0, os.fstat(fd).st_size, fd, "")])
        except BackendError:
            os.close(fd)
            return None
        return fd

    def _opened(self) -> tuple[Memory, Batches, Pool]:
        if self._memory is None or self._batches is None or self._slots is None:
            why = "was opened for lookups only" if self._lookup_only else "isn't open"
            raise BackendUnavailable(f"the backend {why}")
        return self._memory, self._batches, self._slots

    def _about(self, error: BackendError, doing: str) -> BackendError:
        """``error`` with what may be its cause: NIXL itself doesn't tell."""
        room = os.statvfs(self._config.path or "/")
        return type(error)(
            f"can't {doing} the pools in {self._links.folder}: {error}. NIXL names no cause; "
            f"{room.f_bavail * room.f_frsize} bytes are free there, and a file that was cut short "
            "or a disk that fails looks like this: see the kernel's log"
        )
