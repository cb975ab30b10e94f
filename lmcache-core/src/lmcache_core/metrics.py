"""Counts what happens, under the names that operators see.

Names, labels and meanings: `METRICS`.

Knows names and numbers. Imports no metrics library: an exporter reads
`Counters.snapshot`, or serves what `render_prometheus` makes of it.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

Series = tuple[str, tuple[tuple[str, str], ...]]
"""A counter's name and its labels, sorted."""
Snapshot = dict[Series, float]

METRICS: dict[str, tuple[str, tuple[str, ...]]] = {
    "lookup_requests": ("Lookups that were answered", ()),
    "lookup_tokens": ("Tokens of their prompts", ()),
    "lookup_hit_tokens": ("Of those, tokens that could be loaded", ("tier",)),
    "lookups_deferred": ("Requests whose lookup waited, others holding their share of slots", ()),
    "store_chunks": ("Chunks copied from an engine to host memory", ()),
    "store_bytes": ("Their bytes", ()),
    "store_dropped": ("Chunks that weren't kept; with a tier: not there", ("reason", "tier")),
    "tier_store_chunks": ("Chunks that a slow tier took", ("tier",)),
    "tier_store_bytes": ("Their bytes, as stored", ("tier",)),
    "load_tokens": ("Tokens of prompts whose KV was loaded, found good and used", ()),
    "load_chunks": ("Chunks loaded and found good", ("tier",)),
    "load_bytes": ("Their bytes, as stored", ("tier",)),
    "load_failures": ("Chunks that were asked for and couldn't be had", ("tier", "reason")),
    "evicted_chunks": ("Chunks that made room for others", ("tier",)),
    "frame_rejected": ("Stored values that weren't what they should be", ("reason",)),
    "plugin_failures": (
        "Calls to serdes, policies and connectors that raised, or answered nonsense",
        ("kind", "operation", "tier"),
    ),
    "leases_forgotten": ("Leases that nobody can give back any more: a bug of ours", ("kind",)),
    "backend_errors": (
        "Calls to backends that failed or were refused",
        ("backend", "operation", "kind"),
    ),
    "backend_timeouts": ("Calls to backends that missed their deadline", ("backend", "operation")),
    "breaker_open": ("Circuit breakers of backends that are open now", ("backend",)),
    "clear_owed": ("Tiers that couldn't be cleared yet and aren't used until then", ("tier",)),
    "isolated_restarts": (
        "Processes of isolated backends that died, hung or took too much memory, and are replaced",
        ("backend", "reason"),
    ),
}
"""Name, help text, labels of what a cache counts. A series may lack the last of its labels."""

GAUGES = frozenset({"breaker_open", "clear_owed"})
"""Names whose value goes down as well; all others only grow."""
METRIC_PREFIX = "lmcache_"


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
        self.count((name, tuple(sorted(labels.items()))), value)

    def count(self, series: Series, value: float = 1) -> None:
        """`add`, of a series that the caller has made once."""
        with self._lock:
            totals, fresh = self._totals, self._fresh
            totals[series] = totals.get(series, 0) + value
            fresh[series] = fresh.get(series, 0) + value

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
                self._totals[series] = self._totals.get(series, 0) + value
                self._fresh[series] = self._fresh.get(series, 0) + value


def render_prometheus(snapshot: Mapping[Series, float]) -> str:
    """``snapshot`` in Prometheus' text exposition format, version 0.0.4.

    Counters are called ``lmcache_NAME_total``, gauges ``lmcache_NAME``.
    """
    lines: list[str] = []
    family = ""
    for (name, labels), value in sorted(snapshot.items()):
        exported = f"{METRIC_PREFIX}{name}" if name in GAUGES else f"{METRIC_PREFIX}{name}_total"
        if exported != family:
            family = exported
            lines.append(f"# TYPE {family} {'gauge' if name in GAUGES else 'counter'}")
        inside = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels)
        shown = int(value) if float(value).is_integer() else value
        lines.append(f"{family}{{{inside}}} {shown}" if inside else f"{family} {shown}")
    return "".join(f"{line}\n" for line in lines)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
