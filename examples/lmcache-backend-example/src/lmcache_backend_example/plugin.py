"""All that a backend needs: its options, the backend, and the hook that describes it."""

import sqlite3
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from lmcache_core import (
    MISS,
    BackendCapabilities,
    BackendContext,
    BlockingBackend,
    ChunkKey,
    StorageBackendDescriptor,
    StoreOutcome,
    hookimpl,
)


class SqliteConfig(BaseModel):
    """Options of the ``sqlite`` backend."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: Path = Field(description="Folder for the database files; it must be there.")


class SqliteBackend(BlockingBackend):
    """One row a chunk. A connection belongs to one thread, so one thread is asked for."""

    capabilities = BackendCapabilities(shared=True, persistent=True, max_concurrency=1)

    def __init__(self, config: SqliteConfig) -> None:
        self._folder = config.path

    def open_blocking(self, context: BackendContext) -> None:
        # One file a namespace: chunks of different models must never mix.
        self._db = sqlite3.connect(self._folder / f"{context.namespace.fingerprint}.db")
        self._db.execute("CREATE TABLE IF NOT EXISTS chunks (k BLOB PRIMARY KEY, v BLOB)")

    def contains_blocking(self, keys: Sequence[ChunkKey]) -> list[bool]:
        find = "SELECT 1 FROM chunks WHERE k = ?"
        return [self._db.execute(find, [key]).fetchone() is not None for key in keys]

    def load_blocking(self, keys: Sequence[ChunkKey], into: Sequence[memoryview]) -> list[int]:
        return [self._load(key, buffer) for key, buffer in zip(keys, into, strict=True)]

    def _load(self, key: ChunkKey, buffer: memoryview) -> int:
        row = self._db.execute("SELECT v FROM chunks WHERE k = ?", [key]).fetchone()
        if row is None or len(row[0]) > buffer.nbytes:
            return MISS
        buffer[: len(row[0])] = row[0]
        return len(row[0])

    def store_blocking(
        self, keys: Sequence[ChunkKey], sources: Sequence[memoryview]
    ) -> list[StoreOutcome]:
        with self._db:  # all of the batch, or nothing
            rows = zip(keys, sources, strict=True)
            self._db.executemany("INSERT OR REPLACE INTO chunks VALUES (?, ?)", rows)
        return [StoreOutcome.STORED] * len(keys)

    def close_blocking(self) -> None:
        self._db.close()


@hookimpl
def lmcache_storage_backends() -> list[StorageBackendDescriptor]:
    facts = {"summary": "rows of SQLite files", "config": SqliteConfig, "create": SqliteBackend}
    return [StorageBackendDescriptor(name="sqlite", **facts)]
