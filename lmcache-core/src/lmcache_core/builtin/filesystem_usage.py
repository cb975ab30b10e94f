"""How much all chunk files below a folder take together, whoever writes there.

    PATH/.usage            what each namespace holds, and what each writer has set aside
    PATH/.writers/<token>  one file a writer, locked for as long as it lives

A writer sets room aside in blocks and tells at the next one what became of the last, so that a
store takes no file lock. What it says it has is never less than what it has: one that dies leaves
its block counted as full until its namespace's folder is counted again. The numbers are worth
nothing after a power cut, so whoever finds no other writer alive counts all of it.

Knows bytes, namespaces and who is alive. Removes no chunk, and doesn't know which should go.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from lmcache_core.builtin.filesystem_io import FULL, ChunkFiles, remove
from lmcache_core.builtin.filesystem_ledger import (
    LEDGER,
    MOST_BYTES,
    TOKEN,
    Removal,
    Space,
    Standing,
    UsageLedger,
)

logger = logging.getLogger(__name__)

BLOCK_BYTES = 64 << 20
"""Most that is set aside at once."""
BLOCKS = 64
"""All writers together set aside about one part in so many of the bound."""
LOCK_PATIENCE_S = 5.0
"""The lock is held for less than a millisecond, unless its holder was stopped just then."""
_WRITERS = ".writers"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL}


class FolderUsage:
    """One writer's part in what a folder holds. Thread-safe."""

    def __init__(
        self,
        top: Path,
        space: str,
        files: ChunkFiles,
        max_bytes: int | None,
        *,
        name: str = "filesystem",
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._top = top
        self._space = space
        self._files = files
        self._max_bytes = max_bytes
        self._name = name
        self._clock = clock
        self._sleep = sleep
        self._token = secrets.token_hex(8)
        self._alive: weakref.finalize[..., FolderUsage] | None = None
        self._alone: UsageLedger | None = None
        self._lock = threading.Lock()
        self._granted = self._written = self._removed = self._reserved = self._count = 0
        self.uncounted = False
        """The ledger was lost: somebody has to count."""

    def open(self) -> bool:
        """Become a writer; answer whether the whole folder has to be counted.

        Raises:
            OSError: the folder can't be written to.
        """
        with self._ledger() as ledger, self._lock:
            self._bury(ledger)
            if not ledger.writers:
                ledger.counted = False
                self._sweep()
            self._live()
            self._report(ledger)
            return not ledger.counted

    def close(self) -> None:
        """Give back what was set aside, but for stores that are still under way."""
        try:
            with self._ledger() as ledger, self._lock:
                self._written += self._reserved
                self._report(ledger)
                del ledger.writers[self._token]
        finally:
            if self._alive is not None:
                remove(self._top / _WRITERS / self._token)
                self._alive()

    # -- for each store --------------------------------------------------------------------

    def reserve(self, nbytes: int) -> bool:
        """Set ``nbytes`` of the block aside for one store, which ends with `release`."""
        with self._lock:
            if self._granted - self._written - self._reserved < nbytes:
                return False
            self._reserved += nbytes
            return True

    def release(self, nbytes: int, *, written: bool) -> None:
        """A store is over."""
        with self._lock:
            self._reserved -= nbytes
            if written:
                self._written += nbytes

    def removed(self, nbytes: int) -> None:
        """Files of this namespace that took so much are gone: room from the next `take` on."""
        with self._lock:
            self._removed += nbytes

    # -- for each block --------------------------------------------------------------------

    def take(self, nbytes: int, removals: Iterable[Removal] = ()) -> int:
        """Report, also ``removals``, and set a block aside that ``nbytes`` fit into.

        Answers how many bytes have to go first, 0 if it was done.

        Raises:
            OSError: the folder failed.
        """
        with self._ledger() as ledger, self._lock:
            for one in removals:
                ledger.take_off(one)
            self._report(ledger)
            del ledger.writers[self._token]
            block = room = max(nbytes, BLOCK_BYTES)
            if self._max_bytes is not None:
                share = self._max_bytes // BLOCKS // (1 + len(ledger.writers))
                block = max(nbytes, min(BLOCK_BYTES, share)) if nbytes else 0
                room = self._max_bytes - ledger.total - self._reserved
            self._granted = self._reserved + max(0, min(block, room))
            ledger.writers[self._token] = (self._space, self._granted)
            return block - room if nbytes > room else 0

    def standing(self) -> list[Standing]:
        """Each namespace as it is now."""
        with self._ledger() as ledger, self._lock:
            self._bury(ledger)
            self._report(ledger)
            found = {
                name: Standing(name, one.nbytes, one.count) for name, one in ledger.spaces.items()
            }
            for name, nbytes in ledger.writers.values():
                found.setdefault(name, Standing(name, 0, 0)).nbytes += nbytes
                found[name].alive = True
            return list(found.values())

    def retire(self, space: str, clean: Callable[[], None]) -> None:
        """Forget a namespace that has no files, after ``clean``, unless somebody writes there."""
        with self._ledger() as ledger, self._lock:
            self._bury(ledger)
            if all(space != other for other, _ in ledger.writers.values()):
                clean()
                ledger.spaces.pop(space, None)

    # -- counting --------------------------------------------------------------------------

    def start_count(self) -> dict[str, int]:
        """Marks for `end_count`, from before files are looked at."""
        with self._ledger() as ledger, self._lock:
            self._report(ledger)
            return {name: one.written for name, one in ledger.spaces.items()}

    def end_count(
        self, sizes: Mapping[str, int], marks: Mapping[str, int], *, whole: bool = False
    ) -> int:
        """The files of these namespaces were found to take so much; ``whole``: there are no others.

        What was written meanwhile is added, as it may not have been seen. What was removed before
        and isn't reported yet isn't taken off again. Answers the number of the count.
        """
        with self._ledger() as ledger, self._lock:
            self._report(ledger)
            count = secrets.randbits(48)
            for name, nbytes in sizes.items():
                one = ledger.spaces.setdefault(name, Space())
                one.count = count
                one.nbytes = nbytes + max(0, one.written - marks.get(name, 0))
            if whole:
                writing = {space for space, _ in ledger.writers.values()}
                for name in ledger.spaces.keys() - sizes.keys() - writing:
                    del ledger.spaces[name]
                ledger.counted = True
                self.uncounted = False
            return count

    # -- the ledger ------------------------------------------------------------------------

    def _report(self, ledger: UsageLedger) -> None:
        """Enter what was written and removed since the last time."""
        own = ledger.spaces.setdefault(self._space, Space())
        own.nbytes += self._written
        own.written += self._written
        ledger.take_off(Removal(self._space, self._removed, self._count))
        self._granted = max(self._granted - self._written, self._reserved)
        self._written = self._removed = 0
        self._count = own.count
        ledger.writers[self._token] = (self._space, self._granted)

    @contextlib.contextmanager
    def _ledger(self) -> Iterator[UsageLedger]:
        """The ledger, locked, and written back unless something is raised."""
        fd = None if self._alone else self._opened()
        try:
            if fd is not None:
                self._locked(fd)
            if fd is None or self._alone:
                yield self._alone or UsageLedger()
                return
            ledger = UsageLedger.loaded(os.pread(fd, MOST_BYTES, 0))
            if ledger is None:
                ledger, self.uncounted = UsageLedger(), True
            yield ledger
            ledger.save(fd)
        finally:
            if fd is not None:
                os.close(fd)

    def _opened(self) -> int | None:
        """The ledger's file, or ``None`` if the disk has no room for it."""
        try:
            return self._files.open_shared(self._top / LEDGER)
        except OSError as error:
            if error.errno not in FULL:
                raise
            return None

    def _locked(self, fd: int) -> None:
        until, pause = self._clock() + LOCK_PATIENCE_S, 0.0005
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if self._clock() > until:
                    raise OSError(
                        errno.ETIMEDOUT, f"{LEDGER} is locked by a process that doesn't go on"
                    ) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                self._alone = UsageLedger()
                logger.warning(
                    "%s: the file system of %s has no locks: max_size_gib bounds what this "
                    "process finds and writes, not what others write meanwhile",
                    self._name,
                    self._top,
                )
                return
            self._sleep(pause)
            pause = min(2 * pause, 0.02)

    def _live(self) -> None:
        """Have a file that is locked for as long as this writer lives."""
        # A disk that is full, or without locks: then others take this one for dead, and what it has
        # set aside for full.
        with contextlib.suppress(OSError):
            fd = self._files.open_shared(self._top / _WRITERS / self._token)
            # Whoever opens a backend may be gone before it is open, and then nobody closes it.
            self._alive = weakref.finalize(self, os.close, fd)
            self._alive.atexit = False
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _lives(self, token: str) -> bool:
        path = self._top / _WRITERS / token
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except OSError:
            return True  # nothing says that it doesn't
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(fd)
        remove(path)
        return False

    def _bury(self, ledger: UsageLedger) -> None:
        """What writers that died had set aside may be full."""
        for token, (name, nbytes) in list(ledger.writers.items()):
            if token == self._token or self._lives(token):
                continue
            del ledger.writers[token]
            space = ledger.spaces.setdefault(name, Space())
            space.nbytes += nbytes
            space.written += nbytes

    def _sweep(self) -> None:
        """Remove files of writers that a lost ledger knew."""
        with (
            contextlib.suppress(FileNotFoundError),
            os.scandir(self._top / _WRITERS) as entries,
        ):
            for entry in entries:
                if TOKEN.fullmatch(entry.name):
                    self._lives(entry.name)
