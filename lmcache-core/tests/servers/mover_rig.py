"""Caches whose tiers, serdes and engine are in a test's hands, and can be made to fail."""

from __future__ import annotations

import asyncio
import copy
import random
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict

from lmcache_core import (
    BackendCapabilities,
    Cache,
    DType,
    KVLayout,
    Plugins,
    StorageBackend,
    StorageBackendDescriptor,
    StoreOutcome,
    full_attention,
    hookimpl,
    load_config,
)
from lmcache_core.chunks.frame import HEADER_BYTES
from lmcache_core.chunks.keys import CacheNamespace, ChunkKey
from lmcache_core.chunks.layout import LayerGroup
from lmcache_core.contracts.connector import BlockSpan
from lmcache_core.contracts.paged import CanonicalBuffer
from lmcache_core.contracts.serde import Serde, SerdeDescriptor
from lmcache_core.contracts.storage import MISS, BackendContext

CHUNK = 16
GROUP = full_attention(layers=3, heads=2, head_size=8, dtype=DType.BF16)
LAYOUT = KVLayout(CHUNK, (GROUP,))
SLOT = -(-(HEADER_BYTES + GROUP.chunk_bytes(CHUNK)) // 4096) * 4096
WAIT_S = 30.0


class NoOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Store:
    """What a `Remembers` keeps: outlives caches, shared by them, by namespace."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, ChunkKey], bytes] = {}
        self.deleted: list[ChunkKey] = []
        self.may_store = threading.Event()
        self.may_store.set()
        self.before: dict[str, Callable[[], Awaitable[object]]] = {}
        """What is awaited, on the I/O loop, when a call of this name begins."""
        self.calls: list[str] = []


class Remembers(StorageBackend):
    """A backend over a dictionary, that can be held up."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._space = ""

    @property
    def capabilities(self) -> BackendCapabilities:
        return BackendCapabilities(shared=True, persistent=True)

    async def open(self, context: BackendContext) -> None:
        self._space = context.namespace.fingerprint

    async def close(self) -> None:
        pass

    async def _begin(self, call: str) -> None:
        self._store.calls.append(call)
        if (before := self._store.before.get(call)) is not None:
            await before()

    async def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        await self._begin("contains")
        return [(self._space, key) in self._store.values for key in keys]

    async def load(self, keys: Sequence[ChunkKey], into: Sequence[memoryview]) -> list[int]:
        await self._begin("load")
        sizes = []
        for key, buffer in zip(keys, into, strict=True):
            value = self._store.values.get((self._space, key))
            if value is not None and len(value) <= buffer.nbytes:
                buffer[: len(value)] = value
            sizes.append(MISS if value is None else len(value))
        return sizes

    async def store(
        self, keys: Sequence[ChunkKey], sources: Sequence[memoryview]
    ) -> list[StoreOutcome]:
        await self._begin("store")
        while not self._store.may_store.is_set():
            await asyncio.sleep(0)
        for key, source in zip(keys, sources, strict=True):
            self._store.values[self._space, key] = bytes(source)
        return [StoreOutcome.STORED] * len(keys)

    async def delete(self, keys: Sequence[ChunkKey]) -> int:
        await self._begin("delete")
        self._store.deleted += keys
        return sum(self._store.values.pop((self._space, key), None) is not None for key in keys)

    async def clear(self) -> int:
        await self._begin("clear")
        here = [name for name in self._store.values if name[0] == self._space]
        for name in here:
            del self._store.values[name]
        return len(here)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Odd(Serde):
    """Turns every bit over; its calls can be replaced."""

    def __init__(self, wire_id: int = 1234) -> None:
        self._wire_id = wire_id
        self.on_encode: Callable[[], object] = lambda: None
        self.on_decode: Callable[[], object] = lambda: None
        self.on_limit: Callable[[], object] = lambda: None
        self.answers: int | None = None

    @property
    def wire_id(self) -> int:
        return self._wire_id

    def max_encoded_bytes(self, group: LayerGroup, tokens: int) -> int:
        self.on_limit()
        return group.chunk_bytes(tokens)

    def encode(self, chunk: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> int:
        self.on_encode()
        into[: chunk.nbytes] = bytes(chunk).translate(_TURNED)
        return chunk.nbytes if self.answers is None else self.answers

    def decode(self, encoded: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> None:
        self.on_decode()
        into[:] = bytes(encoded).translate(_TURNED)


_TURNED = bytes(255 - i for i in range(256))


def raising(error: BaseException) -> Callable[[], object]:
    def call() -> object:
        raise copy.copy(error)  # which keeps every frame that it went through

    return call


class Rig:
    """Caches over stores and serdes that a test has in its hands."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stores = {"one": Store(), "two": Store()}
        self.serdes = {"odd": Odd(), "other": Odd(1235)}
        stores, serdes = self.stores, self.serdes

        class Plugged:
            @staticmethod
            @hookimpl
            def lmcache_storage_backends() -> list[StorageBackendDescriptor]:
                return [
                    StorageBackendDescriptor(
                        name=name,
                        summary=name,
                        config=NoOptions,
                        create=lambda _, store=store: Remembers(store),
                    )
                    for name, store in stores.items()
                ]

            @staticmethod
            @hookimpl
            def lmcache_serdes() -> list[SerdeDescriptor]:
                return [
                    SerdeDescriptor(
                        name=name,
                        summary=name,
                        lossless=True,
                        config=NoOptions,
                        create=lambda _, serde=serde: serde,
                    )
                    for name, serde in serdes.items()
                ]

        info = folder / "mover_parts-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mover-parts\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[lmcache.plugins]\nmover_parts = mover_parts\n")
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.setitem(sys.modules, "mover_parts", Plugged)  # type: ignore[arg-type]
        self.plugins = Plugins()

    def open(
        self,
        *tiers: str,
        slots: int = 8,
        keep: bool = False,
        more: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> Cache:
        """A cache with ``tiers``, each ``STORE`` or ``STORE:SERDE``, and ``more`` configuration."""
        assignments = [
            f"chunk_size={CHUNK}",
            f"max_local_cpu_size={slots * SLOT / 2**30 + 1e-9}",
            f"local_cpu={str(keep).lower()}",
        ]
        for tier in tiers:
            name, _, serde = tier.partition(":")
            assignments += [
                f"backends.{name}.type={name}",
                f"backends.{name}.serde={serde or 'raw'}",
            ]
        config = load_config(self.plugins, environ={}, assignments=[*assignments, *more])
        return Cache(CacheNamespace("m", LAYOUT), config, self.plugins, clock=clock)


ERRORS = [ValueError("bad"), MemoryError(), SystemExit(1), KeyboardInterrupt(), StopIteration()]


def altered(data: memoryview, where: int = 0) -> None:
    data[where] ^= 1


def eventually(holds: Callable[[], bool]) -> None:
    for _ in range(int(WAIT_S * 100)):
        if holds():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it didn't become true")


def prompt(seed: int, chunks: int = 2) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(50000) for _ in range(chunks * CHUNK)]


def content(chunks: int, seed: int) -> tuple[list[int], bytearray]:
    kv = bytearray(random.Random(-seed).randbytes(GROUP.chunk_bytes(chunks * CHUNK)))
    return prompt(seed, chunks), kv


def loaded(cache: Cache, tokens: list[int]) -> tuple[int, bytearray]:
    into = bytearray(GROUP.chunk_bytes(len(tokens)))
    return cache.load(tokens, into), into


def counted(cache: Cache, name: str) -> dict[tuple[str, ...], float]:
    """A counter's series by the values of their labels."""
    found = cache.counters.snapshot()
    return {tuple(v for _, v in labels): n for (one, labels), n in found.items() if one == name}


class Engine(CanonicalBuffer):
    """A buffer whose answers can be replaced."""

    def __init__(self, kv: bytearray, tokens: int) -> None:
        super().__init__(kv, GROUP, tokens)
        self.sums: Callable[[list[bytes]], object] = lambda sums: sums
        self.positions: Callable[[list[int]], object] = lambda bad: bad

    def gather_checked(  # type: ignore[override]
        self,
        spans: Sequence[BlockSpan],
        into: Sequence[memoryview],
        layers: range | None = None,
    ) -> object:
        return self.sums(super().gather_checked(spans, into, layers))

    def scatter_checked(  # type: ignore[override]
        self,
        sources: Sequence[memoryview],
        spans: Sequence[BlockSpan],
        layers: range | None,
        expected: Sequence[bytes],
    ) -> object:
        return self.positions(super().scatter_checked(sources, spans, layers, expected))
