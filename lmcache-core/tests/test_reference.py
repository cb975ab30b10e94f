"""The reference kernels against a model that moves one element at a time."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_core.chunks.layout import AttentionKind, DType, LayerGroup
from lmcache_core.contracts.connector import BlockSpan, PagedLayout, PlaneStrides
from lmcache_core.contracts.paged import CanonicalBuffer, PagedConnector
from lmcache_core.errors import LayoutError
from lmcache_core.memory.reference import ReferenceKernels
from lmcache_core.testing.connector import EngineConnectorTests, EngineMemory

Situation = tuple["Paged", list[BlockSpan], range]

KERNELS = ReferenceKernels()
TORCH = {
    DType.BF16: torch.bfloat16,
    DType.F16: torch.float16,
    DType.F32: torch.float32,
    DType.F8_E4M3: torch.float8_e4m3fn,
    DType.F8_E5M2: torch.float8_e5m2,
    DType.U8: torch.uint8,
}


def nhd(blocks: int, tokens: int, heads: int, dim: int) -> tuple[int, list[PlaneStrides]]:
    """[2, blocks, tokens, heads, dim]; answers the tensor's elements and the planes."""
    plane = blocks * tokens * heads * dim
    strides = (tokens * heads * dim, heads * dim, dim, 1)
    return 2 * plane, [PlaneStrides(0, *strides), PlaneStrides(plane, *strides)]


def hnd(blocks: int, tokens: int, heads: int, dim: int) -> tuple[int, list[PlaneStrides]]:
    """[blocks, 2, heads, tokens, dim]."""
    half = heads * tokens * dim
    strides = (2 * half, dim, tokens * dim, 1)
    return 2 * half * blocks, [PlaneStrides(0, *strides), PlaneStrides(half, *strides)]


def packed(blocks: int, tokens: int, heads: int, dim: int) -> tuple[int, list[PlaneStrides]]:
    """[blocks, heads, (K as [dim, tokens], V as [tokens, dim])]: vLLM on CPU."""
    half = tokens * dim
    block, head = heads * 2 * half, 2 * half
    keys = PlaneStrides(0, block, 1, head, tokens)
    return block * blocks, [keys, PlaneStrides(half, block, dim, head, 1)]


def side_by_side(blocks: int, tokens: int, heads: int, dim: int) -> tuple[int, list[PlaneStrides]]:
    """[blocks, heads, tokens, 2 * dim]."""
    strides = (heads * tokens * 2 * dim, 2 * dim, tokens * 2 * dim, 1)
    return strides[0] * blocks, [PlaneStrides(0, *strides), PlaneStrides(dim, *strides)]


def latent(blocks: int, tokens: int, heads: int, dim: int) -> tuple[int, list[PlaneStrides]]:
    """[blocks, tokens, heads * dim]: MLA."""
    strides = (tokens * heads * dim, heads * dim, dim, 1)
    return strides[0] * blocks, [PlaneStrides(0, *strides)]


ORDERS = {f.__name__: f for f in (nhd, hnd, packed, side_by_side, latent)}


