"""Hit ratios of eviction policies on a trace of requests, with and without the tree of prefixes.

    python3 bench/eviction.py conversation_trace.jsonl --slots 2000 10000

Takes traces in the format of Mooncake's (FAST '25), which are public: one JSON object a line, with
``input_length`` in tokens and ``hash_ids``, a chained number for each block of 512. Each request
looks its prompt up and stores what is missing, on the planner alone: no bytes move. "tree" is what
the planner does, "flat" is the policy by itself, which forgets the beginning of a prefix before
its end. Not a measurement of time, so it isn't part of `make bench`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lmcache_core.cache.plan import Report
from lmcache_core.cache.planner import Planner
from lmcache_core.chunks.keys import ChunkKey
from lmcache_core.contracts.connector import BlockSpan
from lmcache_core.metrics import Counters
from lmcache_core.plugins.manager import Plugins

BLOCK_TOKENS = 512
SPAN = BlockSpan([0], 0, BLOCK_TOKENS, BLOCK_TOKENS)


def hit_ratio(prompts: list[list[ChunkKey]], slots: int, policy: str, *, tree: bool) -> float:
    """The share of blocks that are found when they are asked for."""
    plugins = Plugins()
    order = plugins.make_cache_policy(policy)
    planner = Planner(slots, order, Counters(), index=plugins.chunk_index(slots))
    hits = 0
    for keys in prompts:
        hold = planner.acquire(keys)
        hits += len(hold)
        report, parent = Report(), hold.keys[-1] if hold.keys else None
        for key in keys[len(hold) :]:
            op = planner.plan_store(key, SPAN, parent if tree else None)
            if op is not None:
                report.ok[op.op] = report.released[op.op] = 1
            parent = key
        planner.settle(report)
        hold.release()
    return hits / sum(map(len, prompts))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--slots", type=int, nargs="+", default=[500, 2000, 10_000, 40_000])
    parser.add_argument("--policies", nargs="+", default=["LRU", "LFU", "FIFO", "MRU"])
    arguments = parser.parse_args()
    prompts = [
        [
            ChunkKey(block.to_bytes(16, "big"))
            for block in request["hash_ids"][: request["input_length"] // BLOCK_TOKENS]
        ]
        for request in map(json.loads, arguments.trace.read_text().splitlines())
    ]
    print(f"{len(prompts)} requests, {len({key for keys in prompts for key in keys})} blocks")
    print(f"{'slots':>8} {'policy':8} {'flat':>7} {'tree':>7}")
    for slots in arguments.slots:
        for policy in arguments.policies:
            flat, tree = (hit_ratio(prompts, slots, policy, tree=on) for on in (False, True))
            print(f"{slots:8} {policy:8} {flat:7.3f} {tree:7.3f}", flush=True)


if __name__ == "__main__":
    main()
