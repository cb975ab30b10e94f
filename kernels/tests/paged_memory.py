"""Paged memory in every order that engines use, for the kernels' tests."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy
import torch
from hypothesis import strategies as st

from lmcache_core.chunks.layout import AttentionKind, DType, LayerGroup
from lmcache_core.contracts.connector import BlockSpan, PagedLayout, PlaneStrides
from lmcache_core.contracts.paged import PagedConnector
from lmcache_core.testing.connector import EngineMemory

TORCH = {
    DType.BF16: torch.bfloat16,
    DType.F16: torch.float16,
    DType.F32: torch.float32,
    DType.F8_E4M3: torch.float8_e4m3fn,
    DType.F8_E5M2: torch.float8_e5m2,
    DType.U8: torch.uint8,
}
Planes = tuple[int, list[PlaneStrides]]


def nhd(blocks: int, tokens: int, heads: int, dim: int) -> Planes:
    """[2, blocks, tokens, heads, dim]; answers the tensor's elements and the planes."""
    plane = blocks * tokens * heads * dim
    strides = (tokens * heads * dim, heads * dim, dim, 1)
    return 2 * plane, [PlaneStrides(0, *strides), PlaneStrides(plane, *strides)]


def nhd_by_block(blocks: int, tokens: int, heads: int, dim: int) -> Planes:
    """[blocks, 2, tokens, heads, dim]."""
    half = tokens * heads * dim
    strides = (2 * half, heads * dim, dim, 1)
    return 2 * half * blocks, [PlaneStrides(0, *strides), PlaneStrides(half, *strides)]


def hnd(blocks: int, tokens: int, heads: int, dim: int) -> Planes:
    """[blocks, 2, heads, tokens, dim]."""
    half = heads * tokens * dim
    strides = (2 * half, dim, tokens * dim, 1)
    return 2 * half * blocks, [PlaneStrides(0, *strides), PlaneStrides(half, *strides)]


def packed(blocks: int, tokens: int, heads: int, dim: int) -> Planes:
    """[blocks, heads, (K as [dim, tokens], V as [tokens, dim])]: vLLM on CPU."""
    half = tokens * dim
    block, head = heads * 2 * half, 2 * half
    keys = PlaneStrides(0, block, 1, head, tokens)
    return block * blocks, [keys, PlaneStrides(half, block, dim, head, 1)]


def side_by_side(blocks: int, tokens: int, heads: int, dim: int) -> Planes:
    """[blocks, heads, tokens, 2 * dim]."""
    strides = (heads * tokens * 2 * dim, 2 * dim, tokens * 2 * dim, 1)
    return strides[0] * blocks, [PlaneStrides(0, *strides), PlaneStrides(dim, *strides)]


def interleaved(blocks: int, tokens: int, heads: int, dim: int) -> Planes:
    """[blocks, dim, heads, tokens, 2]: nothing is next to anything."""
    strides = (dim * heads * tokens * 2, 2, tokens * 2, heads * tokens * 2)
    return strides[0] * blocks, [PlaneStrides(0, *strides), PlaneStrides(1, *strides)]


def latent(blocks: int, tokens: int, heads: int, dim: int) -> Planes:
    """[blocks, tokens, heads * dim]: MLA."""
    strides = (tokens * heads * dim, heads * dim, dim, 1)
    return strides[0] * blocks, [PlaneStrides(0, *strides)]


def padded_latent(blocks: int, tokens: int, heads: int, dim: int) -> Planes:
    """[blocks, tokens, heads * dim + 3]: MLA with rows that are aligned to something."""
    row = heads * dim + 3
    return row * tokens * blocks, [PlaneStrides(0, tokens * row, row, dim, 1)]


ORDERS = {
    f.__name__: f
    for f in (nhd, nhd_by_block, hnd, packed, side_by_side, interleaved, latent, padded_latent)
}


def aligned(size: int) -> torch.Tensor:
    """`size` bytes that begin with a cache line, as an engine's tensors and an arena's slots do."""
    whole = torch.empty(size + 64, dtype=torch.uint8)
    begin = -whole.data_ptr() % 64
    return whole[begin : begin + size]


