"""The ``lm`` backend: one connection for questions, some for values, new ones when they fail.

Knows which request answers which call of the storage contract. How requests travel
is `connection`'s business; deadlines, retries and logging are core's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

from lmcache_backend_lm import protocol
from lmcache_backend_lm.call import Call
from lmcache_backend_lm.config import LmConfig, read_token
from lmcache_backend_lm.connection import Connection
from lmcache_backend_lm.inventory import description_of
from lmcache_backend_lm.protocol import MAX_KEYS, MISSING, Op, ProtocolError
from lmcache_core import (
    MISS,
    BackendCapabilities,
    BackendContext,
    BackendRejected,
    BackendUnavailable,
    ChunkKey,
    StorageBackend,
    StoreOutcome,
)

logger = logging.getLogger(__name__)

_OUTCOMES = (StoreOutcome.STORED, StoreOutcome.ALREADY_PRESENT, StoreOutcome.NOT_ADMITTED)
_USAGE_BYTES = 16
_QUESTIONS = -1


class LmBackend(StorageBackend):
    """Chunks on an ``lmcache_server``."""

    def __init__(self, config: LmConfig) -> None:
        self._config = config
        self._connections: dict[int, Connection] = {}
        self._dead: list[Connection] = []
        self._usage = (0, 0)
        self._max_value_bytes: int | None = None
        self._context: BackendContext | None = None
        self._token = b""
        self._noticed: set[str] = set()

    @property
    def capabilities(self) -> BackendCapabilities:
        return BackendCapabilities(
            shared=True,
            persistent=True,  # the server keeps them for as long as it runs
            max_chunk_bytes=self._max_value_bytes,
            preferred_batch=16,
            max_concurrency=8,
            cancellable=True,
        )

    async def open(self, context: BackendContext) -> None:
        self._context = context
        self._read_token()
        try:
            connection = self._connection(_QUESTIONS)
            self._usage = await connection.call(_usage_call())
        except BaseException:
            await self.close()
            raise
        assert connection.welcome is not None  # noqa: S101  it answered
        self._max_value_bytes = connection.welcome.max_value_bytes
        how = "through shared memory" if connection.shares_memory else "connected"
        logger.info("%s: %s, %s", context.name, self._config.address, how)

    async def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        found: list[bool] = []
        for some in _batches(keys):

            def parse(meta: memoryview, count: int = len(some)) -> list[bool]:
                if len(meta) != count:
                    raise ProtocolError(f"{len(meta)} answers for {count} keys")
                return list(map(bool, meta))

            found += await self._ask(Op.CONTAINS, some, parse, len(some))
        return found

    async def count_leading_hits(self, keys: Sequence[ChunkKey]) -> int:
        total = 0
        for some in _batches(keys):

            def parse(meta: memoryview, count: int = len(some)) -> int:
                hits = protocol.parse_number(meta)
                if hits > count:
                    raise ProtocolError(f"{hits} leading hits of {count} keys")
                return hits

            hits: int = await self._ask(Op.COUNT, some, parse, 8)
            total += hits
            if hits < len(some):
                break
        return total

    async def load(self, keys: Sequence[ChunkKey], into: Sequence[memoryview]) -> list[int]:
        loaded: list[int] = []
        for start in range(0, len(keys), MAX_KEYS):
            some, buffers = keys[start : start + MAX_KEYS], into[start : start + MAX_KEYS]
            meta = protocol.names(some) + protocol.numbers([view.nbytes for view in buffers])
            call = Call(Op.LOAD, len(some), meta, into=buffers)
            sizes = await self._least_busy().call(call)
            loaded += [MISS if size == MISSING else size for size in sizes]
        return loaded

    async def store(
        self, keys: Sequence[ChunkKey], sources: Sequence[memoryview]
    ) -> list[StoreOutcome]:
        outcomes: list[StoreOutcome] = []
        for start in range(0, len(keys), MAX_KEYS):
            some, values = keys[start : start + MAX_KEYS], sources[start : start + MAX_KEYS]
            meta = protocol.names(some) + protocol.numbers([view.nbytes for view in values])

            def parse(meta: memoryview, count: int = len(some)) -> list[StoreOutcome]:
                self._usage, rest = protocol.parse_usage(meta)
                if len(rest) != count or any(code >= len(_OUTCOMES) for code in rest):
                    raise ProtocolError(f"{bytes(rest[:16])!r} aren't {count} outcomes")
                return [_OUTCOMES[code] for code in rest]

            limit = _USAGE_BYTES + len(some)
            call = Call(Op.STORE, len(some), meta, parse, limit, payload=values)
            outcomes += await self._least_busy().call(call)
        return outcomes

    async def delete(self, keys: Sequence[ChunkKey]) -> int:
        total = 0
        for some in _batches(keys):
            total += await self._ask(Op.DELETE, some, self._forgotten, _USAGE_BYTES + 8)
        return total

    async def clear(self) -> int:
        return int(await self._ask(Op.CLEAR, (), self._forgotten, _USAGE_BYTES + 8))

    def usage(self) -> tuple[int, int]:
        """As the server said it last, with the answer to a store, a delete or the greeting."""
        return self._usage

    async def close(self) -> None:
        self._context = None
        open_ones = [*self._connections.values(), *self._dead]
        self._connections, self._dead = {}, []
        for connection in open_ones:  # now: a task that is cancelled before it began does nothing
            connection.end()
        await asyncio.gather(*(connection.close() for connection in open_ones))

    # -- inside ----------------------------------------------------------------------------

    def _forgotten(self, meta: memoryview) -> int:
        self._usage, rest = protocol.parse_usage(meta)
        return protocol.parse_number(rest)

    async def _ask(
        self,
        op: Op,
        keys: Sequence[ChunkKey],
        parse: Callable[[memoryview], Any],
        meta_limit: int,
    ) -> Any:
        call = Call(op, len(keys), protocol.names(keys), parse, meta_limit)
        return await self._connection(_QUESTIONS).call(call)

    def _least_busy(self) -> Connection:
        """The connection for values with the fewest bytes before it; a new one before a queue."""
        busy = []
        for index in range(self._config.connections):
            connection = self._connections.get(index)
            if connection is None or not connection.alive or not connection.waiting_bytes:
                return self._connection(index)
            busy.append(connection)
        return min(busy, key=lambda connection: connection.waiting_bytes)

    def _connection(self, index: int) -> Connection:
        context = self._context
        if context is None:
            raise BackendUnavailable("the backend isn't open")
        connection = self._connections.get(index)
        if connection is None or not connection.alive:
            with contextlib.suppress(BackendRejected):  # it may have changed since, or is as before
                self._read_token()
            if connection is not None:
                self._dead = [one for one in self._dead if not one.ended] + [connection]
            connection = self._connections[index] = Connection(
                self._config,
                context.namespace.fingerprint,
                self._token,
                f"lmcache-{context.name}",
                context.region,
                self._notice,
            )
            if index == _QUESTIONS:
                said = description_of(context.namespace).encode()
                connection.tell(Call(Op.DESCRIBE, meta=said))
        return connection

    def _read_token(self) -> None:
        self._token = read_token(self._config.token, self._config.token_file)

    def _notice(self, text: str) -> None:
        """Say it once, however many connections find it. From their threads."""
        if text not in self._noticed:
            self._noticed.add(text)
            name = "lm" if self._context is None else self._context.name
            logger.warning("%s: %s: %s", name, self._config.address, text)


def _usage_call() -> Call:
    def parse(meta: memoryview) -> tuple[int, int]:
        found, rest = protocol.parse_usage(meta)
        if rest:
            raise ProtocolError("the answer to USAGE is too long")
        return found

    return Call(Op.USAGE, parse=parse, meta_limit=_USAGE_BYTES)


def _batches(keys: Sequence[ChunkKey]) -> list[Sequence[ChunkKey]]:
    return [keys[start : start + MAX_KEYS] for start in range(0, len(keys), MAX_KEYS)]
