"""What a `BlockingBackend` with blocking optional methods is, and where they run."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from lmcache_core.chunks.keys import CacheNamespace, ChunkKey
from lmcache_core.chunks.layout import DType, KVLayout, full_attention
from lmcache_core.contracts.storage import (
    MISS,
    BackendCapabilities,
    BackendContext,
    BlockingBackend,
    StoreOutcome,
    SupportsClear,
    SupportsDelete,
    SupportsPrefixLookup,
)
from lmcache_core.testing.storage import MakeBackend, StorageBackendTests, keys, value, views


class Plain(BlockingBackend):
    """A dictionary, and the names of the threads that were in it."""

    def __init__(self) -> None:
        self.chunks: dict[ChunkKey, bytes] = {}
        self.threads: list[str] = []

    @property
    def capabilities(self) -> BackendCapabilities:
        return BackendCapabilities(shared=False, persistent=False)

    def contains_blocking(self, keys: Sequence[ChunkKey]) -> list[bool]:
        return [key in self.chunks for key in keys]

    def load_blocking(self, keys: Sequence[ChunkKey], into: Sequence[memoryview]) -> list[int]:
        sizes = []
        for key, buffer in zip(keys, into, strict=True):
            found = self.chunks.get(key)
            if found is None or len(found) > buffer.nbytes:
                sizes.append(MISS)
                continue
            buffer[: len(found)] = found
            sizes.append(len(found))
        return sizes

    def store_blocking(
        self, keys: Sequence[ChunkKey], sources: Sequence[memoryview]
    ) -> list[StoreOutcome]:
        self.chunks.update((key, bytes(one)) for key, one in zip(keys, sources, strict=True))
        return [StoreOutcome.STORED] * len(keys)


class Shelf(Plain):
    def delete_blocking(self, keys: Sequence[ChunkKey]) -> int:
        self.threads.append(threading.current_thread().name)
        return sum(self.chunks.pop(key, None) is not None for key in keys)

    def count_leading_hits_blocking(self, keys: Sequence[ChunkKey]) -> int:
        self.threads.append(threading.current_thread().name)
        return next((i for i, key in enumerate(keys) if key not in self.chunks), len(keys))

    def clear_blocking(self) -> int:
        self.threads.append(threading.current_thread().name)
        count = len(self.chunks)
        self.chunks.clear()
        return count


class OfItsOwn(Shelf):
    async def clear(self) -> int:
        return 42


class TestShelf(StorageBackendTests):
    @pytest.fixture
    def make_backend(self) -> MakeBackend:
        return Shelf


def test_a_blocking_method_makes_the_optional_one() -> None:
    for optional in (SupportsDelete, SupportsPrefixLookup, SupportsClear):
        assert isinstance(Shelf(), optional)
        assert not isinstance(Plain(), optional)


def test_they_run_on_the_backends_threads() -> None:
    async def use(shelf: Shelf) -> list[int]:
        layout = KVLayout(16, (full_attention(layers=1, heads=1, head_size=8, dtype=DType.BF16),))
        await shelf.open(BackendContext("shelf", CacheNamespace("m", layout)))
        await shelf.store(keys(3), views([value(i) for i in range(3)]))
        answers = [
            await shelf.count_leading_hits(keys(3)),  # type: ignore[attr-defined]
            await shelf.delete(keys(1)),  # type: ignore[attr-defined]
            await shelf.clear(),  # type: ignore[attr-defined]
        ]
        await shelf.close()
        return answers

    shelf = Shelf()
    assert asyncio.run(use(shelf)) == [3, 1, 2]
    assert len(shelf.threads) == 3
    assert all(name.startswith("lmcache-shelf") for name in shelf.threads)
    assert asyncio.run(use(OfItsOwn())) == [3, 1, 42], "one of its own is left alone"
