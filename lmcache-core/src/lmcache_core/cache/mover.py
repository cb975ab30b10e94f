"""Carries out plans: moves chunks between an engine, the arena and slow tiers.

One mover per rank. Copies between engine and arena run on the calling thread,
because the engine decides when they may; everything to and from slow tiers
runs elsewhere (see `tier_moves`) and is reported when it is really over. Slot
layout:

    0 .. 127     room for the frame header (see `frame`)
    128 ..       the canonical chunk

so that with an in-place serde a slot is written to a tier, and read from one,
as it stands: one copy per hop. Checksums are made while a chunk is gathered,
travel with it wherever it goes, and are compared while it is scattered: nothing
is read for them alone, but for what comes from a slow tier.

A mover decides nothing but this: a slot that doesn't hold the chunk it should,
or not the bytes it had, is a failed load, never a guess.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from lmcache_core.aio.guard import attempted
from lmcache_core.aio.io_loop import IOLoop
from lmcache_core.cache.plan import FetchOp, LoadOp, Report, StoreOp
from lmcache_core.cache.reports import Reports
from lmcache_core.cache.tier_moves import TierMoves
from lmcache_core.chunks.checksums import SUM_BYTES, checksums, part_of
from lmcache_core.chunks.frame import HEADER_BYTES
from lmcache_core.chunks.keys import CacheNamespace, ChunkKey
from lmcache_core.contracts.connector import EngineConnector, HostKernels
from lmcache_core.errors import LayoutError
from lmcache_core.memory.host_memory import PAGE_BYTES, HostArena
from lmcache_core.metrics import Counters
from lmcache_core.tiers.tiers import Tiers

logger = logging.getLogger(__name__)


def slot_bytes(namespace: CacheNamespace) -> int:
    """Bytes that a slot needs for a full chunk of any layer group, with its frame header."""
    layout = namespace.layout
    return HEADER_BYTES + max(layout.chunk_bytes(group) for group in range(len(layout.groups)))


def slots_in(arena_bytes: int, namespace: CacheNamespace) -> int:
    """How many slots an arena of ``arena_bytes`` has, the same wherever it is asked."""
    pages = -(-slot_bytes(namespace) // PAGE_BYTES)
    return arena_bytes // (pages * PAGE_BYTES)


class Mover:
    """Moves the chunks of one rank.

    ``engine`` is whose blocks are meant by default; ``None`` where every call names its own.

    ``kernels`` compute checksums where there is nothing to copy. ``tiers`` and ``loop`` go
    together. ``writes_tiers`` is false on ranks whose chunks another rank writes (MLA's latent
    is the same on all). ``queue_chunks`` bounds how many chunks may wait to be written to slow
    tiers; under pressure the newest isn't written, and counted. ``on_news`` is called, on any
    thread, when a report is waiting.
    """

    def __init__(
        self,
        engine: EngineConnector | None,
        arena: HostArena,
        namespace: CacheNamespace,
        counters: Counters,
        *,
        kernels: HostKernels | None = None,
        tiers: Tiers | None = None,
        loop: IOLoop | None = None,
        writes_tiers: bool = True,
        rank: int = 0,
        queue_chunks: int = 256,
        on_news: Callable[[], None] | None = None,
    ) -> None:
        self._engine = engine
        self._arena = arena
        self._groups = namespace.layout.groups
        self._counters = counters
        self._rank = rank
        self._held: dict[int, tuple[ChunkKey, bytes]] = {}  # by slot, with the checksums
        self._gathering: dict[int, bytearray] = {}  # the checksums, by operation
        self._spoiled: set[int] = set()
        self._failed_steps = 0
        self._fenced = False
        self._reports = Reports(on_news)
        self._tier_moves: TierMoves | None = None
        if tiers is not None and loop is not None:
            self._tier_moves = TierMoves(
                tiers.tiers,
                loop,
                arena,
                self._groups,
                counters,
                self._reports,
                held=self._held,
                checksums_of=checksums if kernels is None else kernels.checksums,
                writes=writes_tiers,
                queue_chunks=queue_chunks,
            )

    # -- engine <-> arena ------------------------------------------------------------------

    def load(
        self,
        ops: Sequence[LoadOp],
        layers: range | None = None,
        engine: EngineConnector | None = None,
    ) -> list[LoadOp]:
        """Scatter chunks into the engine's blocks; answer those of which nothing may be used.

        Those that turn out to be absent or damaged are never offered again; those that a connector
        failed with are as good as before. With a damaged step nothing that is computed in it may be
        stored: see `fence`.
        """
        good: list[tuple[LoadOp, bytes]] = []
        absent: list[LoadOp] = []
        for op in ops:
            key, sums = self._held.get(op.slot, (None, b""))
            if key == op.key:
                good.append((op, part_of(sums, layers)))
            else:
                absent.append(op)
        if absent:
            self._counters.add("load_failures", len(absent), tier="host", reason="absent")
            self._reports.unreadable(op.key for op in absent)
        return absent + (self._scatter(good, layers, self._chosen(engine)) if good else [])

    def _scatter(
        self, good: list[tuple[LoadOp, bytes]], layers: range | None, engine: EngineConnector
    ) -> list[LoadOp]:
        """Scatter; answer those whose bytes aren't what was stored. All of them, after an error."""
        ops = [op for op, _ in good]
        answer = attempted(
            engine.scatter_checked,
            [self._chunk(op.slot, op.span.chunk_tokens, op.span.group) for op in ops],
            [op.span for op in ops],
            layers,
            [sums for _, sums in good],
        )
        bad = answer.value
        if bad is None or not _are_positions(bad, len(ops)):
            self._connector_failed(engine, "scatter", answer.error, bad)
            self._counters.add("load_failures", len(ops), tier="host", reason="scatter")
            return ops
        if bad:
            logger.error("%d chunks in host memory are damaged and aren't used", len(bad))
            self._counters.add("load_failures", len(bad), tier="host", reason="checksum")
            self._reports.unreadable(ops[i].key for i in bad)
        if layers is None or layers.start == 0:
            whole = [op for i, op in enumerate(ops) if i not in bad]
            self._counters.add("load_chunks", len(whole), tier="host")
            self._counters.add("load_bytes", sum(map(self._span_bytes, whole)), tier="host")
        return [ops[i] for i in bad]

    def step_failed(self) -> None:
        """Say that a load of this engine step failed: what it computes isn't to be kept."""
        self._failed_steps += 1
        self._reports.failed_steps(self._rank, self._failed_steps)
        self._fenced = True

    def fence(self, acknowledged: int) -> None:
        """Tell the mover how many of its failed steps the planner had heard of when it planned.

        An engine may plan a step before it learns that an earlier one failed. Whatever such a step
        computes may rest on blocks that were never filled, so its stores are refused.
        """
        self._fenced = acknowledged < self._failed_steps

    def gather(
        self,
        ops: Sequence[StoreOp],
        layers: range | None = None,
        engine: EngineConnector | None = None,
    ) -> None:
        """Copy engine blocks into slots, all layers or some. `finish_stores` comes afterwards."""
        if not ops or self._fenced:
            return
        for op in ops:
            self._held.pop(op.slot, None)
        # Until they are known to be whole: also where the engine's thread is interrupted.
        whole_so_far = [op.op for op in ops if op.op not in self._spoiled]
        self._spoiled.update(whole_so_far)
        chosen = self._chosen(engine)
        answer = attempted(
            chosen.gather_checked,
            [op.span for op in ops],
            [self._chunk(op.slot, op.span.chunk_tokens, op.span.group) for op in ops],
            layers,
        )
        sizes = [self._sum_bytes(op.span.group, layers) for op in ops]
        found = answer.value
        if found is None or not _are_sums(found, sizes):
            self._connector_failed(chosen, "gather", answer.error, found)
            return
        for op, own in zip(ops, found, strict=True):
            every = self._gathering.setdefault(op.op, bytearray(self._sum_bytes(op.span.group)))
            start = 0 if layers is None else layers.start * SUM_BYTES
            every[start : start + len(own)] = own
        self._spoiled.difference_update(whole_so_far)

    def finish_stores(self, ops: Sequence[StoreOp]) -> int:
        """Publish what was gathered, start writing it through, answer how many chunks it was."""
        if not ops:
            return 0
        if self._fenced:
            self._refuse(ops, "after_failed_load")
            return 0
        good = [op for op in ops if op.op in self._gathering and op.op not in self._spoiled]
        if len(good) < len(ops):
            whole = {op.op for op in good}
            self._refuse([op for op in ops if op.op not in whole], "gather")
        stored = [(op, bytes(self._gathering.pop(op.op))) for op in good]
        for op, sums in stored:
            self._held[op.slot] = (op.key, sums)
        self._counters.add("store_chunks", len(good))
        self._counters.add("store_bytes", sum(self._span_bytes(op) for op in good))
        self._reports.done(op.op for op in good)
        if self._tier_moves is None:
            self._reports.released(op.op for op in good)
        else:
            self._tier_moves.write(stored)
        return len(good)

    def store(self, ops: Sequence[StoreOp], engine: EngineConnector | None = None) -> int:
        """`gather` all layers and `finish_stores`, also where gathering is interrupted."""
        try:
            self.gather(ops, None, engine)
        finally:
            stored = self.finish_stores(ops)
        return stored

    def _refuse(self, ops: Sequence[StoreOp], reason: str) -> None:
        self._counters.add("store_dropped", len(ops), reason=reason)
        for op in ops:
            self._gathering.pop(op.op, None)
            self._spoiled.discard(op.op)
        self._reports.failed(op.op for op in ops)
        self._reports.released(op.op for op in ops)

    def _connector_failed(
        self, engine: EngineConnector, operation: str, error: BaseException | None, found: object
    ) -> None:
        self._counters.add("plugin_failures", kind="connector", operation=operation, tier="host")
        what = f"raised {type(error).__name__}: {error}"
        if error is None:
            what = f"answered {found!r:.80}, which isn't what its contract says"
        logger.error(
            "%s.%s_checked %s; its chunks aren't used", type(engine).__name__, operation, what
        )

    # -- slow tiers ------------------------------------------------------------------------

    def fetch(self, ops: Sequence[FetchOp]) -> None:
        """Start reading chunks from slow tiers into slots. Results come with `take_report`."""
        if self._tier_moves is not None:
            self._tier_moves.fetch(ops)

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything stored so far is in the slow tiers, or was dropped."""
        return self._tier_moves is None or self._tier_moves.flush(timeout_s)

    # -- the rest --------------------------------------------------------------------------

    @property
    def leases(self) -> int:
        """Slots' leases that reading and writing slow tiers holds now; at rest none."""
        return 0 if self._tier_moves is None else self._tier_moves.leases

    def take_report(self) -> Report:
        """What happened since the last call."""
        return self._reports.take()

    def close(self, timeout_s: float = 5.0) -> None:
        """Let go of the threads. Close the tiers and the loop before."""
        if self._tier_moves is not None:
            self._tier_moves.close(timeout_s)

    def _chosen(self, engine: EngineConnector | None) -> EngineConnector:
        chosen = engine or self._engine
        if chosen is None:
            raise LayoutError("this mover has no engine of its own, and the call names none")
        return chosen

    def _chunk(self, slot: int, tokens: int, group: int) -> memoryview:
        size = self._groups[group].chunk_bytes(tokens)
        return self._arena.slot(slot)[HEADER_BYTES : HEADER_BYTES + size]

    def _sum_bytes(self, group: int, layers: range | None = None) -> int:
        return SUM_BYTES * len(self._groups[group].layers if layers is None else layers)

    def _span_bytes(self, op: LoadOp | StoreOp) -> int:
        return self._groups[op.span.group].chunk_bytes(op.span.tokens)


def _are_sums(found: object, sizes: list[int]) -> bool:
    return (
        isinstance(found, (list, tuple))
        and len(found) == len(sizes)
        and all(
            isinstance(one, bytes) and len(one) == size
            for one, size in zip(found, sizes, strict=True)
        )
    )


def _are_positions(found: object, count: int) -> bool:
    return isinstance(found, (list, tuple)) and all(
        isinstance(one, int) and 0 <= one < count for one in found
    )
