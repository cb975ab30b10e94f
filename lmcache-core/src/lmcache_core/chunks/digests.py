"""Names files by what they hold: digests of whole files, kept on disk between processes.

A file is cut into pieces of 64 MiB, so that several threads can share one:

    SHA-256(b"lmcache-file-1" || length as little-endian u64 || SHA-256 of each piece)

SHA-256 because it is in every processor of the last years and in every library: 2.7 times as fast
as BLAKE2b where it is (measured), and a cryptographic hash, so that nobody makes two checkpoints
of one name.

Digests are kept by device, inode, size and times of change, one small file each, so that the same
bytes are hashed once for each machine and not once for each rank and start. What is kept is a
saving only: without the folder, or with a damaged one, files are hashed again.

Knows files. Knows nothing about models.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lmcache_core.errors import UnnamedError

PIECE_BYTES = 64 << 20
_READ_BYTES = 1 << 20
_KEPT = re.compile(r"([0-9a-f]{64}) ([0-9a-f]{64})\n")
_MOST_KEPT = 8192


@dataclass(frozen=True)
class Digested:
    """The digests of some files, in their order, and what they cost."""

    digests: tuple[str, ...]
    total_bytes: int
    hashed_bytes: int
    seconds: float
    kept: bool
    """Whether nothing needs to be hashed the next time."""


@dataclass(frozen=True)
class _Stamp:
    """What changes when a file does."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, file: Path) -> _Stamp:
        found = os.stat(file)
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    @property
    def key(self) -> str:
        facts = (self.device, self.inode, self.size, self.modified_ns, self.changed_ns)
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def settled(self, now_s: float) -> bool:
        """Whether the file's clock would show a change from now on.

        A clock ticks every few milliseconds, on some file systems once in two seconds: what was
        written within a tick can be written again with the same times.
        """
        latest = max(self.modified_ns, self.changed_ns)
        tick_s = 2.5 if latest % 1_000_000_000 == 0 else 0.1
        return now_s - latest / 1e9 > tick_s


class FileDigests:
    """Digests files, each once. Threads may share one."""

    def __init__(
        self,
        folder: Path | None = None,
        *,
        threads: int | None = None,
        patience_s: float = 600.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``folder`` keeps the digests: by default ``lmcache/digests`` in the user's cache.

        Who hashes the same file elsewhere is waited for ``patience_s``, then it is hashed here too.
        """
        self._folder = folder if folder is not None else users_cache() / "digests"
        self._threads = threads or max(2, min(16, len(os.sched_getaffinity(0))))
        self._patience_s = patience_s
        self._clock = clock

    def of(self, files: Sequence[Path]) -> Digested:
        """The digests of ``files``; symbolic links are followed.

        Raises:
            UnnamedError: a file can't be read, or changes while it is.
        """
        started = time.perf_counter()
        try:
            stamps = [_Stamp.of(file) for file in files]
            found = {stamp: self._recall(stamp) for stamp in stamps}
            missing = [stamp for stamp, digest in found.items() if digest is None]
            hashed, kept = 0, True
            if missing:
                by_stamp = dict(zip(stamps, files, strict=True))
                with self._alone(missing[0].key):
                    found.update((stamp, self._recall(stamp)) for stamp in missing)
                    todo = {s: by_stamp[s] for s in missing if found[s] is None}
                    found.update(self._hash_all(todo))
                    hashed = sum(stamp.size for stamp in todo)
                    for stamp, file in todo.items():
                        if _Stamp.of(file) != stamp:
                            raise UnnamedError(f"{file} changes while it is read")
                        kept &= self._keep(stamp, found[stamp])
        except OSError as error:
            raise UnnamedError(f"{error.filename}: {error.strerror}") from error
        return Digested(
            tuple(found[stamp] or "" for stamp in stamps),
            sum(stamp.size for stamp in stamps),
            hashed,
            time.perf_counter() - started,
            kept,
        )

    # -- hashing ---------------------------------------------------------------------------

    def _hash_all(self, files: dict[_Stamp, Path]) -> dict[_Stamp, str]:
        with ThreadPoolExecutor(self._threads) as pool:
            pieces = {
                stamp: [
                    pool.submit(_piece, file, start) for start in range(0, stamp.size, PIECE_BYTES)
                ]
                for stamp, file in files.items()
            }
            digests = {}
            for stamp, parts in pieces.items():
                state = hashlib.sha256(b"lmcache-file-1" + stamp.size.to_bytes(8, "little"))
                for part in parts:
                    state.update(part.result())
                digests[stamp] = state.hexdigest()
            return digests

    # -- keeping ---------------------------------------------------------------------------

    def _recall(self, stamp: _Stamp) -> str | None:
        try:
            text = (self._folder / stamp.key).read_bytes()[:200].decode("ascii", "replace")
        except OSError:
            return None
        match = _KEPT.fullmatch(text)
        if match is None or match[2] != _check(stamp.key, match[1]):
            return None
        return match[1]

    def _keep(self, stamp: _Stamp, digest: str | None) -> bool:
        if digest is None or not stamp.settled(self._clock()):
            return False
        try:
            self._sweep()
            fd, name = tempfile.mkstemp(dir=self._folder, prefix=".")
            with os.fdopen(fd, "w") as file:
                file.write(f"{digest} {_check(stamp.key, digest)}\n")
            os.replace(name, self._folder / stamp.key)
        except OSError:
            return False
        return True

    def _sweep(self) -> None:
        """Forget the older half where far more is kept than anybody has files."""
        kept = list(os.scandir(self._folder))
        if len(kept) > _MOST_KEPT:
            kept.sort(key=lambda entry: entry.stat(follow_symlinks=False).st_mtime_ns)
            for entry in kept[: _MOST_KEPT // 2]:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(entry.path)

    @contextlib.contextmanager
    def _alone(self, key: str) -> Iterator[None]:
        """Let one process of a machine hash while the others wait for what it keeps."""
        path = self._folder / f"{key}.lock"
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            file = path.open("w")
        except OSError:
            yield  # nothing can be kept here: everybody hashes
            return
        with file:
            waited_until = time.monotonic() + self._patience_s
            while time.monotonic() < waited_until:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    if error.errno not in (errno.EAGAIN, errno.EACCES):
                        break  # a file system without locks
                    time.sleep(0.05)
            try:
                yield
            finally:
                # Two may hold locks on two files of this name for a moment: both hash, no more.
                with contextlib.suppress(OSError):
                    path.unlink()


def _piece(file: Path, start: int) -> bytes:
    state = hashlib.sha256()
    buffer = memoryview(bytearray(_READ_BYTES))
    left = PIECE_BYTES
    with file.open("rb", buffering=0) as opened:
        opened.seek(start)
        while left and (count := opened.readinto(buffer[: min(_READ_BYTES, left)])):
            state.update(buffer[:count])
            left -= count
    return state.digest()


def _check(key: str, digest: str) -> str:
    return hashlib.sha256(f"{key} {digest}".encode()).hexdigest()


def users_cache() -> Path:
    """Where this user keeps what LMCache can make again."""
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "lmcache"
    home = os.path.expanduser("~")
    # A user without a home: nothing can be made below this, so nothing is kept.
    return Path(os.devnull if home == "~" else home) / ".cache" / "lmcache"
