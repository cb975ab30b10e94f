"""Injects faults into a real cache, of every kind and on every tier, and checks what must hold.

    python3 tools/fault_harness.py                              20,000 faults over all tiers
    python3 tools/fault_harness.py --faults 300000 --seed 7     the long one
    python3 tools/fault_harness.py --tiers redis,lm-unix --minutes 5
    python3 tools/fault_harness.py --break wrong-byte           must fail: see below

Each tier has a process of its own. In it, six threads store, load, look up, prefetch, pin, flush
and clear prompts that share prefixes, over host memory that holds few of them. Meanwhile plugins
raise seventeen kinds of exceptions, are late, answer nonsense, less, and other keys' values; system
calls below the filesystem backend fail; files are damaged; links cut, flip bits and fall silent;
peers send garbage; servers and children are stopped, killed, and come back with and without their
data. The content of each chunk follows from its key, so every loaded byte is checked.

After each round faults end, and then a new prompt must be stored in and loaded from the tiers
within 15 s, no lease, slot, thread, descriptor or process may be left, and memory mustn't have
grown. A call is late when it takes a tenth longer than its deadline, not counting the time after
that in which other processes had the CPU: see `faulting.canary`.

Exit status 1: a byte was wrong, a call raised, something was left, or a call was late. ``--break``
puts a mistake into the plugins around the tiers, to see that it is found. The same seed gives the
same faults and prompts, but not the same timing of threads.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from prepared import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "bench"))
sys.path.insert(0, str(REPOSITORY / "lmcache-core" / "tests" / "servers"))
sys.path.insert(0, str(REPOSITORY / "lmcache-backend-lm" / "tests" / "servers"))
sys.path.insert(0, str(REPOSITORY / "lmcache-backend-redis" / "tests"))

from faulting import plugin
from faulting.canary import quantile
from faulting.findings import Findings
from faulting.kinds import WHILE_COLD
from faulting.places import PLACES
from faulting.work import Task, work
from tqdm import tqdm

SHARE = 2
"""A tier sees at most so many times what it would see if all had the same share: some have fewer
calls than others, or wait for what was stopped."""
JOBS = 4
"""Two cores are busy then, and what waits for its turn recovers meanwhile."""
ENDS_S = 60.0
"""For a process to end that was asked to."""


class Run:
    """A process for each tier, until there were enough faults in all of them together."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self._arguments = arguments
        self._folder = folder
        self._context = multiprocessing.get_context("spawn")
        self._turns = self._context.Semaphore(arguments.jobs)
        self._enough = self._context.Event()
        self._processes: dict[str, BaseProcess] = {}
        self._so_far: Counter[str] = Counter()
        self.findings = Findings()

    def go(self) -> None:
        """All of it."""
        wanted, reports = self._arguments.faults, dict[Connection, str]()
        with tqdm(total=wanted, unit=" faults", disable=self._arguments.quiet) as bar:
            try:
                for task in self._tasks():
                    reports[self._started(task)] = task.name
                while reports:
                    for report in wait(list(reports)):
                        assert isinstance(report, Connection)
                        if not self._took_in(reports[report], report):
                            del reports[report]
                    bar.update(min(wanted, self._so_far.total()) - bar.n)
                    if self._so_far.total() >= wanted:
                        self._enough.set()
            finally:
                self._end()

    def _tasks(self) -> list[Task]:
        arguments = self._arguments
        chance, wanted = random.Random(arguments.seed), arguments.faults
        return [
            Task(
                name=name,
                folder=self._folder / name,
                seed=chance.getrandbits(32),
                faults=min(wanted, -(-SHARE * wanted // len(arguments.tiers))),
                until=time.monotonic() + 60 * arguments.minutes,
                broken=arguments.broken or "",
                log=arguments.log.upper(),
            )
            for name in arguments.tiers
        ]

    def _started(self, task: Task) -> Connection:
        """Begin it; answer where it reports."""
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=work, args=(task, self._turns, self._enough, theirs), name=task.name
        )
        self._processes[task.name] = process
        process.start()
        theirs.close()
        return ours

    def _took_in(self, name: str, report: Connection) -> bool:
        """Take in what a process says; false if that was its last."""
        try:
            told = report.recv()
        except (EOFError, ConnectionResetError):
            self.findings.failed.append(f"{name}: its process ended, and said nothing")
            self._turns.release()  # if it had one
            told = None
        if isinstance(told, int):
            self._so_far[name] = told
            return True
        if told is not None:
            self.findings.add(told)
            self._so_far[name] = told.places[name]
        report.close()
        return False

    def _end(self) -> None:
        for process in self._processes.values():
            if process.exitcode is None and not self.findings.places[process.name]:
                process.terminate()  # it has more to do
        for process in self._processes.values():
            process.join(ENDS_S)
            if process.is_alive():
                process.kill()


def report(findings: Findings, seconds: float) -> dict[str, object]:
    """All that was counted and measured, as plain data."""
    count = findings.faults.total()
    cold = sum(n for kind, n in findings.faults.items() if kind.partition(":")[0] in WHILE_COLD)
    return {
        "faults": count,
        "faults while cold": cold,
        "kinds": dict(sorted(findings.faults.items())),
        "places": dict(findings.places),
        "rounds": findings.rounds,
        "seconds": round(seconds, 1),
        "faults/s": round(count / seconds, 1),
        "operations": findings.operations,
        "checked MiB": round(findings.checked_bytes / 2**20, 1),
        "hit chunks": findings.hit_chunks,
        "asked chunks": findings.asked_chunks,
        "recovered after s, longest": round(max(findings.recovered_s, default=0), 1),
        "memory MiB": {
            name: {"first": round(mib[0], 1), "most": round(max(mib), 1), "last": round(mib[-1], 1)}
            for name, mib in findings.memory_mib.items()
            if mib
        },
        "calls": {
            name: {
                "count": sum(buckets.values()),
                "p50 ms": round(1000 * quantile(buckets, 0.5), 1),
                "p99 ms": round(1000 * quantile(buckets, 0.99), 1),
                "longest ms": round(1000 * findings.longest_s[name], 1),
                "past deadline": findings.past[name],
            }
            for name, buckets in sorted(findings.calls.items())
        },
        "others had the CPU, s": round(findings.lost_s, 1),
        "late": len(findings.late),
        "problems": findings.problems,
    }


def show(found: dict[str, object]) -> None:
    """The report for people."""
    kinds, calls = found.pop("kinds"), found.pop("calls")
    problems = found.pop("problems")
    assert isinstance(kinds, dict)
    assert isinstance(calls, dict)
    assert isinstance(problems, list)
    for kind, count in kinds.items():
        print(f"{count:9,}  {kind}")
    for name, facts in calls.items():
        print(f"{name:>9}  " + "  ".join(f"{what} {number}" for what, number in facts.items()))
    print("; ".join(f"{what}: {number}" for what, number in found.items()))
    for text, count in Counter(problems).most_common(40):
        print(text + (f" ({count} times)" if count > 1 else ""))
    print(f"{len(problems)} problems" if problems else "no wrong byte, nothing left, nobody late")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of faults and prompts (default: 0)")
    add("--faults", type=int, default=20_000, metavar="N", help="how many (default: 20,000)")
    add("--minutes", type=float, default=1e6, metavar="M", help="begin no round after so many")
    add("--jobs", type=int, default=JOBS, help=f"tiers stormed at one time (default: {JOBS})")
    add("--tiers", type=_tiers, default=list(PLACES), help=f"of {','.join(PLACES)} (default: all)")
    add("--break", dest="broken", choices=plugin.BREAKS, help="put a mistake into the plugins")
    add("--json", action="store_true", help="print the report as JSON")
    add("--quiet", action="store_true", help="no progress bar")
    add("--log", default="CRITICAL", metavar="LEVEL", help="show the product's log from here on")
    return parser.parse_args()


def _tiers(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in PLACES]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not of {', '.join(PLACES)}")
    return names


def _end(*_: object) -> None:
    sys.exit(2)


def main() -> int:
    arguments = parsed()
    signal.signal(signal.SIGTERM, _end)  # so that its processes don't outlive it
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder:
        run = Run(arguments, Path(folder))
        run.go()
        found = report(run.findings, time.monotonic() - began)
    problems = run.findings.problems
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        show(found)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
