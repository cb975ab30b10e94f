"""Reads and writes whole files of opaque bytes, atomically and, if asked, past the page cache.

Knows system calls: short reads and writes, O_DIRECT's alignment, fsync and
rename. Knows nothing about keys, sizes that are allowed, or what to evict.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import mmap
import os
import secrets
import socket
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

from lmcache_core.contracts.storage import MISS
from lmcache_core.errors import BackendError, BackendRejected, BackendTimeout, BackendUnavailable
from lmcache_core.memory.host_memory import address_of

logger = logging.getLogger(__name__)

ALIGNMENT = 4096
"""What O_DIRECT asks of addresses, offsets and lengths. Devices with 512-byte sectors accept it
too; a file system that wants more refuses, and is used without O_DIRECT."""
BOUNCE_BYTES = 1 << 20
HEAD_BYTES = 128
ABANDONED_AFTER_S = 600.0
"""A temporary file that nobody wrote to for so long has no writer, whatever its name says."""
NOTE_USE_AFTER_S = 600.0
"""How old a file's time gets before a read renews it: others, and the next process, go by it."""

_DIRECT: int = getattr(os, "O_DIRECT", 0)  # not every system has it
_REJECTED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}
_UNSYNCED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL, errno.ENOTSUP}
_GROUPED = stat.S_ISGID | stat.S_IWGRP
FULL = (errno.ENOSPC, errno.EDQUOT)
_TIMED_OUT = {errno.ETIMEDOUT, errno.ETIME}


def backend_error(error: OSError, doing: str, path: Path, remedy: str = "") -> BackendError:
    """``error`` as what core understands: retry later, timed out, or don't try again."""
    kind: type[BackendError] = BackendUnavailable
    if error.errno in _REJECTED:
        kind = BackendRejected
    elif error.errno in _TIMED_OUT:
        kind = BackendTimeout
    reason = error.strerror or str(error)
    return kind(f"can't {doing} {path}: {reason}" + (f"; {remedy}" if remedy else ""))


