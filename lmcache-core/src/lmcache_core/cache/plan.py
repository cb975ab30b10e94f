"""What a planner tells movers to do, and what they answer.

Plain values that pickle: with a tensor-parallel engine the planner lives in
the scheduler process and every rank has a mover. Operations are named tuples:
one is made for each chunk, in the engine's scheduler, and a frozen dataclass
takes three times as long to make. Knows nothing about how either side works.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from lmcache_core.chunks.keys import ChunkKey
from lmcache_core.contracts.connector import BlockSpan


class LoadOp(NamedTuple):
    """Scatter the chunk in arena slot ``slot`` into the engine's blocks."""

    key: ChunkKey
    slot: int
    span: BlockSpan


class StoreOp(NamedTuple):
    """Gather engine blocks into arena slot ``slot``; then write it through to slow tiers.

    ``op`` names the operation in reports. ``persist``: whether there are slow tiers to write to.
    ``start``: the position of the chunk's first token in its sequence, ``None`` if unknown.
    """

    op: int
    key: ChunkKey
    slot: int
    span: BlockSpan
    persist: bool
    start: int | None = None


class FetchOp(NamedTuple):
    """Read a chunk of ``tokens`` tokens from slow tier number ``tier`` into arena slot ``slot``."""

    op: int
    key: ChunkKey
    slot: int
    tokens: int
    tier: int


@dataclass
class Report:
    """What happened to operations since the last report; addable over ranks.

    Each operation gets, from every rank, exactly one result (``ok`` or ``bad``) and exactly one
    release: from then on that rank neither reads nor writes the slot on its behalf. By operation,
    these are sets of ranks: bit ``r`` is rank ``r``'s. A mover's own report is that of rank 0; it
    becomes another's with `of_rank`.
    """

    ok: dict[int, int] = field(default_factory=dict)
    bad: dict[int, int] = field(default_factory=dict)
    released: dict[int, int] = field(default_factory=dict)
    unreadable: set[ChunkKey] = field(default_factory=set)
    """Chunks in host memory that a load found missing or damaged: never offer them again."""
    refused: dict[int, set[ChunkKey]] = field(default_factory=dict)
    """By slow tier, values that are there but not for us; they count as absent: `Tier.refuse`."""
    failed_steps: dict[int, int] = field(default_factory=dict)
    """For each rank, in how many steps a load failed so far: see `Mover.fence`."""

    def __bool__(self) -> bool:
        return bool(
            self.ok
            or self.bad
            or self.released
            or self.unreadable
            or self.refused
            or self.failed_steps
        )

    def of_rank(self, rank: int) -> Report:
        """The same report, with results and releases of ``rank`` instead of rank 0."""
        if rank:
            for ranks in (self.ok, self.bad, self.released):
                for op in ranks:
                    ranks[op] <<= rank
        return self

    def add(self, other: Report) -> Report:
        """Fold another rank's report, or a later one, into this one."""
        for mine, theirs in (
            (self.ok, other.ok),
            (self.bad, other.bad),
            (self.released, other.released),
        ):
            for op, ranks in theirs.items():
                mine[op] = mine.get(op, 0) | ranks
        self.unreadable |= other.unreadable
        for tier, keys in other.refused.items():
            self.refused.setdefault(tier, set()).update(keys)
        for rank, count in other.failed_steps.items():
            self.failed_steps[rank] = max(count, self.failed_steps.get(rank, 0))
        return self
