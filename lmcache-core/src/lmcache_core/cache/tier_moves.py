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
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from lmcache_core.aio.daemon_pool import DaemonPool
from lmcache_core.aio.guard import attempted
from lmcache_core.aio.io_loop import IOLoop
from lmcache_core.cache.plan import FetchOp, StoreOp
from lmcache_core.cache.reports import Reports
from lmcache_core.chunks.frame import DAMAGE
from lmcache_core.chunks.keys import ChunkKey
from lmcache_core.chunks.layout import LayerGroup
from lmcache_core.contracts.storage import MISS
from lmcache_core.errors import FrameError
from lmcache_core.memory.host_memory import HostArena
from lmcache_core.memory.leases import Lease, Ledger, SharedResource
from lmcache_core.metrics import Counters
from lmcache_core.tiers.sealing import Chunk, Sealer
from lmcache_core.tiers.tier import Tier

logger = logging.getLogger(__name__)
T = TypeVar("T")
Leases = dict[int, Lease]
"""Of chunks, by their position or operation; what is handed on is taken out."""
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
        shares = [
            SharedResource(self._ledger, partial(self._reports.released, (op.op,)), op.key.hex())
            for op, _ in written
        ]
        leases = [{i: share.lease() for i, share in enumerate(shares)} for _ in self._tiers]

        def ended(_: Future[None] | None) -> None:
            for own in leases:
                _keep_taken(own.values())
            with self._idle:
                self._queued -= len(written)
                self._idle.notify_all()
            self._reports.tell()

        clears = [tier.clears for tier, _ in self._tiers]
        if not self._submit(self._persist(written, leases, clears), ended):
            self._counters.add("store_dropped", len(written), reason="closed")
            for own in leases:
                self._give_back(own.values())
            ended(None)

    async def _persist(
        self, stored: Stored, leases: Sequence[Leases], clears: Sequence[int]
    ) -> None:
        """Over when it is known what became of each chunk; a call that hangs has its leases."""
        writes = [
            self._write(tier, sealer, stored, own, asked)
            for (tier, sealer), own, asked in zip(self._tiers, leases, clears, strict=True)
        ]
        for found in await asyncio.gather(*writes, return_exceptions=True):
            if isinstance(found, BaseException):
                logger.error("Writing to a tier failed; this is a bug of ours", exc_info=found)

    async def _write(
        self, tier: Tier, sealer: Sealer, stored: Stored, leases: Leases, clears: int
    ) -> None:
        sealed = await self._on_thread(self._seal, tier, sealer, stored)
        needed = {position for position, _ in sealed} if sealer.in_place else set()
        self._give_back([leases.pop(i) for i in range(len(stored)) if i not in needed])
        if not sealed:
            return
        keys = [stored[position][0].key for position, _ in sealed]
        answer = await tier.store(keys, [frame for _, frame in sealed], clears=clears)
        if needed:
            held = [leases.pop(position) for position, _ in sealed]
            self._settle(held, answer.hanging)

    def _settle(self, leases: Sequence[Lease], hanging: Mapping[int, asyncio.Task[Any]]) -> None:
        """Release what isn't used any more now, and the rest as the calls end that use it."""
        waiting: dict[asyncio.Task[Any], list[Lease]] = {}
        for position, task in hanging.items():
            waiting.setdefault(task, []).append(leases[position])
        self._give_back([lease for i, lease in enumerate(leases) if i not in hanging])
        for task, own in waiting.items():
            self._release_after(task, own)

    def _release_after(self, task: asyncio.Task[Any], leases: list[Lease]) -> None:
        async def released() -> None:
            await asyncio.wait([task])
            self._give_back(leases)

        if not self._submit(released(), lambda _: _keep_taken(leases)):
            _keep_taken(leases)

    def _seal(self, tier: Tier, sealer: Sealer, stored: Stored) -> list[tuple[int, memoryview]]:
        """The values of those chunks that can be sealed, with their positions."""
        sealed: list[tuple[int, memoryview]] = []
        for position, (op, sums) in enumerate(stored):
            group = self._groups[op.span.group]
            slot = self._arena.slot(op.slot)
            chunk = Chunk(op.key, slot, group, op.span.chunk_tokens, op.start)
            answer = attempted(sealer.seal, chunk, sums)
            if answer.value is not None:
                sealed.append((position, answer.value))
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
        leases = {
            op.op: self._ledger.lease(partial(self._reports.released, (op.op,)), op.key.hex())
            for op in ops
        }
        due = set(leases)

        def concluded(bad: set[int]) -> None:
            self._reports.failed(due & bad)
            self._reports.done(due - bad)
            due.clear()
            self._reports.tell()

        def ended(_: Future[None] | None) -> None:
            _keep_taken(leases.values())
            if due:
                concluded(set(due))

        if not self._submit(self._fetch(tier, ops, leases, concluded), ended):
            name = self._tiers[tier][0].name
            self._counters.add("load_failures", len(ops), tier=name, reason="closed")
            self._give_back(leases.values())
            ended(None)

    async def _fetch(
        self, index: int, ops: list[FetchOp], leases: Leases, concluded: Callable[[set[int]], None]
    ) -> None:
        tier, sealer = self._tiers[index]
        landed = self._landed(tier, sealer, ops)
        needed = {op.op for op, _, _ in landed}
        self._give_back([leases.pop(op.op) for op in ops if op.op not in needed])
        if not landed:
            return
        answer = await tier.load([op.key for op, _, _ in landed], [into for _, _, into in landed])
        good, damaged, refused = await self._on_thread(
            self._accept, tier, sealer, landed, answer.sizes
        )
        if damaged:
            # Or it would be there, of the right size, and refused for ever.
            tier.damaged(damaged)
        if refused:
            tier.refuse(refused)
            self._reports.refused(index, refused)
        concluded({op.op for op in ops} - good)
        held = [leases.pop(op.op) for op, _, _ in landed]
        self._settle(held, answer.hanging if sealer.in_place else {})

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

    def _give_back(self, leases: Collection[Lease]) -> None:
        for lease in leases:
            lease.release()
        if leases:
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


def _keep_taken(leases: Iterable[Lease]) -> None:
    """What wasn't given back when its operation ended: somebody may still use it."""
    for lease in leases:
        if lease.live:
            lease.abandon()


def _reason(error: BaseException | None, otherwise: str) -> str:
    return error.reason if isinstance(error, FrameError) else otherwise
