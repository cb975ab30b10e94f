"""What a mover's threads have to report, until the planner asks.

Knows operations by number. Knows nothing about what they do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from lmcache_core.cache.plan import Report
from lmcache_core.chunks.keys import ChunkKey


class Reports:
    """One `Report` that grows until it is taken. Thread-safe.

    ``on_news`` is called, on any thread, when something happened that nobody may be waiting for.
    """

    def __init__(self, on_news: Callable[[], None] | None = None) -> None:
        self._on_news = on_news
        self._lock = threading.Lock()
        self._report = Report()

    def done(self, ops: Iterable[int]) -> None:
        """These operations' chunks are there."""
        with self._lock:
            self._report.ok.update(dict.fromkeys(ops, 1))

    def failed(self, ops: Iterable[int]) -> None:
        """These operations' chunks aren't."""
        with self._lock:
            self._report.bad.update(dict.fromkeys(ops, 1))

    def released(self, ops: Iterable[int]) -> None:
        """Nobody here uses these operations' slots any more."""
        with self._lock:
            self._report.released.update(dict.fromkeys(ops, 1))

    def unreadable(self, keys: Iterable[ChunkKey]) -> None:
        """These chunks in host memory are absent or damaged."""
        with self._lock:
            self._report.unreadable.update(keys)

    def refused(self, tier: int, keys: Iterable[ChunkKey]) -> None:
        """A slow tier has values of these names that aren't for us."""
        with self._lock:
            self._report.refused.setdefault(tier, set()).update(keys)

    def failed_steps(self, rank: int, count: int) -> None:
        """So many engine steps of a rank had a failed load so far."""
        with self._lock:
            self._report.failed_steps[rank] = count

    def tell(self) -> None:
        """Say that there is something to take."""
        if self._on_news is not None:
            self._on_news()

    def take(self) -> Report:
        """What happened since the last call."""
        with self._lock:
            report, self._report = self._report, Report()
            return report
