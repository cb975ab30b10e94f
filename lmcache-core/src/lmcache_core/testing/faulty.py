"""Plugins around real ones, that fail when `faults.Faults` says so, and work as these otherwise.

    faults = Faults(seed=7)
    backend = FaultyBackend(MemoryBackend(MemoryConfig()), faults)
    faults.arm("load", Raise(SystemExit))

For tests of what calls plugins: core's own, and those of engines. A wrapper without armed faults
passes the conformance kit that the real one passes.

Knows the contracts. What a fault does, and when, is said in `faults`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, TypeVar

from lmcache_core.chunks.keys import ChunkKey
from lmcache_core.chunks.layout import LayerGroup
from lmcache_core.contracts.connector import (
    BlockSpan,
    EngineConnector,
    HostKernels,
    PagedLayout,
    Paging,
)
from lmcache_core.contracts.eviction import CachedChunks, OrderedPolicy
from lmcache_core.contracts.serde import Serde, SerdeFacts
from lmcache_core.contracts.storage import (
    BackendCapabilities,
    BackendContext,
    BlockingBackend,
    ReportsUsage,
    StorageBackend,
    StoreOutcome,
    SupportsClear,
    SupportsDelete,
    SupportsPrefixLookup,
)
from lmcache_core.testing.faults import Corrupt, Faults, Injection

T = TypeVar("T")
Views = Sequence[memoryview]


class FaultySerde(Serde):
    """``real``, whose calls fail by ``faults``; so do those of what it is `bound` to."""

    def __init__(self, real: Serde, faults: Faults) -> None:
        self.real = real
        self.faults = faults

    @property
    def wire_id(self) -> int:
        return self.real.wire_id

    @property
    def in_place(self) -> bool:
        return self.real.in_place

    def identity(self, group: LayerGroup) -> str:
        call = self.faults.begin("identity")
        call.before()
        found: str = call.after(self.real.identity(group))
        return found

    def bound(self, facts: SerdeFacts) -> Serde:
        call = self.faults.begin("bound")
        call.before()
        found: Serde = call.after(self._around(self.real.bound(facts)))
        return found

    def for_chunk(self, key: bytes, start: int | None) -> Serde:
        call = self.faults.begin("for_chunk")
        call.before()
        found: Serde = call.after(self._around(self.real.for_chunk(key, start)))
        return found

    def max_encoded_bytes(self, group: LayerGroup, tokens: int) -> int:
        call = self.faults.begin("max_encoded_bytes")
        call.before()
        size: int = call.after(self.real.max_encoded_bytes(group, tokens))
        return size

    def encode(self, chunk: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> int:
        call = self.faults.begin("encode")
        call.before()
        size = self.real.encode(chunk, into, group, tokens)
        answer: int = call.after(size, [into[:size]], [into.nbytes])
        return answer

    def decode(self, encoded: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> None:
        call = self.faults.begin("decode")
        call.before()
        call.after(self.real.decode(encoded, into, group, tokens), [into])

    def _around(self, real: Serde) -> Serde:
        return self if real is self.real else FaultySerde(real, self.faults)


class FaultyPolicy(OrderedPolicy):
    """``real``, whose calls fail by ``faults``; but for `open`, which fails a start.

    ``victims`` is the call that answers an iterator, ``victim`` each step of that.
    """

    def __init__(self, real: OrderedPolicy, faults: Faults) -> None:
        self.real = real
        self.faults = faults

    def open(self, chunks: CachedChunks) -> None:
        self.real.open(chunks)

    def added(self, slot: int) -> None:
        self.faults.begin("added").before()
        self.real.added(slot)

    def touched(self, slots: Sequence[int]) -> None:
        self.faults.begin("touched").before()
        self.real.touched(slots)

    def removed(self, slot: int, evicted: bool = False) -> None:
        self.faults.begin("removed").before()
        self.real.removed(slot, evicted)

    def victim(self, spared: int | None) -> int | None:
        return self.real.victim(spared)

    def victims(self) -> Iterator[int]:
        call = self.faults.begin("victims")
        call.before()
        found: Iterator[int] = call.after(_Victims(self.real.victims(), self.faults))
        return found

    def clear(self) -> None:
        self.faults.begin("clear").before()
        self.real.clear()


class _Victims(Iterator[int]):
    """No generator: in one, a `StopIteration` that is injected would become another exception."""

    def __init__(self, real: Iterator[int], faults: Faults) -> None:
        self._real = real
        self._faults = faults

    def __next__(self) -> int:
        call = self._faults.begin("victim")
        call.before()
        slot: int = call.after(next(self._real))
        return slot


class FaultyConnector(EngineConnector):
    """``real``, whose calls fail by ``faults``.

    What is corrupt after ``gather_checked`` has the checksums of what isn't.
    """

    def __init__(self, real: EngineConnector, faults: Faults) -> None:
        self.real = real
        self.faults = faults

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        return self.real.groups

    def paging(self, group: int) -> Paging | None:
        return self.real.paging(group)

    def gather(self, spans: Sequence[BlockSpan], into: Views, layers: range | None = None) -> None:
        call = self.faults.begin("gather")
        call.before()
        call.after(self.real.gather(spans, into, layers), into)

    def scatter(
        self, sources: Views, spans: Sequence[BlockSpan], layers: range | None = None
    ) -> None:
        self.faults.begin("scatter").before()
        self.real.scatter(sources, spans, layers)

    def gather_checked(
        self, spans: Sequence[BlockSpan], into: Views, layers: range | None = None
    ) -> list[bytes]:
        call = self.faults.begin("gather_checked")
        call.before()
        sums: list[bytes] = call.after(self.real.gather_checked(spans, into, layers), into)
        return sums

    def scatter_checked(
        self,
        sources: Views,
        spans: Sequence[BlockSpan],
        layers: range | None,
        expected: Sequence[bytes],
    ) -> list[int]:
        call = self.faults.begin("scatter_checked")
        call.before()
        found = self.real.scatter_checked(sources, spans, layers, expected)
        bad: list[int] = call.after(found, limits=[len(sources)])
        return bad


class FaultyKernels(HostKernels):
    """``real``, whose calls fail by ``faults``."""

    def __init__(self, real: HostKernels, faults: Faults) -> None:
        self.real = real
        self.faults = faults
        self.name = real.name

    def gather(
        self,
        tensors: Sequence[Any],
        layout: PagedLayout,
        spans: Sequence[BlockSpan],
        into: Views,
        layers: range,
    ) -> None:
        call = self.faults.begin("gather")
        call.before()
        self.real.gather(tensors, layout, spans, into, layers)
        call.after(None, into)

    def scatter(
        self,
        sources: Views,
        tensors: Sequence[Any],
        layout: PagedLayout,
        spans: Sequence[BlockSpan],
        layers: range,
    ) -> None:
        self.faults.begin("scatter").before()
        self.real.scatter(sources, tensors, layout, spans, layers)

    def gather_checked(
        self,
        tensors: Sequence[Any],
        layout: PagedLayout,
        spans: Sequence[BlockSpan],
        into: Views,
        layers: range,
    ) -> list[bytes]:
        call = self.faults.begin("gather_checked")
        call.before()
        found = self.real.gather_checked(tensors, layout, spans, into, layers)
        sums: list[bytes] = call.after(found, into)
        return sums

    def scatter_checked(
        self,
        sources: Views,
        tensors: Sequence[Any],
        layout: PagedLayout,
        spans: Sequence[BlockSpan],
        layers: range,
        expected: Sequence[bytes],
    ) -> list[int]:
        call = self.faults.begin("scatter_checked")
        call.before()
        found = self.real.scatter_checked(sources, tensors, layout, spans, layers, expected)
        bad: list[int] = call.after(found, limits=[len(sources)])
        return bad

    def checksums(self, buffer: memoryview, pieces: int) -> bytes:
        call = self.faults.begin("checksums")
        call.before()
        sums: bytes = call.after(self.real.checksums(buffer, pieces))
        return sums


class FaultyBackend(StorageBackend):
    """``real``, whose calls fail by ``faults``. Has the optional methods that it has.

    If it is a `BlockingBackend`, what is raised is raised on its threads, and what waits waits
    there.
    """

    def __init__(self, real: StorageBackend, faults: Faults) -> None:
        self.real = real
        self.faults = faults
        # Instance attributes, because that is where `isinstance(…, SupportsDelete)` looks.
        if isinstance(real, SupportsDelete):
            self.delete = self._asked("delete", real.delete)
        if isinstance(real, SupportsPrefixLookup):
            self.count_leading_hits = self._asked("count_leading_hits", real.count_leading_hits)
        if isinstance(real, SupportsClear):
            self.clear = self._asked("clear", real.clear)
        if isinstance(real, ReportsUsage):
            self.usage = self._usage(real)

    @property
    def capabilities(self) -> BackendCapabilities:
        return self.real.capabilities

    async def open(self, context: BackendContext) -> None:
        await self.faults.begin("open").before_in_loop()
        await self.real.open(context)

    async def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        return await self._asked("contains", self.real.contains)(keys)

    async def load(self, keys: Sequence[ChunkKey], into: Views) -> list[int]:
        call = await self._begun("load")
        sizes = await self.real.load(keys, into)
        written = [view[:size] for view, size in zip(into, sizes, strict=True) if size > 0]
        answer: list[int] = call.after(sizes, written, [view.nbytes for view in into])
        return answer

    async def store(self, keys: Sequence[ChunkKey], sources: Views) -> list[StoreOutcome]:
        call = await self._begun("store")
        if isinstance(call.fault, Corrupt):
            sources = [memoryview(bytearray(source)) for source in sources]
            call.after(None, sources)
            return await self.real.store(keys, sources)
        outcomes: list[StoreOutcome] = call.after(await self.real.store(keys, sources))
        return outcomes

    async def close(self) -> None:
        await self.faults.begin("close").before_in_loop()
        await self.real.close()

    async def _begun(self, operation: str) -> Injection:
        call = self.faults.begin(operation)
        if isinstance(self.real, BlockingBackend) and call.fault is not None:
            await self.real._run(call.before)
        else:
            await call.before_in_loop()
        return call

    def _asked(
        self, operation: str, real: Callable[..., Awaitable[T]]
    ) -> Callable[..., Awaitable[T]]:
        async def asked(*arguments: Any) -> T:
            call = await self._begun(operation)
            answer: T = call.after(await real(*arguments))
            return answer

        return asked

    def _usage(self, real: ReportsUsage) -> Callable[[], tuple[int, int]]:
        def usage() -> tuple[int, int]:
            call = self.faults.begin("usage")
            call.before()
            answer: tuple[int, int] = call.after(real.usage())
            return answer

        return usage
