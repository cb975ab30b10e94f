"""Connectors with one typical mistake each, and the toy engine that they serve."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace

from lmcache_core.chunks.layout import AttentionKind, DType, LayerGroup
from lmcache_core.contracts.connector import BlockSpan, EngineConnector, Paging
from lmcache_core.testing.connector import EngineMemory

Spans = Sequence[BlockSpan]
Views = Sequence[memoryview]

GROUP = LayerGroup((0, 1, 2), AttentionKind.FULL, 2, heads=2, head_size=2, dtype=DType.F32)
LATENT = LayerGroup((0, 1), AttentionKind.MLA, 1, heads=1, head_size=4, dtype=DType.F32)
BLOCKS, BLOCK_TOKENS = 4, 4


class Memory:
    """rows[group][layer][plane][block][offset]: the elements of one token, as bytes."""

    def __init__(self) -> None:
        self.groups = (GROUP, LATENT)
        self.rows = [
            [
                [[[b""] * BLOCK_TOKENS for _ in range(BLOCKS)] for _ in range(group.planes)]
                for _ in group.layers
            ]
            for group in self.groups
        ]


class Correct(EngineConnector):
    """Token by token, in plain Python. No mistake."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        return self.memory.groups

    def gather(self, spans: Spans, into: Views, layers: range | None = None) -> None:
        self.check_all(spans, into)
        if any(chunk.readonly for chunk in into):
            raise ValueError("read-only")
        for span, chunk in zip(spans, into, strict=True):
            for layer, plane, block, offset, place in self.rows(span, layers):
                chunk[place] = self.out(self.memory.rows[span.group][layer][plane][block][offset])

    def scatter(self, sources: Views, spans: Spans, layers: range | None = None) -> None:
        self.check_all(spans, sources)
        for span, chunk in zip(spans, sources, strict=True):
            for layer, plane, block, offset, place in self.rows(span, layers):
                self.memory.rows[span.group][layer][plane][block][offset] = bytes(chunk[place])

    def paging(self, group: int) -> Paging | None:
        return Paging(BLOCKS, BLOCK_TOKENS)

    def check_all(self, spans: Spans, chunks: Views) -> None:
        for span, chunk in zip(spans, chunks, strict=True):
            self.check(span, chunk)

    def check(self, span: BlockSpan, chunk: memoryview) -> None:
        self.check_span(span)
        if min(span.blocks) < 0 or max(span.blocks) >= BLOCKS:
            raise IndexError("no such block")
        if chunk.nbytes != self.groups[span.group].chunk_bytes(span.chunk_tokens):
            raise ValueError("another size")

    def check_span(self, span: BlockSpan) -> None:
        if span.first < 0 or span.tokens < 1 or span.first + span.tokens > self.named(span):
            raise ValueError("no tokens there")
        if not 0 <= span.chunk_offset <= span.chunk_tokens - span.tokens:
            raise ValueError("outside of its chunk")

    def named(self, span: BlockSpan) -> int:
        return len(span.blocks) * BLOCK_TOKENS

    def out(self, row: bytes) -> bytes:
        return row

    def rows(
        self, span: BlockSpan, layers: range | None
    ) -> Iterator[tuple[int, int, int, int, slice]]:
        """(layer, plane, block, offset, place in the chunk) of each token of each plane."""
        group = self.groups[span.group]
        size = group.heads * group.head_size * group.dtype.itemsize
        for layer in layers if layers is not None else range(len(group.layers)):
            for plane in range(group.planes):
                for i in range(span.tokens):
                    where, offset = divmod(span.first + i, BLOCK_TOKENS)
                    row = (layer * group.planes + plane) * span.chunk_tokens + span.chunk_offset + i
                    yield (
                        layer,
                        plane,
                        span.blocks[where],
                        offset,
                        slice(row * size, (row + 1) * size),
                    )


class TakesNoneForAll(Correct):
    """``layers or range(…)``."""

    def rows(
        self, span: BlockSpan, layers: range | None
    ) -> Iterator[tuple[int, int, int, int, slice]]:
        return super().rows(span, layers or None)


class SwapsPlanes(Correct):
    def rows(
        self, span: BlockSpan, layers: range | None
    ) -> Iterator[tuple[int, int, int, int, slice]]:
        planes = self.groups[span.group].planes
        for layer, plane, block, offset, place in super().rows(span, layers):
            yield layer, planes - 1 - plane, block, offset, place


