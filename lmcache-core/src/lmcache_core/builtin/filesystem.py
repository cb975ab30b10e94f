"""Keeps chunks as files below one folder: a disk tier, or a shared file system.

A file is complete from the moment it has its name. Where files lie is `filesystem_scan`'s business,
how they are read and written `filesystem_io`'s, and what has to go `filesystem_room`'s. What the
bytes mean is nobody's here, but for the header that says whose they are.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from pydantic import BaseModel, ConfigDict, Field

from lmcache_core.builtin import filesystem_manifest as manifest
from lmcache_core.builtin.filesystem_io import (
    FULL,
    ChunkFiles,
    backend_error,
    free_bytes,
    size_of,
    sync_folder,
)
from lmcache_core.builtin.filesystem_ledger import noted
from lmcache_core.builtin.filesystem_room import ATTEMPTS, FolderRoom
from lmcache_core.builtin.filesystem_scan import folders, place, scan
from lmcache_core.chunks.frame import MAGIC, may_start
from lmcache_core.chunks.keys import ChunkKey
from lmcache_core.contracts.hookspecs import hookimpl
from lmcache_core.contracts.storage import (
    MISS,
    BackendCapabilities,
    BackendContext,
    BlockingBackend,
    StorageBackendDescriptor,
    StoreOutcome,
)
from lmcache_core.errors import BackendRejected

logger = logging.getLogger(__name__)

_GIB = 1 << 30
_REMEDY = "make it a folder that this user can write to, or set `path` to another one"


class FilesystemConfig(BaseModel):
    """Options of the ``filesystem`` backend."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Path = Field(description="Folder for the chunk files; made if it isn't there.")
    max_size_gib: float | None = Field(
        None,
        gt=0,
        description="Most that all chunk files below the folder may take, whoever wrote them, in "
        "GiB; the least recently used go first. Unset: no bound but min_free_gib.",
    )
    min_free_gib: float = Field(
        1.0, ge=0, description="Keep this much of the file system free, in GiB."
    )
    direct_io: bool = Field(
        False, description="Go past the page cache (O_DIRECT) where the file system can."
    )
    fsync: bool = Field(
        False, description="Acknowledge a chunk only when it would survive a power cut."
    )


