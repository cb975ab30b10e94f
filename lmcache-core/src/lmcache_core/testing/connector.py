"""Conformance tests for engine connectors and for gather/scatter kernels.

In your plugin::

    from lmcache_core.testing.connector import EngineConnectorTests, EngineMemory

    class TestMyConnector(EngineConnectorTests):
        @pytest.fixture
        def engine(self):
            return MyEngineMemory()

`EngineMemory` is the one thing to write: a small engine memory whose tokens the
kit can set and read without the connector.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest

from lmcache_core.chunks.checksums import layer_checksums, part_of
from lmcache_core.chunks.layout import LayerGroup
from lmcache_core.contracts.connector import BlockSpan, EngineConnector

Tokens = list[bytes]


class EngineMemory(ABC):
    """A small piece of an engine's memory, seen from outside of its connector.

    A token's bytes are ``layers x planes x heads x head_size`` elements in that order:
    ``group.token_bytes`` bytes. Make it small: a few blocks of a few tokens.
    """

    connector: EngineConnector
    blocks: int
    """Blocks 0 … ``blocks - 1`` exist, and no others."""
    block_tokens: int

    @abstractmethod
    def read(self, group: int, block: int, offset: int) -> bytes:
        """The token at ``offset`` of ``block``."""

    @abstractmethod
    def write(self, group: int, block: int, offset: int, token: bytes) -> None:
        """Set the token at ``offset`` of ``block``, every bit as given."""


class EngineConnectorTests:
    """The contract of `EngineConnector`, one test for each sentence of it."""

    @pytest.fixture
    def engine(self) -> EngineMemory:
        """Override it."""
        raise NotImplementedError("override engine: return an EngineMemory")

    # -- whole chunks ----------------------------------------------------------------------

    def test_gather_makes_the_canonical_chunk(self, engine: EngineMemory) -> None:
        for index, group in enumerate(engine.connector.groups):
            tokens = fill(engine, index)
            span = whole(engine, index)
            assert gather(engine, group, span) == canonical(group, tokens)

    def test_scatter_takes_the_canonical_chunk(self, engine: EngineMemory) -> None:
        for index, group in enumerate(engine.connector.groups):
            fill(engine, index)
            tokens = some_tokens(group, capacity(engine), seed=1)
            scatter(engine, canonical(group, tokens), whole(engine, index))
            assert read(engine, index) == tokens

    def test_order_of_blocks(self, engine: EngineMemory) -> None:
        """Blocks are taken in the order in which the span names them."""
        for index, group in enumerate(engine.connector.groups):
            tokens = fill(engine, index)
            size = engine.block_tokens
            blocks = [tokens[i : i + size] for i in range(0, len(tokens), size)]
            span = whole(engine, index, order=list(reversed(range(engine.blocks))))
            expected = [token for block in reversed(blocks) for token in block]
            assert gather(engine, group, span) == canonical(group, expected)

    def test_there_and_elsewhere_is_identity(self, engine: EngineMemory) -> None:
        for index, group in enumerate(engine.connector.groups):
            fill(engine, index)
            chunk = gather(engine, group, whole(engine, index))
            fill(engine, index, seed=1)
            rotated = [*range(1, engine.blocks), 0]
            scatter(engine, chunk, whole(engine, index, order=rotated))
            assert gather(engine, group, whole(engine, index, order=rotated)) == chunk

    # -- spans -----------------------------------------------------------------------------

    def test_spans_that_begin_and_end_anywhere(self, engine: EngineMemory) -> None:
        """Inside a block, across blocks, at their borders; anywhere in the chunk."""
        for index, group in enumerate(engine.connector.groups):
            tokens = fill(engine, index)
            for first, count in _windows(engine):
                for offset in (0, 3):
                    span = part(engine, index, first, count, offset, offset + count + 2)
                    actual = gather(engine, group, span)
                    padded = [None] * offset + tokens[first : first + count] + [None] * 2
                    assert actual == canonical(group, padded), span

    def test_scatter_touches_only_its_span(self, engine: EngineMemory) -> None:
        for index, group in enumerate(engine.connector.groups):
            for first, count in _windows(engine):
                expected = fill(engine, index)
                fresh = some_tokens(group, count + 5, seed=2)
                span = part(engine, index, first, count, 3, count + 5)
                scatter(engine, canonical(group, fresh), span)
                expected[first : first + count] = fresh[3 : 3 + count]
                assert read(engine, index) == expected, span

    def test_scatter_does_not_change_its_sources(self, engine: EngineMemory) -> None:
        for index, group in enumerate(engine.connector.groups):
            chunk = canonical(group, some_tokens(group, capacity(engine), seed=3))
            before = bytes(chunk)
            scatter(engine, chunk, whole(engine, index))
            assert chunk == before

    def test_several_spans_in_one_call(self, engine: EngineMemory) -> None:
        for index, group in enumerate(engine.connector.groups):
            tokens = fill(engine, index)
            middle = capacity(engine) // 2
            spans = [
                part(engine, index, middle, capacity(engine) - middle, 0),
                part(engine, index, 0, middle, 0),
            ]
            into = [empty(group, span.chunk_tokens) for span in spans]
            engine.connector.gather(spans, [memoryview(one) for one in into])
            assert into == [canonical(group, tokens[middle:]), canonical(group, tokens[:middle])]
            fresh = some_tokens(group, capacity(engine), seed=4)
            sources = [canonical(group, fresh[middle:]), canonical(group, fresh[:middle])]
            engine.connector.scatter([memoryview(one) for one in sources], spans)
            assert read(engine, index) == fresh

    def test_no_spans(self, engine: EngineMemory) -> None:
        engine.connector.gather([], [])
        engine.connector.scatter([], [])

    # -- layers ----------------------------------------------------------------------------

    def test_layer_by_layer_equals_whole(self, engine: EngineMemory) -> None:
        for index, group in enumerate(engine.connector.groups):
            fill(engine, index)
            span = part(engine, index, 1, capacity(engine) - 1, 0)
            expected = gather(engine, group, span)
            into = empty(group, span.chunk_tokens)
            for layer in range(len(group.layers)):
                engine.connector.gather([span], [memoryview(into)], range(layer, layer + 1))
            assert into == expected
            fill(engine, index, seed=1)
            for layer in range(len(group.layers)):
                engine.connector.scatter([memoryview(expected)], [span], range(layer, layer + 1))
            assert gather(engine, group, span) == expected

    def test_other_layers_are_left_alone(self, engine: EngineMemory) -> None:
        for index, group in enumerate(engine.connector.groups):
            last = len(group.layers) - 1
            tokens = fill(engine, index)
            span, size = whole(engine, index), capacity(engine)
            into = empty(group, size)
            engine.connector.gather([span], [memoryview(into)], range(last, last + 1))
            begin = group.layer_token_bytes * last * size
            assert into[begin:] == canonical(group, tokens)[begin:]
            assert into[:begin] == empty(group, size)[:begin]
            fresh = some_tokens(group, size, seed=5)
            engine.connector.scatter(
                [memoryview(canonical(group, fresh))], [span], range(last, last + 1)
            )
            kept = group.layer_token_bytes * last
            expected = [old[:kept] + new[kept:] for old, new in zip(tokens, fresh, strict=True)]
            assert read(engine, index) == expected

    def test_no_layers_are_nothing(self, engine: EngineMemory) -> None:
        """``range(0)``: neither is anything moved, nor is it an error."""
        for index, group in enumerate(engine.connector.groups):
            tokens = fill(engine, index)
            span, size = whole(engine, index), capacity(engine)
            into = empty(group, size)
            engine.connector.gather([span], [memoryview(into)], range(0))
            assert into == empty(group, size)
            engine.connector.scatter([memoryview(into)], [span], range(0))
            assert read(engine, index) == tokens
            assert engine.connector.gather_checked([span], [memoryview(into)], range(0)) == [b""]
            assert into == empty(group, size)
            views = [memoryview(into)]
            assert engine.connector.scatter_checked(views, [span], range(0), [b""]) == []
            assert read(engine, index) == tokens

    # -- checksums -------------------------------------------------------------------------

    def test_gather_with_checksums(self, engine: EngineMemory) -> None:
        """They cover the whole chunk, whatever the span; all layers or some."""
        for index, group in enumerate(engine.connector.groups):
            tokens = fill(engine, index)
            count = layers = len(group.layers)
            for span in (whole(engine, index), part(engine, index, 1, 2, 1, 5)):
                into = empty(group, span.chunk_tokens)
                sums = engine.connector.gather_checked([span], [memoryview(into)])
                assert into == gather(engine, group, span)
                assert sums == [layer_checksums(memoryview(into), layers, range(count))]
            some = range(count - 1, count)
            into = canonical(group, tokens)
            span = whole(engine, index)
            sums = engine.connector.gather_checked([span], [memoryview(into)], some)
            assert sums == [layer_checksums(memoryview(into), layers, some)]

    def test_scatter_with_checksums(self, engine: EngineMemory) -> None:
        """A damaged chunk is named, others of the same call are scattered."""
        for index, group in enumerate(engine.connector.groups):
            fill(engine, index)
            middle = capacity(engine) // 2
            fresh = some_tokens(group, capacity(engine), seed=6)
            spans = [
                part(engine, index, 0, middle, 0),
                part(engine, index, middle, capacity(engine) - middle, 0),
            ]
            chunks = [canonical(group, fresh[:middle]), canonical(group, fresh[middle:])]
            every = range(len(group.layers))
            views = [memoryview(chunk) for chunk in chunks]
            sums = [layer_checksums(view, len(every), every) for view in views]
            assert engine.connector.scatter_checked(views, spans, None, sums) == []
            assert read(engine, index) == fresh
            for layers in (None, every[-1:]):
                fill(engine, index)
                chunks[0][-1] ^= 1
                expected = [part_of(one, layers) for one in sums]
                assert engine.connector.scatter_checked(views, spans, layers, expected) == [0]
                chunks[0][-1] ^= 1
                kept = 0 if layers is None else group.layer_token_bytes * layers.start
                arrived = [token[kept:] for token in read(engine, index)[middle:]]
                assert arrived == [token[kept:] for token in fresh[middle:]]

    # -- bits, bounds, threads -------------------------------------------------------------

    def test_every_bit_pattern_survives(self, engine: EngineMemory) -> None:
        """NaN payloads, denormals, negative zero: elements are bits, not numbers."""
        for index, group in enumerate(engine.connector.groups):
            ones = [b"\xff" * group.token_bytes, b"\x01\x7f" * (group.token_bytes // 2)]
            tokens = [
                ones[i % 2].ljust(group.token_bytes, b"\x7f") for i in range(capacity(engine))
            ]
            put(engine, index, tokens)
            chunk = gather(engine, group, whole(engine, index))
            assert chunk == canonical(group, tokens)
            fill(engine, index)
            scatter(engine, chunk, whole(engine, index))
            assert read(engine, index) == tokens

    def test_paging_is_true(self, engine: EngineMemory) -> None:
        """Who says how its memory is divided must say what it does: callers are held to it."""
        for index in range(len(engine.connector.groups)):
            paging = engine.connector.paging(index)
            if paging is not None:
                assert (paging.blocks, paging.block_tokens) == (engine.blocks, engine.block_tokens)

    @pytest.mark.parametrize("wrong", ["first", "tokens", "offset", "outside", "blocks"])
    def test_a_span_that_makes_no_sense_raises(self, engine: EngineMemory, wrong: str) -> None:
        """Nothing of the call is copied then, not even of the other spans."""
        for index, group in enumerate(engine.connector.groups):
            size = capacity(engine)
            good = whole(engine, index)
            bad = {
                "first": replace(good, first=-1),
                "tokens": replace(good, tokens=0),
                "offset": replace(good, tokens=size - 1, chunk_offset=-1),
                "outside": replace(good, chunk_offset=1),
                "blocks": replace(good, blocks=good.blocks[:-1]),
            }[wrong]
            tokens = fill(engine, index)
            chunks = [empty(group, size), empty(group, size)]
            views = [memoryview(chunk) for chunk in chunks]
            with pytest.raises((IndexError, ValueError)):
                engine.connector.gather([good, bad], views)
            assert chunks == [empty(group, size)] * 2
            with pytest.raises((IndexError, ValueError)):
                engine.connector.scatter(views, [good, bad])
            assert read(engine, index) == tokens

    def test_a_read_only_chunk_is_not_filled(self, engine: EngineMemory) -> None:
        """It isn't written to, and no copy of it either without a word."""
        for index, group in enumerate(engine.connector.groups):
            fill(engine, index)
            span = whole(engine, index)
            for call in (engine.connector.gather, engine.connector.gather_checked):
                chunk = bytes(empty(group, span.chunk_tokens))
                with pytest.raises((BufferError, TypeError, ValueError)):
                    call([span], [memoryview(chunk)])
                assert chunk == empty(group, span.chunk_tokens)

    @pytest.mark.parametrize("block", ["first", "last"])
    @pytest.mark.parametrize("wrong", ["-1", "blocks"])
    def test_a_block_that_is_not_there_raises(
        self, engine: EngineMemory, block: str, wrong: str
    ) -> None:
        for index, group in enumerate(engine.connector.groups):
            blocks = list(range(engine.blocks))
            blocks[0 if block == "first" else -1] = -1 if wrong == "-1" else engine.blocks
            span = whole(engine, index, order=blocks)
            chunk = empty(group, span.chunk_tokens)
            with pytest.raises((IndexError, ValueError)):
                engine.connector.gather([span], [memoryview(chunk)])
            with pytest.raises((IndexError, ValueError)):
                engine.connector.scatter([memoryview(chunk)], [span])

    def test_a_chunk_of_another_size_raises(self, engine: EngineMemory) -> None:
        """A short chunk would be read or written beyond its end."""
        for index, group in enumerate(engine.connector.groups):
            span = whole(engine, index)
            short = empty(group, span.chunk_tokens)[: -group.token_bytes]
            with pytest.raises((IndexError, ValueError)):
                engine.connector.gather([span], [memoryview(short)])
            with pytest.raises((IndexError, ValueError)):
                engine.connector.scatter([memoryview(short)], [span])

    def test_any_thread_may_call(self, engine: EngineMemory) -> None:
        """Disjoint tokens are moved from several threads at once."""
        for index, group in enumerate(engine.connector.groups):
            tokens = fill(engine, index)
            spans = [
                part(engine, index, block * engine.block_tokens, engine.block_tokens, 0)
                for block in range(engine.blocks)
            ]
            with ThreadPoolExecutor(4) as threads:
                groups = [group] * len(spans)
                chunks = list(threads.map(partial(gather, engine), groups, spans))
                assert chunks == [
                    canonical(group, tokens[s.blocks[0] * engine.block_tokens :][: s.tokens])
                    for s in spans
                ]
                fill(engine, index, seed=1)
                list(threads.map(partial(scatter, engine), chunks, spans))
            assert read(engine, index) == tokens

    def test_buffers_are_released(self, engine: EngineMemory) -> None:
        for index, group in enumerate(engine.connector.groups):
            chunk = gather(engine, group, whole(engine, index))
            scatter(engine, chunk, whole(engine, index))
            chunk.append(0)  # raises BufferError while anything still exports the buffer


