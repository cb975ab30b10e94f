"""Chains of what a number draws, some at a time, until what they do was done often enough.

Each has a process of its own, and a group of processes. What was done is known from the chains
that ended, so that a later run can go on after them.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from multiprocessing.connection import wait
from typing import ClassVar, TextIO

from forks import FoundError, ended, forked
from tqdm import tqdm

LOOKS_S = 1.0
"""So often it is seen whether to stop."""
LOGS_S = 60.0
"""So often the progress is told where nobody looks at a bar."""
tqdm.monitor_interval = 0  # a thread, and a fork has one of its parent's only


class Chains(ABC):
    """What chains did, in numbers."""

    counted: ClassVar[str]
    """What there have to be enough of, among what was ``done``."""

    def __init__(self) -> None:
        self.counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        """Of all chains that ended; in a chain's process, its own."""
        self.next = 0
        """All chains from the first up to this one have ended."""
        self._ended: set[int] = set()
        self._stopped = False

    @abstractmethod
    def chain(self, number: int) -> None:
        """Be a chain, and count in `counts` what is done.

        Raises:
            FoundError: something is wrong.
        """

    @property
    @abstractmethod
    def summary(self) -> str:
        """What was done so far."""

    @property
    def done(self) -> Counter[str]:
        """How often what was done, in the chains that ended."""
        return self.counts["done"]

    def stop(self, *_: object) -> None:
        """Begin no chain, and end those that run; a signal's handler."""
        self._stopped = True

    def run(self, count: int, first: int, jobs: int) -> bool:
        """Chains from number ``first`` on, until there were so many; false if it was stopped.

        Raises:
            FoundError: in chains, which aren't counted; the others that ran were let end.
        """
        running: dict[TextIO, tuple[int, int]] = {}
        found: list[str] = []
        self.next = number = first
        often = 0.1 if sys.stderr.isatty() else LOGS_S
        with tqdm(total=count, unit=f" {self.counted}", mininterval=often) as bar:
            try:
                while not self._stopped and (running if found else self._lacks(count)):
                    while len(running) < jobs and not found:
                        heard, pid = self._begun(number)
                        running[heard] = number, pid
                        number += 1
                    for heard in wait(list(running), LOOKS_S):
                        found += self._take(heard, *running.pop(heard))  # type: ignore[arg-type]
                        bar.update(min(count, self.done[self.counted]) - bar.n)
            finally:
                for heard, (_, pid) in running.items():
                    os.killpg(pid, signal.SIGKILL)
                    ended(pid)
                    heard.close()
        if found:
            raise FoundError(", ".join(found))
        return not self._stopped

    def _lacks(self, count: int) -> bool:
        return self.done[self.counted] < count

    def _begun(self, number: int) -> tuple[TextIO, int]:
        """What a chain's process says, and its id."""
        heard, told = os.pipe()
        pid = forked(functools.partial(self._work, number, told))
        os.setpgid(pid, pid)  # it does that too, and either may be the first
        os.close(told)
        return open(heard), pid

    def _work(self, number: int, told: int) -> None:
        os.setpgid(0, 0)
        self.counts.clear()
        try:
            self.chain(number)
            said: dict[str, object] = {"counts": self.counts}
        except FoundError as error:
            said = {"found": str(error)}
        with open(told, "w") as answer:
            json.dump(said, answer)

    def _take(self, heard: TextIO, number: int, pid: int) -> list[str]:
        """Count what a chain did; answers what was found."""
        with heard:
            said = json.loads(heard.read() or "{}")
        status = ended(pid)
        if status or "counts" not in said:
            return [f"chain {number}: {said.get('found', f'it ended with {status}')}"]
        for name, counts in said["counts"].items():
            self.counts[name].update(counts)
        self._ended.add(number)
        while self.next in self._ended:
            self._ended.remove(self.next)
            self.next += 1
        return []
