"""Hit rates of cache policies on traces of requests, beside those of a study.

    python3 bench/policies.py --traces DIR
    python3 bench/policies.py --traces DIR --policies S3-FIFO ARC --shares 1 5

DIR has Mooncake's public traces (FAST '25): one JSON object a line, with ``input_length`` in tokens
and ``hash_ids``, a chained number for each block of 512. Each request asks a policy's memory, a
`SimulatedMemory`, for its full blocks, and what is missing is stored; the end of a prefix goes
before its beginning. Memory is so many percent of a trace's blocks. No bytes move and nothing is
timed, so it isn't part of `make bench`.

The study's S3-FIFO is the textbook's, which knows no prefixes: it evicts the beginning of one while
its end stays, which nobody can find then. That is simulated, too, as ``textbook``. The exit status
is 1 where LRU or the textbook's S3-FIFO differs from the study by more than ``--within`` points, or
where S3-FIFO finds less than the study's by as much.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import OrderedDict
from pathlib import Path

from lmcache_core import CachePolicy, ChunkKey, Plugins
from lmcache_core.testing.simulated_memory import SimulatedMemory

BLOCK_TOKENS = 512
SHARES = (0.5, 1.0, 2.0, 5.0, 10.0)
TRACES = {
    "conv": "conversation_trace.jsonl",
    "syn": "synthetic_trace.jsonl",
}
STUDY = {
    ("conv", "LRU"): (4.6, 5.4, 8.0, 20.2, 28.8),
    ("conv", "S3-FIFO"): (5.7, 7.8, 10.9, 19.2, 25.2),
    ("syn", "LRU"): (1.9, 3.7, 7.8, 15.5, 25.7),
    ("syn", "S3-FIFO"): (1.1, 3.5, 7.7, 15.3, 25.1),
}
TEXTBOOK = "textbook"
"""Hit rate in percent at each of `SHARES`, full blocks only."""
Request = tuple[float, int, int, list[ChunkKey]]


def read(path: Path) -> list[Request]:
    """Time in seconds, tokens of prompt and answer, and full blocks of each request."""
    requests = []
    for line in path.read_text().splitlines():
        one = json.loads(line)
        blocks = one["hash_ids"][: one["input_length"] // BLOCK_TOKENS]
        keys = [ChunkKey(block.to_bytes(16, "big")) for block in blocks]
        requests.append((one["timestamp"] / 1000, one["input_length"], one["output_length"], keys))
    return requests


def textbook(requests: list[Request], slots: int) -> float:
    """The share that S3-FIFO finds as it was published, each prompt used from its end."""
    small: OrderedDict[ChunkKey, None] = OrderedDict()
    main: OrderedDict[ChunkKey, None] = OrderedDict()
    ghosts: OrderedDict[ChunkKey, None] = OrderedDict()
    uses: dict[ChunkKey, int] = {}
    hits = 0

    def evict() -> None:
        while len(small) < max(1, slots // 10) and main:
            key, _ = main.popitem(last=False)
            if not uses[key]:
                del uses[key]
                return
            uses[key] -= 1
            main[key] = None
        key, _ = small.popitem(last=False)
        if uses[key] >= 2:
            main[key], uses[key] = None, 0
            return
        del uses[key]
        ghosts[key] = None
        if len(ghosts) > slots * 9 // 10:
            ghosts.popitem(last=False)

    for *_, keys in requests:
        hits += next((i for i, key in enumerate(keys) if key not in uses), len(keys))
        for key in reversed(keys):
            if key in uses:
                uses[key] = min(3, uses[key] + 1)
                continue
            while len(uses) >= slots:
                evict()
            queue = small
            if key in ghosts:
                del ghosts[key]
                queue = main
            queue[key], uses[key] = None, 0
    return hits / sum(len(keys) for *_, keys in requests)


def hit_rate(requests: list[Request], policy: CachePolicy, slots: int) -> SimulatedMemory:
    """What became of ``requests`` in a memory of ``slots`` slots."""
    memory = SimulatedMemory(policy, slots)
    for number, (when, tokens, answer, keys) in enumerate(requests):
        memory.clock = when
        memory.request(keys, tokens=tokens, answer_tokens=answer, name=str(number))
    return memory


def main() -> int:
    """Print a line for each trace, policy and size."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog=(__doc__ or "").partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--traces", type=Path, required=True, metavar="DIR")
    parser.add_argument("--policies", nargs="+", default=["LRU", "S3-FIFO", TEXTBOOK])
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES, help="percent")
    parser.add_argument("--within", type=float, default=0.5, help="points beside the study")
    arguments = parser.parse_args()
    plugins, worst = Plugins(), 0.0
    for name, file in TRACES.items():
        requests = read(arguments.traces / file)
        blocks = len({key for *_, keys in requests for key in keys})
        print(f"{name}: {len(requests):,} requests, {blocks:,} different blocks")
        print(f"  {'%':>5} {'slots':>7} {'policy':10} {'hits %':>7} {'study':>6} {'differs':>8}")
        for share in arguments.shares:
            slots = round(blocks * share / 100)
            for policy in arguments.policies:
                if policy == TEXTBOOK:
                    rate = 100 * textbook(requests, slots)
                else:
                    memory = hit_rate(requests, plugins.make_cache_policy(policy), slots)
                    rate = 100 * memory.hits / memory.accesses
                figures = STUDY.get((name, "S3-FIFO" if policy == TEXTBOOK else policy), ())
                known = dict(zip(SHARES, figures, strict=False)).get(share)
                line = f"  {share:5g} {slots:7,} {policy:10} {rate:7.2f}"
                if known is not None:
                    better = policy == "S3-FIFO" and rate > known
                    worst = max(worst, 0.0 if better else abs(rate - known))
                    line += f" {known:6.1f} {rate - known:+8.2f}"
                print(line, flush=True)
    print(f"at most {worst:.2f} points beside the study, or below it")
    return int(worst > arguments.within)


if __name__ == "__main__":
    sys.exit(main())
