"""Gather and scatter on GPUs, in Triton. **Not run on hardware**: only in Triton's interpreter.

One program moves some tokens of one plane of one layer; all layers and planes
of a span are one launch. A chunk is put together in device memory, in canonical
order, and crosses the bus in one copy. Elements are moved as integers of their
size, so that every bit pattern survives.

Imports triton, so nothing imports this module before a GPU is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]

from lmcache_core import BlockSpan, PagedLayout

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_TOKENS_PER_PROGRAM = 16
_COLUMNS_PER_STEP = 256


# Without annotations: Triton would take them for argument types.
@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _move(  # type: ignore[no-untyped-def]
    pointers,  # int64 [layers]: where each layer's tensor begins
    strides,  # int64 [planes, 5]: offset, block, token, head, dim, in elements
    blocks,  # int64 [blocks of the span]
    chunk,  # elements [layers, planes, tokens, row]
    first,
    tokens,
    block_tokens,
    row,
    head_size,
    planes,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GATHER: tl.constexpr,
):
    """Token ``i`` of the span is row ``i`` of ``chunk``, whose layers are those of ``pointers``."""
    layer = tl.program_id(1) // planes
    plane = tl.program_id(1) % planes
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    present = token < tokens
    place = first + token
    block = tl.load(blocks + place // block_tokens, mask=present, other=0)
    offset = tl.load(strides + plane * 5)
    block_stride = tl.load(strides + plane * 5 + 1)
    token_stride = tl.load(strides + plane * 5 + 2)
    head_stride = tl.load(strides + plane * 5 + 3)
    dim_stride = tl.load(strides + plane * 5 + 4)
    base = tl.load(pointers + layer).to(chunk.dtype)
    engine_row = offset + block * block_stride + (place % block_tokens) * token_stride
    chunk_row = (tl.program_id(1).to(tl.int64) * tokens + token) * row
    for start in range(0, row, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = present[:, None] & (column < row)[None, :]
        element = (column // head_size) * head_stride + (column % head_size) * dim_stride
        paged = base + engine_row[:, None] + element[None, :]
        canonical = chunk + chunk_row[:, None] + column[None, :]
        if GATHER:
            tl.store(canonical, tl.load(paged, mask=inside, other=0), mask=inside)
        else:
            tl.store(paged, tl.load(canonical, mask=inside, other=0), mask=inside)


class TritonKernels:
    """`lmcache_core.contracts.connector.Kernels` for tensors on a GPU. Not run on hardware."""

    name = "triton"

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
        call = _Call(tensors, layout, layers)
        if any(buffer.readonly for buffer in into):
            raise BufferError("a chunk that is read-only can't be filled")
        moves = [call.check(*each) for each in zip(spans, into, strict=True)]
        for chunk, span, blocks in moves:
            staged = call.staging(span)
            call.launch(span, blocks, staged, gather=True)
            call.rows(chunk, span).copy_(staged)

    def scatter(
        self,
        sources: Sequence[memoryview],
        tensors: Sequence[torch.Tensor],
        layout: PagedLayout,
        spans: Sequence[BlockSpan],
        layers: range,
    ) -> None:
        """See `Kernels.scatter`. Raises as `gather` does."""
        call = _Call(tensors, layout, layers)
        moves = [call.check(*each) for each in zip(spans, sources, strict=True)]
        for chunk, span, blocks in moves:
            staged = call.staging(span)
            staged.copy_(call.rows(chunk, span))
            call.launch(span, blocks, staged, gather=False)
        if call.device.type == "cuda":
            torch.cuda.synchronize(call.device)


class _Call:
    """What all spans of one call have in common."""

    def __init__(self, tensors: Sequence[torch.Tensor], layout: PagedLayout, layers: range) -> None:
        group = layout.group
        if len(layout.planes) != group.planes or len(tensors) != len(group.layers):
            raise ValueError(
                f"{len(layout.planes)} planes in {len(tensors)} tensors contradict a group of "
                f"{group.planes} planes and {len(group.layers)} layers"
            )
        for layer in layers:
            if not 0 <= layer < len(tensors):
                raise IndexError(f"there is no layer {layer} among {len(tensors)}")
            _check_reach(tensors[layer], layout)
        self.layout, self.layers, self.group = layout, layers, group
        self.device = tensors[0].device
        self._dtype = _INTEGER[group.dtype.itemsize]
        self._row = group.heads * group.head_size
        self._pointers = self._on_device([tensors[layer].data_ptr() for layer in layers])
        self._strides = self._on_device(
            [[p.offset, p.block, p.token, p.head, p.dim] for p in layout.planes]
        )

    def check(
        self, span: BlockSpan, buffer: memoryview
    ) -> tuple[torch.Tensor, BlockSpan, torch.Tensor]:
        """The whole chunk as integers, the span, and its blocks on the device."""
        group, size = self.group, self.layout.block_tokens
        if buffer.nbytes != group.chunk_bytes(span.chunk_tokens):
            raise ValueError(
                f"a chunk of {span.chunk_tokens} tokens has "
                f"{group.chunk_bytes(span.chunk_tokens)} bytes, the buffer {buffer.nbytes}"
            )
        if span.chunk_offset < 0 or span.chunk_offset + span.tokens > span.chunk_tokens:
            raise ValueError(f"{span} doesn't lie inside its chunk")
        if span.first < 0 or span.tokens < 1:
            raise ValueError(f"{span} has no tokens or starts before its blocks")
        used = list(span.blocks[span.first // size : -(-(span.first + span.tokens) // size)])
        if len(used) != -(-(span.first % size + span.tokens) // size):
            raise ValueError(f"{span} needs more blocks of {size} tokens than it names")
        if min(used) < 0 or max(used) >= self.layout.blocks:
            raise IndexError(f"{span}: there are {self.layout.blocks} blocks")
        # torch warns about memory that it mustn't write to; a copy is the way to be left alone.
        writable = bytearray(buffer) if buffer.readonly else buffer
        shape = (len(group.layers), group.planes, span.chunk_tokens, self._row)
        chunk = torch.frombuffer(writable, dtype=self._dtype).view(shape)
        return chunk, span, self._on_device(used)

    def rows(self, chunk: torch.Tensor, span: BlockSpan) -> torch.Tensor:
        """What the call moves of a chunk: [layers, planes, tokens, row]."""
        layers = slice(self.layers.start, self.layers.stop, self.layers.step)
        return chunk[layers, :, span.chunk_offset : span.chunk_offset + span.tokens]

    def staging(self, span: BlockSpan) -> torch.Tensor:
        shape = (len(self.layers), self.group.planes, span.tokens, self._row)
        return torch.empty(shape, dtype=self._dtype, device=self.device)

    def launch(
        self, span: BlockSpan, blocks: torch.Tensor, staged: torch.Tensor, *, gather: bool
    ) -> None:
        grid = (
            triton.cdiv(span.tokens, _TOKENS_PER_PROGRAM),
            len(self.layers) * self.group.planes,
        )
        _move[grid](
            self._pointers,
            self._strides,
            blocks,
            staged,
            span.first % self.layout.block_tokens,
            span.tokens,
            self.layout.block_tokens,
            self._row,
            self.group.head_size,
            self.group.planes,
            TOKENS=_TOKENS_PER_PROGRAM,
            COLUMNS=_COLUMNS_PER_STEP,
            GATHER=gather,
        )

    def _on_device(self, values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)


def _check_reach(tensor: torch.Tensor, layout: PagedLayout) -> None:
    group = layout.group
    if tensor.element_size() != group.dtype.itemsize:
        raise ValueError(f"a tensor of {tensor.dtype} doesn't hold {group.dtype.value}")
    room = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    counts = (layout.blocks, layout.block_tokens, group.heads, group.head_size)
    for plane in layout.planes:
        steps = (plane.block, plane.token, plane.head, plane.dim)
        last = plane.offset + sum((n - 1) * s for n, s in zip(counts, steps, strict=True))
        if min(plane.offset, *steps) < 0 or last >= room:
            raise ValueError(f"{plane} reaches element {last} of a tensor that has {room}")