class Paged:
    """Layers of paged memory, which the model reads as raw bytes and the kernels as tensors."""

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
        kind = AttentionKind.MLA if order == "latent" else AttentionKind.FULL
        self.group = LayerGroup(tuple(range(layers)), kind, len(planes), heads, dim, dtype)
        self.layout = PagedLayout(self.group, blocks, tokens, tuple(planes))
        # An engine's tensor may begin anywhere in its storage.
        itemsize = dtype.itemsize
        self.bytes = [
            torch.zeros((elements + shift) * itemsize, dtype=torch.uint8) for _ in range(layers)
        ]
        self.tensors = [raw.view(TORCH[dtype])[shift:] for raw in self.bytes]
        self._shift = shift

    def fill(self, seed: int) -> None:
        draw = random.Random(seed)
        for raw in self.bytes:
            raw.copy_(torch.frombuffer(bytearray(draw.randbytes(len(raw))), dtype=torch.uint8))

    def element(self, layer: int, plane: int, block: int, token: int, head: int, dim: int) -> slice:
        """Where one element's bytes are, by the definition of `PlaneStrides`."""
        p, size = self.layout.planes[plane], self.group.dtype.itemsize
        index = p.offset + block * p.block + token * p.token + head * p.head + dim * p.dim
        begin = (index + self._shift) * size
        return slice(begin, begin + size)

    def moves(self, span: BlockSpan, layers: range) -> Iterator[tuple[int, slice, slice]]:
        """(layer, engine bytes, chunk bytes) of every element of a span, one at a time."""
        group, size = self.group, self.group.dtype.itemsize
        for layer in layers:
            for plane in range(group.planes):
                for i in range(span.tokens):
                    where, offset = divmod(span.first + i, self.layout.block_tokens)
                    row = (layer * group.planes + plane) * span.chunk_tokens
                    row += span.chunk_offset + i
                    for head in range(group.heads):
                        for dim in range(group.head_size):
                            here = self.element(layer, plane, span.blocks[where], offset, head, dim)
                            at = ((row * group.heads + head) * group.head_size + dim) * size
                            yield layer, here, slice(at, at + size)


@st.composite
def situations(draw: st.DrawFn) -> Situation:
    size, blocks = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    paged = Paged(
        draw(st.sampled_from(sorted(ORDERS))),
        draw(st.sampled_from(list(DType))),
        layers=draw(st.integers(1, 3)),
        blocks=blocks,
        tokens=size,
        heads=draw(st.integers(1, 3)),
        dim=draw(st.integers(1, 4)),
        shift=draw(st.integers(0, 5)),
    )
    order = draw(st.permutations(range(blocks)))
    cuts = sorted(draw(st.sets(st.integers(1, blocks), max_size=2)) | {0, blocks})
    spans = []
    for begin, end in itertools.pairwise(cuts):
        own = order[begin:end]
        first = draw(st.integers(0, size - 1))
        tokens = draw(st.integers(1, len(own) * size - first))
        offset = draw(st.integers(0, 3))
        total = offset + tokens + draw(st.integers(0, 3))
        spans.append(BlockSpan(own, first, tokens, total, offset))
    layers = len(paged.group.layers)
    start = draw(st.integers(0, layers - 1))
    return paged, spans, range(start, draw(st.integers(start + 1, layers)))


@given(situations(), st.integers(0, 2**32))
@settings(max_examples=120, deadline=None)
def test_gather_equals_the_model(situation: Situation, seed: int) -> None:
    paged, spans, layers = situation
    paged.fill(seed)
    into = [bytearray(b"\xa5") * paged.group.chunk_bytes(span.chunk_tokens) for span in spans]
    expected = [bytearray(chunk) for chunk in into]
    for span, chunk in zip(spans, expected, strict=True):
        for layer, here, there in paged.moves(span, layers):
            chunk[there] = bytes(paged.bytes[layer][here].tolist())
    KERNELS.gather(paged.tensors, paged.layout, spans, [memoryview(c) for c in into], layers)
    assert into == expected


@given(situations(), st.integers(0, 2**32))
@settings(max_examples=120, deadline=None)
def test_scatter_equals_the_model(situation: Situation, seed: int) -> None:
    paged, spans, layers = situation
    paged.fill(seed)
    draw = random.Random(seed)
    sources = [draw.randbytes(paged.group.chunk_bytes(span.chunk_tokens)) for span in spans]
    expected = [bytearray(raw.tolist()) for raw in paged.bytes]
    for span, chunk in zip(spans, sources, strict=True):
        for layer, here, there in paged.moves(span, layers):
            expected[layer][here] = chunk[there]
    # Read-only sources: a chunk in shared memory is mapped like that.
    KERNELS.scatter([memoryview(c) for c in sources], paged.tensors, paged.layout, spans, layers)
    assert [bytearray(raw.tolist()) for raw in paged.bytes] == expected


