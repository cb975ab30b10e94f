"""The scheduler's half of the connector: looks up, plans loads and stores.

Runs in vLLM's scheduler process and owns the planner, so that a lookup costs
no message to any worker, whatever the tensor parallelism. Never blocks: slow
tiers are asked and read in the background, and a request that waits for them
is offered again at the next step, until its deadline.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from lmcache_connector_vllm import identity
from lmcache_connector_vllm.adapters import AdapterNames, RequestAdapter
from lmcache_connector_vllm.events import ChunkEvents
from lmcache_connector_vllm.metadata import RequestLoad, RequestStore, StepPlan, WorkerReport
from lmcache_connector_vllm.settings import Settings
from lmcache_core import (
    BlockSpan,
    CacheNamespace,
    ChunkKey,
    Counters,
    FetchOp,
    Hold,
    IOLoop,
    LeaseError,
    LoadOp,
    Planner,
    PrefixHasher,
    PrefixLookup,
    Report,
    Rope,
    Seldom,
    StoreOp,
    Tiers,
    WaitingBudget,
    init_logger,
    left_of,
    slots_in,
)

if TYPE_CHECKING:
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = init_logger(__name__)

_UNREADABLE = (
    "a request's kv_transfer_params aren't a mapping, or have a lmcache.tag.* that can't be "
    "written as text: the request isn't cached"
)


@dataclass
class _Tracked:
    """What the scheduler remembers of a request."""

    request: Request
    hasher: PrefixHasher
    loads: bool
    saves: bool
    tags: Mapping[str, str]
    blocks: list[int] = field(default_factory=list)
    next_chunk: int = 0
    computed: int = 0
    tail_done: bool = False
    lookup: PrefixLookup | None = None
    lookup_chunks: int = 0
    offered: tuple[int, int] = (0, 0)
    loading: Sequence[int] = ()
    """The blocks of its last load."""
    logged: bool = False
    watched: bool | None = None
    """Whether the cache policy wants to know when it ends; ``None``: not told of it yet."""
    adapter: RequestAdapter | None = None


class SchedulerSide:
    """See the module. One per engine; all calls come from the scheduler's thread."""

    def __init__(
        self,
        settings: Settings,
        namespace: CacheNamespace,
        *,
        ranks: int,
        block_tokens: int,
        events: bool = False,
        rope: Rope | None = None,
        weights: str = "",
        adapters: AdapterNames | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        core = settings.config.core
        self._settings = settings
        self._namespace = namespace
        self._chunk_tokens = core.chunk_size
        self._block_tokens = block_tokens
        self._adapters = adapters
        self._clock = clock
        self.counters = Counters()
        self._loop: IOLoop | None = None
        self._tiers: list[Tiers] = []
        if settings.config.backends:
            self._open_tiers(ranks, rope, weights)
        slots = slots_in(settings.arena_bytes, namespace)
        self._planner = Planner(
            slots,
            settings.plugins.make_cache_policy(
                core.cache_policy, settings.config.cache_policy_options
            ),
            self.counters,
            ranks=ranks,
            keep=core.local_cpu,
            persist=bool(self._tiers),
            pin_timeout_s=core.pin_timeout_sec,
            index=settings.plugins.chunk_index(slots),
        )
        self._events = ChunkEvents(self._chunk_tokens) if events or core.enable_kv_events else None
        if self._events is not None:
            self._planner.on_ready = self._events.ready
            self._planner.on_failed = self._events.failed
            self._planner.on_evicted = self._events.evicted
        self._waiting = WaitingBudget(slots, self.counters)
        self._requests: dict[str, _Tracked] = {}
        self._loads: list[RequestLoad] = []
        self._fetches: list[FetchOp] = []
        self._to_release: list[Hold] = []
        self._receiving: dict[str, Hold] = {}
        self._sources: dict[str, tuple[int, int]] = {}
        self._acknowledged: dict[int, int] = {}
        self._epoch = ""
        self._seldom = Seldom(logger)

    def _open_tiers(self, ranks: int, rope: Rope | None, weights: str) -> None:
        """Open each backend once for the heads of every rank, to ask what the workers stored.

        With the same serdes, bound to the same facts: where values lie depends on them.
        """
        core = self._settings.config.core
        self._loop = IOLoop("lmcache-scheduler")
        every = (self._namespace.for_rank(rank, ranks) for rank in range(ranks))
        for namespace in dict.fromkeys(every):  # several ranks may have the same heads
            self._tiers.append(
                Tiers.open(
                    self._settings.config.backends,
                    self._settings.plugins,
                    namespace=namespace,
                    region=None,
                    loop=self._loop,
                    counters=self.counters,
                    lookup_only=True,
                    default_deadline_s=core.lookup_timeout_ms / 1000,
                    default_serde=core.serde,
                    serdes=self._settings.config.serdes,
                    rope=rope,
                    weights=weights,
                )
            )

    # -- looking up ------------------------------------------------------------------------

    def new_request(self, request: Request) -> None:
        """Remember a request, and start asking slow tiers before vLLM schedules it."""
        tracked = self._track(request)
        known = self._adapter_known(tracked)
        asks = known and self._asks_tiers and tracked.loads and tracked.lookup is None
        if asks and self._may_lease(tracked, asked=False):
            self._look_up(tracked)

    def matched_tokens(self, request: Request, computed: int) -> tuple[int | None, bool]:
        """Tokens beyond ``computed`` that can be loaded; ``None``: ask again next step."""
        tracked = self._track(request)
        if not self._adapter_known(tracked):
            return None, False
        self._check_adapter(tracked, computed)
        if not tracked.loads or request.skip_reading_prefix_cache:
            self._end_lookup(tracked)
            return 0, False
        if tracked.lookup is None and not self._may_lease(tracked, asked=True):
            return None, False
        lookup = tracked.lookup or self._look_up(tracked)
        chunks = lookup.poll()
        if chunks is None:
            return None, False
        self._waiting.holds(request.request_id, chunks)
        total = request.num_tokens
        hit = min(self._tokens_of(tracked, chunks), total)
        need = max(0, min(hit, total - 1) - computed)
        if need < self._settings.config.core.min_retrieve_tokens:
            need = 0
        tracked.offered = (computed, hit)
        self._note_lookup(tracked, lookup, total, hit, need)
        return need, bool(need) and self._settings.asynchronous

    def allocated(self, request: Request, blocks: KVCacheBlocks, external: int) -> None:
        """vLLM made room for ``external`` tokens: plan their load."""
        self.load_into(request, blocks.get_block_ids()[0], external)

    def load_into(self, request: Request, block_ids: Sequence[int], external: int) -> None:
        """Plan to load ``external`` tokens after those that are computed locally."""
        tracked = self._track(request)
        lookup, adapter = tracked.lookup, tracked.adapter
        if adapter is not None:
            adapter.plan()
        if not external or lookup is None:
            self._end_lookup(tracked)
            return
        start, hit = tracked.offered
        end = start + external
        ops = self._load_ops(tracked, lookup.hold, block_ids, start, end)
        first, last = start // self._block_tokens, (end - 1) // self._block_tokens
        asynchronous = self._settings.asynchronous
        self._loads.append(
            RequestLoad(
                request.request_id,
                ops,
                list(block_ids[first : last + 1]),
                asynchronous,
                hit,
                external,
                adapter.use if adapter is not None else None,
            )
        )
        tracked.loading = self._loads[-1].blocks
        memory = min(self._chunk_tokens * lookup.memory_chunks, end) - start
        self._sources[request.request_id] = (max(0, memory), external - max(0, memory))
        hold, tracked.lookup = lookup.hand_on(), None
        self._waiting.ends(request.request_id)
        if asynchronous:
            self._receiving[request.request_id] = hold
        else:
            self._to_release.append(hold)

    def hit_sources(self, request_id: str) -> tuple[int, int]:
        """How many of the request's loaded tokens came from host memory and from slow tiers."""
        return self._sources.pop(request_id, (0, 0))

    def _track(self, request: Request) -> _Tracked:
        tracked = self._requests.get(request.request_id)
        if tracked is not None:
            return tracked
        marks = identity.marks(request.kv_transfer_params)
        if marks is None:
            self._seldom.warn("marks", _UNREADABLE)
        tags = marks.tags if marks is not None else {}
        limit = self._settings.config.core.priority_limit
        usable = marks is not None and identity.cacheable(request)
        usable = usable and (limit is None or request.priority <= limit)
        if self._epoch and not self._settings.config.core.local_cpu:
            usable = False  # there is no place for what this engine alone may see
        tracked = self._requests[request.request_id] = _Tracked(
            request,
            self._hasher(request, tags),
            loads=usable,
            saves=usable and self._settings.saves and not (marks and marks.skip_save),
            tags=tags,
        )
        if self._adapters is not None:
            tracked.adapter = self._adapters.of(request, usable)
        return tracked

    def _hasher(self, request: Request, tags: Mapping[str, str], adapter: str = "") -> PrefixHasher:
        return PrefixHasher(
            identity.root(self._namespace.root, request, tags, self._epoch, adapter),
            self._chunk_tokens,
            identity.media(request, self._chunk_tokens),
            self._planner.index,
        )

    def _adapter_known(self, tracked: _Tracked) -> bool:
        """Whether the request's adapter, if it has one, needn't be waited for.

        Until it is computed another one may be loaded: then it is looked up under another name.
        """
        if (adapter := tracked.adapter) is None:
            return True
        before = adapter.fact
        if not adapter.settle():
            return False
        if adapter.fact != before:
            self._end_lookup(tracked)
            tracked.hasher = self._hasher(tracked.request, tracked.tags, adapter.fact)
        if adapter.use is None:
            tracked.loads = tracked.saves = False
        return True

    def _check_adapter(self, tracked: _Tracked, computed: int) -> None:
        """Before an offer: what it would rest on, and what it would be loaded for."""
        if (adapter := tracked.adapter) is None or adapter.use is None:
            return
        if not adapter.holds(computed):
            adapter.leave_alone()
            tracked.loads = tracked.saves = False
        elif not adapter.offered(self._settings.asynchronous):
            tracked.loads = False

    def _stop_changed(self, tracked: Iterable[_Tracked]) -> None:
        """Stop storing for requests whose adapter isn't the one that they began with."""
        if self._adapters is None:
            return
        board = self._adapters.board.read()
        for one in tracked:
            if one.adapter is not None and one.adapter.changed(board):
                one.saves = False

    @property
    def _asks_tiers(self) -> bool:
        return bool(self._tiers) and not self._epoch

    def _may_lease(self, tracked: _Tracked, *, asked: bool) -> bool:
        """Whether the request may be looked up now, which leases what is found."""
        chunks = -(-tracked.request.num_tokens // self._chunk_tokens)
        return self._waiting.admits(tracked.request.request_id, chunks, asked=asked)

    def _look_up(self, tracked: _Tracked) -> PrefixLookup:
        request, core = tracked.request, self._settings.config.core
        tokens = request.all_token_ids
        hasher, size = tracked.hasher, self._chunk_tokens
        tracked.lookup_chunks = len(tokens) // size
        counts = [size] * tracked.lookup_chunks
        if tracked.watched is None:
            tracked.watched = self._planner.requested(
                partial(hasher.extend, tokens),
                len(tokens),
                request.request_id,
                {"priority": request.priority},
            )
        if self._asks_tiers or core.save_unfull_chunk:
            keys = list(hasher.extend(tokens))
            if core.save_unfull_chunk and (tail := hasher.tail(tokens)) is not None:
                keys.append(ChunkKey(tail))
                counts.append(len(tokens) % size)

            def find() -> Sequence[ChunkKey]:
                return keys
        else:

            def find() -> Sequence[ChunkKey]:
                return hasher.digests[: len(hasher.find(tokens))]

        tracked.lookup = PrefixLookup(
            self._planner,
            find,
            counts,
            locate=self._locate if self._asks_tiers else None,
            submit=partial(self._submit, tracked),
            deadline_s=core.blocking_timeout_secs,
        )
        return tracked.lookup

    def _submit(self, tracked: _Tracked, fetches: list[FetchOp]) -> None:
        """Have chunks fetched by the next step; each becomes an event when it is here."""
        self._fetches += fetches
        if self._events is None:
            return
        places = {key: index for index, key in enumerate(tracked.hasher.digests)}
        for op in fetches:
            index = places.get(op.key, tracked.lookup_chunks)  # else it is the unfull last one
            begin = index * self._chunk_tokens
            self._events.planned(op.key, tracked.request, begin, op.tokens, tracked.hasher)

    def _locate(self, keys: Sequence[ChunkKey]) -> Future[list[int]]:
        if self._loop is None:
            raise RuntimeError("no slow tiers to ask")
        return self._loop.submit(self._locate_all_parts(keys))

    async def _locate_all_parts(self, keys: Sequence[ChunkKey]) -> list[int]:
        """A chunk is in a tier if every rank's part of it is. All are asked at the same time."""
        deadline_s = self._settings.config.core.lookup_timeout_ms / 1000
        parts = await asyncio.gather(*(tiers.locate(keys, deadline_s) for tiers in self._tiers))
        if len(parts) == 1:
            return parts[0]
        return [found[0] if len(set(found)) == 1 else -1 for found in zip(*parts, strict=True)]

    def _tokens_of(self, tracked: _Tracked, chunks: int) -> int:
        full = min(chunks, tracked.lookup_chunks)
        tokens = full * self._chunk_tokens
        if chunks > full and tracked.lookup is not None:
            tokens = len(tracked.request.all_token_ids)
        return tokens

    def _load_ops(
        self, tracked: _Tracked, hold: Hold, block_ids: Sequence[int], start: int, end: int
    ) -> list[LoadOp]:
        size, ops = self._chunk_tokens, []
        for index in range(start // size, (end + size - 1) // size):
            begin, stop = max(start, index * size), min(end, (index + 1) * size)
            whole = size if index < tracked.lookup_chunks else tracked.request.num_tokens % size
            span = self._span(block_ids, begin, stop - begin, whole, begin - index * size)
            ops.append(LoadOp(hold.keys[index], hold.slots[index], span))
        return ops

    def _span(
        self, blocks: Sequence[int], begin: int, tokens: int, chunk_tokens: int, offset: int
    ) -> BlockSpan:
        first, last = begin // self._block_tokens, (begin + tokens - 1) // self._block_tokens
        return BlockSpan(
            blocks=list(blocks[first : last + 1]),
            first=begin - first * self._block_tokens,
            tokens=tokens,
            chunk_tokens=chunk_tokens,
            chunk_offset=offset,
        )

    def _note_lookup(
        self, tracked: _Tracked, lookup: PrefixLookup, total: int, hit: int, need: int
    ) -> None:
        if tracked.logged:
            return
        tracked.logged = True
        memory = min(hit, lookup.memory_chunks * self._chunk_tokens)
        self.counters.add("lookup_requests")
        self.counters.add("lookup_tokens", total)
        if memory:
            self.counters.add("lookup_hit_tokens", memory, tier="host")
        if hit > memory:
            self.counters.add("lookup_hit_tokens", hit - memory, tier="slow")
        logger.info(
            "Reqid: %s, Total tokens %d, LMCache hit tokens: %d, need to load: %d",
            tracked.request.request_id,
            total,
            hit,
            need,
        )

    def _end_lookup(self, tracked: _Tracked) -> None:
        self._waiting.ends(tracked.request.request_id)
        if tracked.lookup is not None:
            tracked.lookup.close()
            tracked.lookup = None

    # -- planning a step -------------------------------------------------------------------

    def plan_step(self, output: SchedulerOutput) -> StepPlan:
        """Everything that the workers have to do in the step that was just scheduled."""
        plan = StepPlan(
            loads=self._loads,
            fetches=self._fetches[:],
            acknowledged=dict(self._acknowledged),
        )
        self._loads = []
        self._fetches.clear()
        self._waiting.next_step()
        self._stop_changed(self._requests.values())
        for new in output.scheduled_new_reqs:
            tracked = self._requests.get(new.req_id)
            if tracked is not None:
                tracked.blocks = list(new.block_ids[0])
                self._plan_stores(
                    plan, tracked, new.num_computed_tokens, output.num_scheduled_tokens[new.req_id]
                )
        cached = output.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            tracked = self._requests.get(request_id)
            if tracked is None:
                continue
            fresh = cached.new_block_ids[index]
            if request_id in cached.resumed_req_ids:
                tracked.blocks = list(fresh[0]) if fresh is not None else []
            elif fresh is not None:
                tracked.blocks += fresh[0]
            self._plan_stores(
                plan,
                tracked,
                cached.num_computed_tokens[index],
                output.num_scheduled_tokens[request_id],
            )
        # Workers carry out steps in order: what is loaded in this step is loaded before anything
        # that a later step stores into the same slots.
        while self._to_release:
            self._to_release.pop().release()
        return plan

    def _plan_stores(
        self, plan: StepPlan, tracked: _Tracked, computed: int, scheduled: int
    ) -> None:
        request, core, size = tracked.request, self._settings.config.core, self._chunk_tokens
        if tracked.adapter is not None and tracked.adapter.use is not None:
            plan.adapters[request.request_id] = tracked.adapter.use
        if not tracked.saves:
            return
        if computed < tracked.computed:
            # Recomputed after a preemption or a failed load: what was planned since may be lost.
            tracked.next_chunk = min(tracked.next_chunk, computed // size)
            tracked.tail_done = False
        tokens = request.all_token_ids
        # Speculative tokens aren't in all_token_ids before they are accepted.
        upto = tracked.computed = min(computed + scheduled, len(tokens))
        limit = len(tokens) if core.save_decode_cache else request.num_prompt_tokens
        last = min(upto, limit) // size
        stores: list[tuple[int, StoreOp]] = []
        if last > tracked.next_chunk:
            keys = tracked.hasher.extend(tokens[: last * size])
            for index in range(tracked.next_chunk, last):
                parent = keys[index - 1] if index else None
                self._add_store(stores, tracked, keys[index], parent, index * size, size)
            tracked.next_chunk = last
        if core.save_unfull_chunk and upto >= request.num_prompt_tokens and not tracked.tail_done:
            tracked.tail_done = True
            self._add_tail(stores, tracked)
        if stores:
            ops = [op for _, op in stores]
            plan.stores.append(RequestStore(request.request_id, ops))
            logger.info(
                "Storing KV cache for %d out of %d tokens (skip_leading_tokens=%d) for request %s",
                sum(op.span.tokens for op in ops),
                min(upto, limit),
                stores[0][0],
                request.request_id,
            )

    def _add_tail(self, stores: list[tuple[int, StoreOp]], tracked: _Tracked) -> None:
        prompt, size = tracked.request.num_prompt_tokens, self._chunk_tokens
        if prompt % size:
            hasher = tracked.hasher.fork(prompt // size)
            tail = hasher.tail(tracked.request.all_token_ids[:prompt])
            if tail is not None:
                key, parent = ChunkKey(tail), hasher.digests[-1] if hasher.digests else None
                tokens = prompt % size
                self._add_store(stores, tracked, key, parent, prompt - tokens, tokens)

    def _add_store(
        self,
        stores: list[tuple[int, StoreOp]],
        tracked: _Tracked,
        key: ChunkKey,
        parent: ChunkKey | None,
        begin: int,
        tokens: int,
    ) -> None:
        span = self._span(tracked.blocks, begin, tokens, tokens, 0)
        op = self._planner.plan_store(key, span, parent, begin)
        if op is not None:
            stores.append((begin, op))
            if self._events is not None:
                self._events.planned(key, tracked.request, begin, tokens, tracked.hasher)

    # -- hearing back ----------------------------------------------------------------------

    def hear(self, output: KVConnectorOutput) -> None:
        """Take in what the workers report after a step."""
        meta = output.kv_connector_worker_meta
        if isinstance(meta, WorkerReport):
            try:
                self._planner.settle(meta.report)
            except LeaseError as error:  # without effect, and no reason to end the engine
                logger.error("%s", error)
            self._refuse(meta.report)
            self._acknowledged.update(meta.report.failed_steps)
        if output.invalid_block_ids:
            self._note_failed_loads(output.invalid_block_ids)
        for request_id in output.finished_recving or ():
            hold = self._receiving.pop(request_id, None)
            if hold is not None:
                hold.release()

    def _note_failed_loads(self, invalid: set[int]) -> None:
        """Offer nothing more to requests whose load failed.

        vLLM asks for them again, and what a connector failed with is as good as before, so that it
        would be offered, and fail, without end.
        """
        for tracked in self._requests.values():
            if not invalid.isdisjoint(tracked.loading):
                tracked.loads = False
                self._end_lookup(tracked)

    def _refuse(self, report: Report) -> None:
        """Take for absent what workers found that isn't for them, in every shard."""
        if self._loop is None:
            return
        for index, keys in report.refused.items():
            for tiers in self._tiers:
                self._loop.call_soon(partial(tiers.tiers[index].refuse, keys))

    def request_finished(self, request: Request) -> None:
        """Forget a request. An asynchronous load under way keeps its slots until it ends."""
        tracked = self._requests.pop(request.request_id, None)
        if tracked is not None:
            self._end_lookup(tracked)
            if tracked.watched:
                self._planner.finished(request.request_id, request.num_tokens)
        self._sources.pop(request.request_id, None)

    def reset(self) -> bool:
        """Forget all chunks in host memory, and never believe one of changed weights.

        vLLM resets in ``/pause`` and ``/sleep``, too, and doesn't say whether weights are changed.
        Slow tiers are shared: they keep what they have, which was computed with the weights that
        its names say. Where this engine's may change, it has names of its own from now on, which
        no other process can make, and keeps what has them in its host memory only.
        """
        chunks = self._planner.clear()
        logger.info("Reset: forgot %d chunks in host memory", chunks)
        names = [tier.name for tier in self._tiers[0].tiers] if self._tiers else []
        if not self._settings.config.core.weights_may_change:
            for name in names:
                logger.info("Reset: %s keeps its chunks, and this engine goes on using them", name)
            return True
        self._epoch = uuid.uuid4().hex
        self._planner.persist = False
        for tracked in self._requests.values():
            self._end_lookup(tracked)
            tracked.loads = tracked.saves = False
        for name in names:
            logger.warning(
                "Reset: %s keeps its chunks for those who share it; this engine neither loads from "
                "it nor stores there until it restarts, because its weights may have been changed. "
                "If nobody changes them while it runs, set weights_may_change=false",
                name,
            )
        return True

    def take_events(self) -> Iterable[KVCacheEvent]:
        """KV events since the last call."""
        return self._events.take() if self._events is not None else ()

    def close(self) -> None:
        """Let go of the tiers and the loop, within ``blocking_timeout_secs`` for all of it."""
        left_s = left_of(self._settings.config.core.blocking_timeout_secs, self._clock)
        for tracked in self._requests.values():
            self._end_lookup(tracked)
        for hold in (*self._to_release, *self._receiving.values()):
            hold.release()  # no step follows in which anybody else could be given the slots
        self._to_release.clear()
        self._receiving.clear()
        for index, tiers in enumerate(self._tiers):
            tiers.close(0.75 * left_s() / (len(self._tiers) - index))
        if self._loop is not None:
            self._loop.close(left_s())
        if self._adapters is not None:
            self._adapters.close()
