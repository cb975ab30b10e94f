"""A pool of equal slots in one file, and what lies in them.

    PATH/FINGERPRINT/pool-ID.data    the slots of one process, allocated at the start
    PATH/FINGERPRINT/chunks/KEY      a symbolic link whose text is ID.NONCE.OFFSET.LENGTH

A link leads nowhere; it is an index entry that the file system makes and removes in one step, that
other processes can read, and that a restart finds. It is made once all of the value is in its slot
and removed before another value goes there. NONCE is other for each value, so a reader that finds
the same text before and after it read the slot has read that value and no other.

ID is random and never used again. A process has the pool that it holds a lock on; if it has ended,
the next one takes it over.

Knows slots, links and what was used last. Moves no bytes of values.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import re
import secrets
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from lmcache_core.errors import BackendRejected, BackendUnavailable
from lmcache_core.keys import ChunkKey

_LINK: Final = re.compile(r"([0-9a-f]{16})\.([0-9a-f]{16})\.(\d{1,18})\.(\d{1,18})")
_FILE: Final = re.compile(r"pool-([0-9a-f]{16})\.data")
_NO_LINK: Final = (errno.EINVAL, errno.ENOTDIR)
"""Something else has its name, or that of the folder."""
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Entry(NamedTuple):
    """Where a value lies."""

    text: str
    """Of its link: ``POOL.NONCE.OFFSET.LENGTH``."""
    pool: str
    offset: int
    nbytes: int

    @classmethod
    def of(cls, pool: str, nonce: int, offset: int, nbytes: int) -> Entry:
        """A value that gets a link only now; ``nonce`` has 64 bits."""
        return cls(f"{pool}.{nonce:016x}.{offset}.{nbytes}", pool, offset, nbytes)

    @classmethod
    def parse(cls, text: str) -> Entry | None:
        """Read a link's text; ``None`` if it isn't one of ours."""
        match = _LINK.fullmatch(text)
        return cls(text, match[1], int(match[3]), int(match[4])) if match else None


class Links:
    """The index of one namespace, which all processes share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._chunks = folder / "chunks"
        self._stem = f"{self._chunks}/"

    def make_folders(self) -> None:
        """Create what isn't there yet."""
        self._chunks.mkdir(parents=True, exist_ok=True)

    def text(self, key: ChunkKey) -> str | None:
        """The text of the link of ``key``; ``None`` if there is nothing.

        Of something that isn't a link, "".

        Raises:
            BackendUnavailable: the file system failed.
        """
        try:
            return os.readlink(self._place(key))
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno in _NO_LINK:
                return ""
            raise BackendUnavailable(f"can't look into {self._chunks}: {error.strerror}") from error

    def read(self, key: ChunkKey) -> Entry | None:
        """The entry of ``key``, if there is one.

        Raises:
            BackendUnavailable: the file system failed.
        """
        return Entry.parse(self.text(key) or "")

    def publish(self, key: ChunkKey, entry: Entry) -> bool:
        """Make ``entry`` visible; ``False`` if there is one already."""
        if self._link(key, entry):
            return True
        if self.read(key) is not None:
            return False
        self.remove(key)  # something that is no entry stood in its place
        return self._link(key, entry)

    def _link(self, key: ChunkKey, entry: Entry) -> bool:
        try:
            os.symlink(entry.text, self._place(key))
        except FileExistsError:
            return False
        except OSError as error:
            raise BackendUnavailable(f"can't write to {self._chunks}: {error.strerror}") from error
        return True

    def remove(self, key: ChunkKey, entry: Entry | None = None) -> bool:
        """Remove the entry of ``key``, or only ``entry``; answer whether it was there."""
        if entry is not None and self.read(key) != entry:
            return False
        try:
            os.unlink(self._place(key))
        except FileNotFoundError:
            return False
        except OSError as error:
            raise BackendUnavailable(
                f"can't remove from {self._chunks}: {error.strerror}"
            ) from error
        return True

    def oldest_first(self) -> list[tuple[ChunkKey, Entry | None]]:
        """Every key of the namespace, with ``None`` for one whose entry can't be read."""
        try:
            with os.scandir(self._chunks) as entries:
                found = [dated for dated in map(_dated, entries) if dated is not None]
        except FileNotFoundError:
            return []
        found.sort()
        return [(key, self.read(key)) for _, key in found]

    def data_file(self, pool: str) -> Path:
        """Where the slots of a pool are."""
        return self.folder / f"pool-{pool}.data"

    def _place(self, key: ChunkKey) -> str:
        return self._stem + key.hex()