def test_a_bad_span_moves_nothing() -> None:
    paged = Paged("nhd", DType.BF16)
    paged.fill(0)
    before = [raw.clone() for raw in paged.bytes]
    chunk = memoryview(bytearray(paged.group.chunk_bytes(8)))
    spans = [BlockSpan([0, 1], 0, 8, 8), BlockSpan([2, 4], 0, 8, 8)]
    with pytest.raises(IndexError, match="there are 4 blocks"):
        KERNELS.scatter([chunk, chunk], paged.tensors, paged.layout, spans, range(2))
    assert all(map(torch.equal, paged.bytes, before))


@pytest.mark.parametrize(
    ("span", "reason"),
    [
        (BlockSpan([0], 0, 5, 8), "needs more blocks"),
        (BlockSpan([0, 1], 1, 8, 8), "needs more blocks"),
        (BlockSpan([0, 1], -1, 4, 8), "starts before"),
        (BlockSpan([0, 1], 0, 0, 8), "no tokens"),
        (BlockSpan([0, 1], 0, 6, 8, 3), "inside its chunk"),
        (BlockSpan([0, 1], 0, 6, 8, -1), "inside its chunk"),
        (BlockSpan([0, 1], 0, 8, 9), "has 432 bytes"),
    ],
)
def test_spans_that_make_no_sense(span: BlockSpan, reason: str) -> None:
    paged = Paged("nhd", DType.F16)
    chunk = memoryview(bytearray(paged.group.chunk_bytes(8)))
    for move in (
        lambda: KERNELS.gather(paged.tensors, paged.layout, [span], [chunk], range(2)),
        lambda: KERNELS.scatter([chunk], paged.tensors, paged.layout, [span], range(2)),
    ):
        with pytest.raises(ValueError, match=reason):
            move()


def test_layers_and_tensors_are_checked() -> None:
    paged = Paged("hnd", DType.BF16)
    chunk, span = memoryview(bytearray(paged.group.chunk_bytes(4))), BlockSpan([0], 0, 4, 4)
    for layers in (range(2, 3), range(-1, 1)):
        with pytest.raises(IndexError, match="no layer"):
            KERNELS.gather(paged.tensors, paged.layout, [span], [chunk], layers)
    with pytest.raises(ValueError, match="contradict"):
        KERNELS.gather(paged.tensors[:1], paged.layout, [span], [chunk], range(1))
    wide = [tensor.float() for tensor in paged.tensors]
    with pytest.raises(ValueError, match=r"torch\.float32 doesn't hold BF16"):
        KERNELS.gather(wide, paged.layout, [span], [chunk], range(1))


class TorchMemory(EngineMemory):
    """Two groups of paged tensors behind a `PagedConnector`."""

    def __init__(self, order: str, dtype: DType) -> None:
        self.groups = [
            Paged(order, dtype, layers=3, blocks=4, tokens=4),
            Paged("latent", dtype, layers=2, blocks=4, tokens=4, heads=1, dim=6),
        ]
        self.connector = PagedConnector(
            [paged.layout for paged in self.groups],
            [paged.tensors for paged in self.groups],
            KERNELS,
        )
        self.blocks, self.block_tokens = 4, 4

    def _elements(self, group: int, block: int, offset: int) -> Iterator[tuple[int, slice, slice]]:
        return self.groups[group].moves(BlockSpan([block], offset, 1, 1), self._layers(group))

    def _layers(self, group: int) -> range:
        return range(len(self.groups[group].group.layers))

    def read(self, group: int, block: int, offset: int) -> bytes:
        token = bytearray(self.groups[group].group.token_bytes)
        for layer, here, there in self._elements(group, block, offset):
            token[there] = bytes(self.groups[group].bytes[layer][here].tolist())
        return bytes(token)

    def write(self, group: int, block: int, offset: int, token: bytes) -> None:
        for layer, here, there in self._elements(group, block, offset):
            self.groups[group].bytes[layer][here] = torch.tensor(list(token[there])).byte()