def capacity(engine: EngineMemory) -> int:
    """Tokens in all blocks together."""
    return engine.blocks * engine.block_tokens


def some_tokens(group: LayerGroup, count: int, seed: int) -> Tokens:
    """Tokens of random bits."""
    draw = random.Random(seed)  # noqa: S311  the same every time
    return [draw.randbytes(group.token_bytes) for _ in range(count)]


def put(engine: EngineMemory, group: int, tokens: Tokens) -> None:
    """Set all tokens of the engine, block after block."""
    for i, token in enumerate(tokens):
        engine.write(group, i // engine.block_tokens, i % engine.block_tokens, token)


def fill(engine: EngineMemory, group: int, seed: int = 0) -> Tokens:
    """Set all tokens of the engine to something known."""
    tokens = some_tokens(engine.connector.groups[group], capacity(engine), seed)
    put(engine, group, tokens)
    return tokens


def read(engine: EngineMemory, group: int) -> Tokens:
    """All tokens of the engine, block after block."""
    size = engine.block_tokens
    return [engine.read(group, i // size, i % size) for i in range(capacity(engine))]


def canonical(group: LayerGroup, tokens: list[bytes] | list[bytes | None]) -> bytearray:
    """``tokens`` as a chunk; ``None`` stands for what `empty` has there."""
    row = group.heads * group.head_size * group.dtype.itemsize
    chunk = empty(group, len(tokens))
    for i, token in enumerate(tokens):
        for plane in range(len(group.layers) * group.planes) if token is not None else ():
            begin = (plane * len(tokens) + i) * row
            chunk[begin : begin + row] = (token or b"")[plane * row : (plane + 1) * row]
    return chunk


def empty(group: LayerGroup, tokens: int) -> bytearray:
    """A chunk that nothing was copied to yet."""
    return bytearray(b"\xa5") * group.chunk_bytes(tokens)


def whole(engine: EngineMemory, group: int, order: list[int] | None = None) -> BlockSpan:
    """All blocks, as one chunk."""
    size = capacity(engine)
    blocks = list(range(engine.blocks)) if order is None else order
    return BlockSpan(blocks, 0, size, size, 0, group)


def part(
    engine: EngineMemory,
    group: int,
    first: int,
    tokens: int,
    chunk_offset: int,
    chunk_tokens: int | None = None,
) -> BlockSpan:
    """Engine tokens ``first`` … ``first + tokens - 1`` at ``chunk_offset`` of a chunk."""
    size = engine.block_tokens
    blocks = list(range(first // size, (first + tokens - 1) // size + 1))
    total = tokens + chunk_offset if chunk_tokens is None else chunk_tokens
    return BlockSpan(blocks, first % size, tokens, total, chunk_offset, group)


def gather(engine: EngineMemory, group: LayerGroup, span: BlockSpan) -> bytearray:
    """One span as a chunk."""
    into = empty(group, span.chunk_tokens)
    engine.connector.gather([span], [memoryview(into)])
    return into


def scatter(engine: EngineMemory, chunk: bytearray, span: BlockSpan) -> None:
    """One chunk into the engine."""
    engine.connector.scatter([memoryview(chunk)], [span])


def _windows(engine: EngineMemory) -> list[tuple[int, int]]:
    """(first, tokens) of pieces that begin and end at every kind of place."""
    size, end = engine.block_tokens, capacity(engine)
    edges = sorted({0, 1, size - 1, size, size + 1, end - size, end - 1, end} & set(range(end + 1)))
    return [(a, b - a) for a in edges for b in edges if a < b]
