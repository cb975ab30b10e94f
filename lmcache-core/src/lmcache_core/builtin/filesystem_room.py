"""Makes room in a folder: which chunks go, and of which namespace.

Of namespaces that nobody uses any more the least recently used one goes first, then the largest of
those in use; within one the least recently used chunk, for which other namespaces' files have only
their times to say. Knows the folder's usage and one namespace's index. Writes no chunk.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from lmcache_core.builtin import filesystem_manifest as manifest
from lmcache_core.builtin.filesystem_index import FileIndex
from lmcache_core.builtin.filesystem_io import ChunkFiles, remove
from lmcache_core.builtin.filesystem_ledger import Removal, Standing
from lmcache_core.builtin.filesystem_scan import place, remove_empty, scan, spaces
from lmcache_core.builtin.filesystem_usage import FolderUsage
from lmcache_core.chunks.frame import MAGIC, may_start
from lmcache_core.chunks.keys import ChunkKey

logger = logging.getLogger(__name__)

IN_USE_S = 600.0
"""A namespace that was neither read nor written for so long counts as one that nobody uses."""
USED_EVERY_S = 30.0
VICTIMS = 4096
"""Files of another namespace that are remembered from one look into its folder."""
ATTEMPTS = 4
UNWRITTEN_S = 60.0
"""A power cut may damage what was written in so long before it: kernels write back after half of
it. Of what was found at the start, these files are looked at."""


class FolderRoom:
    """Room for one namespace's chunks in a folder that others write to as well. Thread-safe.

    ``max_bytes`` bounds the whole folder. ``clock`` is compared with files' times.
    """

    def __init__(
        self,
        top: Path,
        space: str,
        files: ChunkFiles,
        max_bytes: int | None,
        *,
        name: str = "filesystem",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.index = FileIndex()
        self._top = top
        self._space = space
        self._files = files
        self._max_bytes = max_bytes
        self._name = name
        self._clock = clock
        self._usage = FolderUsage(top, space, files, max_bytes, name=name)
        self._making = threading.Lock()
        self._victims: dict[str, list[tuple[int, str, int]]] = {}
        self._counts: dict[str, int] = {}
        self._used_at = 0.0
        self._since_scan = 0
        self._said: set[str] = set()
        self._of_others = [0, 0]
        self._refused = 0

    def open(self) -> None:
        """Become a writer, and count what is there.

        Raises:
            OSError: the folder failed.
        """
        if self._usage.open():
            self._count_all(look=True)
        else:
            self._count_own(look=True)

    def keep_bound(self) -> None:
        """Remove what is too much.

        Raises:
            OSError: the folder failed.
        """
        with self._making:
            if lacking := self._usage.take(0):
                self._usage.take(0, self._evict(lacking))

    def close(self) -> None:
        """Give back what was set aside, and say what became of others' chunks."""
        self._usage.close()
        if self._of_others[0] or self._refused:
            logger.info(
                "%s: removed %d chunks of other namespaces, %d bytes; refused %d for lack of room",
                self._name,
                *self._of_others,
                self._refused,
            )

    def retire(self) -> None:
        """After `close`: leave nothing of a namespace that holds nothing and that nobody writes.

        Raises:
            OSError: the folder failed.
        """
        folder = self._top / self._space

        def clean() -> None:
            if not any(True for _ in scan(folder, self._files)):
                self._clean(folder)

        if folder.is_dir():
            self._usage.retire(self._space, clean)

    def used(self) -> None:
        """The namespace is in use; others are told now and then."""
        now = self._clock()
        if not 0 <= now - self._used_at < USED_EVERY_S:
            self._used_at = now
            manifest.used(self._top / self._space)

    def reserve(self, nbytes: int) -> bool:
        """Set room for a chunk aside, which ends with `release`; ``False`` if there is none.

        Raises:
            OSError: the folder failed.
        """
        if self._usage.reserve(nbytes):
            return True
        if self._max_bytes is not None and nbytes > self._max_bytes:
            return self._refuse(f"a chunk of {nbytes} bytes is more than max_size_gib")
        with self._making:
            for _ in range(ATTEMPTS):
                if self._usage.reserve(nbytes):
                    return True
                lacking = self._usage.take(nbytes)
                if self._usage.uncounted:
                    self._count_all()
                    continue
                if lacking:
                    removals = self._evict(lacking)
                    if not any(one.nbytes for one in removals):
                        break
                    self._usage.take(nbytes, removals)
            else:
                if self._usage.reserve(nbytes):
                    return True
        return self._refuse("max_size_gib is taken by chunks that are being written")

    def release(self, nbytes: int, *, written: bool, replaced: int = 0) -> None:
        """A chunk was written, in the place of one of ``replaced`` bytes, or wasn't."""
        self._usage.release(nbytes, written=written)
        self._usage.removed(replaced)
        if written:
            self._since_scan += nbytes

    def removed(self, nbytes: int) -> None:
        """Files of this namespace that took so much are gone, by this process's hand."""
        self._usage.removed(nbytes)

    def settle(self) -> None:
        """Give back what many removals freed."""
        self._usage.take(0)

    def make_free(self, nbytes: int) -> bool:
        """Remove chunks that take ``nbytes``; none if all of them together don't."""
        with self._making:
            if sum(one.nbytes for one in self._standing()) < nbytes:
                return self._refuse("others fill the disk")
            removals = self._evict(nbytes)
            self._usage.take(0, removals)
        return any(one.nbytes for one in removals)

    # -- who goes --------------------------------------------------------------------------

    def _evict(self, nbytes: int) -> list[Removal]:
        """Remove chunks that take ``nbytes``, or as many as there are; the caller reports it."""
        removals: list[Removal] = []
        for one in self._order():
            lacking = nbytes - sum(removal.nbytes for removal in removals)
            if lacking <= 0:
                break
            evict = self._evict_own if one.space == self._space else self._evict_other
            removals += evict(one, lacking)
        return removals

    def _order(self) -> list[Standing]:
        """Namespaces in the order in which they lose chunks."""
        now = self._clock()
        idle: list[tuple[float, str, Standing]] = []
        used: list[tuple[int, bool, str, Standing]] = []
        for one in self._standing():
            since = manifest.last_used_s(self._top / one.space)
            own = one.space == self._space
            if own or (one.alive and now - since < IN_USE_S):
                used.append((-one.nbytes, not own, one.space, one))
            else:
                idle.append((since, one.space, one))
        return [one for _, _, one in sorted(idle)] + [one for _, _, _, one in sorted(used)]

    def _standing(self) -> list[Standing]:
        """As `FolderUsage.standing`, and what is known here though there was no room to note it."""
        known, found = self.index.usage()[1], self._usage.standing()
        for one in found:
            self._counts[one.space] = one.count
            if one.space == self._space:
                one.nbytes = max(one.nbytes, known)
        return found

    def _evict_own(self, own: Standing, nbytes: int) -> list[Removal]:
        # Others write to the same namespace, and what they wrote is in no index but theirs.
        turned_over = self._max_bytes is not None and self._since_scan > self._max_bytes
        stale = own.nbytes > 2 * self.index.usage()[1] or turned_over
        removals = [] if stale else [self._remove_oldest(nbytes)]
        freed = sum(one.nbytes for one in removals)
        if freed < nbytes:
            self._count_own()
            removals.append(self._remove_oldest(nbytes - freed))
        return removals

    def _remove_oldest(self, nbytes: int) -> Removal:
        freed, count = 0, self._counts.get(self._space, 0)
        while freed < nbytes and (victims := self.index.oldest(nbytes - freed)):
            for key, size in victims:
                if remove(Path(place(self._top / self._space, key))):
                    freed += size
        return Removal(self._space, freed, count)

    def _evict_other(self, other: Standing, nbytes: int) -> list[Removal]:
        space = other.space
        what = "" if space in self._said else manifest.described(self._top / space)
        removals = [self._remove_victims(space, nbytes)]
        if removals[0].nbytes < nbytes:
            self._look_into(space)
            removals.append(self._remove_victims(space, nbytes - removals[0].nbytes))
        if any(one.nbytes for one in removals):
            self._say(
                space,
                "%s: %s is full; the least recently used chunks go, now those of namespace %s (%s)",
                *(self._name, self._top, space, what),
            )
        return removals

    def _remove_victims(self, space: str, nbytes: int) -> Removal:
        victims, freed, count = self._victims.get(space, []), 0, self._counts.get(space, 0)
        while victims and freed < nbytes:
            _, path, size = victims.pop()
            if remove(Path(path)):
                freed += size
                self._of_others[0] += 1
                self._of_others[1] += size
        return Removal(space, freed, count)

    def _look_into(self, space: str) -> None:
        """Find another namespace's oldest files, and count all of them."""
        folder, total = self._top / space, 0
        marks = self._usage.start_count()
        found: list[tuple[int, str, int]] = []
        try:
            for time_ns, key, size in scan(folder, self._files):
                total += size
                found.append((time_ns, place(folder, key), size))
        except OSError as error:  # another user's, for example
            self._cant_look(folder, error)
            return
        self._counts[space] = self._usage.end_count({space: total}, marks)
        self._victims[space] = heapq.nsmallest(VICTIMS, found)[::-1]
        if not found:
            del self._victims[space]
            self._usage.retire(space, lambda: self._clean(folder))

    def _clean(self, folder: Path) -> None:
        remove(folder / manifest.NAME)
        remove_empty(folder)

    # -- counting --------------------------------------------------------------------------

    def _count_own(self, *, look: bool = False) -> None:
        marks = self._usage.start_count()
        sizes = {self._space: self._scan_own(look)}
        self._counts[self._space] = self._usage.end_count(sizes, marks)

    def _count_all(self, *, look: bool = False) -> None:
        marks = self._usage.start_count()
        sizes = {self._space: self._scan_own(look)}
        for space in spaces(self._top):
            if space != self._space:
                try:
                    found = scan(self._top / space, self._files)
                    sizes[space] = sum(size for _, _, size in found)
                except OSError as error:
                    self._cant_look(self._top / space, error)
        self._usage.end_count(sizes, marks, whole=True)

    def _scan_own(self, look: bool) -> int:
        since_ns, self._since_scan = time.time_ns(), 0
        found = list(scan(self._top / self._space, self._files))
        if look:
            last_ns = max((time_ns for time_ns, _, _ in found), default=0)
            before_ns = last_ns - int(UNWRITTEN_S * 1e9)
            found = [one for one in found if one[0] < before_ns or self._is_whole(one[1])]
        self.index.merge(found, since_ns)
        return sum(size for _, _, size in found)

    def _is_whole(self, key: ChunkKey) -> bool:
        """Whether a file may be good, by its first bytes; one that can't be holds nothing then."""
        path = Path(place(self._top / self._space, key))

        def is_good(head: bytes, nbytes: int) -> bool:
            framed = head.startswith(MAGIC)
            return may_start(head, key=key, nbytes=nbytes) if framed else any(head)

        good = self._files.judge(path, is_good)
        if good is False:
            self._say("damaged", "%s: removed damaged files, such as %s", self._name, path)
        return bool(good)

    # -- saying ----------------------------------------------------------------------------

    def _cant_look(self, folder: Path, error: OSError) -> None:
        self._say(
            f"{folder} failed",
            "%s: can't look into %s, which counts for nothing: %s",
            *(self._name, folder, error.strerror),
        )

    def _refuse(self, reason: str) -> bool:
        self._refused += 1
        self._say(reason, "%s: no room for a chunk in %s: %s", self._name, self._top, reason)
        return False

    def _say(self, what: str, text: str, *arguments: object) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning(text, *arguments)
