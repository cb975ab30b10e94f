"""The public API: a KV cache for an application that has no engine, or its own.

    from lmcache_core import Cache, DType, KVLayout, full_attention

    layout = KVLayout(256, (full_attention(layers=32, heads=8, head_size=128, dtype=DType.BF16),))
    with Cache.open(model="my-model", layout=layout) as cache:
        cache.store(tokens, kv)              # kv: layers x 2 x len(tokens) x 8 x 128
        hit = cache.lookup(tokens)           # leading tokens that a load would fill
        loaded = cache.load(tokens, kv)      # fills kv[:, :, :loaded]

Puts the planner, the mover and the tiers of one process together and adds a
lock. Everything it does, an engine connector does too; see `planner` and
`mover` for how.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from lmcache_core.aio.io_loop import EARLY, IOLoop, left_of
from lmcache_core.cache.holds import Hold
from lmcache_core.cache.lookup import PrefixLookup
from lmcache_core.cache.mover import Mover, slot_bytes, slots_in
from lmcache_core.cache.plan import FetchOp, LoadOp, StoreOp
from lmcache_core.cache.planner import Planner
from lmcache_core.cache.prefetches import Prefetches
from lmcache_core.chunks.hashing import PrefixHasher, request_root
from lmcache_core.chunks.keys import CacheNamespace, ChunkKey
from lmcache_core.chunks.layout import KVLayout
from lmcache_core.chunks.tokens import ID_BYTES, Plain, Tokens, count, plain, token_bytes
from lmcache_core.contracts.connector import EngineConnector
from lmcache_core.contracts.paged import CanonicalBuffer, Paged
from lmcache_core.contracts.serde import Rope
from lmcache_core.errors import ConfigError, LayoutError, LeaseError
from lmcache_core.memory.host_memory import HostArena
from lmcache_core.metrics import Counters
from lmcache_core.tiers.tiers import Tiers

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from lmcache_core.config import Config
    from lmcache_core.plugins.manager import Plugins

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Session:
    """A token sequence that grows, such as a conversation. Made by `Cache.session`.

    Goes wherever a `Cache` asks for tokens; what was asked before isn't hashed again. Not
    thread-safe.
    """

    def __init__(self, hasher: PrefixHasher) -> None:
        self.hasher = hasher
        self.packed = bytearray()

    def append(self, tokens: Tokens) -> None:
        """Add the tokens of a turn."""
        self.packed += token_bytes(tokens)

    def __len__(self) -> int:
        """How many tokens there are."""
        return len(self.packed) // ID_BYTES


class Cache:
    """Stores and loads KV by token prefix. Thread-safe; use as a context manager.

    ``tokens`` is always the whole sequence from its start: ids in whatever `tokens.Tokens` names,
    or a `Session`, which has a salt of its own. ``kv`` is a C-contiguous buffer (numpy array, torch
    tensor, ``bytearray``, memoryview) of layers x planes x len(tokens) x heads x head_size
    elements, or a `Paged`; `paged.CanonicalBuffer` says what the elements may be. Only whole chunks
    are stored and loaded. ``salt`` separates tenants: equal tokens under different salts never
    share. What is wrong in a call is raised before anything is planned or moved.

    No call waits for slow tiers longer than its deadline, however many tiers, steps and tries there
    are: `lookup` has ``lookup_timeout_ms``; `load`, `prefetch`, `clear` and `close` have
    ``blocking_timeout_secs``, the last two unless the call says otherwise; `flush` has what the
    call says; `store`, `pin` and `unpin` wait for nothing. ``clock`` is what that is measured by.
    After `close` every call raises `RuntimeError`.
    """

    def __init__(
        self,
        namespace: CacheNamespace,
        config: Config,
        plugins: Plugins,
        *,
        rope: Rope | None = None,
        weights: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        layout, core = namespace.layout, config.core
        if len(layout.groups) != 1:
            raise LayoutError("Cache stores one layer group; open one Cache for each")
        if layout.tokens_per_chunk != core.chunk_size:
            raise ConfigError(
                f"the layout has {layout.tokens_per_chunk} tokens a chunk, but chunk_size is "
                f"{core.chunk_size}: make them equal"
            )
        self.counters = Counters()
        self.engine = _engine(core.engine_connector, plugins)
        """What ``engine_connector`` names, for use in `Paged`; ``None`` if it names nothing."""
        self._namespace = namespace
        self._group = layout.groups[0]
        self._chunk_tokens = core.chunk_size
        self._deadline_s = core.blocking_timeout_secs
        self._lookup_deadline_s = core.lookup_timeout_ms / 1000
        arena_bytes = int(core.max_local_cpu_size * 2**30)
        region = plugins.host_region(
            arena_bytes,
            "cpu",
            hugepages=core.local_cpu_use_hugepages,
            numa_mode=core.numa_mode,
            populate=core.local_cpu_populate,
            shared=config.shares_region,
        )
        arena = HostArena(region, slot_bytes(namespace))
        loop = IOLoop("lmcache") if config.backends else None
        tiers: Tiers | None = None
        if loop is not None:
            tiers = Tiers.open(
                config.backends,
                plugins,
                namespace=namespace,
                region=region,
                loop=loop,
                counters=self.counters,
                lookup_only=False,
                default_deadline_s=core.blocking_timeout_secs,
                default_serde=core.serde,
                serdes=config.serdes,
                rope=rope,
                weights=weights,
            )
        self._clock = clock
        self._news = threading.Condition()
        slots = slots_in(arena_bytes, namespace)
        planner = Planner(
            slots,
            plugins.make_cache_policy(core.cache_policy, config.cache_policy_options),
            self.counters,
            keep=core.local_cpu,
            persist=tiers is not None,
            pin_timeout_s=core.pin_timeout_sec,
            index=plugins.chunk_index(slots),
            clock=clock,
        )
        self._kernels = plugins.host_kernels()
        mover = Mover(
            None,
            arena,
            namespace,
            self.counters,
            kernels=self._kernels,
            tiers=tiers,
            loop=loop,
            queue_chunks=core.store_queue_chunks,
            on_news=self._hear,
        )
        self._prefetches = Prefetches(self._news)
        self._parts: _Parts | None = _Parts(arena, loop, tiers, planner, mover)
        self._closed = False

    @classmethod
    def open(
        cls,
        *,
        model: str,
        layout: KVLayout,
        config: Config | None = None,
        plugins: Plugins | None = None,
        rank: int = 0,
        ranks: int = 1,
        rope: Rope | None = None,
        weights: str = "",
    ) -> Cache:
        """Open a cache for ``model``. Without ``config``, file and environment are read.

        ``layout`` is the model's; of ``ranks`` tensor-parallel ranks, ``rank`` keeps its heads
        (`KVLayout.for_rank`), and ``kv`` has no others. ``rope`` and ``weights`` are for
        serdes: see `serde.SerdeFacts`.

        Raises:
            ConfigError: the configuration is wrong, or asks for memory that isn't there.
            LayoutError: the model's heads can't be dealt out to so many ranks.
            PluginError: the configuration names a plugin that is missing or broken.
        """
        from lmcache_core.config import load_config
        from lmcache_core.plugins.manager import Plugins

        plugins = plugins or Plugins()
        if config is None:
            config = load_config(plugins)
        namespace = CacheNamespace(model, layout if ranks == 1 else layout.for_rank(rank, ranks))
        return cls(namespace, config, plugins, rope=rope, weights=weights)

    # -- the calls -------------------------------------------------------------------------

    def lookup(self, tokens: Tokens | Session, *, salt: str = "") -> int:
        """How many leading tokens a `load` would fill now. Moves nothing.

        What slow tiers haven't said within ``lookup_timeout_ms`` isn't counted.
        """
        parts, left_s = self._running, self._budget(self._lookup_deadline_s)
        hasher, sequence = self._sequence(tokens, salt)
        with self._news:
            parts.settle()
        ready = len(hasher.find(sequence))
        keys = hasher.digests if parts.tiers is None else hasher.extend(sequence)
        if parts.tiers is not None and ready < len(keys):
            asked = parts.tiers.locate(keys[ready:], EARLY * left_s())
            found = parts.in_time(asked, left_s(), [])
            ready += next((i for i, tier in enumerate(found) if tier < 0), len(found))
        whole = count(sequence) // self._chunk_tokens * self._chunk_tokens
        self._count_lookup(whole, ready * self._chunk_tokens)
        return ready * self._chunk_tokens

    def store(self, tokens: Tokens | Session, kv: Buffer | Paged, *, salt: str = "") -> int:
        """Keep the KV of ``tokens``; answer how many tokens were new.

        ``kv`` has been copied when the call returns; slow tiers are written in the background
        (see `flush`). Without room, the rest isn't stored, and counted.

        Raises:
            TypeError: ``tokens`` are no ids, or ``kv`` is no memory.
            ValueError: ``kv`` has another size, shape, order or type than ``tokens`` and the layout
                make, or a `Paged` has fewer blocks or other ones.
            IndexError: the engine has no such block.
            OverflowError: a token id doesn't fit into 32 bits.
        """
        parts = self._running
        hasher, sequence = self._sequence(tokens, salt)
        keys = hasher.extend(sequence)
        paged = self._paged(kv, count(sequence))
        ops: list[StoreOp] = []
        with self._news:
            parts.settle()
            try:
                for index, key in enumerate(keys):
                    parent = keys[index - 1] if index else None
                    start = index * self._chunk_tokens
                    span = paged.span(index, self._chunk_tokens)
                    op = parts.planner.plan_store(key, span, parent, start)
                    if op is not None:
                        ops.append(op)
            except BaseException:
                parts.planner.withdraw(ops)
                raise
        stored = parts.mover.store(ops, paged.engine)
        self._hear()
        return stored * self._chunk_tokens

    def load(self, tokens: Tokens | Session, into: Buffer | Paged, *, salt: str = "") -> int:
        """Fill ``into`` with the KV of as many leading tokens as there are; answer how many.

        Waits for slow tiers for ``blocking_timeout_secs`` at most, asking and reading together.
        What lies beyond the answer is unchanged, unless chunks turned out to be damaged while they
        were copied: they aren't counted, and what was written for them means nothing.

        Raises:
            TypeError, ValueError, IndexError, OverflowError: as `store` does, and where ``into`` is
                read-only. Nothing has moved then, and no chunk is forgotten.
        """
        parts = self._running
        hasher, sequence = self._sequence(tokens, salt)
        keys = hasher.extend(sequence)
        paged = self._paged(into, count(sequence), writable=True)
        with self._held(parts, keys) as hold:
            ops = [
                LoadOp(hold.keys[i], hold.slots[i], paged.span(i, self._chunk_tokens))
                for i in range(len(hold))
            ]
            self._count_lookup(len(keys) * self._chunk_tokens, len(ops) * self._chunk_tokens)
            failed = {op.slot for op in parts.mover.load(ops, engine=paged.engine)}
            good = next((i for i, op in enumerate(ops) if op.slot in failed), len(ops))
            if tokens_loaded := good * self._chunk_tokens:
                self.counters.add("load_tokens", tokens_loaded)
            return tokens_loaded

    def prefetch(self, tokens: Tokens | Session, *, salt: str = "") -> Future[int]:
        """Bring a prefix from slow tiers into host memory; the future says how many tokens are.

        It does so within ``blocking_timeout_secs`` of this call, with what has come by then. Those
        that want the same chunks share one fetch. Cancelling the future ends it.

        """
        parts = self._running
        keys = self._keys(tokens, salt)
        return self._prefetches.add(_Search(self, parts, keys))

    def pin(self, tokens: Tokens | Session, *, salt: str = "") -> int:
        """Keep a prefix in host memory for ``pin_timeout_sec``; answer how many tokens of it."""
        parts = self._running
        keys = self._keys(tokens, salt)
        with self._news:
            parts.settle()
            return parts.planner.pin(keys) * self._chunk_tokens

    def unpin(self, tokens: Tokens | Session, *, salt: str = "") -> int:
        """Undo `pin`; answer how many tokens were pinned."""
        parts = self._running
        keys = self._keys(tokens, salt)
        with self._news:
            return parts.planner.unpin(keys) * self._chunk_tokens

    def clear(self, timeout_s: float | None = None) -> int:
        """Forget everything, in host memory and in tiers that can; answer chunks in memory.

        Nothing from before is found afterwards, nor written any more. A tier that isn't cleared
        within ``timeout_s`` (``blocking_timeout_secs`` if not said) is in `uncleared`; it isn't
        used until it is, which is tried again, unless it never can be: then what is in it stays.
        The log says both. If the process ends before, what is in such a tier is back.
        """
        parts, left_s = self._running, self._budget(timeout_s)
        clearing = None if parts.tiers is None else parts.tiers.clear(EARLY * left_s())
        with self._news:
            parts.settle()
            count = parts.planner.clear()
        if clearing is not None:
            parts.in_time(clearing, left_s(), 0)
        return count

    @property
    def uncleared(self) -> dict[str, str]:
        """Tiers that the last `clear` didn't clear, nor anybody since then, and why."""
        running = self._running.tiers
        tiers = () if running is None else running.tiers
        return {tier.name: tier.uncleared for tier in tiers if tier.uncleared}

    def flush(self, timeout_s: float = 60.0) -> bool:
        """Wait until what was stored is in the slow tiers or was dropped; False: still not."""
        return self._running.mover.flush(timeout_s)

    def session(self, *, salt: str = "") -> Session:
        """An empty sequence that will grow turn by turn."""
        return Session(self._hasher(salt))

    def close(self, timeout_s: float | None = None) -> None:
        """Write out what is queued and let go of everything, host memory too. Idempotent.

        ``timeout_s`` is for all of it; ``blocking_timeout_secs`` if not said. What isn't written in
        three quarters of it is lost: `flush` before, where that matters. Calls that are under way
        end as they do; from now on each raises `RuntimeError`. Memory that something still uses
        then, such as a backend that doesn't come back, goes with it.
        """
        with self._news:
            parts = self._parts
            if self._closed or parts is None:
                return
            self._closed = True
        left_s = self._budget(timeout_s)
        self._prefetches.close(left_s())
        if not parts.mover.flush(0.75 * left_s()):
            logger.warning("Closed before everything was written to the slow tiers")
        if parts.tiers is not None:
            parts.tiers.close(0.5 * left_s())
        if parts.loop is not None:
            parts.loop.close(0.5 * left_s())
        parts.mover.close(left_s())
        self._parts = None

    def __enter__(self) -> Cache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- inside ----------------------------------------------------------------------------

    def _keys(self, tokens: Tokens | Session, salt: str) -> list[ChunkKey]:
        hasher, sequence = self._sequence(tokens, salt)
        return hasher.extend(sequence)

    def _sequence(self, tokens: Tokens | Session, salt: str) -> tuple[PrefixHasher, Plain]:
        if not isinstance(tokens, Session):
            return self._hasher(salt), plain(tokens)
        if salt:
            raise ValueError(f"salt={salt!r}: a session has its own; name it in Cache.session")
        return tokens.hasher, tokens.packed

    def _hasher(self, salt: str) -> PrefixHasher:
        facts = (f"salt={salt}",) if salt else ()
        root = request_root(self._namespace.root, *facts)
        return PrefixHasher(root, self._chunk_tokens, index=self._running.planner.index)

    def _paged(self, kv: Buffer | Paged, tokens: int, *, writable: bool = False) -> Paged:
        """``kv`` as blocks, all of it checked: a mistake is the caller's to hear of."""
        if isinstance(kv, Paged):
            return kv.checked(self._group, tokens - tokens % self._chunk_tokens)
        buffer = CanonicalBuffer(kv, self._group, tokens, self._kernels, writable=writable)
        return Paged(buffer, [0], max(tokens, 1))

    def _budget(self, timeout_s: float | None = None) -> Callable[[], float]:
        """What is left of ``timeout_s``; of ``blocking_timeout_secs`` if not said."""
        return left_of(self._deadline_s if timeout_s is None else timeout_s, self._clock)

    @contextmanager
    def _held(self, parts: _Parts, keys: list[ChunkKey]) -> Iterator[Hold]:
        """What can be read of ``keys``: finds it, going down the tiers, and leases it within."""
        with self._news:
            search = _Search(self, parts, keys)
        try:
            with self._news:
                while search.advance() is None:
                    self._news.wait(search.left_s)
            yield search.lookup.hold
        finally:
            with self._news:
                search.end()

    @property
    def _running(self) -> _Parts:
        """What calls work with. Who has it may go on with it while the cache is closed."""
        parts = self._parts
        if self._closed or parts is None:
            raise RuntimeError("the cache is closed; open another one")
        return parts

    def _locate(self, parts: _Parts, keys: Sequence[ChunkKey]) -> Future[list[int]]:
        if parts.tiers is None or parts.loop is None:
            raise RuntimeError("no slow tiers to ask")
        deadline_s = min(self._lookup_deadline_s, self._deadline_s)
        future = parts.loop.submit(parts.tiers.locate(keys, deadline_s))
        future.add_done_callback(lambda _: self._hear())
        return future

    def _hear(self) -> None:
        with self._news:
            if self._parts is not None:
                self._parts.settle()
            self._news.notify_all()

    def _count_lookup(self, asked: int, hit: int) -> None:
        self.counters.add("lookup_requests")
        self.counters.add("lookup_tokens", asked)
        if hit:
            self.counters.add("lookup_hit_tokens", hit, tier="any")


@dataclass(frozen=True)
class _Parts:
    """What a cache works with until it is closed."""

    arena: HostArena
    loop: IOLoop | None
    tiers: Tiers | None
    planner: Planner
    mover: Mover

    def settle(self) -> None:
        """Take in what was moved. The cache's lock is held."""
        try:
            self.planner.settle(self.mover.take_report())
        except LeaseError as error:  # without effect; whoever happens to ask didn't cause it
            logger.error("%s", error)

    def in_time(self, asked: Coroutine[Any, Any, T], timeout_s: float, otherwise: T) -> T:
        """What the tiers answer. They keep a deadline; if the loop itself is late, not that."""
        if self.loop is None:
            raise RuntimeError("no slow tiers to ask")
        try:
            return self.loop.run(asked, timeout_s)
        except TimeoutError as error:
            logger.warning("Slow tiers didn't answer: %s", error)
            return otherwise


class _Search:
    """What can be read of ``keys``, leased until `end`. The cache's lock is held for all of it."""

    def __init__(self, cache: Cache, parts: _Parts, keys: list[ChunkKey]) -> None:
        self._parts = parts
        self._chunk_tokens = cache._chunk_tokens
        self._fetches: list[FetchOp] = []
        with cache._news:
            parts.settle()
            parts.planner.requested(lambda: keys, len(keys) * cache._chunk_tokens)
            self.lookup = PrefixLookup(
                parts.planner,
                lambda: keys,
                [cache._chunk_tokens] * len(keys),
                locate=partial(cache._locate, parts) if parts.tiers is not None else None,
                submit=self._fetches.extend,
                deadline_s=cache._deadline_s,
                clock=cache._clock,
            )

    @property
    def left_s(self) -> float:
        return self.lookup.left_s

    def advance(self) -> int | None:
        """Tokens that can be read, once that is known."""
        self._parts.settle()
        while (chunks := self.lookup.poll()) is None and self._fetches:
            given = self._fetches[:]
            self._fetches.clear()
            self._parts.mover.fetch(given)
            self._parts.settle()
        return None if chunks is None else chunks * self._chunk_tokens

    def give_up(self) -> int:
        return self.lookup.give_up() * self._chunk_tokens

    def end(self) -> None:
        self._parts.planner.withdraw(self._fetches)  # if it was interrupted
        self._fetches.clear()
        self.lookup.close()


def _engine(name: str | None, plugins: Plugins) -> EngineConnector | None:
    if name is None:
        return None
    descriptor = plugins.engine_connector(name)
    if descriptor.create is None:
        raise ConfigError(
            f"engine_connector = {name!r}: only the engine itself can create this one; "
            "leave the option out and start the engine"
        )
    return descriptor.create(descriptor.config())
