"""A pool of equal slots in a few files, and what lies in it and in the pools of other processes.

    PATH/FINGERPRINT/pool-ID.index     what lies in the slots of one process: see `index`
    PATH/FINGERPRINT/pool-ID.N.data    the slots, allocated at the start: see `slots`

ID is random and never used again. A process has the pool whose index it holds a lock on; if it has
ended, the next one takes it over.

Knows slots and what was used last. Moves no bytes of values.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import re
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Final

from lmcache_backend_nixl.index import KEY_BYTES, Entry, Index, OwnIndex
from lmcache_backend_nixl.slots import Shape
from lmcache_core import BackendRejected, BackendUnavailable, ChunkKey

_INDEX: Final = re.compile(r"pool-([0-9a-f]{16})\.index")
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_COARSE_NS: Final = 2 * 10**9
"""Within this a folder may change twice and say the same time; FAT's, the coarsest, is that."""


def data_file(folder: Path, pool: str, number: int) -> Path:
    """Where some of a pool's slots are, or a part of each."""
    return folder / f"pool-{pool}.{number}.data"


def index_file(folder: Path, pool: str) -> Path:
    """Where it says what lies in them."""
    return folder / f"pool-{pool}.index"


class Others:
    """The pools in a folder that aren't this process's own. Thread-safe."""

    def __init__(self, folder: Path, own: str | None = None) -> None:
        self._folder = folder
        self._own = own
        self._lock = threading.Lock()
        self._indexes: dict[str, Index] = {}
        self._gone: set[str] = set()
        self._listed: int | None = None

    def find(self, keys: Sequence[ChunkKey]) -> list[Entry | None]:
        """Where the value of each key lies, if any pool has it.

        Raises:
            BackendUnavailable: the file system failed, or one's own pool is gone.
        """
        with self._lock:
            indexes = self._refreshed()
            return [_first(indexes, key) for key in keys]

    def still(self, key: ChunkKey, entry: Entry) -> bool:
        """Whether nothing else was written where ``entry`` is since it was found."""
        with self._lock:
            index = self._indexes.get(entry.pool)
            if index is None:
                return False
            self._refresh(index)
            return index.entries.get(key) == entry

    def withdraw(self, keys: Iterable[ChunkKey] | None) -> set[ChunkKey]:
        """Have everybody forget ``keys``, or everything; answer which there were.

        Raises:
            BackendUnavailable: the file system failed, or pools aren't to be written.
        """
        withdrawn: set[ChunkKey] = set()
        with self._lock:
            for index in self._refreshed():
                some = index.entries.keys() & (index.entries if keys is None else set(keys))
                try:
                    index.withdraw(index.entries[key] for key in some)
                except FileNotFoundError:
                    continue  # the pool is gone
                except OSError as error:
                    raise _unusable(self._folder, error) from error
                withdrawn |= some
        return withdrawn

    def take_gone(self) -> set[str]:
        """The names of pools that vanished since the last call."""
        with self._lock:
            gone, self._gone = self._gone, set()
            return gone

    def close(self) -> None:
        """Call nothing afterwards."""
        with self._lock:
            for index in self._indexes.values():
                index.close()
            self._indexes.clear()

    def _refreshed(self) -> list[Index]:
        """Every index there is now, up to date."""
        try:
            self._list()
        except FileNotFoundError:
            self._keep(set())
        except OSError as error:
            raise _unusable(self._folder, error) from error
        for index in self._indexes.values():
            self._refresh(index)
        return list(self._indexes.values())

    def _refresh(self, index: Index) -> None:
        try:
            index.refresh()
        except OSError as error:
            raise _unusable(self._folder, error) from error

    def _list(self) -> None:
        changed = os.stat(self._folder).st_mtime_ns
        if changed == self._listed:
            return
        now = time.time_ns()
        self._keep(set(_pools_in(self._folder)))
        self._listed = changed if now - changed > _COARSE_NS else None

    def _keep(self, pools: set[str]) -> None:
        if self._own is not None and self._own not in pools:
            raise BackendUnavailable(
                f"somebody removed {index_file(self._folder, self._own)} while it was in use; "
                "restart this engine (to empty a pool that is in use: lmcache clear)"
            )
        for pool in self._indexes.keys() - pools:
            self._indexes.pop(pool).close()
            self._gone.add(pool)
        for pool in pools - self._indexes.keys() - {self._own}:
            with suppress(FileNotFoundError, PermissionError):  # just removed, or somebody else's
                self._indexes[pool] = Index(index_file(self._folder, pool), pool)