class ChunkFiles:
    """Whole-file reads and atomic whole-file writes below one folder. Thread-safe."""

    def __init__(self, name: str, *, direct: bool, fsync: bool) -> None:
        self._name = name
        self._direct = direct
        self._fsync = fsync
        self._numbers = count()
        self._host = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
        # Two backends in one process, or two containers that both are pid 1 of one host name.
        self._token = secrets.token_hex(4)
        self._file_mode, self._folder_mode = 0o600, 0o700
        self._grouped = False
        self._settled: set[Path] = set()

    def follow(self, top: Path) -> None:
        """Give files and folders to the group as well, where ``top`` does so with what is new.

        That is a folder with the bits that ``chmod g+ws`` sets. The umask has no say in it.
        """
        if os.stat(top).st_mode & _GROUPED == _GROUPED:
            self._file_mode, self._folder_mode, self._grouped = 0o660, 0o2770, True

    def read(self, path: Path, into: memoryview) -> int:
        """Copy the file to the start of ``into``; answer its length.

        `MISS` if there is no such file, or it is empty or longer than ``into``. The bytes are
        those of one file even if it is replaced meanwhile.

        Raises:
            OSError: the file system failed.
        """
        try:
            fd = self._open(path, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return MISS
        try:
            facts = os.fstat(fd)
            if not stat.S_ISREG(facts.st_mode) or not 0 < facts.st_size <= into.nbytes:
                return MISS
            if time.time() - facts.st_mtime > NOTE_USE_AFTER_S:
                with suppress(OSError):  # another user's
                    os.utime(fd)
            return self._read_exactly(fd, path, into, facts.st_size)
        finally:
            os.close(fd)

    def open_shared(self, path: Path) -> int:
        """Open a file that all who write here read and write; it is made if it isn't there."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(path, flags, self._file_mode)
        except FileNotFoundError:
            self.make_folder(path.parent)
            fd = os.open(path, flags, self._file_mode)
        if self._grouped:
            with suppress(PermissionError):  # another user's, who did this
                os.fchmod(fd, self._file_mode)
        return fd

    def write(self, path: Path, source: memoryview) -> int:
        """Publish ``source`` as ``path``: nobody ever sees a part of it.

        Answers how many bytes the file had that it replaced.

        Raises:
            OSError: nothing was published and nothing is left behind. FileNotFoundError: the
                folder went away.
        """
        temporary = self._temporary(path)
        try:
            fd = self._open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            try:
                if self._grouped:
                    os.fchmod(fd, self._file_mode)
                self._write_all(fd, temporary, source)
                if self._fsync:
                    os.fsync(fd)
            finally:
                os.close(fd)
            replaced = size_of(path)
            os.replace(temporary, path)
        except BaseException:
            remove(temporary)
            raise
        if self._fsync:
            sync_folder(path.parent)
            self._settle(path.parent)
        return replaced

    def look(self, path: Path) -> bytes | None:
        """The first bytes of a file, `HEAD_BYTES` at most; ``None`` if there is none.

        If durability was asked for, the file survives a power cut then; whoever wrote it may not
        have seen to that.
        """
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            head = os.pread(fd, HEAD_BYTES, 0)
            if self._fsync:
                os.fsync(fd)
        finally:
            os.close(fd)
        if self._fsync:
            sync_folder(path.parent)
            self._settle(path.parent)
        return head

    def judge(self, path: Path, is_good: Callable[[bytes, int], bool]) -> bool | None:
        """Whether a file is good by its first `HEAD_BYTES` and its length; else it is emptied.

        ``None`` if there is none. Not removed: its name may be that of another by now, of which
        its writer said that it is there.
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except PermissionError:
            return True  # another user's; nothing says that it isn't
        try:
            good = is_good(os.pread(fd, HEAD_BYTES, 0), os.fstat(fd).st_size)
            if not good:
                os.ftruncate(fd, 0)
        finally:
            os.close(fd)
        return good

    def probe(self, folder: Path) -> None:
        """Find out whether files can be created in ``folder``.

        Raises:
            OSError: they can't.
        """
        temporary = self._temporary(folder / "probe")
        try:
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, self._file_mode))
        finally:
            remove(temporary)

    def make_folder(self, path: Path) -> None:
        """Create ``path`` and what lacks above it; who else may enter is `follow`'s business.

        Raises:
            OSError: it can't be made. FileExistsError: a file has this name.
        """
        try:
            os.mkdir(path, self._folder_mode)
        except FileNotFoundError:
            self.make_folder(path.parent)
            self.make_folder(path)
            return
        except FileExistsError:
            if not path.is_dir():
                raise
            return
        if self._grouped:
            os.chmod(path, self._folder_mode)
        if self._fsync:
            self._settled.discard(path)  # somebody deleted the one that was there
            self._settle(path)

    def settle_all(self, path: Path) -> None:
        """If durability was asked for, make the names of all folders down to ``path`` durable.

        They may be there because a process made them that died before it could do so.
        """
        if not self._fsync:
            return
        self._settle(path)
        device = os.stat(path).st_dev
        for folder in path.parent.parents:
            if os.stat(folder).st_dev != device or not _synced(folder):
                return

    def _settle(self, folder: Path) -> None:
        """Make the name of ``folder`` durable, once."""
        if folder not in self._settled:
            sync_folder(folder.parent)
            self._settled.add(folder)

    def is_abandoned(self, path: Path, modified_s: float) -> bool:
        """Whether the writer of the temporary file ``path`` is gone.

        A writer on this host is asked for; anywhere else only the time tells.
        """
        if time.time() - modified_s > ABANDONED_AFTER_S:
            return True
        fields = path.name.rsplit(".", 4)  # the name that it was to get may have dots of its own
        if len(fields) != 5 or fields[1] != self._host or not fields[2].isdecimal():
            return False
        pid = int(fields[2])
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            return True
        except PermissionError:
            return False  # alive, and somebody else's
        return False

    def _temporary(self, path: Path) -> Path:
        """``.KEY.HOST.PID.TOKEN-NUMBER.tmp`` in the same folder."""
        unique = f"{self._token}-{next(self._numbers)}"
        return path.with_name(f".{path.name}.{self._host}.{os.getpid()}.{unique}.tmp")

    def _open(self, path: Path, flags: int) -> int:
        if self._direct:
            try:
                return os.open(path, flags | _DIRECT | os.O_CLOEXEC, self._file_mode)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._give_up_direct(path)
        return os.open(path, flags | os.O_CLOEXEC, self._file_mode)

    def _give_up_direct(self, path: Path) -> None:
        if self._direct:
            self._direct = False
            logger.warning(
                "%s: the file system of %s has no O_DIRECT; direct_io is ignored, "
                "reads and writes go through the page cache",
                self._name,
                path,
            )

    def _plain(self, fd: int) -> bool:
        """Turn O_DIRECT off for an open file; answer whether it was on."""
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        if not flags & _DIRECT:
            return False
        fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~_DIRECT)
        return True

    def _without_direct(self, fd: int, path: Path, error: OSError) -> None:
        """Get ready to try again after ``error``, if O_DIRECT may be its cause; else raise it."""
        if error.errno != errno.EINVAL or not self._plain(fd):
            raise error
        self._give_up_direct(path)

    def _read_exactly(self, fd: int, path: Path, into: memoryview, size: int) -> int:
        done = 0
        while done < size:
            try:
                got = self._read_some(fd, into, done, size)
            except OSError as error:
                self._without_direct(fd, path, error)
                got = self._read_some(fd, into, done, size)
            if got == 0:
                return MISS  # somebody truncated it under us
            done += got
        return size

    def _read_some(self, fd: int, buffer: memoryview, done: int, size: int) -> int:
        """One read at ``done``, straight into ``buffer`` where alignment allows it."""
        if not self._direct:
            with buffer[done:size] as rest:
                return os.preadv(fd, [rest], done)
        if done % ALIGNMENT:
            self._plain(fd)  # a short read that ended inside a page
            with buffer[done:size] as rest:
                return os.preadv(fd, [rest], done)
        left = size - done
        if _is_aligned(buffer):
            # The buffer may be padded beyond the value: then the last page fits as well.
            length = _round_up(left) if done + _round_up(left) <= buffer.nbytes else _down(left)
            if length:
                with buffer[done : done + length] as rest:
                    return min(os.preadv(fd, [rest], done), left)
        with mmap.mmap(-1, min(_round_up(left), BOUNCE_BYTES)) as bounce:
            got = min(os.preadv(fd, [bounce], done), left)
            with memoryview(bounce) as whole, whole[:got] as part:
                buffer[done : done + got] = part
            return got

    def _write_all(self, fd: int, path: Path, source: memoryview) -> None:
        done = 0
        while done < source.nbytes:
            try:
                wrote = self._write_some(fd, source, done)
            except OSError as error:
                self._without_direct(fd, path, error)
                wrote = self._write_some(fd, source, done)
            done += wrote
        if os.fstat(fd).st_size != source.nbytes:
            os.ftruncate(fd, source.nbytes)  # the last page was padded

    def _write_some(self, fd: int, source: memoryview, done: int) -> int:
        """One write at ``done``; answers how many bytes of ``source`` it took."""
        if self._direct and done % ALIGNMENT:
            self._plain(fd)  # a short write that ended inside a page
        elif self._direct:
            left = source.nbytes - done
            if _is_aligned(source) and left >= ALIGNMENT:
                with source[done : done + _down(left)] as part:
                    return _some(os.pwrite(fd, part, done))
            with mmap.mmap(-1, min(_round_up(left), BOUNCE_BYTES)) as bounce:
                length = min(left, len(bounce))
                bounce[:length] = source[done : done + length]
                return min(_some(os.pwrite(fd, bounce, done)), length)
        with source[done:] as part:
            return _some(os.pwrite(fd, part, done))