class _Rewrites(Correct):
    """A mistake in how spans are understood."""

    def understood(self, span: BlockSpan) -> BlockSpan:
        raise NotImplementedError

    def rows(
        self, span: BlockSpan, layers: range | None
    ) -> Iterator[tuple[int, int, int, int, slice]]:
        return super().rows(self.understood(span), layers)


class SortsBlocks(_Rewrites):
    def understood(self, span: BlockSpan) -> BlockSpan:
        return replace(span, blocks=sorted(span.blocks))


class IgnoresChunkOffset(_Rewrites):
    def understood(self, span: BlockSpan) -> BlockSpan:
        return replace(span, chunk_offset=0)


class WholeBlocksOnly(_Rewrites):
    """Starts at the first block's first token."""

    def understood(self, span: BlockSpan) -> BlockSpan:
        return replace(span, first=0)


class IgnoresLayers(Correct):
    def rows(
        self, span: BlockSpan, layers: range | None
    ) -> Iterator[tuple[int, int, int, int, slice]]:
        return super().rows(span, None)


class WipesTheChunk(Correct):
    def gather(self, spans: Spans, into: Views, layers: range | None = None) -> None:
        if layers is None:
            for chunk in into:
                chunk[:] = bytes(chunk.nbytes)
        super().gather(spans, into, layers)


class ScattersWholeBlocks(Correct):
    """Writes the blocks' other tokens as zeros."""

    def scatter(self, sources: Views, spans: Spans, layers: range | None = None) -> None:
        for span in spans:
            for layer, plane, block, _, place in self.rows(span, layers):
                zeros = bytes(place.stop - place.start)
                self.memory.rows[span.group][layer][plane][block] = [zeros] * BLOCK_TOKENS
        super().scatter(sources, spans, layers)


class FirstSpanOnly(Correct):
    def gather(self, spans: Spans, into: Views, layers: range | None = None) -> None:
        super().gather(spans[:1], into[:1], layers)


class GoesThroughFloats(Correct):
    """Adds zero to every number, which turns some bits of NaN and of -0.0."""

    def out(self, row: bytes) -> bytes:
        values = struct.unpack(f"<{len(row) // 4}f", row)
        return struct.pack(f"<{len(values)}f", *(v + 0.0 if v == v else 0.0 for v in values))


class ClampsBlocks(Correct):
    """Never fails: reads and writes some other block instead."""

    def gather(self, spans: Spans, into: Views, layers: range | None = None) -> None:
        super().gather(_clamped(spans), into, layers)

    def scatter(self, sources: Views, spans: Spans, layers: range | None = None) -> None:
        super().scatter(sources, _clamped(spans), layers)


def _clamped(spans: Spans) -> list[BlockSpan]:
    return [replace(s, blocks=[max(0, min(b, BLOCKS - 1)) for b in s.blocks]) for s in spans]


class NegativeFromTheEnd(Correct):
    """Lets Python's negative indices through."""

    def check(self, span: BlockSpan, chunk: memoryview) -> None:
        super().check(replace(span, blocks=[max(b, 0) for b in span.blocks]), chunk)


class TrustsTheBuffer(Correct):
    def check(self, span: BlockSpan, chunk: memoryview) -> None:
        self.check_span(span)
        if min(span.blocks) < 0 or max(span.blocks) >= BLOCKS:
            raise IndexError("no such block")

    def gather(self, spans: Spans, into: Views, layers: range | None = None) -> None:
        if any(chunk.readonly for chunk in into):
            raise ValueError("read-only")
        rooms = [bytearray(GROUP.chunk_bytes(64)) for _ in into]
        for room, chunk in zip(rooms, into, strict=True):
            room[: chunk.nbytes] = chunk
        super().gather(spans, [memoryview(room) for room in rooms], layers)
        for room, chunk in zip(rooms, into, strict=True):
            chunk[:] = room[: chunk.nbytes]


class MisstatesItsBlocks(Correct):
    """Counts a block that isn't there."""

    def paging(self, group: int) -> Paging | None:
        return Paging(BLOCKS + 1, BLOCK_TOKENS)


class TrustsSpans(Correct):
    def check_span(self, span: BlockSpan) -> None:
        pass


class StartsBeforeItsBlocks(Correct):
    """Takes a negative first token for one of the last block."""

    def check_span(self, span: BlockSpan) -> None:
        super().check_span(replace(span, first=max(span.first, 0)))


