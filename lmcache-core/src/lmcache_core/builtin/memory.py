"""Keeps chunks in a dictionary of this process, the least recently used going first.

For tests, for own applications and as the smallest complete example of a
backend. The CPU tier that engines use is core's arena, not this: nothing here
is pinned, shared or zero-copy.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from lmcache_core.chunks.keys import ChunkKey
from lmcache_core.contracts.hookspecs import hookimpl
from lmcache_core.contracts.storage import (
    MISS,
    BackendCapabilities,
    BackendContext,
    StorageBackend,
    StorageBackendDescriptor,
    StoreOutcome,
)

_GIB = 1 << 30
_BYTES_BETWEEN_YIELDS = 4 << 20
"""A copy holds the interpreter wherever it runs, so a thread wouldn't help; giving the loop its
turn about once a millisecond does."""


class MemoryConfig(BaseModel):
    """Options of the ``memory`` backend."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_size_gib: float = Field(
        1.0, gt=0, description="Most that the stored values may take together, in GiB."
    )


class MemoryBackend(StorageBackend):
    """A bounded dictionary. Chunks are gone when the backend is closed."""

    def __init__(self, config: MemoryConfig) -> None:
        self._max_bytes = int(config.max_size_gib * _GIB)
        self._chunks: OrderedDict[ChunkKey, bytes] = OrderedDict()
        self._bytes = 0

    @property
    def capabilities(self) -> BackendCapabilities:
        return BackendCapabilities(
            shared=False,
            persistent=False,
            max_chunk_bytes=self._max_bytes,
            max_concurrency=1,
            cancellable=True,
        )

    async def open(self, context: BackendContext) -> None:
        """Nothing to connect to; an instance serves one namespace, so keys can't mix."""

    async def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        return [key in self._chunks for key in keys]

    async def count_leading_hits(self, keys: Sequence[ChunkKey]) -> int:
        for index, key in enumerate(keys):
            if key not in self._chunks:
                return index
        return len(keys)

    async def load(self, keys: Sequence[ChunkKey], into: Sequence[memoryview]) -> list[int]:
        loaded: list[int] = []
        copied = 0
        for key, buffer in zip(keys, into, strict=True):
            value = self._chunks.get(key)
            if value is None or len(value) > buffer.nbytes:
                loaded.append(MISS)
                continue
            self._chunks.move_to_end(key)
            buffer[: len(value)] = value
            loaded.append(len(value))
            copied = await _breathe(copied + len(value))
        return loaded

    async def store(
        self, keys: Sequence[ChunkKey], sources: Sequence[memoryview]
    ) -> list[StoreOutcome]:
        outcomes: list[StoreOutcome] = []
        copied = 0
        for key, source in zip(keys, sources, strict=True):
            if key in self._chunks:
                self._chunks.move_to_end(key)
                outcomes.append(StoreOutcome.ALREADY_PRESENT)
                continue
            if source.nbytes > self._max_bytes:
                outcomes.append(StoreOutcome.NOT_ADMITTED)
                continue
            while self._bytes + source.nbytes > self._max_bytes:
                _, victim = self._chunks.popitem(last=False)
                self._bytes -= len(victim)
            self._chunks[key] = bytes(source)
            self._bytes += source.nbytes
            outcomes.append(StoreOutcome.STORED)
            copied = await _breathe(copied + source.nbytes)
        return outcomes

    async def delete(self, keys: Sequence[ChunkKey]) -> int:
        found = [value for key in keys if (value := self._chunks.pop(key, None)) is not None]
        self._bytes -= sum(map(len, found))
        return len(found)

    async def clear(self) -> int:
        count, self._bytes = len(self._chunks), 0
        self._chunks.clear()
        return count

    def usage(self) -> tuple[int, int]:
        return len(self._chunks), self._bytes

    async def close(self) -> None:
        await self.clear()


async def _breathe(copied: int) -> int:
    """Let other tasks run once enough bytes were copied; answer the bytes since then."""
    if copied < _BYTES_BETWEEN_YIELDS:
        return copied
    await asyncio.sleep(0)
    return 0


@hookimpl
def lmcache_storage_backends() -> list[StorageBackendDescriptor]:
    return [
        StorageBackendDescriptor(
            name="memory",
            summary="a dictionary in this process",
            config=MemoryConfig,
            create=MemoryBackend,
        )
    ]
