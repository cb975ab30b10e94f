"""Planning: what an engine's scheduler pays for the chunks of a prompt, on the planner alone.

    python3 bench/planner.py            less than a minute
    python3 bench/planner.py --quick    a few seconds, wider spread

A prompt of 32,768 tokens in 128 chunks. No bytes move. The calibration is hashlib's BLAKE2b over
its tokens in one call; for the last row it is the same on an empty planner.

    store               plan it where there is room, and take in that every chunk was stored
    store, full         the same, where each chunk takes another one's place
    hits                find and lease all of it, and give it back
    store, all leased   plan a chunk where every slot of a million is in use, and there is no room
"""

from __future__ import annotations

import hashlib
from itertools import count

from measuring import Report as Table
from measuring import duration, parse, parser, runs_of

from lmcache_core.cache.lookup import PrefixLookup
from lmcache_core.cache.plan import Report
from lmcache_core.cache.planner import Planner
from lmcache_core.chunks.keys import ChunkKey
from lmcache_core.contracts.connector import BlockSpan
from lmcache_core.metrics import Counters
from lmcache_core.plugins.manager import Plugins

CHUNKS, CHUNK_TOKENS = 128, 256
SPAN = BlockSpan([0], 0, CHUNK_TOKENS, CHUNK_TOKENS)
TURNS = 20
FULL = 16  # prompts
SINGLE = 16  # chunks planned in a turn of the last row


class Prompts:
    """A planner of so many slots, and prompts that it never saw."""

    def __init__(self, slots: int) -> None:
        plugins = Plugins()
        order, index = plugins.make_cache_policy("LRU"), plugins.chunk_index(slots)
        self.planner = Planner(slots, order, Counters(), index=index)
        self._numbers = count(1)

    def keys(self, chunks: int = CHUNKS) -> list[ChunkKey]:
        return [ChunkKey(next(self._numbers).to_bytes(16, "big")) for _ in range(chunks)]

    def store(self, keys: list[ChunkKey]) -> None:
        report, parent = Report(), None
        for key in keys:
            op = self.planner.plan_store(key, SPAN, parent)
            assert op is not None
            report.ok[op.op] = report.released[op.op] = 1
            parent = key
        self.planner.settle(report)

    def lookup(self, keys: list[ChunkKey]) -> PrefixLookup:
        lookup = PrefixLookup(
            self.planner,
            lambda: keys,
            [CHUNK_TOKENS] * len(keys),
            locate=None,
            submit=lambda _: None,
            deadline_s=1.0,
        )
        assert lookup.poll() == len(keys)
        return lookup

    def plan(self, keys: list[ChunkKey]) -> int:
        """How many were planned."""
        return sum(self.planner.plan_store(key, SPAN) is not None for key in keys)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--slots", type=float, default=1e6, help="of which all are leased")
    arguments = parse(options)
    runs, slots = arguments.runs, int(arguments.slots)
    table = Table(arguments, "BLAKE2b")
    tokens = bytes(4 * CHUNKS * CHUNK_TOKENS)

    def plain(_: int) -> object:
        return hashlib.blake2b(tokens, digest_size=16).digest()

    turns = runs * TURNS + 2
    roomy, full = Prompts(turns * CHUNKS), Prompts(FULL * CHUNKS)
    kept = [full.keys() for _ in range(FULL)]
    for keys in kept:
        full.store(keys)
    fresh = [roomy.keys() for _ in range(turns)]
    hits = runs_of(
        lambda turn: full.lookup(kept[turn % FULL]).close(), plain, runs=runs, turns=TURNS
    )
    room = runs_of(lambda _: roomy.store(fresh.pop()), plain, runs=runs, turns=TURNS)
    fresh = [full.keys() for _ in range(turns)]
    evicting = runs_of(lambda _: full.store(fresh.pop()), plain, runs=runs, turns=TURNS)
    table.add(duration("store", room), duration("store, full", evicting), duration("hits", hits))

    empty, leased = Prompts(slots), Prompts(slots)
    prompts = [leased.keys() for _ in range(slots // CHUNKS)]
    prompts.append(leased.keys(slots % CHUNKS))
    for keys in prompts:
        leased.store(keys)
    lookups = [leased.lookup(keys) for keys in prompts]
    refused, planned = leased.keys(SINGLE), [empty.keys(SINGLE) for _ in range(turns)]
    found = runs_of(
        lambda _: leased.plan(refused), lambda _: empty.plan(planned.pop()), runs=runs, turns=TURNS
    )
    assert leased.plan(refused) == 0
    table.add(duration("store, all leased", found))
    for lookup in lookups:
        lookup.close()
    table.write()


if __name__ == "__main__":
    main()
