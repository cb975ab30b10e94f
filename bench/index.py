"""Finding a prompt's chunks: what hashing and looking up cost, and how much memory.

    python3 bench/index.py                10 million chunks, about a minute
    python3 bench/index.py --chunks 1e6   fewer

A prompt of 100,000 tokens in chunks of 256, whose 390 chunks are spread over an index of 10
million: how long from token ids to the number of leading hits. Once as a list of Python integers,
which engines have, once as packed bytes; once with this package, once with core's own hasher and
a dict. The calibration is hashlib's BLAKE2b over the same bytes in one call, which is what the
digests alone would cost if there were nothing around them. `ratio` is calibration by value.
Before each call, memory bigger than the caches is read: a prompt's part of the index isn't there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import statistics
import sys
import time
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from lmcache_core.hashing import PrefixHasher
from lmcache_kernels.index import ChunkIndex, prefix_digests

CHUNK_TOKENS, LONG, MIDDLE, TURN = 256, 100_000, 32_768, 512
ROOT = b"benchmark"
CALLS = 100
RUNS = 7
EVICTING = bytearray(48 << 20)


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    name: str
    value: float
    unit: str
    calibration: float
    ratio: float
    runs: int
    spread: float
    """Half the distance between the quartiles of the runs' values, by their median."""


def timed(job: Callable[[], object]) -> float:
    began = time.perf_counter()
    job()
    return (time.perf_counter() - began) * 1e6


def measure(
    name: str, job: Callable[[], object], plain: Callable[[], object], runs: int, calls: int
) -> list[Result]:
    """Median and 99th percentile of single calls, in µs; medians of runs of them."""
    middles, tails, others = [], [], []
    for _ in range(runs):
        mine, theirs = [], []
        for _ in range(calls):
            EVICTING.count(1)
            mine.append(timed(job))
            theirs.append(timed(plain))
        middles.append(statistics.median(mine))
        tails.append(sorted(mine)[int(len(mine) * 0.99)])
        others.append(statistics.median(theirs))
    calibration = statistics.median(others)
    results = []
    for kind, values in (("p50", middles), ("p99", tails)):
        value = statistics.median(values)
        quartiles = statistics.quantiles(values, n=4) if runs > 1 else [value] * 3
        spread = (quartiles[2] - quartiles[0]) / 2 / value
        results.append(
            Result(
                f"{name}/{kind}",
                round(value, 2),
                "µs",
                round(calibration, 2),
                round(calibration / value, 3),
                runs,
                round(spread, 3),
            )
        )
        show(results[-1])
    return results


def show(result: Result) -> None:
    print(
        f"{result.name:34} {result.value:10.2f} {result.unit}   BLAKE2b "
        f"{result.calibration:8.2f}   ratio {result.ratio:6.2f}   ± {result.spread:4.0%}"
    )
    sys.stdout.flush()


def filled(chunks: int, own: list[bytes]) -> ChunkIndex:
    """A full index that has ``own`` among its keys."""
    index, draw = ChunkIndex(chunks), random.Random(0)
    every = max(1, chunks // (len(own) + 1))
    waiting = list(own)
    for slot in range(chunks):
        mine = waiting and slot % every == 0
        index.insert(waiting.pop() if mine else draw.randbytes(16), slot)
    return index


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chunks", type=float, default=1e7)
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--calls", type=int, default=CALLS)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    runs, calls, chunks = arguments.runs, arguments.calls, int(arguments.chunks)
    draw = random.Random(1)
    tokens = [draw.randrange(128_256) for _ in range(LONG)]
    packed = array("I", tokens).tobytes()
    digests = PrefixHasher(ROOT, CHUNK_TOKENS).extend(tokens)
    before = resident_bytes()
    index = filled(chunks, digests)
    grown = resident_bytes() - before
    print(f"{len(index):,} chunks, load {os.getloadavg()[0]:.1f}")
    per_chunk = index.nbytes / len(index)
    print(f"{per_chunk:.1f} bytes a chunk; the process grew by {grown / len(index):.1f} a chunk")
    results = [Result("memory per chunk", round(per_chunk, 1), "bytes", 64, 0, 1, 0)]

    def plain(size: int) -> Callable[[], object]:
        part = packed[: size * 4]
        return lambda: hashlib.blake2b(part, digest_size=16).digest()

    hits = len(digests)
    assert index.match(ROOT, tokens, CHUNK_TOKENS)[1] == hits
    assert index.ready_prefix(prefix_digests(ROOT, packed, CHUNK_TOKENS)) == hits
    other = [token ^ 1 for token in tokens[:MIDDLE]]
    assert index.match(ROOT, other, CHUNK_TOKENS)[1] == 0
    middle = digests[MIDDLE // CHUNK_TOKENS - 1]
    grown_tokens = tokens[MIDDLE : MIDDLE + TURN]
    cases: list[tuple[str, Callable[[], object], int]] = [
        ("100k hit, list", lambda: index.match(ROOT, tokens, CHUNK_TOKENS), LONG),
        ("100k hit, packed", lambda: index.match(ROOT, packed, CHUNK_TOKENS), LONG),
        ("100k lookup only", lambda: index.ready_prefix(digests), LONG),
        ("32k hit, list", lambda: index.match(ROOT, tokens[:MIDDLE], CHUNK_TOKENS), MIDDLE),
        ("32k miss, list", lambda: index.match(ROOT, other, CHUNK_TOKENS), MIDDLE),
        (
            "32k + 512, list",
            lambda: index.match(middle, grown_tokens, CHUNK_TOKENS, None, MIDDLE // CHUNK_TOKENS),
            TURN,
        ),
        ("100k hash by core, list", lambda: PrefixHasher(ROOT, CHUNK_TOKENS).extend(tokens), LONG),
    ]
    for name, job, size in cases:
        results += measure(
            name, job, plain(size), runs, calls if "core" not in name else calls // 3
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(one) for one in results], indent=1))
    else:
        print(json.dumps([asdict(one) for one in results]))


def resident_bytes() -> int:
    """What this process has in memory; 0 where nobody says."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


if __name__ == "__main__":
    main()
