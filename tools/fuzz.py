"""Feeds damaged messages to a parser, by a seed: only the errors that it documents may come out.

    python3 tools/fuzz.py --list
    python3 tools/fuzz.py resp --runs 1000000
    python3 tools/fuzz.py all --runs 20000 --seed 7

Each run takes a valid sample, or several, and flips bits, cuts, repeats, inserts, joins, or puts a
number where a length may be. Exit status 1: another error came out, or more than ``--most-mib`` of
memory were taken. The input is printed as Python writes it; the same target and seed find it again.
A line for each target says how many runs there were, how many a second of CPU time, and what came
out of them; SIGTERM and Ctrl-C end the run with it.

The codecs' decoder in C++ has a fuzzer of its own, in ``kernels/fuzz``; `codec` here is what Python
does before it. Requests for ``/metrics`` have no target: Python's ``http.server`` parses them, and
what is left to us compares a header and a path with the ones that are right.
"""

from __future__ import annotations

import argparse
import logging
import random
import resource
import signal
import sys
import time
import tracemalloc
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field

from fuzzing import TARGETS as MESSAGES
from fuzzing import Target, mutated
from fuzzing_codecs import TARGETS as CODECS
from fuzzing_files import TARGETS as FILES
from fuzzing_requests import TARGETS as REQUESTS
from tqdm import tqdm

TARGETS = {**MESSAGES, **REQUESTS, **CODECS, **FILES}
TRACED, TRACED_EVERY = 200, 10_000
"""Of so many runs the memory of the first ones is looked at, which makes those slow. What stays
resident is looked at after all of them."""
_SHOWN = 8


@dataclass
class Report:
    """What came out of one target's runs."""

    runs: int = 0
    cpu_s: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    """How often nothing was raised, and each class of documented errors."""
    found: str | None = None
    stopped: bool = False

    def __str__(self) -> str:
        """In one line, with what was found below it."""
        rate = self.runs / self.cpu_s if self.cpu_s else 0.0
        common = [f"{name} {count:,}" for name, count in self.outcomes.most_common(_SHOWN)]
        text = f"{self.runs:,} runs, {rate:,.0f} a second of CPU time; "
        text += f"{len(self.outcomes)} outcomes: {', '.join(common) or 'none'}"
        text += "; stopped" if self.stopped else ""
        return f"{text}\n{self.found}" if self.found else f"{text}; only documented errors"


class Stop:
    """Whether a signal asked for the end. A run is never cut: a parser would get the blame."""

    def __init__(self) -> None:
        self.asked = False

    def on(self, *signals: signal.Signals) -> Stop:
        for one in signals:
            signal.signal(one, self._ask)
        return self

    def _ask(self, *_: object) -> None:
        self.asked = True


class Rendered(logging.Handler):
    """Makes the text of each line, and shows none: damaged input is what they are full of."""

    def emit(self, record: logging.LogRecord) -> None:
        record.getMessage()


def fuzz(target: Target, runs: int, seed: int, most_mib: float, stop: Stop | None = None) -> Report:
    """Run ``target``; its `Report.found` says in words what was found, if anything was."""
    report, stop = Report(), stop or Stop()
    chance = random.Random(f"{target.name} {seed}")
    samples = target.samples()
    for sample in samples:
        with suppress(*target.documented):  # as it is, it is fine, or for another parser
            target.parse(sample, random.Random(0))
    resident, began = _resident_mib(), time.process_time()
    try:
        for number in tqdm(range(runs), desc=target.name, disable=not sys.stderr.isatty()):
            if stop.asked:
                report.stopped = True
                break
            if number % TRACED_EVERY == 0:
                tracemalloc.start()
            data = mutated(chance.choice(samples), samples, chance)
            outcome = "none raised"
            try:
                target.parse(data, chance)
            except target.documented as error:
                outcome = type(error).__name__
            except BaseException as error:  # noqa: BLE001  that is what we are looking for
                report.found = f"run {number}: {type(error).__name__}: {error}\n  of {data!r}"
                break
            report.runs += 1
            report.outcomes[outcome] += 1
            if number % TRACED_EVERY < TRACED and (number % TRACED_EVERY + 1 in (TRACED, runs)):
                peak = tracemalloc.get_traced_memory()[1] / 2**20
                if peak > most_mib:
                    report.found = f"up to run {number}: {peak:.0f} MiB of memory at once"
                    break
                tracemalloc.stop()
    finally:
        report.cpu_s = time.process_time() - began
        tracemalloc.stop()
        target.close()
    more = _resident_mib() - resident
    if report.found is None and more > most_mib:
        report.found = f"up to run {report.runs}: {more:.0f} MiB more were resident at once"
    return report


def _resident_mib() -> float:
    """The most that was ever resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("target", nargs="?", default="all", help=f"all, or one of {', '.join(TARGETS)}")
    add("--runs", type=int, default=10_000, metavar="N", help="of each target (default: 10,000)")
    add("--seed", type=int, default=0, help="(default: 0)")
    add("--most-mib", type=float, default=64, metavar="MIB", help="memory at once (default: 64)")
    add("--list", action="store_true", help="print the targets and what each is")
    arguments = parser.parse_args()
    if arguments.list:
        for name, target in TARGETS.items():
            print(f"{name:12} {target.__doc__}")
        return 0
    if arguments.target != "all" and arguments.target not in TARGETS:
        parser.error(f"no target {arguments.target!r}; there are {', '.join(TARGETS)}")
    logging.getLogger().addHandler(Rendered())
    stop = Stop().on(signal.SIGTERM, signal.SIGINT)
    names = list(TARGETS) if arguments.target == "all" else [arguments.target]
    status = 0
    for name in names:
        report = fuzz(TARGETS[name](), arguments.runs, arguments.seed, arguments.most_mib, stop)
        print(f"{name}: {report}", flush=True)
        status |= report.found is not None
        if report.stopped:
            break
    return status


if __name__ == "__main__":
    sys.exit(main())