class FilesystemBackend(BlockingBackend):
    """One file a chunk.

    Several processes may share a folder, for one namespace or several, and keep to ``max_size_gib``
    together: see `filesystem_usage`.
    """

    def __init__(self, config: FilesystemConfig) -> None:
        self._config = config
        self._top = config.path.expanduser().absolute()
        self._min_free_bytes = int(config.min_free_gib * _GIB)
        self._prepare("filesystem", "")

    def _prepare(self, name: str, space: str) -> None:
        bound, fsync = self._config.max_size_gib, self._config.fsync
        self._folder = self._top / space
        self._files = ChunkFiles(name, direct=self._config.direct_io, fsync=fsync)
        max_bytes = None if bound is None else int(bound * _GIB)
        self._room = FolderRoom(self._top, space, self._files, max_bytes, name=name)
        self._index = self._room.index
        self._writes = False

    @property
    def capabilities(self) -> BackendCapabilities:
        # A call keeps one thread busy: small batches let a long prefix use several.
        return BackendCapabilities(
            shared=True, persistent=True, preferred_batch=8, max_concurrency=8
        )

    def open_blocking(self, context: BackendContext) -> None:
        self._prepare(context.name, context.namespace.fingerprint)
        try:
            if context.lookup_only:
                if self._top.exists() and not self._top.is_dir():
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
                return
            self._become_writer(context)
        except FileExistsError:
            raise BackendRejected(f"{self._top} is a file, not a folder; {_REMEDY}") from None
        except FileNotFoundError as error:
            raise BackendRejected(f"can't make {self._top}: {error.strerror}; {_REMEDY}") from error
        except OSError as error:
            raise backend_error(error, "use", self._top, _REMEDY) from error
        count, nbytes = self._index.usage()
        logger.info(
            "%s: found %d chunks, %.2f GiB, in %s", context.name, count, nbytes / _GIB, self._folder
        )

    def _become_writer(self, context: BackendContext) -> None:
        self._files.make_folder(self._top)
        self._files.follow(self._top)
        self._writes = True
        try:
            # First of all: the folder of a namespace without a writer may be removed.
            self._room.open()
            self._files.make_folder(self._folder)
            self._files.settle_all(self._folder)
            self._probe()
            manifest.keep(self._folder, context.namespace, self._files, context.name)
            self._room.keep_bound()
        except BaseException:
            self.close_blocking()
            raise

    def contains_blocking(self, keys: Sequence[ChunkKey]) -> list[bool]:
        # Always asks the file system: other processes write and evict here too, and a stat takes
        # about two microseconds.
        return [size > 0 for size in self._sizes(keys)]

    async def sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        """Bytes of each key's file, 0 where there is none.

        Raises:
            BackendError: as `contains`.
        """
        return await self._run(self._sizes, keys)

    def load_blocking(self, keys: Sequence[ChunkKey], into: Sequence[memoryview]) -> list[int]:
        try:
            self._room.used()
            return [self._load(key, buffer) for key, buffer in zip(keys, into, strict=True)]
        except OSError as error:
            raise backend_error(error, "read from", self._folder) from error

    def store_blocking(
        self, keys: Sequence[ChunkKey], sources: Sequence[memoryview]
    ) -> list[StoreOutcome]:
        try:
            self._room.used()
            return [self._store(key, source) for key, source in zip(keys, sources, strict=True)]
        except OSError as error:
            raise backend_error(error, "write to", self._folder) from error

    async def delete(self, keys: Sequence[ChunkKey]) -> int:
        return await self._run(self._delete, keys)

    async def clear(self) -> int:
        return await self._run(self._clear)

    async def purge(self, most: int) -> tuple[int, int, bool]:
        """Forget up to ``most`` chunks of the namespace.

        Answers how many, their bytes, and whether there may be more.

        Raises:
            BackendError: as `clear`.
        """
        return await self._run(self._purge, most)

    def usage(self) -> tuple[int, int]:
        return self._index.usage()

    @staticmethod
    def usage_below(top: Path) -> dict[str, int]:
        """Bytes of each namespace's files below ``top``, whoever wrote them, as noted last."""
        return noted(top)

    @staticmethod
    def manifest_of(top: Path, space: str) -> Mapping[str, object]:
        """What the folder of the namespace ``space`` says of itself; never trusted."""
        return manifest.read(top / space) or {}

    def close_blocking(self) -> None:
        if not self._writes:
            return
        self._writes = False
        try:
            self._room.close()
        except OSError as error:
            raise backend_error(error, "leave", self._folder) from error
        finally:
            self._index.clear()

    # -- one chunk -------------------------------------------------------------------------

    def _place(self, key: ChunkKey) -> str:
        return place(self._folder, key)

    def _sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        try:
            return [size_of(self._place(key)) for key in keys]
        except OSError as error:
            raise backend_error(error, "look into", self._folder) from error

    def _load(self, key: ChunkKey, into: memoryview) -> int:
        path = self._place(key)
        size = self._files.read(Path(path), into)
        if size != MISS:
            self._index.seen(key, size)
        elif not size_of(path):
            self._index.forget(key)
        return size

    def _store(self, key: ChunkKey, source: memoryview) -> StoreOutcome:
        size = source.nbytes
        if not size:
            return StoreOutcome.NOT_ADMITTED  # an empty file is what a crash leaves behind
        # A file of another length is a torn one or another serde's: it is replaced.
        if size_of(self._place(key)) == size and self._is_good(key, source):
            self._index.seen(key, size, good=True)
            return StoreOutcome.ALREADY_PRESENT
        if not self._room.reserve(size):
            return StoreOutcome.NOT_ADMITTED
        replaced: int | None = None
        try:
            if self._leaves_enough_free(size):
                replaced = self._write(key, source)
        finally:
            self._room.release(size, written=replaced is not None, replaced=replaced or 0)
        if replaced is None:
            return StoreOutcome.NOT_ADMITTED
        self._index.seen(key, size, good=True)
        return StoreOutcome.STORED

    def _is_good(self, key: ChunkKey, source: memoryview) -> bool:
        """Whether the file that is there, as long as ``source``, needn't be written again.

        A file that this process didn't write is looked at, once: a power cut leaves files of the
        right size behind that hold something else.
        """
        if self._index.is_good(key, source.nbytes):
            return True
        head = self._files.look(Path(self._place(key)))
        if head is None:
            return False
        framed = source[: len(MAGIC)] == MAGIC
        return not framed or may_start(head, key=key, nbytes=source.nbytes)

    def _leaves_enough_free(self, size: int) -> bool:
        """Whether ``size`` bytes may be written; evicts if that is what it takes."""
        for _ in range(ATTEMPTS):  # what was made free may be taken by another
            lacking = self._min_free_bytes + size - self._free()
            if lacking <= 0:
                return True
            # Where somebody else fills the disk, giving up all of ours wouldn't help.
            if not self._room.make_free(lacking):
                return False
        return self._min_free_bytes + size <= self._free()

    def _free(self) -> int:
        try:
            return free_bytes(self._top)
        except FileNotFoundError:  # somebody deleted it
            self._files.make_folder(self._top)
            return free_bytes(self._top)

    def _write(self, key: ChunkKey, source: memoryview) -> int | None:
        """Publish a file; answers the bytes that were there in its place.

        ``None`` if the disk or the quota is full even after evicting.
        """
        path = Path(self._place(key))
        replaced = self._write_once(path, source)
        if replaced is None and self._room.make_free(source.nbytes):
            return self._write_once(path, source)
        return replaced

    def _write_once(self, path: Path, source: memoryview) -> int | None:
        try:
            try:
                return self._files.write(path, source)
            except FileNotFoundError:
                self._files.make_folder(path.parent)
                return self._files.write(path, source)
        except OSError as error:
            if error.errno in FULL:
                return None
            raise

    # -- the folder ------------------------------------------------------------------------

    def _probe(self) -> None:
        try:
            self._files.probe(self._folder)
        except OSError as error:
            if error.errno not in FULL:  # what is there can still be read
                raise

    def _delete(self, keys: Sequence[ChunkKey]) -> int:
        paths = [self._place(key) for key in keys]
        gone = sum(map(self._unlink, paths))
        for key in keys:
            self._index.forget(key)
        try:
            self._settle_removals({Path(path).parent for path in paths})
        except OSError as error:
            raise backend_error(error, "delete from", self._folder) from error
        return gone

    def _clear(self) -> int:
        try:
            paths = [self._place(key) for _, key, _ in scan(self._folder, self._files)]
            gone = sum(map(self._unlink, paths))
            self._index.clear()
            self._settle_removals(folders(self._folder) if self._config.fsync else ())
            self._room.settle()
        except OSError as error:
            raise backend_error(error, "look into", self._folder) from error
        return gone

    def _purge(self, most: int) -> tuple[int, int, bool]:
        try:
            found = [(key, size) for _, key, size in islice(scan(self._folder, self._files), most)]
            gone = [(key, size) for key, size in found if self._unlink(self._place(key))]
            for key, _ in found:
                self._index.forget(key)
            self._settle_removals({Path(self._place(key)).parent for key, _ in gone})
            self._room.settle()
        except OSError as error:
            raise backend_error(error, "look into", self._folder) from error
        return len(gone), sum(size for _, size in gone), len(found) == most

    def _settle_removals(self, places: Iterable[Path]) -> None:
        """If durability was asked for, have what was removed from ``places`` gone for good.

        Whoever did it: an eviction doesn't wait for the disk, and must not be undone either.
        """
        if not self._config.fsync:
            return
        if sum(not _synced(folder) for folder in places):
            _synced(self._folder)  # of which it was gone itself

    def _unlink(self, path: str) -> bool:
        size = size_of(path)
        try:
            os.unlink(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise backend_error(error, "delete", Path(path)) from error
        self._room.removed(size)
        return True


def _synced(folder: Path) -> bool:
    """Make the names in ``folder`` durable, if it is there."""
    try:
        sync_folder(folder)
    except FileNotFoundError:
        return False
    return True


def config_from_url(url: str) -> dict[str, Any]:
    """Options from ``fs://[HOST[:PORT]]/PATH`` or ``file:///PATH``; a query sets other options.

    LMCache's ``fs://`` has a host that means nothing.

    Raises:
        ValueError: there is no absolute path in it.
    """
    parts = urlsplit(url)
    if parts.scheme == "file" and parts.netloc not in ("", "localhost"):
        raise ValueError(
            f"file:// takes an absolute path after an empty host; did you mean "
            f"file:///{parts.netloc}{parts.path}?"
        )
    path = unquote(parts.path)
    if not path.strip("/"):
        raise ValueError(f"there is no folder in it; write {parts.scheme}:///PATH")
    return {**dict(parse_qsl(parts.query, strict_parsing=bool(parts.query))), "path": path}


@hookimpl
def lmcache_storage_backends() -> list[StorageBackendDescriptor]:
    return [
        StorageBackendDescriptor(
            name="filesystem",
            summary="one file a chunk in a folder, on a disk or a shared file system",
            config=FilesystemConfig,
            create=FilesystemBackend,
            url_schemes=("fs", "file"),
            config_from_url=config_from_url,
            extra_config_keys={"fs_connector_use_odirect": "direct_io"},
        )
    ]
