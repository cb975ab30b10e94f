"""Gather and scatter in torch: slow, obviously right, the same on every device.

What the C++ and Triton kernels must match bit for bit, and what runs where
they aren't installed. Elements are moved as integers of their size, so that
every bit pattern survives. One torch call moves all whole blocks of a span in
one plane of one layer; there is no per-token Python.

Imports torch, so nothing in core imports this module before it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lmcache_core.chunks.layout import LayerGroup
from lmcache_core.contracts.connector import BlockSpan, PagedLayout, PlaneStrides

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class ReferenceKernels:
    """`lmcache_core.contracts.connector.Kernels` in torch."""

    name = "reference"

    def gather(
        self,
        tensors: Sequence[torch.Tensor],
        layout: PagedLayout,
        spans: Sequence[BlockSpan],
        into: Sequence[memoryview],
        layers: range,
    ) -> None:
        """See `Kernels.gather`. Nothing is copied if any argument is wrong.

        Raises:
            IndexError: a span names a block, or ``layers`` a layer, that isn't there.
            ValueError: a span, a buffer or a tensor contradicts the layout.
            BufferError: a buffer can't be written to.
        """
        planes = list(_planes(tensors, layout, layers))
        if any(buffer.readonly for buffer in into):
            raise BufferError("a chunk that is read-only can't be filled")
        moves = [_Move.of(*each, layout) for each in zip(spans, into, strict=True)]
        for layer, plane, paged in planes:
            for move in moves:
                rows = move.rows(layer, plane)
                if move.head:
                    rows[: move.head].copy_(paged[move.head_at])
                if move.whole is not None:
                    target = move.blocks_of(rows)
                    if paged.device.type == "cpu":
                        torch.index_select(paged, 0, move.whole, out=target)
                    else:
                        target.copy_(paged.index_select(0, move.whole.to(paged.device)))
                if move.tail:
                    rows[-move.tail :].copy_(paged[move.tail_at])

    def scatter(
        self,
        sources: Sequence[memoryview],
        tensors: Sequence[torch.Tensor],
        layout: PagedLayout,
        spans: Sequence[BlockSpan],
        layers: range,
    ) -> None:
        """See `Kernels.scatter`. Raises as `gather` does."""
        planes = list(_planes(tensors, layout, layers))
        moves = [_Move.of(*each, layout) for each in zip(spans, sources, strict=True)]
        for layer, plane, paged in planes:
            for move in moves:
                rows = move.rows(layer, plane)
                if move.head:
                    paged[move.head_at].copy_(rows[: move.head])
                if move.whole is not None:
                    where = move.whole.to(paged.device)
                    paged.index_copy_(0, where, move.blocks_of(rows).to(paged.device))
                if move.tail:
                    paged[move.tail_at].copy_(rows[-move.tail :])


@dataclass(frozen=True)
class _Move:
    """One span, cut into the end of a block, whole blocks, and the start of a block."""

    chunk: torch.Tensor
    span: BlockSpan
    block_tokens: int
    head: int
    head_at: tuple[int, slice]
    whole: torch.Tensor | None
    tail: int
    tail_at: tuple[int, slice]

    @classmethod
    def of(cls, span: BlockSpan, buffer: memoryview, layout: PagedLayout) -> _Move:
        chunk = _canonical(layout.group, span, buffer)
        blocks, size = _blocks(layout, span), layout.block_tokens
        start = span.first % size
        head = min(span.tokens, -start % size)
        whole, tail = divmod(span.tokens - head, size)
        inner = blocks[1:] if head else blocks
        return cls(
            chunk,
            span,
            size,
            head,
            (blocks[0], slice(start, start + head)),
            torch.tensor(inner[:whole], dtype=torch.int64) if whole else None,
            tail,
            (blocks[-1], slice(0, tail)),
        )

    def rows(self, layer: int, plane: int) -> torch.Tensor:
        """The span's part of the chunk: [tokens, heads, head_size]."""
        first = self.span.chunk_offset
        return self.chunk[layer, plane, first : first + self.span.tokens]

    def blocks_of(self, rows: torch.Tensor) -> torch.Tensor:
        """The whole blocks among ``rows``: [blocks, block_tokens, heads, head_size]."""
        inner = rows[self.head : len(rows) - self.tail]
        return inner.view(-1, self.block_tokens, *rows.shape[1:])


def _canonical(group: LayerGroup, span: BlockSpan, buffer: memoryview) -> torch.Tensor:
    """The chunk as [layers, planes, tokens, heads, head_size] integers."""
    shape = (len(group.layers), group.planes, span.chunk_tokens, group.heads, group.head_size)
    if buffer.nbytes != group.chunk_bytes(span.chunk_tokens):
        raise ValueError(
            f"a chunk of {span.chunk_tokens} tokens has {group.chunk_bytes(span.chunk_tokens)} "
            f"bytes, the buffer {buffer.nbytes}"
        )
    if span.chunk_offset < 0 or span.chunk_offset + span.tokens > span.chunk_tokens:
        raise ValueError(f"{span} doesn't lie inside its chunk")
    # torch warns about memory that it mustn't write to; a copy is the way to be left alone.
    writable = bytearray(buffer) if buffer.readonly else buffer
    return torch.frombuffer(writable, dtype=_INTEGER[group.dtype.itemsize]).view(shape)


def _blocks(layout: PagedLayout, span: BlockSpan) -> list[int]:
    """The blocks that the span touches, in order."""
    if span.first < 0 or span.tokens < 1:
        raise ValueError(f"{span} has no tokens or starts before its blocks")
    size = layout.block_tokens
    used = list(span.blocks[span.first // size : -(-(span.first + span.tokens) // size)])
    if len(used) != -(-(span.first % size + span.tokens) // size):
        raise ValueError(f"{span} needs more blocks of {size} tokens than it names")
    if min(used) < 0 or max(used) >= layout.blocks:
        raise IndexError(f"{span}: there are {layout.blocks} blocks")
    return used


def _planes(
    tensors: Sequence[torch.Tensor], layout: PagedLayout, layers: range
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Each plane of each layer as a view [blocks, block_tokens, heads, head_size]."""
    group = layout.group
    if len(layout.planes) != group.planes or len(tensors) != len(group.layers):
        raise ValueError(
            f"{len(layout.planes)} planes in {len(tensors)} tensors contradict a group of "
            f"{group.planes} planes and {len(group.layers)} layers"
        )
    for layer in layers:
        if not 0 <= layer < len(tensors):
            raise IndexError(f"there is no layer {layer} among {len(tensors)}")
        tensor = tensors[layer]
        if tensor.element_size() != group.dtype.itemsize:
            raise ValueError(f"a tensor of {tensor.dtype} doesn't hold {group.dtype.value}")
        for plane, strides in enumerate(layout.planes):
            yield layer, plane, _view(tensor, layout, strides)


def _view(tensor: torch.Tensor, layout: PagedLayout, strides: PlaneStrides) -> torch.Tensor:
    group = layout.group
    return torch.as_strided(
        tensor.view(_INTEGER[group.dtype.itemsize]),
        (layout.blocks, layout.block_tokens, group.heads, group.head_size),
        (strides.block, strides.token, strides.head, strides.dim),
        tensor.storage_offset() + strides.offset,
    )