class Paged:
    """Layers of paged memory, which the tests read as raw bytes and the kernels as tensors."""

    def __init__(
        self,
        order: str,
        dtype: DType,
        *,
        layers: int = 2,
        blocks: int = 4,
        tokens: int = 4,
        heads: int = 2,
        dim: int = 3,
        shift: int = 0,
    ) -> None:
        elements, planes = ORDERS[order](blocks, tokens, heads, dim)
        kind = AttentionKind.MLA if len(planes) == 1 else AttentionKind.FULL
        self.group = LayerGroup(tuple(range(layers)), kind, len(planes), heads, dim, dtype)
        self.layout = PagedLayout(self.group, blocks, tokens, tuple(planes))
        # An engine's tensor may begin anywhere in its storage.
        self._elements, self._shift, self._dtype = elements, shift, dtype
        self.bytes: list[torch.Tensor] = []
        self.tensors: list[torch.Tensor] = []
        self.fill(0)

    def fill(self, seed: int) -> None:
        """Every layer anew, in memory of its own that begins with a line, with random bits."""
        draw = numpy.random.default_rng(seed)
        size = (self._elements + self._shift) * self._dtype.itemsize
        self.bytes = [aligned(size) for _ in self.group.layers]
        for raw in self.bytes:
            raw.copy_(torch.frombuffer(bytearray(draw.bytes(size)), dtype=torch.uint8))
        self.tensors = [raw.view(TORCH[self._dtype])[self._shift :] for raw in self.bytes]

    def content(self) -> list[bytes]:
        return [bytes(raw.numpy()) for raw in self.bytes]

    def moves(self, span: BlockSpan, layers: range) -> Iterator[tuple[int, slice, slice]]:
        """(layer, engine bytes, chunk bytes) of every element of a span, one at a time."""
        group, size = self.group, self.group.dtype.itemsize
        counts = (layers, range(group.planes), range(span.tokens))
        for layer, plane, i in itertools.product(*counts):
            where, offset = divmod(span.first + i, self.layout.block_tokens)
            row = (layer * group.planes + plane) * span.chunk_tokens + span.chunk_offset + i
            p = self.layout.planes[plane]
            start = self._shift + p.offset + span.blocks[where] * p.block + offset * p.token
            for head, dim in itertools.product(range(group.heads), range(group.head_size)):
                here = (start + head * p.head + dim * p.dim) * size
                there = ((row * group.heads + head) * group.head_size + dim) * size
                yield layer, slice(here, here + size), slice(there, there + size)


@st.composite
def situations(draw: st.DrawFn) -> tuple[Paged, list[BlockSpan], range]:
    """Memory of any order, and spans over it that share no block."""
    # Small sizes for the odd cases; whole vectors and lines for the paths that work on those.
    size = draw(st.one_of(st.integers(1, 5), st.sampled_from([8, 16, 24, 33])))
    dim = draw(st.one_of(st.integers(1, 4), st.sampled_from([8, 16, 19, 32])))
    blocks, heads = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    paged = Paged(
        draw(st.sampled_from(sorted(ORDERS))),
        draw(st.sampled_from(list(DType))),
        layers=draw(st.integers(1, 3)),
        blocks=blocks,
        tokens=size,
        heads=heads,
        dim=dim,
        shift=draw(st.integers(0, 5)),
    )
    paged.fill(draw(st.integers(0, 2**16)))
    order = draw(st.permutations(range(blocks)))
    cuts = sorted(draw(st.sets(st.integers(1, blocks), max_size=2)) | {0, blocks})
    spans = []
    for begin, end in itertools.pairwise(cuts):
        own = order[begin:end]
        first = draw(st.integers(0, size - 1))
        tokens = draw(st.integers(1, len(own) * size - first))
        offset = draw(st.integers(0, 3))
        total = offset + tokens + draw(st.integers(0, 3))
        before = draw(st.integers(0, 1))  # blocks of the span that it doesn't use
        spans.append(BlockSpan([-1] * before + own, before * size + first, tokens, total, offset))
    layers = len(paged.group.layers)
    start = draw(st.integers(0, layers - 1))
    return paged, spans, range(start, draw(st.integers(start + 1, layers)))


class TorchMemory(EngineMemory):
    """Two groups of paged tensors behind a `PagedConnector`, for core's conformance tests."""

    def __init__(self, order: str, dtype: DType, kernels: object) -> None:
        self.groups = [
            Paged(order, dtype, layers=3, blocks=4, tokens=4),
            Paged("latent", dtype, layers=2, blocks=4, tokens=4, heads=1, dim=6),
        ]
        self.connector = PagedConnector(
            [paged.layout for paged in self.groups],
            [paged.tensors for paged in self.groups],
            kernels,  # type: ignore[arg-type]
        )
        self.blocks, self.block_tokens = 4, 4

    def _elements(self, group: int, block: int, offset: int) -> Iterator[tuple[int, slice, slice]]:
        paged = self.groups[group]
        return paged.moves(BlockSpan([block], offset, 1, 1), range(len(paged.group.layers)))

    def read(self, group: int, block: int, offset: int) -> bytes:
        token = bytearray(self.groups[group].group.token_bytes)
        for layer, here, there in self._elements(group, block, offset):
            token[there] = bytes(self.groups[group].bytes[layer].numpy()[here])
        return bytes(token)

    def write(self, group: int, block: int, offset: int, token: bytes) -> None:
        for layer, here, there in self._elements(group, block, offset):
            raw = self.groups[group].bytes[layer].numpy()
            raw[here] = list(token[there])
