"""The redis backend: batches of chunks in pipelines of commands.

Knows which keys are on which node, and that a node that fails costs its own keys only. What is said
to a node is `loading`'s, `storing`'s and `commands`' business, names and heads `layout`'s, replies
`resp`'s, servers `topology`'s. Retries, deadlines, metrics and tiers are core's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from lmcache_backend_redis import topology
from lmcache_backend_redis.commands import clear, discard
from lmcache_backend_redis.config import RedisConfig
from lmcache_backend_redis.layout import MAX_VALUE_BYTES, Names
from lmcache_backend_redis.loading import Load
from lmcache_backend_redis.resp import Wire, commands
from lmcache_backend_redis.storing import Store
from lmcache_backend_redis.topology import Node, Topology
from lmcache_core.errors import BackendError, BackendRejected, BackendUnavailable
from lmcache_core.keys import ChunkKey
from lmcache_core.storage import (
    MISS,
    BackendCapabilities,
    BackendContext,
    BlockingBackend,
    StoreOutcome,
)


class RedisBackend(BlockingBackend):
    """Keeps each chunk under one name, or under one name and one for each of its pieces."""

    def __init__(self, config: RedisConfig) -> None:
        self._config = config
        self._topology: Topology | None = None
        self._names = Names(config.prefix, "")

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
        self._names = Names(self._config.prefix, context.namespace.fingerprint)
        self._topology = topology.connect(self._config)

    async def close(self) -> None:
        if self._topology is not None:
            self._topology.abort()  # so that no thread goes on waiting for a server
        await super().close()

    def close_blocking(self) -> None:
        if self._topology is not None:
            self._topology.close()

    # -- asking ----------------------------------------------------------------------------

    def contains_blocking(self, keys: Sequence[ChunkKey]) -> list[bool]:
        names = [self._names.head(key) for key in keys]
        found = [False] * len(keys)
        groups = self._groups(names, read=True)
        until = time.monotonic() + self._config.call_timeout_s

        def ask(node: Node, positions: list[int]) -> Iterator[None]:
            with self._open.wire(node, until) as wire:
                wire.send([commands(b"EXISTS", [names[i] for i in positions])])
                yield
                for i, count in zip(positions, wire.integers(len(positions)), strict=True):
                    found[i] = count > 0

        # Every node is asked before any is waited for: together they cost one round trip.
        asking = [ask(*group) for group in groups.items()]
        failures: list[BackendError] = []
        for _ in ("ask", "listen"):
            for one in asking:
                with _noting(failures):
                    next(one, None)
        _raise_if_all_failed(failures, len(groups))
        return found

    async def count_leading_hits(self, keys: Sequence[ChunkKey]) -> int:
        """How many keys from the first on would hit, up to the first miss."""
        found = await self.contains(keys)
        return found.index(False) if False in found else len(found)

    # -- loading ---------------------------------------------------------------------------

    def load_blocking(self, keys: Sequence[ChunkKey], into: Sequence[memoryview]) -> list[int]:
        names = [self._names.head(key) for key in keys]
        sizes = [MISS] * len(keys)

        def load(wire: Wire, positions: list[int]) -> None:
            Load(wire, self._config.piece_bytes).run(positions, names, into, sizes)

        self._each(self._groups(names, read=True), load)
        return sizes

    # -- storing ---------------------------------------------------------------------------

    def store_blocking(
        self, keys: Sequence[ChunkKey], sources: Sequence[memoryview]
    ) -> list[StoreOutcome]:
        names = [self._names.head(key) for key in keys]
        outcomes = [StoreOutcome.NOT_ADMITTED] * len(keys)

        def store(wire: Wire, positions: list[int]) -> None:
            Store(wire, self._config).run(positions, names, sources, outcomes)

        self._each(self._groups(names, read=False), store)
        return outcomes

    # -- forgetting ------------------------------------------------------------------------

    async def delete(self, keys: Sequence[ChunkKey]) -> int:
        """Forget ``keys``; answer how many of them were there."""
        return await self._run(self._delete_blocking, keys)

    async def clear(self) -> int:
        """Forget every chunk of the namespace; answer how many there were."""
        return await self._run(self._clear_blocking)

    def _delete_blocking(self, keys: Sequence[ChunkKey]) -> int:
        names = [self._names.head(key) for key in keys]
        counts: list[int] = []
        self._each(
            self._groups(names, read=False),
            lambda wire, positions: counts.append(discard(wire, [names[i] for i in positions])),
        )
        return sum(counts)

    def _clear_blocking(self) -> int:
        counts: list[int] = []
        nodes: dict[Node, list[int]] = {node: [] for node in self._open.primaries()}
        self._each(nodes, lambda wire, _: counts.append(clear(wire, self._names)))
        return sum(counts)

    # -- inside ----------------------------------------------------------------------------

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

    def _each(
        self, groups: dict[Node, list[int]], work: Callable[[Wire, list[int]], object]
    ) -> None:
        """Do ``work`` on each node. One that fails costs its own keys, and only that."""
        failures: list[BackendError] = []
        until = time.monotonic() + self._config.call_timeout_s
        for node, positions in groups.items():
            with _noting(failures), self._open.wire(node, until) as wire:
                work(wire, positions)
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