class Pool:
    """The slots that belong to this process. Thread-safe."""

    def __init__(self, links: Links, slots: int, slot_bytes: int, *, flags: int) -> None:
        """Take over a pool that nobody has, or make one.

        Raises:
            BackendRejected: it can't be made that large there.
            OSError: the file system refuses.
        """
        self.slot_bytes = slot_bytes
        self.nbytes = slots * slot_bytes
        self._links = links
        self._lock = threading.Lock()
        self._held: OrderedDict[ChunkKey, Entry] = OrderedDict()
        self._nonces = itertools.count(secrets.randbits(64))
        self.name, self.fd = self._take(flags)
        self.path = links.data_file(self.name)
        try:
            self._allocate()
            self._recover()
        except BaseException:
            os.close(self.fd)
            raise
        taken = {entry.offset for entry in self._held.values()}
        offsets = range(0, self.nbytes, slot_bytes)
        self._free = deque(offset for offset in offsets if offset not in taken)

    def usage(self) -> tuple[int, int]:
        """Chunks and bytes."""
        with self._lock:
            return len(self._held), sum(entry.nbytes for entry in self._held.values())

    def reserve(self, nbytes: int) -> Entry | None:
        """A slot to write to, emptied of what was used least recently if need be.

        ``None``: the value is too long, or every slot is being written to.
        """
        if not 0 < nbytes <= self.slot_bytes:
            return None
        with self._lock:
            if not self._free:
                if not self._held:
                    return None
                key, victim = self._held.popitem(last=False)
                self._links.remove(key, victim)
                self._free.append(victim.offset)
            nonce = next(self._nonces) % 2**64
            return Entry.of(self.name, nonce, self._free.popleft(), nbytes)

    def give_back(self, entry: Entry) -> None:
        """A reserved slot that nothing was published from."""
        with self._lock:
            self._free.append(entry.offset)

    def publish(self, key: ChunkKey, entry: Entry) -> bool:
        """Make a value visible that is all there; ``False`` if another one has its name."""
        if not self._links.publish(key, entry):
            self.give_back(entry)
            return False
        with self._lock:
            stale = self._held.pop(key, None)  # somebody removed its link
            if stale is not None:
                self._free.append(stale.offset)
            self._held[key] = entry
        return True

    def entries(self, keys: Sequence[ChunkKey]) -> list[Entry | None]:
        """What the link of each key says; ours among them go last now.

        Raises:
            BackendUnavailable: the file system failed.
        """
        texts = list(map(self._links.text, keys))
        found: list[Entry | None] = []
        stale: list[ChunkKey] = []
        with self._lock:
            for key, text in zip(keys, texts, strict=True):
                held = self._held.get(key)
                if held is not None and held.text == text:
                    self._held.move_to_end(key)
                    found.append(held)
                    continue
                if held is not None:
                    stale.append(key)
                found.append(Entry.parse(text) if text else None)
        for key in stale:
            self.forget(key)
        return found

    def still(self, key: ChunkKey, entry: Entry) -> bool:
        """Whether nothing else was written where ``entry`` is since it was found."""
        # What is held here keeps its slot, even if somebody removed its link.
        return self._held.get(key) is entry or self._links.text(key) == entry.text

    def forget(self, key: ChunkKey) -> None:
        """Give up the slot of ``key`` if its link is gone, or is another one's. Others are fine."""
        with self._lock:
            held = self._held.get(key)
            # Looked at here, because it may just have been published anew.
            if held is not None and self._links.text(key) != held.text:
                del self._held[key]
                self._free.append(held.offset)

    def close(self, *, keep: bool) -> None:
        """Let go of the pool; unless ``keep``, remove it."""
        with self._lock:
            if not keep:
                for key, entry in self._held.items():
                    self._links.remove(key, entry)
                self.path.unlink(missing_ok=True)
            self._held.clear()
            os.close(self.fd)

    def _take(self, flags: int) -> tuple[str, int]:
        names = sorted(
            match[1] for match in map(_FILE.fullmatch, os.listdir(self._links.folder)) if match
        )
        for name in [*names, secrets.token_hex(8)]:
            path = self._links.data_file(name)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | flags, 0o600)
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
        raise BackendUnavailable(f"{self._links.folder} has no pool that could be locked")

    def _allocate(self) -> None:
        if os.fstat(self.fd).st_size > self.nbytes:
            os.ftruncate(self.fd, self.nbytes)
        try:
            os.posix_fallocate(self.fd, 0, self.nbytes)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            room = os.statvfs(self._links.folder)
            self.path.unlink(missing_ok=True)
            raise BackendRejected(
                f"there is no room for {self.nbytes} bytes in {self._links.folder}, where "
                f"{room.f_bavail * room.f_frsize} are free: pool_size (nixl_pool_size) is "
                f"{self.nbytes // self.slot_bytes} slots of {self.slot_bytes} bytes; lower it"
            ) from error

    def _recover(self) -> None:
        """Find what the last owner left, and drop what doesn't fit the slots as they are now."""
        for key, entry in self._links.oldest_first():
            if entry is None or entry.pool != self.name:
                continue
            fits = entry.offset % self.slot_bytes == 0 and 0 < entry.nbytes <= self.slot_bytes
            if fits and entry.offset + self.slot_bytes <= self.nbytes:
                self._held[key] = entry
            else:
                self._links.remove(key, entry)


def remove_orphans(links: Links, entries: Iterable[tuple[ChunkKey, Entry | None]]) -> None:
    """Remove the entries whose pool is gone."""
    for key, entry in entries:
        if entry is None or not links.data_file(entry.pool).exists():
            links.remove(key, entry)


def _dated(entry: os.DirEntry[str]) -> tuple[int, ChunkKey] | None:
    """When a link was made and for which key; ``None`` for what isn't a link of ours."""
    try:
        return entry.stat(follow_symlinks=False).st_mtime_ns, ChunkKey(bytes.fromhex(entry.name))
    except (ValueError, FileNotFoundError):
        return None


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
