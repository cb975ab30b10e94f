"""Rounds on one place, one after the other, in a process of its own.

So the waits of one place are others' time, and what is left in a process is one place's doing.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path

from faulting import plugin
from faulting.canary import Canary
from faulting.content import Prompts
from faulting.findings import Findings
from faulting.kinds import counted
from faulting.places import PLACES, Place
from faulting.rest import memory_mib
from faulting.storm import Round, numbers

GROWTH_MIB = 48.0
"""More than this above what the first rounds took is a leak."""
ROUND = 1000
"""Faults in one round, at the most."""
TELLS_S = 0.5
"""How often a process says how many faults there were."""


@dataclass(frozen=True)
class Task:
    """What one process does."""

    name: str
    """One of `PLACES`."""
    folder: Path
    """Its own, and not there yet."""
    seed: int
    faults: int
    """No more than so many."""
    until: float
    """No round begins after this moment, by the monotonic clock."""
    broken: str
    log: str


def work(
    task: Task, turns: AbstractContextManager[object], enough: Event, report: Connection
) -> None:
    """Do ``task``. Reports numbers of faults so far, and at last `Findings`."""
    faulthandler.enable()
    sys.setswitchinterval(5e-4)  # or a call waits longer for its own process than for others
    logging.basicConfig(level=task.log)
    signal.signal(signal.SIGTERM, _end)  # so that servers don't outlive it
    task.folder.mkdir()
    os.environ |= {
        plugin.FOLDER: str(task.folder),
        plugin.SEED: str(task.seed),
        plugin.BREAK: task.broken,
    }
    site = task.folder / "site"
    sys.path.insert(0, str(site))
    plugin.install(site)
    plugin.tally()  # before anything is counted: it keeps descriptors
    findings = Findings()
    try:
        _rounds(task, turns, enough, findings, _Seldom(report))
    except Exception:  # noqa: BLE001  what was found until then counts, too
        findings.failed.append(f"{task.name}: {traceback.format_exc()}")
    report.send(findings)
    report.close()


def _rounds(
    task: Task,
    turns: AbstractContextManager[object],
    enough: Event,
    findings: Findings,
    tell: Callable[[int], None],
) -> None:
    chance, canary = random.Random(task.seed), Canary()
    memory = findings.memory_mib[task.name] = list[float]()
    with ExitStack() as stack:
        canary.start()
        stack.callback(canary.stop)
        place = PLACES[task.name](task.folder / "place", random.Random(chance.getrandbits(32)))
        stack.callback(_count, findings, task, place, canary)
        stack.callback(place.close)
        one = Round(
            task.name,
            place,
            task.folder,
            findings,
            canary,
            Prompts(),
            numbers(),
            turns,
            enough.is_set,
        )
        while one.faults < task.faults and time.monotonic() < task.until and not enough.is_set():
            share = min(ROUND, max(20, task.faults - one.faults))
            one.run(share, chance.getrandbits(32), lambda: tell(one.faults))
            findings.rounds += 1
            memory.append(memory_mib())
            if not one.faults and findings.rounds > 2 and not enough.is_set():
                raise RuntimeError("no fault was injected")
    if len(memory) > 2 and (grown := min(memory[-2:]) - max(memory[:2])) > GROWTH_MIB:
        findings.left.append(f"{task.name}: memory grew by {grown:.0f} MiB")


def _count(findings: Findings, task: Task, place: Place, canary: Canary) -> None:
    findings.faults = counted(task.folder) + place.counts
    findings.places[task.name] = findings.faults.total()
    findings.lost_s = canary.lost_s


class _Seldom:
    """Tells numbers, but not all."""

    def __init__(self, report: Connection) -> None:
        self._report = report
        self._next = 0.0

    def __call__(self, number: int) -> None:
        if time.monotonic() > self._next:
            self._next = time.monotonic() + TELLS_S
            self._report.send(number)


def _end(*_: object) -> None:
    sys.exit(2)
