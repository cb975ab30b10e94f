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

import hashlib
import os
import random
import statistics
from array import array
from collections.abc import Callable
from pathlib import Path

import numpy as np
from measuring import Report, Result, Run, duration, parse, parser, take_turns

from lmcache_core.chunks.chunk_index import NONE, ChunkState
from lmcache_core.chunks.hashing import PrefixHasher
from lmcache_core.chunks.keys import ChunkKey
from lmcache_kernels.index import LRU, ChunkIndex

CHUNK_TOKENS, LONG, MIDDLE, TURN = 256, 100_000, 32_768, 512
ROOT = b"benchmark"
CALLS = 100
RUNS = 7
BUDGET_BYTES = 64  # a chunk
EVICTING = np.ones(6 << 20, dtype=np.uint64)  # bytes: 48 Mi


def measure(
    name: str, job: Callable[[], object], plain: Callable[[], object], runs: int, calls: int
) -> list[Result]:
    """Median and 99th percentile of single calls."""
    middles, tails = [], []
    for _ in range(runs):
        ours, theirs = take_turns(
            lambda _: job(), lambda _: plain(), calls, before=lambda: EVICTING.max()
        )
        calibration = statistics.median(theirs)
        middles.append(Run(statistics.median(ours), calibration))
        tails.append(Run(sorted(ours)[int(len(ours) * 0.99)], calibration))
    return [duration(f"{name}/p50", middles), duration(f"{name}/p99", tails)]


def filled(chunks: int, own: list[ChunkKey]) -> tuple[ChunkIndex, LRU]:
    """A full index that has ``own``, one prompt's, among its keys, and the order of its slots.

    The others are prompts of as many chunks.
    """
    index, order, draw = ChunkIndex(chunks), LRU(), random.Random(0)
    every = max(1, chunks // (len(own) + 1))
    waiting = own[::-1]
    before = mine_before = NONE
    for slot in range(chunks):
        if waiting and slot % every == 0:
            index.insert(waiting.pop(), slot, mine_before, ChunkState.READY)
            mine_before = slot
        else:
            index.insert(draw.randbytes(16), slot, before, ChunkState.READY)
            before = slot if slot % len(own) else NONE
        order.added(slot)
    return index, order


def main() -> None:
    options = parser(__doc__, runs=RUNS)
    options.add_argument("--chunks", type=float, default=1e7)
    options.add_argument("--calls", type=int, default=CALLS, help="in a run")
    arguments = parse(options)
    runs, calls, chunks = arguments.runs, arguments.calls, int(arguments.chunks)
    draw = random.Random(1)
    tokens = [draw.randrange(128_256) for _ in range(LONG)]
    packed = array("I", tokens).tobytes()
    digests = PrefixHasher(ROOT, CHUNK_TOKENS).extend(tokens)
    before = resident_bytes()
    index, order = filled(chunks, digests)
    grown = resident_bytes() - before
    report = Report(arguments, "BLAKE2b")
    per_chunk = (index.nbytes + order.nbytes) / len(index)
    ratio = round(BUDGET_BYTES / per_chunk, 3)
    report.add(Result("memory per chunk", round(per_chunk, 1), "bytes", BUDGET_BYTES, ratio, 1, 0))
    print(f"{len(index):,} chunks; the process grew by {grown / len(index):.1f} bytes for each")

    def plain(size: int) -> Callable[[], object]:
        part = packed[: size * 4]
        return lambda: hashlib.blake2b(part, digest_size=16).digest()

    hits = len(digests)
    assert len(index.match(ROOT, tokens, CHUNK_TOKENS)[1]) == hits
    assert index.digests(ROOT, packed, CHUNK_TOKENS) == b"".join(digests)
    assert len(index.ready_slots(digests)) == hits
    other = [token ^ 1 for token in tokens[:MIDDLE]]
    assert not index.match(ROOT, other, CHUNK_TOKENS)[1]
    middle = digests[MIDDLE // CHUNK_TOKENS - 1]
    grown_tokens = tokens[MIDDLE : MIDDLE + TURN]
    cases: list[tuple[str, Callable[[], object], int]] = [
        ("100k hit, list", lambda: index.match(ROOT, tokens, CHUNK_TOKENS), LONG),
        ("100k hit, packed", lambda: index.match(ROOT, packed, CHUNK_TOKENS), LONG),
        ("100k lookup only", lambda: index.ready_slots(digests), LONG),
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
        fewer = calls // 3 if "core" in name else calls
        report.add(*measure(name, job, plain(size), runs, fewer))
    report.write()


def resident_bytes() -> int:
    """What this process has in memory; 0 where nobody says."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


if __name__ == "__main__":
    main()
