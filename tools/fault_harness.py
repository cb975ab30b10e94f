"""Injects faults into a real cache, of every kind and on every tier, and checks what must hold.

    python3 tools/fault_harness.py                              20,000 faults over all tiers
    python3 tools/fault_harness.py --faults 300000 --seed 7     the long one; an hour or more
    python3 tools/fault_harness.py --tiers redis,lm-unix --minutes 5
    python3 tools/fault_harness.py --break wrong-byte           must fail: see below

Six threads store, load, look up, prefetch, pin, flush and clear prompts that share prefixes, over
host memory that holds few of them. Meanwhile plugins raise seventeen kinds of exceptions, are late,
answer nonsense, less, and other keys' values; system calls below the filesystem backend fail; files
are damaged; links cut, flip bits and fall silent; peers send garbage; servers and children are
stopped, killed, and come back with and without their data. The content of each chunk follows from
its key, so every loaded byte is checked.

After each round faults end, and then a new prompt must be stored in and loaded from the tiers
within 15 s, no lease, slot, thread, descriptor or process may be left, and memory mustn't have
grown. A call is late when it takes a tenth longer than its deadline, not counting what a canary
thread lost meanwhile.

Exit status 1: a byte was wrong, a call raised, something was left, or a call was late without the
canary. ``--break`` puts a mistake into the plugins around the tiers, to see that it is found. The
same seed gives the same faults and prompts, but not the same timing of threads.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from prepared import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "bench"))
sys.path.insert(0, str(REPOSITORY / "lmcache-core" / "tests" / "servers"))
sys.path.insert(0, str(REPOSITORY / "lmcache-backend-redis" / "tests"))

from faulting import plugin
from faulting.canary import Canary, Latencies
from faulting.kinds import WHILE_COLD, counted
from faulting.places import PLACES, Place
from faulting.rest import memory_mib
from faulting.storm import Findings, Round, numbers
from tqdm import tqdm

GROWTH_MIB = 48.0
"""More than this above what the first rounds took is a leak."""
ROUND = 800
"""Faults in one round, at the most."""


class Run:
    """Rounds over all tiers in turn, until there were enough faults."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self._arguments = arguments
        self._folder = folder
        self._canary = Canary()
        self.findings = Findings(Latencies(self._canary))
        self.places: dict[str, Place] = {}
        self.memory_mib: list[float] = []
        self.rounds = 0

    def go(self) -> None:
        """All of it."""
        wanted, chance = self._arguments.faults, random.Random(self._arguments.seed)
        ends = time.monotonic() + 60 * self._arguments.minutes
        unique = numbers()
        with (
            ExitStack() as stack,
            tqdm(total=wanted, unit=" faults", disable=self._arguments.quiet) as bar,
        ):
            stack.callback(self._canary.stop)
            for name in self._arguments.tiers:
                where, seed = self._folder / name, chance.getrandbits(32)
                self.places[name] = place = PLACES[name](where, random.Random(seed))
                stack.callback(place.close)

            def told() -> None:
                bar.update(min(wanted, self.injected.total()) - bar.n)

            while self.injected.total() < wanted and time.monotonic() < ends:
                before = self.injected.total()
                for name, place in self.places.items():
                    if time.monotonic() > ends:
                        break
                    bar.set_description(name)
                    share = max(20, min(ROUND, wanted // len(self.places)))
                    one = Round(name, place, self._folder, self.findings, self._canary, unique)
                    one.run(share, chance.getrandbits(32), told)
                    self.rounds += 1
                self.memory_mib.append(memory_mib())
                if self.injected.total() == before:
                    raise RuntimeError("no fault was injected")
        self._look_at_memory()

    @property
    def injected(self) -> Counter[str]:
        """How often each kind was injected."""
        found = counted(self._folder)
        for place in self.places.values():
            found.update(place.counts)
        return found

    def _look_at_memory(self) -> None:
        if len(self.memory_mib) > 2:
            grown = min(self.memory_mib[-2:]) - max(self.memory_mib[:2])
            if grown > GROWTH_MIB:
                self.findings.left.append(f"memory grew by {grown:.0f} MiB")


def report(run: Run, seconds: float) -> dict[str, object]:
    """All that was counted and measured, as plain data."""
    findings, injected = run.findings, run.injected
    latencies = findings.latencies
    cold = sum(n for kind, n in injected.items() if kind.partition(":")[0] in WHILE_COLD)
    return {
        "faults": injected.total(),
        "faults while cold": cold,
        "kinds": dict(sorted(injected.items())),
        "rounds": run.rounds,
        "seconds": round(seconds, 1),
        "operations": findings.operations,
        "checked MiB": round(findings.checked_bytes / 2**20, 1),
        "hit chunks": findings.hit_chunks,
        "asked chunks": findings.asked_chunks,
        "recovered after s, longest": round(max(findings.recovered_s, default=0), 1),
        "memory MiB": [round(mib, 1) for mib in run.memory_mib],
        "calls": {
            name: {
                "count": sum(buckets.values()),
                "p50 ms": round(1000 * latencies.quantile(name, 0.5), 1),
                "p99 ms": round(1000 * latencies.quantile(name, 0.99), 1),
                "longest ms": round(1000 * latencies.longest_s[name], 1),
                "past deadline": latencies.past[name],
            }
            for name, buckets in sorted(latencies.calls.items())
        },
        "canary lost s": round(latencies.canary.lost_s, 1),
        "late": len(latencies.unexplained),
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
    faulthandler.enable()
    sys.setswitchinterval(5e-4)  # or the canary loses more to its own process than to others
    logging.basicConfig(level=arguments.log.upper())
    signal.signal(signal.SIGTERM, _end)  # so that servers don't outlive it
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder:
        os.environ |= {
            plugin.FOLDER: folder,
            plugin.SEED: str(arguments.seed),
            plugin.BREAK: arguments.broken or "",
        }
        sys.path.insert(0, str(Path(folder) / "site"))
        plugin.install(Path(folder) / "site")
        plugin.tally()  # before anything is counted: it keeps descriptors
        run = Run(arguments, Path(folder))
        run.go()
        found = report(run, time.monotonic() - began)
    problems = run.findings.problems
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        show(found)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