class RepeatsTheLastBlock(Correct):
    """Fewer blocks than the tokens need: the rest comes from the last one."""

    def named(self, span: BlockSpan) -> int:
        return span.first + span.tokens

    def rows(
        self, span: BlockSpan, layers: range | None
    ) -> Iterator[tuple[int, int, int, int, slice]]:
        blocks = [*span.blocks, *[span.blocks[-1]] * BLOCKS]
        return super().rows(replace(span, blocks=blocks), layers)


class ChecksAsItGoes(Correct):
    """Refuses a span after it has copied those before it."""

    def check_all(self, spans: Spans, chunks: Views) -> None:
        pass

    def gather(self, spans: Spans, into: Views, layers: range | None = None) -> None:
        for span, chunk in zip(spans, into, strict=True):
            self.check(span, chunk)
            super().gather([span], [chunk], layers)

    def scatter(self, sources: Views, spans: Spans, layers: range | None = None) -> None:
        for span, chunk in zip(spans, sources, strict=True):
            self.check(span, chunk)
            super().scatter([chunk], [span], layers)


class FillsACopy(Correct):
    """Copies a chunk that it can't write to, fills that, and says nothing."""

    def gather(self, spans: Spans, into: Views, layers: range | None = None) -> None:
        rooms = [memoryview(bytearray(one)) if one.readonly else one for one in into]
        super().gather(spans, rooms, layers)


class SharesState(Correct):
    """Keeps the span in itself while it works; the threads meet there, every time."""

    def __init__(self, memory: Memory) -> None:
        super().__init__(memory)
        self.met = threading.Event()
        self.inside = 0

    def gather(self, spans: Spans, into: Views, layers: range | None = None) -> None:
        self.spans = spans
        self.inside += 1
        if threading.current_thread() is not threading.main_thread():
            if self.inside > 1:
                self.met.set()
            else:
                self.met.wait(10)
        super().gather(self.spans, into, layers)


class ScramblesSources(Correct):
    def scatter(self, sources: Views, spans: Spans, layers: range | None = None) -> None:
        super().scatter(sources, spans, layers)
        for chunk in sources:
            chunk[:] = chunk.tobytes()[::-1]


class KeepsBuffer(Correct):
    def gather(self, spans: Spans, into: Views, layers: range | None = None) -> None:
        super().gather(spans, into, layers)
        self.last = into


class SumsOnlyTheSpan(Correct):
    """Its checksums leave out what a chunk held before."""

    def gather_checked(self, spans: Spans, into: Views, layers: range | None = None) -> list[bytes]:
        empty = [memoryview(bytearray(chunk.nbytes)) for chunk in into]
        super().gather(spans, into, layers)
        return super().gather_checked(spans, empty, layers)


class BelievesAnything(Correct):
    def scatter_checked(
        self, sources: Views, spans: Spans, layers: range | None, expected: Sequence[bytes]
    ) -> list[int]:
        self.scatter(sources, spans, layers)
        return []


class GivesUpOnAll(Correct):
    """One damaged chunk, and nothing of the call is scattered."""

    def scatter_checked(
        self, sources: Views, spans: Spans, layers: range | None, expected: Sequence[bytes]
    ) -> list[int]:
        if self._checksums(spans, sources, layers) == list(expected):
            self.scatter(sources, spans, layers)
            return []
        return list(range(len(spans)))


class ToyEngine(EngineMemory):
    """A memory and a connector to it."""

    blocks = BLOCKS
    block_tokens = BLOCK_TOKENS

    def __init__(self, kind: type[Correct]) -> None:
        self.memory = Memory()
        self.connector = kind(self.memory)
        for index, group in enumerate(self.memory.groups):
            for i in range(BLOCKS * BLOCK_TOKENS):
                self.write(index, *divmod(i, BLOCK_TOKENS), bytes(group.token_bytes))

    def read(self, group: int, block: int, offset: int) -> bytes:
        layers = self.memory.rows[group]
        return b"".join(plane[block][offset] for layer in layers for plane in layer)

    def write(self, group: int, block: int, offset: int, token: bytes) -> None:
        planes = [plane for layer in self.memory.rows[group] for plane in layer]
        size = len(token) // len(planes)
        for i, plane in enumerate(planes):
            plane[block][offset] = token[i * size : (i + 1) * size]
