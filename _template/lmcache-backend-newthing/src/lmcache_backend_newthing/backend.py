"""The newthing backend.

Knows how chunks are kept in newthing. Retries, deadlines, metrics and tiers are core's business.

Start from here: a dictionary stands where newthing's client goes. `BlockingBackend` is for clients
that block, one call to a thread; derive from `StorageBackend` for one that has asyncio.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from lmcache_backend_newthing.config import NewthingConfig
from lmcache_core import (
    MISS,
    BackendCapabilities,
    BackendContext,
    BlockingBackend,
    ChunkKey,
    StoreOutcome,
)


class NewthingBackend(BlockingBackend):
    """Keeps each chunk under its key; an instance serves one namespace."""

    def __init__(self, config: NewthingConfig) -> None:
        self._max_chunks = config.max_chunks
        self._chunks: dict[ChunkKey, bytes] = {}
        self._lock = threading.Lock()

    @property
    def capabilities(self) -> BackendCapabilities:
        # Other processes don't see a dictionary, and it dies with this one. Say what is true of
        # newthing: the conformance kit then checks it.
        return BackendCapabilities(shared=False, persistent=False)

    def open_blocking(self, context: BackendContext) -> None:
        """Connect here, and keep ``context.namespace.fingerprint`` for the names of chunks."""

    def contains_blocking(self, keys: Sequence[ChunkKey]) -> list[bool]:
        with self._lock:
            return [key in self._chunks for key in keys]

    def load_blocking(self, keys: Sequence[ChunkKey], into: Sequence[memoryview]) -> list[int]:
        loaded = []
        for key, buffer in zip(keys, into, strict=True):
            with self._lock:
                value = self._chunks.get(key)
            if value is None or len(value) > buffer.nbytes:
                loaded.append(MISS)
                continue
            buffer[: len(value)] = value
            loaded.append(len(value))
        return loaded

    def store_blocking(
        self, keys: Sequence[ChunkKey], sources: Sequence[memoryview]
    ) -> list[StoreOutcome]:
        return [self._store_one(key, source) for key, source in zip(keys, sources, strict=True)]

    def close_blocking(self) -> None:
        with self._lock:
            self._chunks.clear()

    def _store_one(self, key: ChunkKey, source: memoryview) -> StoreOutcome:
        value = bytes(source)
        with self._lock:
            if key in self._chunks:
                return StoreOutcome.ALREADY_PRESENT
            if len(self._chunks) >= self._max_chunks:
                return StoreOutcome.NOT_ADMITTED
            self._chunks[key] = value
            return StoreOutcome.STORED
