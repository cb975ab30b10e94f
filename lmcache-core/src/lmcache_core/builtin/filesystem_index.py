"""What one namespace's folder of chunk files holds: sizes, order of use, and which were looked at.

Knows keys and byte counts. Touches no file, and doesn't know how much there may be: whoever asks
for the oldest removes them. Thread-safe.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable

from lmcache_core.chunks.keys import ChunkKey


class FileIndex:
    """Key to size, least recently used first. ``clock`` is compared with files' times."""

    def __init__(self, clock: Callable[[], int] = time.time_ns) -> None:
        self._clock = clock
        self._files: OrderedDict[ChunkKey, tuple[int, int, bool]] = OrderedDict()
        self._held = 0
        self._lock = threading.Lock()

    def usage(self) -> tuple[int, int]:
        """Chunks and bytes."""
        with self._lock:
            return len(self._files), self._held

    def merge(self, files: Iterable[tuple[int, ChunkKey, int]], since_ns: int) -> None:
        """Take over what a scan that began at ``since_ns`` found: time, key and size of each file.

        Files keep the later of their two times. What wasn't found is forgotten, unless it was used
        since the scan began.
        """
        with self._lock:
            known, self._files = self._files, OrderedDict()
            merged: list[tuple[int, ChunkKey, int, bool]] = []
            for time_ns, key, size in files:
                before, used_ns, good = known.pop(key, (0, 0, False))
                merged.append((max(time_ns, used_ns), key, size, good and before == size))
            merged += [
                (used_ns, key, size, good)
                for key, (size, used_ns, good) in known.items()
                if used_ns >= since_ns
            ]
            merged.sort()
            self._files.update((key, (size, used, good)) for used, key, size, good in merged)
            self._held = sum(size for _, _, size, _ in merged)

    def seen(self, key: ChunkKey, size: int, *, good: bool = False) -> None:
        """``key`` was found on disk with ``size`` bytes; it is the most recently used now.

        ``good``: there is no need to look at it again (see `is_good`).
        """
        with self._lock:
            before, _, was_good = self._files.pop(key, (0, 0, False))
            self._held += size - before
            self._files[key] = (size, self._clock(), good or (was_good and size == before))

    def is_good(self, key: ChunkKey, size: int) -> bool:
        """Whether ``key`` was written here, or looked at, with ``size`` bytes."""
        with self._lock:
            before, _, good = self._files.get(key, (0, 0, False))
            return good and before == size

    def forget(self, key: ChunkKey) -> None:
        """``key`` isn't on disk any more. Unknown keys are fine."""
        with self._lock:
            self._held -= self._files.pop(key, (0, 0, False))[0]

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._files.clear()
            self._held = 0

    def oldest(self, nbytes: int) -> list[tuple[ChunkKey, int]]:
        """Drop the oldest keys that take ``nbytes``, or all; answer them with their sizes."""
        with self._lock:
            victims: list[tuple[ChunkKey, int]] = []
            while nbytes > 0 and self._files:
                key, (size, _, _) = self._files.popitem(last=False)
                self._held -= size
                nbytes -= size
                victims.append((key, size))
            return victims
