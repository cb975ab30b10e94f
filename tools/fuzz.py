"""Feeds damaged messages to a parser, by a seed: only the errors that it documents may come out.

    python3 tools/fuzz.py --list
    python3 tools/fuzz.py resp --runs 1000000
    python3 tools/fuzz.py all --runs 20000 --seed 7

Each run takes a valid sample, or several, and flips bits, cuts, repeats, inserts, joins, or puts a
number where a length may be. Exit status 1: another error came out, or more than ``--most-mib`` of
memory were taken. The input is printed as Python writes it; the same target and seed find it again.
The codecs' decoder in C++ has a fuzzer of its own, in ``kernels/fuzz``; `codec` here is what Python
does before it.
"""

from __future__ import annotations

import argparse
import random
import sys
import tracemalloc
from contextlib import suppress

from fuzzing import TARGETS as MESSAGES
from fuzzing import Target, mutated
from fuzzing_files import TARGETS as FILES
from tqdm import tqdm

TARGETS = {**MESSAGES, **FILES}
TRACED, TRACED_EVERY = 500, 5000
"""Of so many runs the memory of the first ones is looked at, which makes those slow."""


def fuzz(target: Target, runs: int, seed: int, most_mib: float) -> str | None:
    """What was found, in words, if anything was."""
    chance = random.Random(f"{target.name} {seed}")
    samples = target.samples()
    for sample in samples:
        with suppress(*target.documented):  # as it is, it is fine, or for another parser
            target.parse(sample, random.Random(0))
    try:
        for number in tqdm(range(runs), desc=target.name, disable=not sys.stderr.isatty()):
            if number % TRACED_EVERY == 0:
                tracemalloc.start()
            data = mutated(chance.choice(samples), samples, chance)
            try:
                target.parse(data, chance)
            except target.documented:
                pass
            except BaseException as error:  # noqa: BLE001  that is what we are looking for
                return f"run {number}: {type(error).__name__}: {error}\n  of {data!r}"
            if tracemalloc.is_tracing() and number % TRACED_EVERY + 1 in (TRACED, runs):
                peak = tracemalloc.get_traced_memory()[1] / 2**20
                if peak > most_mib:
                    return f"up to run {number}: {peak:.0f} MiB of memory at once"
                tracemalloc.stop()
    finally:
        tracemalloc.stop()
        target.close()
    return None


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
    names = list(TARGETS) if arguments.target == "all" else [arguments.target]
    status = 0
    for name in names:
        found = fuzz(TARGETS[name](), arguments.runs, arguments.seed, arguments.most_mib)
        print(f"{name}: {found or f'{arguments.runs:,} runs, only documented errors'}", flush=True)
        status |= found is not None
    return status


if __name__ == "__main__":
    sys.exit(main())