def remove(path: Path) -> bool:
    """Delete a file if it can be; answer whether it was there and is gone."""
    try:
        os.unlink(path)
    except OSError:
        # Gone already, or a folder that lets nobody delete: either way it is no use as a chunk's
        # place, and the next write says why.
        return False
    return True


def size_of(path: Path | str) -> int:
    """Bytes of a regular file, 0 if there is none."""
    try:
        facts = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return 0
    return facts.st_size if stat.S_ISREG(facts.st_mode) else 0


def sync_folder(path: Path) -> None:
    """Make the names in ``path`` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _synced(path: Path) -> bool:
    """Sync a folder that somebody else made, if this user and its file system can."""
    try:
        sync_folder(path)
    except OSError as error:
        if error.errno not in _UNSYNCED:
            raise
        return False
    return True


def free_bytes(path: Path) -> int:
    """What an ordinary user may still write on the file system of ``path``."""
    facts = os.statvfs(path)
    return facts.f_bavail * facts.f_frsize


def _is_aligned(buffer: memoryview) -> bool:
    # The address of a read-only buffer can't be had without another package; it takes the bounce.
    start = address_of(buffer)
    return start != 0 and start % ALIGNMENT == 0


def _round_up(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _down(nbytes: int) -> int:
    return nbytes // ALIGNMENT * ALIGNMENT


def _some(written: int) -> int:
    if written == 0:
        raise OSError(errno.EIO, "a write took no bytes and gave no reason")
    return written
