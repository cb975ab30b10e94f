"""A canary: how late is a thread that only wants to wake up, and is that this process's doing?

A call that ends after its deadline is late because of what is tested, unless other processes had
the CPU. They had it where the canary was due and this process used less CPU than the clock went on:
then whoever the canary waited for waited itself. Besides, the calling thread may have waited for a
CPU; for how long, the system says. Only what was lost after the deadline counts: before it a call
can't be late, it gives up at its deadline whatever it has reached by then.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import log

from faulting.findings import Findings

TICK_S = 0.005
ALLOWED = 1.1
"""Times a deadline."""
REMEMBERED = 1 << 16
"""Losses: those of minutes, and no call takes so long."""
_STEP = log(1.2)


class Canary:
    """A thread that wakes up every `TICK_S` and keeps what other processes cost it.

    ``clock`` and ``cpu`` are the time, and how much CPU this process has had; ``remembered``, how
    many losses are kept.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        cpu: Callable[[], float] = time.process_time,
        *,
        remembered: int = REMEMBERED,
    ) -> None:
        self._clock = clock
        self._cpu = cpu
        self._lost_s = 0.0
        self._losses: deque[tuple[float, float]] = deque(maxlen=remembered)
        """From when to when."""
        self._slept = clock(), cpu()
        self._lock = threading.Lock()
        self._ends = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def lost_s(self) -> float:
        """Seconds lost since the start."""
        return self._lost_s

    def start(self) -> None:
        """From now on."""
        self._thread = threading.Thread(target=self._run, name="harness-canary", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._ends.set()
        if self._thread is not None:
            self._thread.join()

    def lost_since(self, moment: float) -> float:
        """Seconds lost from ``moment`` until now, which it may still be losing."""
        return self.lost_between(moment, self._clock())

    def lost_between(self, began: float, ended: float) -> float:
        """Seconds lost between two moments, the later of which isn't to come."""
        with self._lock:
            now = self._clock()
            losing = now - self._losing(now), now
            lost = _shared(losing, began, ended)
            for loss in reversed(self._losses):
                if loss[1] <= began:
                    break
                lost += _shared(loss, began, ended)
        return lost

    def woke(self) -> None:
        """The canary is awake, and goes to sleep again."""
        with self._lock:
            now = self._clock()
            if lost := self._losing(now):
                self._losses.append((now - lost, now))
                self._lost_s += lost
            self._slept = now, self._cpu()

    def _losing(self, now: float) -> float:
        """What other processes cost it since it went to sleep."""
        since, cpu_s = self._slept
        asleep = now - since
        return max(0.0, min(asleep - TICK_S, asleep - (self._cpu() - cpu_s)))

    def _run(self) -> None:
        while not self._ends.is_set():
            time.sleep(TICK_S)
            self.woke()


class Latencies:
    """How long calls took, by their name, into ``findings``. Thread-safe."""

    def __init__(
        self,
        canary: Canary,
        findings: Findings,
        clock: Callable[[], float] = time.monotonic,
        waited: Callable[[], float] = lambda: waited_s("/proc/thread-self"),
    ) -> None:
        self._canary = canary
        self._findings = findings
        self._clock = clock
        self._waited = waited
        self._lock = threading.Lock()

    @contextmanager
    def timed(self, name: str, deadline_s: float, *, waits: bool = True) -> Iterator[None]:
        """Measure the call within; it has ``deadline_s``.

        ``waits``: it gives up then, by itself. Otherwise it needs nobody, and may take so long for
        its own work; then what was lost before that counts, too.
        """
        began, waited = self._clock(), self._waited()
        try:
            yield
        finally:
            took = self._clock() - began
            late, lost = took > ALLOWED * deadline_s, 0.0
            if late:
                since = deadline_s * waits
                lost = self._canary.lost_since(began + since) + self._waited() - waited
                lost = min(lost, took - since)
            found = self._findings
            with self._lock:
                found.calls.setdefault(name, Counter())[_bucket(took)] += 1
                found.longest_s[name] = max(found.longest_s.get(name, 0.0), took)
                found.past[name] += late
                if took - lost > ALLOWED * deadline_s:
                    found.late.append(
                        f"{name} took {took:.2f} s of {deadline_s:g} s, "
                        f"of which others had the CPU for {lost:.2f} s"
                    )


def _shared(loss: tuple[float, float], began: float, ended: float) -> float:
    """How much of a loss lies between two moments."""
    return max(0.0, min(loss[1], ended) - max(loss[0], began))


def quantile(buckets: Counter[int], share: float) -> float:
    """Seconds that so many of the calls took at the most, to within a fifth."""
    wanted = share * sum(buckets.values())
    for bucket in sorted(buckets):
        wanted -= buckets[bucket]
        if wanted <= 0:
            return float(1.2**bucket)
    return 0.0


def waited_s(task: str) -> float:
    """Seconds for which a thread, by its folder in ``/proc``, waited for a CPU; 0 without it."""
    try:
        with open(f"{task}/schedstat", "rb", buffering=0) as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, IndexError):  # it has ended, or this system doesn't say
        return 0.0


def _bucket(seconds: float) -> int:
    return round(log(max(seconds, 1e-6)) / _STEP)
