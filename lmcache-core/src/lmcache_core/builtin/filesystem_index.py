"""What one folder of chunk files holds: sizes, order of use, and room for more.

Knows keys and byte counts, and whether one more value fits below the bound.
Touches no file: whoever asks for room gets the keys to remove. Thread-safe.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable

from lmcache_core.keys import ChunkKey


class FileIndex:
    """Key to size, least recently used first, bounded by ``max_bytes`` (``None``: unbounded).

    Room is reserved before a value is written, so that concurrent writers can't overshoot the
    bound together.
    """

    def __init__(self, max_bytes: int | None) -> None:
        self._max_bytes = max_bytes
        self._sizes: OrderedDict[ChunkKey, int] = OrderedDict()
        self._held = 0
        self._reserved = 0
        self._lock = threading.Lock()

    def usage(self) -> tuple[int, int]:
        """Chunks and bytes, without what is only reserved."""
        with self._lock:
            return len(self._sizes), self._held

    def fill(self, files: Iterable[tuple[ChunkKey, int]]) -> list[ChunkKey]:
        """Start from ``files``, oldest first; answer those that are too much."""
        with self._lock:
            self._sizes = OrderedDict(files)
            self._held = sum(self._sizes.values())
            over = 0 if self._max_bytes is None else self._held - self._max_bytes
            return self._pop_oldest(over)

    def seen(self, key: ChunkKey, size: int) -> None:
        """``key`` was found on disk with ``size`` bytes; it is the most recently used now."""
        with self._lock:
            self._held += size - self._sizes.pop(key, 0)
            self._sizes[key] = size

    def forget(self, key: ChunkKey) -> None:
        """``key`` isn't on disk any more. Unknown keys are fine."""
        with self._lock:
            self._held -= self._sizes.pop(key, 0)

    def clear(self) -> None:
        """Forget everything but reservations."""
        with self._lock:
            self._sizes.clear()
            self._held = 0

    def reserve(self, nbytes: int) -> list[ChunkKey] | None:
        """Set ``nbytes`` aside; answer the keys to remove for it, or ``None`` if it can't fit.

        Every reservation ends with `release`.
        """
        with self._lock:
            victims: list[ChunkKey] = []
            if self._max_bytes is not None:
                room = self._max_bytes - self._reserved
                if nbytes > room:
                    return None
                victims = self._pop_oldest(self._held + nbytes - room)
            self._reserved += nbytes
            return victims

    def release(self, nbytes: int) -> None:
        """Give a reservation back."""
        with self._lock:
            self._reserved -= nbytes

    def oldest(self, nbytes: int) -> list[ChunkKey] | None:
        """Drop the oldest keys that free ``nbytes``; ``None`` if all together wouldn't."""
        with self._lock:
            return self._pop_oldest(nbytes) if nbytes <= self._held else None

    def _pop_oldest(self, nbytes: int) -> list[ChunkKey]:
        victims: list[ChunkKey] = []
        while nbytes > 0 and self._sizes:
            key, size = self._sizes.popitem(last=False)
            self._held -= size
            nbytes -= size
            victims.append(key)
        return victims
