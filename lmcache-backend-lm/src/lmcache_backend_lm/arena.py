"""The server's memory: one mapping of fixed size that other processes may map for reading.

Values have a few sizes, one for each model and codec, from kilobytes to hundreds of
megabytes. Extents serve them: a value takes the smallest free run of pages that
holds it, and where there is none, several runs. So all free memory can be used by
any value, nothing is ever moved, and with one size of value, which is the usual
case, every value is in one piece. Slabs of size classes would have to be taken
from one class for another whenever a second model comes (memcached's "slab
calcification"), and a buddy allocator wastes up to half of each value.

Knows pages. Knows nothing about what is in them.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import mmap
import os

from lmcache_backend_lm.protocol import MAX_EXTENTS, Extent
from lmcache_core import (
    PAGE_BYTES,
    ConfigError,
    available_bytes,
    keep_writers_out,
    memfd,
    reader_of,
)

LEASE_BYTES = 64 << 10
"""The arena's first pages: a u64 for each client that reads it directly."""
_POPULATE_STEP = 64 << 20
_MADV_POPULATE_WRITE = 23  # Linux 5.14


class Extents:
    """The free runs of ``start`` … ``stop``. Not thread-safe."""

    def __init__(self, start: int, stop: int) -> None:
        self._lengths: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._by_length: list[Extent] = []  # (length, start): bisect finds the smallest that fits
        self.free_bytes = 0
        self._add(start, stop - start)

    def allocate(
        self, nbytes: int, *, runs: int = MAX_EXTENTS, after: int | None = None
    ) -> list[Extent] | None:
        """Pages for ``nbytes``, those right behind ``after`` if they are free.

        ``None`` if there aren't enough in so many ``runs``.
        """
        need = whole_pages(nbytes)
        if need > self.free_bytes or not need:
            return None
        if after is not None and (length := self._lengths.get(after, 0)) >= need:
            self._take(after, length)
            if length > need:
                self._add(after + need, length - need)
            return [(after, need)]
        at = bisect.bisect_left(self._by_length, (need, 0))
        if at < len(self._by_length):
            length, start = self._by_length[at]
            self._take(start, length)
            if length > need:
                self._add(start + need, length - need)
            return [(start, need)]
        if runs < 2 or sum(n for n, _ in self._by_length[-runs:]) < need:
            return None
        parts: list[Extent] = []
        while need:
            length, start = self._by_length[-1]
            if length > need:  # can only be the last part: take the smallest that holds it
                length, start = self._by_length[bisect.bisect_left(self._by_length, (need, 0))]
            self._take(start, length)
            if length > need:
                self._add(start + need, length - need)
                length = need
            parts.append((start, length))
            need -= length
        return parts

    def release(self, parts: list[Extent]) -> None:
        """Give back what `allocate` gave, or whole pages of it."""
        for start, length in parts:
            before = self._ends.get(start)
            if before is not None:
                length += start - before
                start = before
                self._take(before, self._lengths[before])
            after = self._lengths.get(start + length)
            if after is not None:
                self._take(start + length, after)
                length += after
            self._add(start, length)

    def _add(self, start: int, length: int) -> None:
        self._lengths[start] = length
        self._ends[start + length] = start
        bisect.insort(self._by_length, (length, start))
        self.free_bytes += length

    def _take(self, start: int, length: int) -> None:
        del self._lengths[start]
        del self._ends[start + length]
        del self._by_length[bisect.bisect_left(self._by_length, (length, start))]
        self.free_bytes -= length


class Arena:
    """``nbytes`` of memory, rounded up to pages, that takes pages as they are first written.

    ``populate``: all of it at once. ``reader``: a descriptor that others can map for reading only;
    nobody can change the memory but through this mapping.

    Raises:
        ConfigError: there isn't that much memory.
    """

    def __init__(self, nbytes: int, *, populate: bool = False) -> None:
        available = available_bytes()
        if nbytes > available:
            raise ConfigError(
                f"{nbytes / 2**30:.2f} GiB of memory are asked for (--memory-gib), but only "
                f"{available / 2**30:.2f} GiB are available; ask for less"
            )
        self.nbytes = LEASE_BYTES + whole_pages(nbytes)
        self._fd = memfd("lmcache-server", self.nbytes)
        self._map = mmap.mmap(self._fd, self.nbytes)
        self.view = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.reader: int | None = None
        with contextlib.suppress(OSError):  # an old kernel: nobody gets the memory then
            keep_writers_out(self._fd)
            self.reader = reader_of(self._fd)
        with contextlib.suppress(OSError):  # decided by the kernel's shmem_enabled
            self._map.madvise(mmap.MADV_HUGEPAGE)
        if populate:
            self._populate()
        self.extents = Extents(LEASE_BYTES, self.nbytes)

    @property
    def capacity(self) -> int:
        """Bytes for values."""
        return self.nbytes - LEASE_BYTES

    def views(self, parts: list[Extent], nbytes: int) -> list[memoryview]:
        """The first ``nbytes`` of ``parts``."""
        found: list[memoryview] = []
        for start, length in trimmed(parts, nbytes):
            found.append(self.view[start : start + length])
        return found

    def close(self) -> None:
        """Give the memory back, or leave that to the last view of it. Idempotent."""
        for fd in (self._fd, self.reader):
            if fd is not None:
                os.close(fd)
        self._fd, self.reader = -1, None
        self.view.release()
        with contextlib.suppress(BufferError):
            self._map.close()

    def _populate(self) -> None:
        for start in range(0, self.nbytes, _POPULATE_STEP):
            length = min(_POPULATE_STEP, self.nbytes - start)
            try:
                self._map.madvise(_MADV_POPULATE_WRITE, start, length)
            except OSError:
                self.view[start : start + length] = bytes(length)


def trimmed(parts: list[Extent], nbytes: int) -> list[Extent]:
    """The first ``nbytes`` of ``parts``, as parts."""
    found: list[Extent] = []
    for start, length in parts:
        if nbytes <= 0:
            break
        found.append((start, min(length, nbytes)))
        nbytes -= length
    return found


def whole_pages(nbytes: int) -> int:
    """``nbytes``, rounded up."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES
