"""The redis backend: batches of chunks in pipelines of commands.

Knows which keys are on which node, and that a node that fails costs its own keys only. What is said
to a node is `loading`'s, `storing`'s and `commands`' business, names and heads `layout`'s, replies
`resp`'s, servers `topology`'s. Retries, deadlines, metrics and tiers are core's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final, TypeVar

from lmcache_backend_redis import topology
from lmcache_backend_redis.blocking import at_once
from lmcache_backend_redis.commands import clear, discard
from lmcache_backend_redis.config import RedisConfig
from lmcache_backend_redis.layout import MAX_VALUE_BYTES, Names
from lmcache_backend_redis.loading import Load
from lmcache_backend_redis.pools import Node
from lmcache_backend_redis.resp import Wire, commands
from lmcache_backend_redis.storing import Store
from lmcache_backend_redis.topology import Topology
from lmcache_core import (
    MISS,
    BackendCapabilities,
    BackendContext,
    BackendError,
    BackendRejected,
    BackendUnavailable,
    BlockingBackend,
    ChunkKey,
    StoreOutcome,
)

T = TypeVar("T")
Wires = Callable[[Node, float], AbstractContextManager[Wire]]
"""A connection to a node for one call, which must be over at a time."""

ON_LOOP_BYTES: Final = 4 << 20
"""A call about no more is awaited on the event loop: waking a thread, and being woken by it, takes
longer than the loop is kept busy by copying. Longer ones would keep it busy for milliseconds."""


class RedisBackend(BlockingBackend):
    """Keeps each chunk under one name, or under one name and one for each of its pieces.

    What is said to a node is written once, as coroutines. A call of a few MiB to one server awaits
    them on the event loop. Any other one runs them on a thread, where they never suspend: a long
    one, one with TLS, which would encrypt on the loop's thread, and one to a cluster, which
    redis-py asks now and then who has which slot.
    """

    def __init__(self, config: RedisConfig) -> None:
        self._config = config
        self._topology: Topology | None = None
        self._names = Names(config.prefix, "")
        self._most_bytes = MAX_VALUE_BYTES
        self._turns = asyncio.Semaphore(config.connections)
        """Of calls that are awaited on the loop; threads are as many."""

    @property
    def capabilities(self) -> BackendCapabilities:
        return BackendCapabilities(
            shared=True,
            persistent=True,
            max_chunk_bytes=MAX_VALUE_BYTES,
            preferred_batch=8,  # more calls, each with a connection, rather than longer ones
            max_concurrency=self._config.connections,
        )

    # -- opening and closing ---------------------------------------------------------------

    def open_blocking(self, context: BackendContext) -> None:
        largest = context.max_value_bytes
        if largest is not None and largest > MAX_VALUE_BYTES:
            raise BackendRejected(
                f"a chunk may have {largest} bytes here, and this backend keeps values of up to "
                f"{MAX_VALUE_BYTES} bytes, as Redis does; set a smaller chunk_size"
            )
        self._most_bytes = MAX_VALUE_BYTES if largest is None else largest
        self._names = Names(self._config.prefix, context.namespace.fingerprint)
        self._topology = topology.connect(self._config)

    async def close(self) -> None:
        if self._topology is not None:
            self._topology.abort()  # so that nobody goes on waiting for a server
            try:
                for _ in range(self._config.connections):  # until nobody has a turn any more
                    await self._turns.acquire()
            except asyncio.CancelledError:  # somebody still has one, so the rest isn't safe
                if self._pool is not None:
                    self._pool.shutdown()
                raise
            self._topology.leave_loop()
            for _ in range(self._config.connections):
                self._turns.release()
        await super().close()

    def close_blocking(self) -> None:
        if self._topology is not None:
            self._topology.close()

    # -- asking ----------------------------------------------------------------------------

    async def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        return await self._run_near(0, True, self._contains, keys)

    def contains_blocking(self, keys: Sequence[ChunkKey]) -> list[bool]:
        return at_once(self._contains(self._open.wire, keys))

    async def _contains(self, wires: Wires, keys: Sequence[ChunkKey]) -> list[bool]:
        names = [self._names.head(key) for key in keys]
        found = [False] * len(keys)
        groups = self._groups(names, read=True)
        until = time.monotonic() + self._config.call_timeout_s

        async def ask(node: Node, positions: list[int]) -> AsyncIterator[None]:
            with wires(node, until) as wire:
                await wire.send([commands(b"EXISTS", [names[i] for i in positions])])
                yield
                for i, count in zip(positions, await wire.integers(len(positions)), strict=True):
                    found[i] = count > 0

        # Every node is asked before any is waited for: together they cost one round trip.
        asking = [ask(*group) for group in groups.items()]
        failures: list[BackendError] = []
        for _ in ("ask", "listen"):
            for one in asking:
                with _noting(failures):
                    await anext(one, None)
        _raise_if_all_failed(failures, len(groups))
        return found

    async def count_leading_hits(self, keys: Sequence[ChunkKey]) -> int:
        """How many keys from the first on would hit, up to the first miss."""
        found = await self.contains(keys)
        return found.index(False) if False in found else len(found)

    # -- loading ---------------------------------------------------------------------------

    async def load(self, keys: Sequence[ChunkKey], into: Sequence[memoryview]) -> list[int]:
        return await self._run_near(_nbytes(into), True, self._load, keys, into)

    def load_blocking(self, keys: Sequence[ChunkKey], into: Sequence[memoryview]) -> list[int]:
        return at_once(self._load(self._open.wire, keys, into))

    async def _load(
        self, wires: Wires, keys: Sequence[ChunkKey], into: Sequence[memoryview]
    ) -> list[int]:
        names = [self._names.head(key) for key in keys]
        sizes = [MISS] * len(keys)

        async def load(wire: Wire, positions: list[int]) -> None:
            await Load(wire, self._config.piece_bytes).run(positions, names, into, sizes)

        await self._each(wires, self._groups(names, read=True), load)
        return sizes

    # -- storing ---------------------------------------------------------------------------

    async def store(
        self, keys: Sequence[ChunkKey], sources: Sequence[memoryview]
    ) -> list[StoreOutcome]:
        return await self._run_near(_nbytes(sources), False, self._store, keys, sources)

    def store_blocking(
        self, keys: Sequence[ChunkKey], sources: Sequence[memoryview]
    ) -> list[StoreOutcome]:
        return at_once(self._store(self._open.wire, keys, sources))

    async def _store(
        self, wires: Wires, keys: Sequence[ChunkKey], sources: Sequence[memoryview]
    ) -> list[StoreOutcome]:
        names = [self._names.head(key) for key in keys]
        outcomes = [StoreOutcome.NOT_ADMITTED] * len(keys)

        async def store(wire: Wire, positions: list[int]) -> None:
            await Store(wire, self._config, self._most_bytes).run(
                positions, names, sources, outcomes
            )

        await self._each(wires, self._groups(names, read=False), store)
        return outcomes

    # -- forgetting ------------------------------------------------------------------------

    async def delete(self, keys: Sequence[ChunkKey]) -> int:
        """Forget ``keys``; answer how many of them were there."""
        return await self._run_near(0, False, self._delete, keys)

    async def clear(self) -> int:
        """Forget every chunk of the namespace; answer how many there were."""
        return await self._run(lambda: at_once(self._clear(self._open.wire)))

    async def _delete(self, wires: Wires, keys: Sequence[ChunkKey]) -> int:
        names = [self._names.head(key) for key in keys]
        counts: list[int] = []

        async def delete(wire: Wire, positions: list[int]) -> None:
            these = [names[i] for i in positions]
            counts.append(await discard(wire, these, self._most_bytes))

        await self._each(wires, self._groups(names, read=False), delete)
        return sum(counts)

    async def _clear(self, wires: Wires) -> int:
        counts: list[int] = []
        nodes: dict[Node, list[int]] = {node: [] for node in self._open.primaries()}

        async def empty(wire: Wire, _: list[int]) -> None:
            counts.append(await clear(wire, self._names))

        await self._each(wires, nodes, empty)
        return sum(counts)

    # -- inside ----------------------------------------------------------------------------

    async def _run_near(
        self, nbytes: int, read: bool, work: Callable[..., Coroutine[Any, Any, T]], *args: Any
    ) -> T:
        """Await ``work(wires, *args)`` here if it is about a few bytes, or else on a thread."""
        servers = self._open
        node = servers.loop_node(read=read) if nbytes <= ON_LOOP_BYTES else None
        if node is None:
            return await self._run(lambda: at_once(work(servers.wire, *args)))
        async with self._turns:
            for _ in range(self._config.connections):  # another call may take the new one first
                if servers.has_line(node):
                    break
                await self._run(servers.add_line, node)
            return await work(servers.line, *args)

    @property
    def _open(self) -> Topology:
        if self._topology is None:
            raise BackendUnavailable("the backend isn't open")
        return self._topology

    def _groups(self, names: Sequence[bytes], *, read: bool) -> dict[Node, list[int]]:
        if not names:
            return {}
        groups = self._open.groups(names, read=read)
        if not groups:
            raise BackendUnavailable("no node of the cluster that has these keys can be reached")
        return groups

    async def _each(
        self,
        wires: Wires,
        groups: dict[Node, list[int]],
        work: Callable[[Wire, list[int]], Awaitable[None]],
    ) -> None:
        """Do ``work`` on each node. One that fails costs its own keys, and only that."""
        failures: list[BackendError] = []
        until = time.monotonic() + self._config.call_timeout_s
        for node, positions in groups.items():
            with _noting(failures), wires(node, until) as wire:
                await work(wire, positions)
        _raise_if_all_failed(failures, len(groups))


@contextmanager
def _noting(failures: list[BackendError]) -> Iterator[None]:
    """Go on after a node failed."""
    try:
        yield
    except BackendError as error:
        failures.append(error)


def _raise_if_all_failed(failures: Sequence[BackendError], count: int) -> None:
    if failures and len(failures) == count:
        raise failures[0]


def _nbytes(views: Sequence[memoryview]) -> int:
    return sum(view.nbytes for view in views)