class Pool:
    """The slots that belong to this process. Thread-safe."""

    def __init__(self, folder: Path, slots: int, shape: Shape, *, flags: int) -> None:
        """Take over a pool that nobody has, or make one.

        Raises:
            BackendRejected: it can't be made that large there.
            OSError: the file system refuses.
        """
        self.shape = shape
        self.bytes_in_each = shape.bytes_in_each(slots)
        self._folder = folder
        self._lock = threading.Lock()
        self.name, fd = self._take()
        self._index = OwnIndex(index_file(folder, self.name), self.name, fd)
        self.fds: tuple[int, ...] = ()
        """Its data files."""
        try:
            there = self._allocate(slots, flags)
            self._held = OrderedDict(self._index.recover(slots, shape, there))
        except BaseException:
            self._close_files()
            self._index.close()
            raise
        self._held_bytes = sum(entry.nbytes for entry in self._held.values())
        taken = {entry.slot for entry in self._held.values()}
        self._free = deque(slot for slot in range(slots) if slot not in taken)
        self._others = Others(folder, self.name)

    def usage(self) -> tuple[int, int]:
        """Chunks and bytes."""
        with self._lock:
            return len(self._held), self._held_bytes

    def find(self, keys: Sequence[ChunkKey]) -> list[Entry | None]:
        """Where the value of each key lies, here or in another pool; ours go last now.

        Raises:
            BackendUnavailable: the file system failed, or the pool was removed.
        """
        with self._lock:
            self._heed()
            found = list(map(self._held.get, keys))
            for key in reversed(keys):  # the beginning of a prefix goes last
                if key in self._held:
                    self._held.move_to_end(key)
        missing = [index for index, entry in enumerate(found) if entry is None]
        if missing:
            theirs = self._others.find([keys[index] for index in missing])
            for index, entry in zip(missing, theirs, strict=True):
                found[index] = entry
        return found

    def still(self, key: ChunkKey, entry: Entry) -> bool:
        """Whether nothing else was written where ``entry`` is since it was found."""
        if entry.pool == self.name:
            return self._held.get(key) is entry
        return self._others.still(key, entry)

    def take_gone(self) -> set[str]:
        """The names of other pools that vanished since the last call."""
        return self._others.take_gone()

    def reserve(self, values: Sequence[tuple[ChunkKey, int]]) -> list[int | None]:
        """A slot for each value, a key and a length, emptied of what was used least recently.

        ``None``: the value is too long, or every slot is being written to.

        Raises:
            BackendUnavailable: the file system failed.
        """
        with self._lock:
            fits = [self._fits(*value) for value in values]
            wanted = sum(fits)
            self._evict(min(wanted - len(self._free), len(self._held)))
            # In order, because neighbours in the index are written together.
            slots = iter(sorted(self._free.popleft() for _ in range(min(wanted, len(self._free)))))
            return [next(slots, None) if fit else None for fit in fits]

    def give_back(self, slots: Iterable[int | None]) -> None:
        """Slots that were reserved and nothing was published from."""
        with self._lock:
            self._free.extend(slot for slot in slots if slot is not None)

    def publish(self, values: Sequence[tuple[int, ChunkKey, int]]) -> list[bool]:
        """Make values visible that are all there: a slot, a key and a length for each.

        ``False``: this process has one of that name already, and the slot is free again. Whatever
        happens, the slots are no longer the caller's.

        Raises:
            BackendUnavailable: the file system failed. The slots stay out of use: some of them may
                have been published.
        """
        with self._lock:
            new = {value[1]: value for value in values if value[1] not in self._held}
            try:
                last_first = list(reversed(new.values()))
                entries = self._index.publish(last_first)
            except OSError as error:
                raise _unusable(self._folder, error) from error
            for (_, key, _), entry in zip(last_first, entries, strict=True):
                self._held[key] = entry
                self._held_bytes += entry.nbytes
            published = [new.get(value[1]) == value for value in values]
            self._free.extend(
                slot for (slot, _, _), done in zip(values, published, strict=True) if not done
            )
            return published

    def sync(self) -> None:
        """Return once what was written to slots would survive a power cut.

        Raises:
            BackendUnavailable: the file system failed.
        """
        self._sync(self.fds)

    def sync_index(self) -> None:
        """The same for what was published.

        Raises:
            BackendUnavailable: the file system failed.
        """
        self._sync([self._index.fd])

    def delete(self, keys: Sequence[ChunkKey] | None) -> int:
        """Forget ``keys``, or everything, in this pool and all others; answer how many there were.

        Raises:
            BackendUnavailable: the file system failed, or other pools aren't to be written.
        """
        with self._lock:
            self._heed()
            own = set(self._held if keys is None else self._held.keys() & set(keys))
            self._drop(own)
        return len(own | self._others.withdraw(keys))

    def close(self, *, keep: bool) -> None:
        """Let go of the pool; unless ``keep``, remove it."""
        with self._lock:
            self._others.close()
            if not keep:
                self._index.vanish()
                self._remove_files()
            self._close_files()
            self._index.close()
            self._held.clear()
            self._held_bytes = 0

    def _sync(self, fds: Iterable[int]) -> None:
        try:
            for fd in fds:
                os.fdatasync(fd)
        except OSError as error:
            raise BackendUnavailable(f"can't sync {self._folder}: {error.strerror}") from error

    def _fits(self, key: ChunkKey, nbytes: int) -> bool:
        return 0 < nbytes <= self.shape.slot_bytes and len(key) <= KEY_BYTES

    def _heed(self) -> None:
        """Let go of what another process had forgotten."""
        try:
            withdrawn = self._index.withdrawn(self._held.items())
        except OSError as error:
            raise _unusable(self._folder, error) from error
        self._drop(set(withdrawn))

    def _evict(self, count: int) -> None:
        self._drop(set(itertools.islice(self._held, max(0, count))))

    def _drop(self, keys: Set[ChunkKey]) -> None:
        """Forget values; their slots are free once nobody can find them."""
        if not keys:
            return
        slots = [self._held[key].slot for key in keys]
        try:
            self._index.empty(slots)
        except OSError as error:
            raise _unusable(self._folder, error) from error
        for key in keys:
            self._held_bytes -= self._held.pop(key).nbytes
        self._free.extend(slots)

    def _take(self) -> tuple[str, int]:
        for name in [*_pools_in(self._folder), secrets.token_hex(8)]:
            path = index_file(self._folder, name)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                continue
            except OSError:
                os.close(fd)
                raise
            if _is_at(fd, path):  # and wasn't removed just before it was locked
                return name, fd
            os.close(fd)
        raise BackendUnavailable(f"{self._folder} has no pool that could be locked")

    def _allocate(self, slots: int, flags: int) -> int:
        """Open the data files, and have room for all slots; answer how many there were in them."""
        paths = [data_file(self._folder, self.name, i) for i in range(self.shape.files)]
        for path in paths:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | flags, 0o600)
            self.fds = (*self.fds, fd)
        for path in self._data_files() - set(paths):
            path.unlink(missing_ok=True)  # slots were in more files
        before = [os.fstat(fd).st_size for fd in self.fds]
        try:
            for fd, size in zip(self.fds, before, strict=True):
                if size > self.bytes_in_each:
                    os.ftruncate(fd, self.bytes_in_each)
                os.posix_fallocate(fd, 0, self.bytes_in_each)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            room = os.statvfs(self._folder)
            for fd, size in zip(self.fds, before, strict=True):
                os.ftruncate(fd, size)
            if not any(before):
                self._index.vanish()
                self._remove_files()
            raise BackendRejected(
                f"there is no room for {slots * self.shape.slot_bytes} bytes in {self._folder}, "
                f"where {room.f_bavail * room.f_frsize} are free: pool_size (nixl_pool_size) is "
                f"{slots} slots of {self.shape.slot_bytes} bytes; lower it"
            ) from error
        return self.shape.slots_in(min(before))

    def _remove_files(self) -> None:
        """The index last: as long as it is there, somebody will take over what is left."""
        for path in self._data_files():
            path.unlink(missing_ok=True)
        index_file(self._folder, self.name).unlink(missing_ok=True)

    def _data_files(self) -> set[Path]:
        return set(self._folder.glob(f"pool-{self.name}.*.data"))

    def _close_files(self) -> None:
        for fd in self.fds:
            os.close(fd)


def _pools_in(folder: Path) -> list[str]:
    """The names of all pools there are."""
    return sorted(match[1] for match in map(_INDEX.fullmatch, os.listdir(folder)) if match)


def _first(indexes: Iterable[Index], key: ChunkKey) -> Entry | None:
    for index in indexes:
        if (entry := index.entries.get(key)) is not None:
            return entry
    return None


def _unusable(folder: Path, error: OSError) -> BackendUnavailable:
    return BackendUnavailable(f"can't use the indexes in {folder}: {error.strerror}")


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
