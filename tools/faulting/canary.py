"""A canary: how late is a thread that only wants to wake up?

A call that ends after its deadline is late because of what is tested only where the canary was on
time. What the canary lost while the call ran is taken off it, however much that is.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import log

TICK_S = 0.005
ALLOWED = 1.1
"""Times a deadline."""
_STEP = log(1.2)


class Canary:
    """A thread that wakes up every `TICK_S` and adds up how much later than that it did."""

    def __init__(self) -> None:
        self._lost_s = 0.0
        self._due = time.monotonic() + TICK_S
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name="harness-canary", daemon=True)
        self._thread.start()

    @property
    def lost_s(self) -> float:
        """Seconds lost since the start, those of this moment included."""
        return self._lost_s + max(0.0, time.monotonic() - self._due)

    def stop(self) -> None:
        self._ends.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ends.is_set():
            time.sleep(max(0.0, self._due - time.monotonic()))
            now = time.monotonic()
            self._lost_s += max(0.0, now - self._due)
            self._due = now + TICK_S


@dataclass
class Latencies:
    """How long calls took, by their name. Thread-safe."""

    canary: Canary
    calls: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    longest_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    past: Counter[str] = field(default_factory=Counter)
    """Calls past their deadline and a tenth of it, whoever was to blame."""
    unexplained: list[str] = field(default_factory=list)
    """Those of them that the canary doesn't explain, in words."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def timed(self, name: str, deadline_s: float) -> Iterator[None]:
        """Measure the call within; it has ``deadline_s``."""
        lost, began = self.canary.lost_s, time.monotonic()
        try:
            yield
        finally:
            took = time.monotonic() - began
            lost = self.canary.lost_s - lost
            with self._lock:
                self.calls[name][_bucket(took)] += 1
                self.longest_s[name] = max(self.longest_s[name], took)
                if took > ALLOWED * deadline_s:
                    self.past[name] += 1
                    if took - lost > ALLOWED * deadline_s:
                        self.unexplained.append(
                            f"{name} took {took:.2f} s of {deadline_s:g} s, "
                            f"of which the canary lost {lost:.2f} s"
                        )

    def quantile(self, name: str, share: float) -> float:
        """Seconds that so many of the calls took at the most, to within a fifth."""
        buckets = self.calls[name]
        wanted = share * sum(buckets.values())
        for bucket in sorted(buckets):
            wanted -= buckets[bucket]
            if wanted <= 0:
                return 1.2**bucket
        return 0.0


def _bucket(seconds: float) -> int:
    return round(log(max(seconds, 1e-6)) / _STEP)