class TestNHD(EngineConnectorTests):
    @pytest.fixture
    def engine(self) -> EngineMemory:
        return TorchMemory("nhd", DType.BF16)


class TestHND(EngineConnectorTests):
    @pytest.fixture
    def engine(self) -> EngineMemory:
        return TorchMemory("hnd", DType.F8_E4M3)


class TestPacked(EngineConnectorTests):
    @pytest.fixture
    def engine(self) -> EngineMemory:
        return TorchMemory("packed", DType.F32)


class BufferMemory(EngineMemory):
    """A plain bytearray behind a `CanonicalBuffer`."""

    blocks, block_tokens = 1, 7

    def __init__(self) -> None:
        self.group = LayerGroup((0, 1, 2), AttentionKind.FULL, 2, 2, 3, DType.BF16)
        self.memory = bytearray(self.group.chunk_bytes(self.block_tokens))
        self.connector = CanonicalBuffer(self.memory, self.group, self.block_tokens)
        self.row = self.group.heads * self.group.head_size * 2

    def _rows(self, offset: int) -> list[slice]:
        begins = [(p * self.block_tokens + offset) * self.row for p in range(3 * 2)]
        return [slice(begin, begin + self.row) for begin in begins]

    def read(self, group: int, block: int, offset: int) -> bytes:
        return b"".join(self.memory[row] for row in self._rows(offset))

    def write(self, group: int, block: int, offset: int, token: bytes) -> None:
        for i, row in enumerate(self._rows(offset)):
            self.memory[row] = token[i * self.row : (i + 1) * self.row]


class TestCanonicalBuffer(EngineConnectorTests):
    @pytest.fixture
    def engine(self) -> EngineMemory:
        return BufferMemory()


def test_a_layout_outside_its_tensor_is_refused() -> None:
    paged = Paged("packed", DType.BF16)
    short = [tensor[:-1] for tensor in paged.tensors]
    with pytest.raises(LayoutError, match="reaches element 191"):
        PagedConnector([paged.layout], [short], KERNELS)
    with pytest.raises(LayoutError, match="2 planes"):
        PagedConnector([paged.layout], [paged.tensors[:1]], KERNELS)
    with pytest.raises(LayoutError, match="doesn't hold BF16"):
        PagedConnector([paged.layout], [[t.view(torch.uint8) for t in paged.tensors]], KERNELS)


def test_a_group_that_is_not_there() -> None:
    paged = Paged("nhd", DType.BF16)
    connector = PagedConnector([paged.layout], [paged.tensors], KERNELS)
    chunk = memoryview(bytearray(paged.group.chunk_bytes(4)))
    with pytest.raises(IndexError, match="1 layer groups"):
        connector.gather([BlockSpan([0], 0, 4, 4, 0, 1)], [chunk])


def test_canonical_buffer_takes_arrays_and_refuses_what_it_cannot_take() -> None:
    numpy = pytest.importorskip("numpy")
    group = LayerGroup((0,), AttentionKind.FULL, 2, 1, 4, DType.F16)
    kv = numpy.arange(2 * 8 * 4, dtype=numpy.float16).reshape(1, 2, 8, 1, 4)
    chunk = bytearray(group.chunk_bytes(8))
    CanonicalBuffer(kv, group, 8).gather([BlockSpan([0], 0, 8, 8)], [memoryview(chunk)])
    assert chunk == kv.tobytes()
    with pytest.raises(ValueError, match="has 128 and isn't contiguous"):
        CanonicalBuffer(kv.transpose(), group, 8)
    with pytest.raises(ValueError, match="must be a C-contiguous buffer of 112 bytes"):
        CanonicalBuffer(kv, group, 7)
