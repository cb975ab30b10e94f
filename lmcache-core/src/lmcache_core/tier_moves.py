"""Moves chunks between the arena and slow tiers, in the background.

Whoever reads or writes a slot here has a lease of it, and the slot's operation is released when
the last of them ends: one tier that fails can't give back what another still reads. Serdes run
on two threads, calls to backends on the I/O loop.

A failure costs the chunk that it happened to, in the tier that it happened in; it is counted with
its reason and logged. What may still be in use when its operation ends without a word, because
the loop was closed, stays taken for good.

Knows slots, serdes and tiers. Knows nothing about engines.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from lmcache_core.daemon_pool import DaemonPool
from lmcache_core.errors import FrameError
from lmcache_core.frame import DAMAGE
from lmcache_core.guard import attempted
from lmcache_core.host_memory import HostArena
from lmcache_core.io_loop import IOLoop
from lmcache_core.keys import ChunkKey
from lmcache_core.layout import LayerGroup
from lmcache_core.leases import Lease, Ledger, Shared
from lmcache_core.metrics import Counters
from lmcache_core.plan import FetchOp, StoreOp
from lmcache_core.reports import Reports
from lmcache_core.sealing import Chunk, Sealer
from lmcache_core.storage import MISS
from lmcache_core.tier import Tier

logger = logging.getLogger(__name__)
T = TypeVar("T")
Stored = Sequence[tuple[StoreOp, bytes]]
"""Operations, with the checksums that their chunks had when they were gathered."""


class TierMoves:
    """See the module. All methods but the coroutines may be called on any thread.

    ``held`` says what lies in the slots, with checksums; fetched chunks are written into it.
    ``writes``, ``queue_chunks``: see `mover.Mover`.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        loop: IOLoop,
        arena: HostArena,
        groups: Sequence[LayerGroup],
        counters: Counters,
        reports: Reports,
        *,
        held: dict[int, tuple[ChunkKey, bytes]],
        checksums_of: Callable[[memoryview, int], bytes],
        writes: bool,
        queue_chunks: int,
    ) -> None:
        self._tiers = [
            (
                tier,
                Sealer(
                    tier.serde,
                    exact=tier.exact,
                    fingerprint=tier.fingerprint,
                    checksums_of=checksums_of,
                ),
            )
            for tier in tiers
        ]
        self._loop = loop
        self._arena = arena
        self._groups = groups
        self._counters = counters
        self._reports = reports
        self._held = held
        self._writes = writes and bool(tiers)
        self._queue_chunks = queue_chunks
        self._ledger = Ledger("slots of tiers", counters)
        self._idle = threading.Condition()
        self._queued = 0
        self._threads = DaemonPool(2, "lmcache-seal")

    @property
    def leases(self) -> int:
        """Leases of slots that are out now."""
        return self._ledger.out

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything stored so far is in the slow tiers, or was dropped."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._queued, timeout_s)

    def close(self, timeout_s: float) -> None:
        """Let go of the threads. Close the tiers and the loop before.

        A serde that isn't done within ``timeout_s`` keeps its thread, which is a daemon.
        """
        self._threads.shutdown()
        if not self._threads.join(timeout_s):
            logger.warning("A serde didn't end within %g s; its thread is left behind", timeout_s)

    # -- arena -> slow tiers ---------------------------------------------------------------

    def write(self, stored: Stored) -> None:
        """Start writing chunks to all tiers; release what isn't written."""
        written = [one for one in stored if one[0].persist] if self._writes else []
        with self._idle:
            room = max(0, self._queue_chunks - self._queued)
            dropped, written = written[room:], written[:room]
            self._queued += len(written)
        if dropped:
            self._counters.add("store_dropped", len(dropped), reason="queue_full")
        numbers = [op.op for op, _ in written]
        waiting = set(numbers)
        self._reports.released(op.op for op, _ in stored if op.op not in waiting)
        if not written:
            return
        shared = Shared(self._ledger, lambda: self._release(numbers), _named(written))
        leases = [shared.lease() for _ in self._tiers]

        def ended(_: Future[None] | None) -> None:
            _keep_taken(leases)
            with self._idle:
                self._queued -= len(written)
                self._idle.notify_all()
            self._reports.tell()

        if not self._submit(self._persist(written, leases), ended):
            self._counters.add("store_dropped", len(written), reason="closed")
            for lease in leases:
                lease.release()
            ended(None)

    async def _persist(self, stored: Stored, leases: Sequence[Lease]) -> None:
        writes = [
            self._write(tier, sealer, stored, lease)
            for (tier, sealer), lease in zip(self._tiers, leases, strict=True)
        ]
        for found in await asyncio.gather(*writes, return_exceptions=True):
            if isinstance(found, BaseException):
                logger.error("Writing to a tier failed; this is a bug of ours", exc_info=found)

    async def _write(self, tier: Tier, sealer: Sealer, stored: Stored, lease: Lease) -> None:
        sealed = await self._on_thread(self._seal, tier, sealer, stored)
        if not sealer.in_place or not sealed:
            lease.release()
        if not sealed:
            return
        answer = await tier.store([key for key, _ in sealed], [frame for _, frame in sealed])
        if answer.unsettled is not None:
            await asyncio.wait([answer.unsettled])
        if sealer.in_place:
            lease.release()

    def _seal(
        self, tier: Tier, sealer: Sealer, stored: Stored
    ) -> list[tuple[ChunkKey, memoryview]]:
        """The values of those chunks that can be sealed."""
        sealed: list[tuple[ChunkKey, memoryview]] = []
        for op, sums in stored:
            group = self._groups[op.span.group]
            slot = self._arena.slot(op.slot)
            chunk = Chunk(op.key, slot, group, op.span.chunk_tokens, op.start)
            answer = attempted(sealer.seal, chunk, sums)
            if answer.value is not None:
                sealed.append((op.key, answer.value))
                continue
            reason = _reason(answer.error, "encode")
            self._counters.add("store_dropped", tier=tier.name, reason=reason)
            if reason == "checksum":
                logger.error(
                    "Chunk %s isn't written to %s: %s", op.key.hex(), tier.name, answer.error
                )
                self._reports.unreadable([op.key])
            else:
                tier.serde_failed("encode", answer.error)
        return sealed

    # -- slow tiers -> arena ---------------------------------------------------------------

    def fetch(self, ops: Sequence[FetchOp]) -> None:
        """Start reading chunks from slow tiers into slots."""
        by_tier: dict[int, list[FetchOp]] = {}
        for op in ops:
            self._held.pop(op.slot, None)
            by_tier.setdefault(op.tier, []).append(op)
        for tier, own in by_tier.items():
            self._fetch_from(tier, own)

    def _fetch_from(self, tier: int, ops: list[FetchOp]) -> None:
        numbers = [op.op for op in ops]
        lease = self._ledger.lease(lambda: self._release(numbers), f"{len(ops)} fetched chunks")
        due = set(numbers)

        def concluded(bad: set[int]) -> None:
            self._reports.failed(due & bad)
            self._reports.done(due - bad)
            due.clear()
            self._reports.tell()

        def ended(_: Future[None] | None) -> None:
            _keep_taken([lease])
            if due:
                concluded(set(numbers))

        if not self._submit(self._fetch(tier, ops, lease, concluded), ended):
            name = self._tiers[tier][0].name
            self._counters.add("load_failures", len(ops), tier=name, reason="closed")
            lease.release()
            ended(None)

    async def _fetch(
        self, index: int, ops: list[FetchOp], lease: Lease, concluded: Callable[[set[int]], None]
    ) -> None:
        tier, sealer = self._tiers[index]
        landed = self._landed(tier, sealer, ops)
        if not landed:
            lease.release()
            return
        answer = await tier.load([op.key for op, _, _ in landed], [into for _, _, into in landed])
        good, damaged, refused = await self._on_thread(
            self._accept, tier, sealer, landed, answer.sizes
        )
        if damaged:
            # Or it would be there, of the right size, and refused for ever.
            await tier.delete(damaged)
        if refused:
            tier.refuse(refused)
            self._reports.refused(index, refused)
        concluded({op.op for op in ops} - good)
        if answer.unsettled is not None and sealer.in_place:
            await asyncio.wait([answer.unsettled])
        lease.release()

    def _landed(
        self, tier: Tier, sealer: Sealer, ops: list[FetchOp]
    ) -> list[tuple[FetchOp, Chunk, memoryview]]:
        """Those operations for which there is memory to read to, with it."""
        landed = []
        for op in ops:
            chunk = Chunk(op.key, self._arena.slot(op.slot), self._groups[0], op.tokens)
            answer = attempted(sealer.landing, chunk)
            if answer.value is not None:
                landed.append((op, chunk, answer.value))
                continue
            tier.serde_failed("max_encoded_bytes", answer.error)
            self._counters.add("load_failures", tier=tier.name, reason="serde")
        return landed

    def _accept(
        self,
        tier: Tier,
        sealer: Sealer,
        landed: list[tuple[FetchOp, Chunk, memoryview]],
        sizes: list[int],
    ) -> tuple[set[int], list[ChunkKey], list[ChunkKey]]:
        """Verify and decode what was read.

        Answers the operations that are good, and of the others the values that are damaged, which
        is proven, and those that only aren't for us: they may be somebody else's.
        """
        good: set[int] = set()
        damaged: list[ChunkKey] = []
        refused: list[ChunkKey] = []
        for (op, chunk, frame), size in zip(landed, sizes, strict=True):
            if size == MISS:
                continue
            answer = attempted(sealer.open, frame[:size], chunk)
            if answer.value is not None:
                self._held[op.slot] = (op.key, answer.value)
                good.add(op.op)
                self._counters.add("load_chunks", tier=tier.name)
                self._counters.add("load_bytes", size, tier=tier.name)
                continue
            reason = _reason(answer.error, "decode")
            (damaged if reason in DAMAGE else refused).append(op.key)
            self._counters.add("frame_rejected", reason=reason)
            self._counters.add("load_failures", tier=tier.name, reason=reason)
            if reason == "decode":
                tier.serde_failed(reason, answer.error)
            else:
                logger.warning(
                    "Tier %s: chunk %s isn't used (%s): %s",
                    tier.name,
                    op.key.hex(),
                    reason,
                    answer.error,
                )
        return good, damaged, refused

    # -- inside ----------------------------------------------------------------------------

    def _release(self, numbers: list[int]) -> None:
        self._reports.released(numbers)
        self._reports.tell()

    def _submit(
        self, work: Coroutine[Any, Any, None], ended: Callable[[Future[None] | None], None]
    ) -> bool:
        """Start ``work``; ``ended`` is called when it is over, however that comes about.

        False: it can't be started any more, and ``ended`` isn't called.
        """
        try:
            future = self._loop.submit(work)
        except RuntimeError as error:  # closed
            logger.debug("Nothing is moved to or from tiers any more: %s", error)
            return False
        future.add_done_callback(ended)
        return True

    async def _on_thread(self, call: Callable[..., T], *args: object) -> T:
        """What ``call`` answers. Over only when the call is, even if the caller is cancelled."""
        running = self._threads.run(call, *args)
        try:
            return await asyncio.shield(running)
        finally:
            while not running.done():
                with contextlib.suppress(asyncio.CancelledError):  # goes on when it's over
                    await asyncio.wait([running])


def _keep_taken(leases: Sequence[Lease]) -> None:
    """What wasn't given back when its operation ended: somebody may still use it."""
    for lease in leases:
        if lease.live:
            lease.abandon()


def _reason(error: BaseException | None, otherwise: str) -> str:
    return error.reason if isinstance(error, FrameError) else otherwise


def _named(stored: Stored) -> str:
    return f"{len(stored)} chunks from {stored[0][0].key.hex()} on"
