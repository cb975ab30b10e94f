"""Keeps chunks as files below one folder: a disk tier, or a shared file system.

    PATH/<namespace fingerprint>/<first byte of the key>/<key>

A file is complete from the moment it has its name. Knows what is in the
folder and what has to go; how files are read and written is `filesystem_io`'s
business, and what the bytes mean is nobody's here.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from pydantic import BaseModel, ConfigDict, Field

from lmcache_core.builtin.filesystem_index import FileIndex
from lmcache_core.builtin.filesystem_io import ChunkFiles, backend_error, free_bytes, remove
from lmcache_core.errors import BackendRejected
from lmcache_core.hookspecs import hookimpl
from lmcache_core.keys import ChunkKey
from lmcache_core.storage import (
    MISS,
    BackendCapabilities,
    BackendContext,
    BlockingBackend,
    StorageBackendDescriptor,
    StoreOutcome,
)

logger = logging.getLogger(__name__)

_GIB = 1 << 30
_FULL = (errno.ENOSPC, errno.EDQUOT)
_REMEDY = "make it a folder that this user can write to, or set `path` to another one"


class FilesystemConfig(BaseModel):
    """Options of the ``filesystem`` backend."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Path = Field(description="Folder for the chunk files; made if it isn't there.")
    max_size_gib: float | None = Field(
        None,
        gt=0,
        description="Most that the chunk files of one model and rank may take, in GiB; the least "
        "recently used go first. Unset: no bound but min_free_gib.",
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

    Several processes may share a folder. Each keeps to ``max_size_gib`` with the files that it
    found at its start, loaded or wrote; what others have written since then it doesn't count.
    """

    def __init__(self, config: FilesystemConfig) -> None:
        self._config = config
        self._top = config.path.expanduser().absolute()
        self._folder = self._top
        self._index = FileIndex(None)
        self._files = ChunkFiles("filesystem", direct=False, fsync=False)
        self._min_free_bytes = int(config.min_free_gib * _GIB)

    @property
    def capabilities(self) -> BackendCapabilities:
        # A call keeps one thread busy: small batches let a long prefix use several.
        return BackendCapabilities(
            shared=True, persistent=True, preferred_batch=8, max_concurrency=8
        )

    def open_blocking(self, context: BackendContext) -> None:
        bound = self._config.max_size_gib
        self._folder = self._top / context.namespace.fingerprint
        self._index = FileIndex(None if bound is None else int(bound * _GIB))
        self._files = ChunkFiles(
            context.name, direct=self._config.direct_io, fsync=self._config.fsync
        )
        try:
            if context.lookup_only:
                if self._top.exists() and not self._top.is_dir():
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
                return
            self._files.make_folder(self._top)
            self._files.follow(self._top)
            self._files.make_folder(self._folder)
            self._files.settle_all(self._folder)
            self._probe()
            self._remove(self._index.fill(self._scan()))
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
            return [self._load(key, buffer) for key, buffer in zip(keys, into, strict=True)]
        except OSError as error:
            raise backend_error(error, "read from", self._folder) from error

    def store_blocking(
        self, keys: Sequence[ChunkKey], sources: Sequence[memoryview]
    ) -> list[StoreOutcome]:
        try:
            return [self._store(key, source) for key, source in zip(keys, sources, strict=True)]
        except OSError as error:
            raise backend_error(error, "write to", self._folder) from error

    async def delete(self, keys: Sequence[ChunkKey]) -> int:
        return await self._run(self._delete, keys)

    async def clear(self) -> int:
        return await self._run(self._clear)

    def usage(self) -> tuple[int, int]:
        return self._index.usage()

    def close_blocking(self) -> None:
        self._index.clear()

    # -- one chunk -------------------------------------------------------------------------

    def _place(self, key: ChunkKey) -> str:
        name = key.hex()
        return f"{self._folder}/{name[:2]}/{name}"

    def _size(self, key: ChunkKey) -> int:
        """Bytes of the key's file, 0 if there is none."""
        try:
            facts = os.stat(self._place(key))
        except (FileNotFoundError, NotADirectoryError):
            return 0
        return facts.st_size if stat.S_ISREG(facts.st_mode) else 0

    def _sizes(self, keys: Sequence[ChunkKey]) -> list[int]:
        try:
            return [self._size(key) for key in keys]
        except OSError as error:
            raise backend_error(error, "look into", self._folder) from error

    def _load(self, key: ChunkKey, into: memoryview) -> int:
        size = self._files.read(Path(self._place(key)), into)
        if size != MISS:
            self._index.seen(key, size)
        elif not self._size(key):
            self._index.forget(key)
        return size

    def _store(self, key: ChunkKey, source: memoryview) -> StoreOutcome:
        size = source.nbytes
        if not size:
            return StoreOutcome.NOT_ADMITTED  # an empty file is what a crash leaves behind
        # A file of another length is a torn one or another serde's: it is replaced.
        if self._size(key) == size:
            self._index.seen(key, size)
            return StoreOutcome.ALREADY_PRESENT
        victims = self._index.reserve(size)
        if victims is None:
            return StoreOutcome.NOT_ADMITTED
        try:
            self._remove(victims)
            if not self._leaves_enough_free(size) or not self._write(key, source):
                return StoreOutcome.NOT_ADMITTED
            self._index.seen(key, size)
            return StoreOutcome.STORED
        finally:
            self._index.release(size)

    def _leaves_enough_free(self, size: int) -> bool:
        """Whether ``size`` bytes may be written; evicts if that is what it takes."""
        lacking = self._min_free_bytes + size - free_bytes(self._top)
        if lacking <= 0:
            return True
        victims = self._index.oldest(lacking)
        if victims is None:
            return False  # somebody else fills the disk: giving up all of ours wouldn't help
        self._remove(victims)
        return self._min_free_bytes + size <= free_bytes(self._top)

    def _write(self, key: ChunkKey, source: memoryview) -> bool:
        """Publish a file; ``False`` if the disk or the quota is full even after evicting."""
        path = Path(self._place(key))
        if self._write_once(path, source):
            return True
        victims = self._index.oldest(source.nbytes)
        if victims is None:
            return False
        self._remove(victims)
        return self._write_once(path, source)

    def _write_once(self, path: Path, source: memoryview) -> bool:
        try:
            try:
                self._files.write(path, source)
            except FileNotFoundError:
                self._files.make_folder(path.parent)
                self._files.write(path, source)
        except OSError as error:
            if error.errno in _FULL:
                return False
            raise
        return True

    # -- the folder ------------------------------------------------------------------------

    def _probe(self) -> None:
        try:
            self._files.probe(self._folder)
        except OSError as error:
            if error.errno not in _FULL:  # what is there can still be read
                raise

    def _remove(self, keys: Iterable[ChunkKey]) -> None:
        for key in keys:
            remove(Path(self._place(key)))

    def _delete(self, keys: Sequence[ChunkKey]) -> int:
        count = 0
        for key in keys:
            self._index.forget(key)
            count += self._unlink(self._place(key))
        return count

    def _clear(self) -> int:
        try:
            count = sum(self._unlink(self._place(key)) for key, _ in self._scan())
        except OSError as error:
            raise backend_error(error, "look into", self._folder) from error
        self._index.clear()
        return count

    def _unlink(self, place: str) -> bool:
        try:
            os.unlink(place)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise backend_error(error, "delete", Path(place)) from error
        return True

    def _scan(self) -> list[tuple[ChunkKey, int]]:
        """Every chunk in the folder with its size, oldest first; sweeps what crashes left."""
        found: list[tuple[int, ChunkKey, int]] = []
        for entry in self._entries():
            path = Path(entry.path)
            try:
                facts = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue  # another process evicted it
            if entry.name.startswith(".") and entry.name.endswith(".tmp"):
                if self._files.is_abandoned(path, facts.st_mtime):
                    remove(path)
                continue
            key = _key(path)
            if key is None or not stat.S_ISREG(facts.st_mode):
                continue  # not ours
            if facts.st_size:
                found.append((facts.st_mtime_ns, key, facts.st_size))
            else:
                remove(path)
        found.sort()
        return [(key, size) for _, key, size in found]

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        try:
            with os.scandir(self._folder) as level:
                folders = list(level)
        except FileNotFoundError:
            return
        for folder in folders:
            if folder.is_dir(follow_symlinks=False):
                with os.scandir(folder) as level:
                    yield from level
            else:
                yield folder


def _key(path: Path) -> ChunkKey | None:
    """The key that a file is named after, or ``None`` for a file that isn't ours."""
    name = path.name
    if path.parent.name != name[:2] or name != name.lower():
        return None
    try:
        return ChunkKey(bytes.fromhex(name))
    except ValueError:
        return None


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
