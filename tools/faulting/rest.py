"""What is left when the faults are over: threads, descriptors, processes, leases, slots, memory."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from faulting.canary import Canary, waited_s
from faulting.content import CHUNK_TOKENS, Content, Prompt, as_bytes
from faulting.places import children
from lmcache_core import Cache

SETTLES_S = 15.0
"""So long after the last fault everything works again, and nothing is left."""
_HARNESS = ("harness-", "(_read)", "(_pump)", "(_accept)", "tqdm")
"""Threads of the harness itself, which come and go with its servers and links."""


@dataclass(frozen=True)
class Held:
    """What a process holds."""

    threads: tuple[str, ...]
    descriptors: tuple[str, ...]
    children: int

    @classmethod
    def now(cls) -> Held:
        gc.collect()
        names = [t.name for t in threading.enumerate()]
        own = sorted(name for name in names if not any(mark in name for mark in _HARNESS))
        return cls(tuple(own), tuple(sorted(_descriptors())), len(children()))

    def more_than(self, before: Held) -> list[str]:
        """What there is now and wasn't before, in words."""
        found = []
        if len(self.threads) > len(before.threads):
            found.append(f"threads left: {_beyond(self.threads, before.threads)}")
        if len(self.descriptors) > len(before.descriptors):
            found.append(f"descriptors left: {_beyond(self.descriptors, before.descriptors)}")
        if self.children > before.children:
            found.append(f"{self.children - before.children} child processes left")
        return found


class Undisturbed:
    """Time, but for that in which other processes had the CPU: this one's, or a child's."""

    def __init__(self, canary: Canary) -> None:
        self._canary = canary
        self._began = time.monotonic(), canary.lost_s
        self._waited = {pid: waited_s(f"/proc/{pid}") for pid in children()}

    @property
    def seconds(self) -> float:
        """Since it was made."""
        began, lost = self._began
        waited = [waited_s(f"/proc/{pid}") - self._waited.get(pid, 0.0) for pid in children()]
        disturbed = self._canary.lost_s - lost + sum(waited)
        return max(0.0, time.monotonic() - began - disturbed)


def settled(canary: Canary, problems: Callable[[], list[str]]) -> list[str]:
    """Ask again until there are no ``problems``, for `SETTLES_S` of undisturbed time."""
    clock = Undisturbed(canary)
    while found := problems():
        if clock.seconds > SETTLES_S:
            return found
        time.sleep(0.5)  # looking costs more than waiting
    return []


class Rest:
    """Looks into a cache at rest. ``numbers`` are new ones each time: chunks outlive caches."""

    def __init__(
        self, cache: Cache, content: Content, tiers: Sequence[str], numbers: Iterator[int]
    ) -> None:
        self._cache = cache
        self._content = content
        self._tiers = tiers
        self._numbers = numbers
        self._slots = cache._running.planner.index.slots

    def unworking(self) -> list[str]:
        """Whether a new prompt is stored everywhere, and then loaded from the first tier."""
        number = next(self._numbers)
        prompt = Prompt(tuple(range(10 * number, 10 * number + 4)))
        before = _tier_counts(self._cache)
        self._cache.store(prompt.tokens, as_bytes(self._content.made(prompt)))
        self._cache.flush(1.0)
        if self._tiers:  # push it out of host memory
            self._fill()
            self._cache.flush(1.0)
        into = self._content.empty(prompt)
        loaded = self._cache.load(prompt.tokens, as_bytes(into)) // CHUNK_TOKENS
        after = _tier_counts(self._cache)
        found = [] if loaded == len(prompt.path) else [f"{loaded} of a prompt's 4 chunks hit"]
        if self._content.wrong_words(into, prompt, loaded):
            found.append("WRONG bytes at rest")

        def same(counter: str, tier: str) -> bool:
            return after.get((counter, tier)) == before.get((counter, tier))

        deaf = [tier for tier in self._tiers if same("tier_store_chunks", tier)]
        dumb = [tier for tier in self._tiers[:1] if same("load_chunks", tier)]
        found += [f"tier {tier} takes nothing in" for tier in deaf]
        found += [f"tier {tier} gives nothing back" for tier in dumb]
        return found

    def still_held(self) -> list[str]:
        """Leases and slots that nobody gave back."""
        if not self._cache.flush(1.0):
            return ["the slow tier didn't take in what was stored"]
        self._cache.lookup([])  # takes in what movers report
        running = self._cache._running
        leases, pending = running.mover.leases, running.planner.pending
        if leases or pending:
            return [f"{leases} leases and {pending} operations at rest"]
        lacking = self._slots - self._fill()
        return [f"{lacking} of {self._slots} slots are never freed"] if lacking else []

    def _fill(self) -> int:
        """Store as many new chunks as there are slots; answer how many were taken."""
        count = self._slots
        first = (1 << 30) + next(self._numbers) * count * CHUNK_TOKENS
        tokens = np.arange(first, first + count * CHUNK_TOKENS, dtype="<u4").tobytes()
        room = self._content.empty(Prompt((0,) * count))
        return self._cache.store(tokens, as_bytes(room)) // CHUNK_TOKENS


def memory_mib() -> float:
    """What this process has to itself, after giving back what it can."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) / 1024
    return 0.0


def _tier_counts(cache: Cache) -> dict[tuple[str, str], float]:
    found: dict[tuple[str, str], float] = {}
    for (name, labels), value in cache.counters.snapshot().items():
        if tier := dict(labels).get("tier"):
            found[name, tier] = found.get((name, tier), 0) + value
    return found


def _descriptors() -> list[str]:
    return [_target(name) for name in os.listdir("/proc/self/fd")]


def _target(descriptor: str) -> str:
    """What a descriptor is of, without its number."""
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").partition(":")[0]
    except OSError:
        return "closed meanwhile"  # the one that lists them


def _beyond(now: tuple[str, ...], before: tuple[str, ...]) -> str:
    left = list(now)
    for one in before:
        if one in left:
            left.remove(one)
    return ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
