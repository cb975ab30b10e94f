"""Carries out plans: moves chunks between an engine, the arena and slow tiers.

One mover per rank. Copies between engine and arena run on the calling thread,
because the engine decides when they may; everything to and from slow tiers
runs on the I/O loop and is reported when it is really over. Slot layout:

    0 .. 127     room for the frame header (see `frame`)
    128 ..       the canonical chunk

so that with an in-place serde a slot is written to a tier, and read from one,
as it stands: one copy per hop. Checksums are made while a chunk is gathered,
go into its frame, and are compared while it is scattered: nothing is read for
them alone, but for what comes from a slow tier.

A mover decides nothing but this: a slot that doesn't hold the chunk it should,
or not the bytes it had, is a failed load, never a guess.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from lmcache_core.checksums import SUM_BYTES, checksums, part_of
from lmcache_core.connector import EngineConnector, HostKernels
from lmcache_core.errors import FrameError, LayoutError
from lmcache_core.frame import HEADER_BYTES, read_header, write_header
from lmcache_core.guard import attempt
from lmcache_core.host_memory import PAGE_BYTES, HostArena
from lmcache_core.io_loop import IOLoop
from lmcache_core.keys import CacheNamespace, ChunkKey
from lmcache_core.metrics import Counters
from lmcache_core.plan import FetchOp, LoadOp, Report, StoreOp
from lmcache_core.serde import Serde
from lmcache_core.storage import MISS
from lmcache_core.tiers import Tier, Tiers

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
        self._namespace = namespace
        self._counters = counters
        self._checksums = checksums if kernels is None else kernels.checksums
        self._tiers = tiers.tiers if tiers is not None else ()
        self._loop = loop
        self._writes_tiers = writes_tiers
        self._rank = rank
        self._queue_chunks = queue_chunks
        self._on_news = on_news
        self._held: dict[int, tuple[ChunkKey, bytes]] = {}  # by slot, with the checksums
        self._gathering: dict[int, bytearray] = {}  # the checksums, by operation
        self._spoiled: set[int] = set()
        self._failed_steps = 0
        self._fenced = False
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._report = Report()
        self._queued = 0
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="lmcache-seal")

    # -- engine <-> arena ------------------------------------------------------------------

    def load(
        self,
        ops: Sequence[LoadOp],
        layers: range | None = None,
        engine: EngineConnector | None = None,
    ) -> list[LoadOp]:
        """Scatter chunks into the engine's blocks; answer those of which nothing may be used.

        With a damaged step nothing that is computed in it may be stored: see `fence`.
        """
        good: list[tuple[LoadOp, bytes]] = []
        failed: list[LoadOp] = []
        for op in ops:
            key, sums = self._held.get(op.slot, (None, b""))
            if key == op.key:
                good.append((op, part_of(sums, layers)))
            else:
                failed.append(op)
        if failed:
            self._counters.add("load_failures", len(failed), tier="host", reason="absent")
        if good:
            failed += self._scatter(good, layers, self._chosen(engine))
        if failed:
            with self._lock:
                self._report.unreadable.update(op.key for op in failed)
        return failed

    def _scatter(
        self, good: list[tuple[LoadOp, bytes]], layers: range | None, engine: EngineConnector
    ) -> list[LoadOp]:
        """Scatter; answer those whose bytes aren't what was stored. All of them, after an error."""
        ops = [op for op, _ in good]
        try:
            bad = engine.scatter_checked(
                [self._chunk(op.slot, op.span.chunk_tokens, op.span.group) for op in ops],
                [op.span for op in ops],
                layers,
                [sums for _, sums in good],
            )
        except Exception as error:  # noqa: BLE001 - a connector isn't ours; nothing may be used
            logger.error("Loading %d chunks into the engine failed: %s", len(ops), error)
            self._counters.add("load_failures", len(ops), tier="host", reason="scatter")
            return ops
        if bad:
            logger.error("%d chunks in host memory are damaged and aren't used", len(bad))
            self._counters.add("load_failures", len(bad), tier="host", reason="checksum")
        if layers is None or layers.start == 0:
            whole = [op for i, op in enumerate(ops) if i not in bad]
            self._counters.add("load_chunks", len(whole), tier="host")
            self._counters.add("load_bytes", sum(map(self._span_bytes, whole)), tier="host")
        return [ops[i] for i in bad]

    def step_failed(self) -> None:
        """Say that a load of this engine step failed: what it computes isn't to be kept."""
        with self._lock:
            self._failed_steps += 1
            self._report.failed_steps[self._rank] = self._failed_steps
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
        try:
            sums = self._chosen(engine).gather_checked(
                [op.span for op in ops],
                [self._chunk(op.slot, op.span.chunk_tokens, op.span.group) for op in ops],
                layers,
            )
        except Exception as error:  # noqa: BLE001 - a connector isn't ours; nothing is stored
            logger.error("Copying %d chunks from the engine failed: %s", len(ops), error)
            self._spoiled.update(op.op for op in ops)
            return
        for op, own in zip(ops, sums, strict=True):
            every = self._gathering.setdefault(op.op, bytearray(self._sum_bytes(op.span.group)))
            start = 0 if layers is None else layers.start * SUM_BYTES
            every[start : start + len(own)] = own

    def finish_stores(self, ops: Sequence[StoreOp]) -> int:
        """Publish what was gathered, start writing it through, answer how many chunks it was."""
        if not ops:
            return 0
        if self._fenced:
            self._refuse(ops, "after_failed_load")
            return 0
        good = [op for op in ops if op.op not in self._spoiled]
        if len(good) < len(ops):
            self._refuse([op for op in ops if op.op in self._spoiled], "gather")
            self._spoiled.difference_update(op.op for op in ops)
        for op in good:
            self._held[op.slot] = (op.key, bytes(self._gathering.pop(op.op)))
        self._counters.add("store_chunks", len(good))
        self._counters.add("store_bytes", sum(self._span_bytes(op) for op in good))
        self._publish(good)
        return len(good)

    def store(self, ops: Sequence[StoreOp], engine: EngineConnector | None = None) -> int:
        """`gather` all layers and `finish_stores`."""
        self.gather(ops, None, engine)
        return self.finish_stores(ops)

    def _refuse(self, ops: Sequence[StoreOp], reason: str) -> None:
        self._counters.add("store_dropped", len(ops), reason=reason)
        for op in ops:
            self._gathering.pop(op.op, None)
        with self._lock:
            for op in ops:
                self._report.bad[op.op] = 1
                self._report.released[op.op] = 1

    def _publish(self, ops: Sequence[StoreOp]) -> None:
        written = [op for op in ops if op.persist] if self._writes_tiers and self._tiers else []
        with self._lock:
            room = max(0, self._queue_chunks - self._queued)
            dropped, written = written[room:], written[:room]
            self._queued += len(written)
            waiting = {op.op for op in written}
            for op in ops:
                self._report.ok[op.op] = 1
                if op.op not in waiting:
                    self._report.released[op.op] = 1
        if dropped:
            self._counters.add("store_dropped", len(dropped), reason="queue_full")
        if written and self._loop is not None:
            self._loop.submit(self._persist(written))

    # -- arena -> slow tiers ---------------------------------------------------------------

    async def _persist(self, ops: list[StoreOp]) -> None:
        try:
            await asyncio.gather(*(self._write(tier, ops) for tier in self._tiers))
        finally:
            with self._lock:
                for op in ops:
                    self._report.released[op.op] = 1
                self._queued -= len(ops)
                self._idle.notify_all()
            self._tell()

    async def _write(self, tier: Tier, ops: list[StoreOp]) -> None:
        loop = asyncio.get_running_loop()
        frames = await loop.run_in_executor(
            self._threads,
            lambda: [self._seal(tier.serde.for_chunk(op.key, op.start), op) for op in ops],
        )
        answer = await tier.store([op.key for op in ops], frames)
        if answer.unsettled is not None:
            await asyncio.wait([answer.unsettled])

    def _seal(self, serde: Serde, op: StoreOp) -> memoryview:
        """The framed bytes of a chunk: in the slot itself where the serde allows it."""
        tokens = op.span.chunk_tokens
        group = self._namespace.layout.groups[op.span.group]
        chunk = self._chunk(op.slot, tokens, op.span.group)
        sums = None
        if serde.in_place:
            payload_bytes = chunk.nbytes
            sums = self._held[op.slot][1]
            frame = self._arena.slot(op.slot)[: HEADER_BYTES + payload_bytes]
        else:
            frame = memoryview(bytearray(HEADER_BYTES + serde.max_encoded_bytes(group, tokens)))
            payload_bytes = serde.encode(chunk, frame[HEADER_BYTES:], group, tokens)
            frame = frame[: HEADER_BYTES + payload_bytes]
        write_header(
            frame,
            key=op.key,
            fingerprint=self._namespace.fingerprint,
            serde=serde.wire_id,
            raw_bytes=chunk.nbytes,
            payload_bytes=payload_bytes,
            sums=sums,
        )
        return frame

    # -- slow tiers -> arena ---------------------------------------------------------------

    def fetch(self, ops: Sequence[FetchOp]) -> None:
        """Start reading chunks from slow tiers into slots. Results come with `take_report`."""
        if not ops or self._loop is None:
            return
        for op in ops:
            self._held.pop(op.slot, None)
        by_tier: dict[int, list[FetchOp]] = {}
        for op in ops:
            by_tier.setdefault(op.tier, []).append(op)
        for tier, group in by_tier.items():
            self._loop.submit(self._fetch(self._tiers[tier], group))

    async def _fetch(self, tier: Tier, ops: list[FetchOp]) -> None:
        bad = {op.op for op in ops}
        try:
            into = [self._landing(tier.serde, op) for op in ops]
            answer = await tier.load([op.key for op in ops], into)
            loop = asyncio.get_running_loop()
            bad, damaged = await loop.run_in_executor(
                self._threads, self._accept, tier, ops, into, answer.sizes
            )
            if damaged:
                # Or it would be there, of the right size, and refused for ever.
                await tier.delete(damaged)
            if answer.unsettled is not None:
                self._conclude(ops, bad, released=False)
                await asyncio.wait([answer.unsettled])
                self._release(ops)
                return
        except asyncio.CancelledError:
            self._conclude(ops, bad)
            raise
        self._conclude(ops, bad)

    def _landing(self, serde: Serde, op: FetchOp) -> memoryview:
        group = self._namespace.layout.groups[0]
        if serde.in_place:
            size = HEADER_BYTES + group.chunk_bytes(op.tokens)
            return self._arena.slot(op.slot)[:size]
        return memoryview(bytearray(HEADER_BYTES + serde.max_encoded_bytes(group, op.tokens)))

    def _accept(
        self, tier: Tier, ops: list[FetchOp], into: list[memoryview], sizes: list[int]
    ) -> tuple[set[int], list[ChunkKey]]:
        """Verify and decode what was read; answer what failed, and which values are no good."""
        bad: set[int] = set()
        damaged: list[ChunkKey] = []
        for op, frame, size in zip(ops, into, sizes, strict=True):
            if size == MISS:
                bad.add(op.op)
                continue
            error = attempt(self._open, tier.serde, op, frame[:size])
            if error is None:
                self._counters.add("load_chunks", tier=tier.name)
                self._counters.add("load_bytes", size, tier=tier.name)
                continue
            bad.add(op.op)
            damaged.append(op.key)
            reason = error.reason if isinstance(error, FrameError) else "decode"
            self._counters.add("frame_rejected", reason=reason)
            self._counters.add("load_failures", tier=tier.name, reason=reason)
            logger.warning(
                "Tier %s: chunk %s isn't used (%s): %s", tier.name, op.key.hex(), reason, error
            )
        return bad, damaged

    def _open(self, serde: Serde, op: FetchOp, frame: memoryview) -> None:
        group = self._namespace.layout.groups[0]
        header = read_header(
            frame,
            key=op.key,
            fingerprint=self._namespace.fingerprint,
            checksums_of=self._checksums,
        )
        chunk = self._chunk(op.slot, op.tokens, 0)
        if header.raw_bytes != chunk.nbytes:
            raise FrameError("length", f"{header.raw_bytes} bytes, this chunk has {chunk.nbytes}")
        if header.serde != serde.wire_id:
            raise FrameError("serde", f"written by serde {header.serde}, not {serde.wire_id}")
        if not serde.in_place:
            serde.for_chunk(op.key, None).decode(frame[HEADER_BYTES:], chunk, group, op.tokens)
        elif header.payload_bytes != header.raw_bytes:
            raise FrameError("length", "an uncompressed chunk has a payload of another length")
        layers = len(group.layers)
        known = serde.in_place and header.pieces == layers
        sums = header.sums if known else self._checksums(chunk, layers)
        self._held[op.slot] = (op.key, sums)

    def _conclude(self, ops: list[FetchOp], bad: set[int], *, released: bool = True) -> None:
        with self._lock:
            for op in ops:
                (self._report.bad if op.op in bad else self._report.ok)[op.op] = 1
                if released:
                    self._report.released[op.op] = 1
        self._tell()

    def _release(self, ops: list[FetchOp]) -> None:
        with self._lock:
            for op in ops:
                self._report.released[op.op] = 1
        self._tell()

    def _tell(self) -> None:
        if self._on_news is not None:
            self._on_news()

    # -- the rest --------------------------------------------------------------------------

    def take_report(self) -> Report:
        """What happened since the last call."""
        with self._lock:
            report, self._report = self._report, Report()
            return report

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything stored so far is in the slow tiers, or was dropped."""
        with self._lock:
            return self._idle.wait_for(lambda: not self._queued, timeout_s)

    def close(self) -> None:
        """Let go of the threads. Close the tiers and the loop before."""
        self._threads.shutdown(wait=True)

    def _chosen(self, engine: EngineConnector | None) -> EngineConnector:
        chosen = engine or self._engine
        if chosen is None:
            raise LayoutError("this mover has no engine of its own, and the call names none")
        return chosen

    def _chunk(self, slot: int, tokens: int, group: int) -> memoryview:
        size = self._namespace.layout.groups[group].chunk_bytes(tokens)
        return self._arena.slot(slot)[HEADER_BYTES : HEADER_BYTES + size]

    def _sum_bytes(self, group: int) -> int:
        return SUM_BYTES * len(self._namespace.layout.groups[group].layers)

    def _span_bytes(self, op: LoadOp | StoreOp) -> int:
        return self._namespace.layout.groups[op.span.group].chunk_bytes(op.span.tokens)
