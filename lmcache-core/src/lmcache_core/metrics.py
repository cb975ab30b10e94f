"""Counts what happens, under the names that operators see.

    name              labels                    counts
    lookup_requests                             lookups that were answered
    lookup_tokens                               tokens of their prompts
    lookup_hit_tokens tier                      of those, tokens that could be loaded
    store_chunks                                chunks copied from an engine to host memory
    store_bytes                                 their bytes
    store_dropped     reason [tier]             chunks that weren't kept; with tier: not there
    tier_store_chunks tier                      chunks that a slow tier took
    tier_store_bytes  tier                      their bytes, as stored
    load_chunks       tier                      chunks loaded from a tier and found good
    load_bytes        tier                      their bytes, as stored
    load_failures     tier, reason              chunks that were asked for and couldn't be had
    evicted_chunks    tier                      chunks that made room for others
    frame_rejected    reason                    stored values that weren't what they should be
    backend_errors    backend, operation, kind  calls that failed or were refused
    backend_timeouts  backend, operation        calls that missed their deadline
    breaker_open      backend                   circuit breakers that are open now (a gauge)
    isolated_restarts backend, reason           processes of isolated backends that died or were
                                                killed (died, hung, memory) and are replaced

Knows names and numbers. Imports no metrics library: an exporter reads
`Counters.snapshot`, or serves what `render_prometheus` makes of it.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

Series = tuple[str, tuple[tuple[str, str], ...]]
"""A counter's name and its labels, sorted."""
Snapshot = dict[Series, float]

GAUGES = frozenset({"breaker_open"})
"""Names whose value goes down as well; all others only grow."""
PREFIX = "lmcache_"


class Counters:
    """Named numbers of one process. Thread-safe.

    Build one, pass it on. A worker ships `delta` to its scheduler, which takes it in with `merge`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals: Snapshot = {}
        self._fresh: Snapshot = {}

    def add(self, name: str, value: float = 1, /, **labels: str) -> None:
        """Add ``value`` to the series of ``name`` with these labels."""
        series = (name, tuple(sorted(labels.items())))
        with self._lock:
            self._add(series, value)

    def snapshot(self) -> Snapshot:
        """All totals, as a copy."""
        with self._lock:
            return dict(self._totals)

    def delta(self) -> Snapshot:
        """What was added since the last call; series that didn't change are left out."""
        with self._lock:
            fresh, self._fresh = self._fresh, {}
        return {series: value for series, value in fresh.items() if value}

    def merge(self, delta: Mapping[Series, float]) -> None:
        """Add another process's `delta`. It is part of this one's next `delta` too."""
        with self._lock:
            for series, value in delta.items():
                self._add(series, value)

    def _add(self, series: Series, value: float) -> None:
        self._totals[series] = self._totals.get(series, 0) + value
        self._fresh[series] = self._fresh.get(series, 0) + value


def render_prometheus(snapshot: Mapping[Series, float]) -> str:
    """``snapshot`` in Prometheus' text exposition format, version 0.0.4.

    Counters are called ``lmcache_NAME_total``, gauges ``lmcache_NAME``.
    """
    lines: list[str] = []
    family = ""
    for (name, labels), value in sorted(snapshot.items()):
        exported = f"{PREFIX}{name}" if name in GAUGES else f"{PREFIX}{name}_total"
        if exported != family:
            family = exported
            lines.append(f"# TYPE {family} {'gauge' if name in GAUGES else 'counter'}")
        inside = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels)
        shown = int(value) if float(value).is_integer() else value
        lines.append(f"{family}{{{inside}}} {shown}" if inside else f"{family} {shown}")
    return "".join(f"{line}\n" for line in lines)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
