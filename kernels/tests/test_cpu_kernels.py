"""The C++ kernels against the torch reference, bit for bit."""

from __future__ import annotations

import itertools
import mmap
import os
import random
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_memory import ORDERS, Paged, TorchMemory, aligned, situations

from lmcache_core.chunks.checksums import checksums, layer_checksums
from lmcache_core.chunks.layout import AttentionKind, DType, LayerGroup
from lmcache_core.contracts.connector import BlockSpan, HostKernels, PagedLayout
from lmcache_core.contracts.paged import CanonicalBuffer
from lmcache_core.memory.reference import ReferenceKernels
from lmcache_core.testing.connector import EngineConnectorTests, EngineMemory
from lmcache_kernels import _native
from lmcache_kernels.cpu import CpuKernels

Situation = tuple[Paged, list[BlockSpan], range]

REFERENCE = ReferenceKernels()
LEVELS = _native.simd_levels()
KERNELS = {level: CpuKernels(2, level) for level in LEVELS}
STREAMED = 4 << 20
"""Bytes from which on a call writes past the caches: see csrc/paged.cpp."""


def empty(group: LayerGroup, spans: list[BlockSpan]) -> list[bytearray]:
    return [bytearray(b"\xa5") * group.chunk_bytes(span.chunk_tokens) for span in spans]


def views(chunks: list[bytearray]) -> list[memoryview]:
    return [memoryview(chunk) for chunk in chunks]


def check_aligned_gather(kernels: CpuKernels, situation: Situation) -> None:
    paged, spans, layers = situation
    expected = empty(paged.group, spans)
    REFERENCE.gather(paged.tensors, paged.layout, spans, views(expected), layers)
    actual = [memoryview(aligned(len(chunk)).numpy()) for chunk in expected]
    kernels.gather(paged.tensors, paged.layout, spans, actual, layers)
    assert actual == expected
    again = [memoryview(aligned(len(chunk)).numpy()) for chunk in expected]
    sums = kernels.gather_checked(paged.tensors, paged.layout, spans, again, layers)
    assert again == expected
    assert sums == [checksum(paged.group, chunk, layers) for chunk in expected]


def drawn(group: LayerGroup, spans: list[BlockSpan], seed: int) -> list[bytearray]:
    draw = numpy.random.default_rng(seed)
    return [bytearray(draw.bytes(group.chunk_bytes(span.chunk_tokens))) for span in spans]


def checksum(group: LayerGroup, chunk: bytearray, layers: range) -> bytes:
    return layer_checksums(memoryview(chunk), len(group.layers), layers)


def check_gather(kernels: CpuKernels, situation: Situation) -> None:
    paged, spans, layers = situation
    expected, actual = empty(paged.group, spans), empty(paged.group, spans)
    REFERENCE.gather(paged.tensors, paged.layout, spans, views(expected), layers)
    kernels.gather(paged.tensors, paged.layout, spans, views(actual), layers)
    assert actual == expected
    again = empty(paged.group, spans)
    sums = kernels.gather_checked(paged.tensors, paged.layout, spans, views(again), layers)
    assert again == expected
    assert sums == [checksum(paged.group, chunk, layers) for chunk in expected]


def check_scatter(kernels: CpuKernels, situation: Situation, seed: int) -> None:
    paged, spans, layers = situation
    chunks = drawn(paged.group, spans, seed)
    sums = [checksum(paged.group, chunk, layers) for chunk in chunks]
    paged.fill(seed)
    REFERENCE.scatter(views(chunks), paged.tensors, paged.layout, spans, layers)
    expected = paged.content()
    read_only = [memoryview(bytes(chunk)) for chunk in chunks]
    paged.fill(seed)
    kernels.scatter(read_only, paged.tensors, paged.layout, spans, layers)
    assert paged.content() == expected
    paged.fill(seed)
    assert (
        kernels.scatter_checked(read_only, paged.tensors, paged.layout, spans, layers, sums) == []
    )
    assert paged.content() == expected
    # Memory is memory: torch's tensors or anything with a buffer.
    paged.fill(seed)
    plain = [memoryview(t.view(torch.uint8).flatten().numpy()) for t in paged.tensors]
    assert kernels.scatter_checked(read_only, plain, paged.layout, spans, layers, sums) == []
    assert paged.content() == expected


@pytest.mark.parametrize("level", LEVELS)
@given(situation=situations())
@settings(max_examples=120, deadline=None)
def test_gather_equals_the_reference(level: str, situation: Situation) -> None:
    check_gather(KERNELS[level], situation)


@pytest.mark.parametrize("level", LEVELS)
@given(situation=situations(), seed=st.integers(0, 2**16))
@settings(max_examples=120, deadline=None)
def test_scatter_equals_the_reference(level: str, situation: Situation, seed: int) -> None:
    check_scatter(KERNELS[level], situation, seed)


def big(order: str, dtype: DType = DType.BF16, block_tokens: int = 16, shift: int = 32) -> Paged:
    """Memory of which 128 tokens are shared by threads and streamed."""
    paged = Paged(
        order,
        dtype,
        layers=4,
        blocks=192 // block_tokens,
        tokens=block_tokens,
        heads=16 if "latent" not in order else 32,
        dim=128 * 2 // dtype.itemsize,
        shift=shift,
    )
    assert paged.group.chunk_bytes(128) >= STREAMED
    return paged


@pytest.mark.parametrize("shift", [0, 32])
@pytest.mark.parametrize("first", [0, 5])
@pytest.mark.parametrize(
    ("order", "dtype", "block_tokens"),
    [
        *((order, DType.BF16, 16) for order in sorted(ORDERS)),
        ("packed", DType.BF16, 64),
        ("packed", DType.F32, 64),
        ("packed", DType.U8, 32),
        ("hnd", DType.F8_E5M2, 64),
    ],
)
@pytest.mark.parametrize("level", LEVELS)
def test_big_copies_equal_the_reference(
    level: str, order: str, dtype: DType, block_tokens: int, first: int, shift: int
) -> None:
    """Those take other paths: several threads, streaming stores, rearranging in a buffer."""
    paged = big(order, dtype, block_tokens, shift)
    count = paged.layout.blocks
    blocks = random.Random(0).sample(range(count), count)
    tokens = 128 + first
    situation = (paged, [BlockSpan(blocks, first, tokens, tokens)], range(4))
    check_gather(KERNELS[level], situation)
    check_aligned_gather(KERNELS[level], situation)
    check_scatter(KERNELS[level], situation, seed=1)


@pytest.mark.parametrize("dim", [16, 32, 48, 64, 128, 512, 1024])
@pytest.mark.parametrize("level", LEVELS)
def test_heads_of_every_size(level: str, dim: int) -> None:
    """Heads that are whole lines are hashed while they are copied, whatever a token's size."""
    for heads, tokens, order in itertools.product((2, 3, 8), (5, 16, 2048), ("hnd", "packed")):
        tokens = min(tokens, (5 << 20) // (heads * dim * 4))
        count = -(-tokens // 16)
        paged = Paged(order, DType.BF16, layers=1, blocks=count, tokens=16, heads=heads, dim=dim)
        situation = (paged, [BlockSpan(range(count)[::-1], 0, tokens, tokens)], range(1))
        check_aligned_gather(KERNELS[level], situation)
        check_scatter(KERNELS[level], situation, seed=2)


def test_unaligned_buffers() -> None:
    """Streaming stores want whole lines; a buffer may begin anywhere."""
    paged, spans = big("nhd"), [BlockSpan(range(12), 3, 180, 180)]
    expected = empty(paged.group, spans)
    REFERENCE.gather(paged.tensors, paged.layout, spans, views(expected), range(4))
    for shift in (1, 8, 32):
        memory = bytearray(len(expected[0]) + 64)
        into = memoryview(memory)[shift : shift + len(expected[0])]
        KERNELS[LEVELS[0]].gather(paged.tensors, paged.layout, spans, [into], range(4))
        assert into == expected[0]
        sums = KERNELS[LEVELS[0]].gather_checked(
            paged.tensors, paged.layout, spans, [into], range(4)
        )
        assert into == expected[0]
        assert sums == [checksum(paged.group, expected[0], range(4))]


def test_layer_by_layer_gives_the_same_checksums() -> None:
    paged = Paged("packed", DType.F16, layers=3)
    spans = [BlockSpan([3, 1], 0, 8, 8), BlockSpan([0], 0, 4, 4)]
    whole, parts = empty(paged.group, spans), empty(paged.group, spans)
    kernels = KERNELS[LEVELS[0]]
    arguments = (paged.tensors, paged.layout, spans)
    expected = kernels.gather_checked(*arguments, views(whole), range(3))
    sums = [b"", b""]
    for layer in range(3):
        layers = range(layer, layer + 1)
        for i, one in enumerate(kernels.gather_checked(*arguments, views(parts), layers)):
            sums[i] += one
    assert parts == whole
    assert sums == expected


@given(
    size=st.integers(0, 3000), pieces=st.integers(1, 9), at=st.integers(0, 40), seed=st.integers()
)
@settings(max_examples=100, deadline=None)
def test_checksums_are_core_s(size: int, pieces: int, at: int, seed: int) -> None:
    data = random.Random(seed).randbytes(at + size * pieces)
    buffer = memoryview(data)[at:]
    for kernels in KERNELS.values():
        assert kernels.checksums(buffer, pieces) == checksums(buffer, pieces)


def test_checksums_of_much_on_several_threads() -> None:
    buffer = memoryview(random.Random(1).randbytes(8 << 20))
    kernels = CpuKernels(2)
    assert isinstance(kernels, HostKernels)
    assert kernels.checksums(buffer, 32) == checksums(buffer, 32)
    for pieces in (0, -1, 3):
        with pytest.raises(ValueError, match="equal pieces"):
            kernels.checksums(buffer, pieces)


# -- what is wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [4, 6])
def test_damaged_chunks_are_named(tokens: int) -> None:
    paged = Paged("hnd", DType.BF16, dim=32, heads=4)
    spans = [BlockSpan([i], 0, min(tokens, 4), tokens) for i in range(4)]
    chunks = drawn(paged.group, spans, seed=3)
    sums = [checksum(paged.group, chunk, range(2)) for chunk in chunks]
    chunks[1][-1] ^= 1
    chunks[2][0] ^= 0x80
    good = [0, 3]
    before = paged.content()
    REFERENCE.scatter(
        views([chunks[i] for i in good]),
        paged.tensors,
        paged.layout,
        [spans[i] for i in good],
        range(2),
    )
    expected = paged.content()
    paged.fill(0)
    assert paged.content() == before
    kernels = KERNELS[LEVELS[0]]
    rest = (paged.layout, spans, range(2), sums)
    assert kernels.scatter_checked(views(chunks), paged.tensors, *rest) == [1, 2]
    for layer, here, _ in (move for i in good for move in paged.moves(spans[i], range(2))):
        assert paged.content()[layer][here] == expected[layer][here]
    for wrong in (sums[:-1], [*sums[:-1], sums[-1][:-1]], [*sums[:-1], b""]):
        with pytest.raises(ValueError, match="checksums"):
            kernels.scatter_checked(views(chunks), paged.tensors, *rest[:-1], wrong)


Call = Callable[[list[torch.Tensor], PagedLayout, list[BlockSpan], list[memoryview], range], object]


def calls(level: str) -> list[Call]:
    kernels = KERNELS[level]
    return [
        kernels.gather,
        kernels.gather_checked,
        lambda t, layout, spans, chunks, r: kernels.scatter(chunks, t, layout, spans, r),
        lambda t, layout, spans, chunks, r: kernels.scatter_checked(
            chunks, t, layout, spans, r, [bytes(8 * len(r))] * len(spans)
        ),
    ]


@pytest.mark.parametrize("call", calls(LEVELS[0]))
@pytest.mark.parametrize(
    ("span", "error", "reason"),
    [
        (BlockSpan([0], 0, 5, 8), ValueError, "needs more blocks"),
        (BlockSpan([0, 1], 1, 8, 8), ValueError, "needs more blocks"),
        (BlockSpan([0, 1], 2**62, 8, 8), ValueError, "needs more blocks"),
        (BlockSpan([0, 1], -1, 4, 8), ValueError, "starts before"),
        (BlockSpan([0, 1], 0, 0, 8), ValueError, "no tokens"),
        (BlockSpan([0, 1], 0, 6, 8, 3), ValueError, "inside its chunk"),
        (BlockSpan([0, 1], 0, 6, 8, -1), ValueError, "inside its chunk"),
        (BlockSpan([0, 1], 0, 6, 8, 2**63 - 1), ValueError, "inside its chunk"),
        (BlockSpan([0, 1], 0, 8, 9), ValueError, "has 432 bytes"),
        (BlockSpan([0, 1], 0, 8, 2**62), ValueError, "bytes, the buffer"),
        (BlockSpan([0, 4], 0, 8, 8), IndexError, "there are 4 blocks"),
        (BlockSpan([-1, 1], 0, 8, 8), IndexError, "there are 4 blocks"),
    ],
)
def test_spans_that_make_no_sense(
    call: Call, span: BlockSpan, error: type[Exception], reason: str
) -> None:
    """Refused as the reference refuses them, and before anything moves."""
    paged = Paged("nhd", DType.F16)
    fine = BlockSpan([2, 3], 0, 8, 8)
    chunks = [bytearray(b"\x01" * paged.group.chunk_bytes(8)) for _ in range(2)]
    before, chunks_before = paged.content(), [bytes(chunk) for chunk in chunks]
    with pytest.raises(error, match=reason):
        call(paged.tensors, paged.layout, [fine, span], views(chunks), range(2))
    assert paged.content() == before
    assert chunks == chunks_before
    for chunk in chunks:
        chunk.append(0)  # raises BufferError while anything still exports the buffer


@pytest.mark.parametrize("call", calls(LEVELS[0]))
def test_layers_tensors_and_counts_are_checked(call: Call) -> None:
    paged = Paged("hnd", DType.BF16)
    chunk, span = memoryview(bytearray(paged.group.chunk_bytes(4))), BlockSpan([0], 0, 4, 4)
    for layers in (range(2, 3), range(-1, 1)):
        with pytest.raises(IndexError, match="no layer"):
            call(paged.tensors, paged.layout, [span], [chunk], layers)
    with pytest.raises(ValueError, match="contradict"):
        call(paged.tensors[:1], paged.layout, [span], [chunk], range(1))
    layout = replace(paged.layout, planes=paged.layout.planes[:1])
    with pytest.raises(ValueError, match="contradict"):
        call(paged.tensors, layout, [span], [chunk], range(1))
    wide = [tensor.float() for tensor in paged.tensors]
    with pytest.raises(ValueError, match=r"torch\.float32 doesn't hold BF16"):
        call(wide, paged.layout, [span], [chunk], range(1))
    short = [tensor[:-1].clone() for tensor in paged.tensors]
    with pytest.raises(ValueError, match=r"reaches byte 384 .* whose tensor has 382"):
        call(short, paged.layout, [span], [chunk], range(1))
    meta = [tensor.to("meta") for tensor in paged.tensors]
    with pytest.raises(ValueError, match="isn't in host memory"):
        call(meta, paged.layout, [span], [chunk], range(1))
    with pytest.raises(ValueError, match="2 spans for 1 buffers"):
        call(paged.tensors, paged.layout, [span, span], [chunk], range(1))


@pytest.mark.parametrize(
    "change",
    [{"offset": -1}, {"block": -24}, {"token": -6}, {"head": 2**62}, {"block": 2**40}],
)
def test_strides_that_leave_the_tensor(change: dict[str, int]) -> None:
    paged = Paged("nhd", DType.BF16)
    planes = (paged.layout.planes[0], replace(paged.layout.planes[1], **change))
    chunk, span = memoryview(bytearray(paged.group.chunk_bytes(4))), BlockSpan([0], 0, 4, 4)
    for call in calls(LEVELS[0]):
        with pytest.raises(ValueError, match=r"negative|64 bits|reaches byte"):
            call(paged.tensors, replace(paged.layout, planes=planes), [span], [chunk], range(1))


def test_buffers_that_cannot_be_used() -> None:
    paged, span = Paged("nhd", DType.BF16), BlockSpan([0], 0, 4, 4)
    size = paged.group.chunk_bytes(4)
    arguments = (paged.tensors, paged.layout, [span])
    with pytest.raises(BufferError):
        CpuKernels(1).gather(*arguments, [memoryview(bytes(size))], range(2))
    with pytest.raises(BufferError):
        CpuKernels(1).gather(*arguments, [memoryview(bytearray(2 * size))[::2]], range(2))


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="1 to 256 threads"):
        CpuKernels(0)
    with pytest.raises(ValueError, match="no SIMD level mmx"):
        CpuKernels(1, "mmx")


# -- threads ---------------------------------------------------------------------------------------


def test_many_threads_share_one_object() -> None:
    """Each caller has its own chunk and blocks; the workers are everybody's."""
    kernels = CpuKernels(3)
    paged = Paged("hnd", DType.BF16, layers=8, blocks=32, tokens=16, heads=4, dim=64)
    spans = [BlockSpan(range(i * 8, i * 8 + 8), 0, 128, 128) for i in range(4)]
    layers, start = range(8), threading.Barrier(4)
    chunks = drawn(paged.group, spans, seed=5)
    sums = [checksum(paged.group, chunk, layers) for chunk in chunks]

    def work(i: int) -> None:
        start.wait()
        for _ in range(10):
            arguments = (paged.tensors, paged.layout, [spans[i]])
            bad = kernels.scatter_checked(views([chunks[i]]), *arguments, layers, [sums[i]])
            assert bad == []
            back = empty(paged.group, [spans[i]])
            assert kernels.gather_checked(*arguments, views(back), layers) == [sums[i]]
            assert back == [chunks[i]]

    with ThreadPoolExecutor(4) as callers:
        list(callers.map(work, range(4)))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own(tmp_path: Path) -> None:
    kernels = CpuKernels(2)
    paged, spans = big("nhd"), [BlockSpan(range(12), 0, 192, 192)]
    expected = empty(paged.group, spans)
    kernels.gather(paged.tensors, paged.layout, spans, views(expected), range(4))
    child = os.fork()
    if child == 0:
        try:
            actual = empty(paged.group, spans)
            kernels.gather(paged.tensors, paged.layout, spans, views(actual), range(4))
            (tmp_path / "same").write_text(str(actual == expected))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / "same").read_text() == "True"


# -- core's conformance tests ----------------------------------------------------------------------


class BufferMemory(EngineMemory):
    """An own application's buffer, moved by the kernels."""

    blocks, block_tokens = 1, 24

    def __init__(self) -> None:
        self.group = LayerGroup((0, 1, 2), AttentionKind.FULL, 2, 2, 3, DType.BF16)
        self.memory = bytearray(self.group.chunk_bytes(self.block_tokens))
        self.connector = CanonicalBuffer(self.memory, self.group, self.block_tokens, CpuKernels())
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


class TestNHD(EngineConnectorTests):
    @pytest.fixture
    def engine(self) -> EngineMemory:
        return TorchMemory("nhd", DType.BF16, CpuKernels())


class TestHND(EngineConnectorTests):
    @pytest.fixture
    def engine(self) -> EngineMemory:
        return TorchMemory("hnd", DType.F8_E4M3, CpuKernels())


class TestPacked(EngineConnectorTests):
    @pytest.fixture
    def engine(self) -> EngineMemory:
        return TorchMemory("packed", DType.F32, CpuKernels())


class TestInterleaved(EngineConnectorTests):
    @pytest.fixture
    def engine(self) -> EngineMemory:
        return TorchMemory("interleaved", DType.U8, CpuKernels())


# -- what mustn't be written to, and spans of any kind --------------------------------------


def buffers(paged: Paged, make: Callable[[int], Any]) -> list[Any]:
    """A buffer for each layer, as big as its tensor."""
    return [make(t.untyped_storage().nbytes()) for t in paged.tensors]


def read_only_map(size: int) -> mmap.mmap:
    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        return mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)


@pytest.mark.parametrize("make", [bytes, read_only_map], ids=["bytes", "map"])
@pytest.mark.parametrize("level", LEVELS)
def test_nothing_is_scattered_to_what_is_read_only(level: str, make: Callable[[int], Any]) -> None:
    paged, span = Paged("nhd", DType.BF16), BlockSpan([0], 0, 4, 4)
    kernels, layers = CpuKernels(1, level), range(len(paged.group.layers))
    source = memoryview(bytearray(b"\1" * paged.group.chunk_bytes(4)))
    targets = buffers(paged, make)
    # The first may be written to: it must not be, as the second mayn't.
    targets[0] = bytearray(len(targets[0]))
    with pytest.raises(BufferError, match="read-only"):
        kernels.scatter([source], targets, paged.layout, [span], layers)
    with pytest.raises(BufferError, match="read-only"):
        kernels.scatter_checked(
            [source], targets, paged.layout, [span], layers, [b"\0" * 8 * len(layers)]
        )
    assert not any(any(bytes(target)) for target in targets)
    # They may be read, though.
    kernels.gather(targets, paged.layout, [span], [source], layers)
    assert bytes(source) == bytes(len(source))


def test_buffers_of_other_elements_are_refused() -> None:
    paged, span = Paged("nhd", DType.BF16), BlockSpan([0], 0, 4, 4)
    chunk, layers = (
        memoryview(bytearray(paged.group.chunk_bytes(4))),
        range(len(paged.group.layers)),
    )
    wide = buffers(paged, lambda size: memoryview(bytearray(size)).cast("i"))
    with pytest.raises(ValueError, match="4-byte elements doesn't hold BF16"):
        CpuKernels(1).scatter([chunk], wide, paged.layout, [span], layers)
    with pytest.raises(ValueError, match="4-byte elements doesn't hold BF16"):
        CpuKernels(1).gather(wide, paged.layout, [span], [chunk], layers)


NUMBERS = st.one_of(
    st.integers(-3, 20), st.sampled_from([-(2**63), 2**63 - 1, 2**62, 2**31, -(2**31), 2**64])
)


@given(
    blocks=st.lists(NUMBERS, max_size=6),
    numbers=st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS),
    size=st.integers(0, 40),
)
@settings(max_examples=600, deadline=None)
def test_any_span_is_copied_or_refused_whole(
    blocks: list[int], numbers: tuple[int, int, int, int], size: int
) -> None:
    """What the reference takes is taken, and the same; of anything else no byte is written."""
    first, tokens, chunk_tokens, offset = numbers
    paged = Paged("nhd", DType.BF16, layers=2, blocks=4, tokens=4)
    layers = range(2)
    span = BlockSpan(blocks, first, tokens, chunk_tokens, offset)
    good = BlockSpan([0], 0, 4, 4)
    ours = [bytearray(b"\xa5" * paged.group.chunk_bytes(n)) for n in (4, size)]
    theirs = [bytearray(one) for one in ours]
    before = [t.clone() for t in paged.tensors]

    def outcome(call: Callable[[], object]) -> bool:
        try:
            call()
        except (ValueError, IndexError, OverflowError, BufferError):
            return False
        return True

    spans = [good, span]
    done = outcome(
        lambda: CpuKernels(1).gather(
            paged.tensors, paged.layout, spans, [memoryview(one) for one in ours], layers
        )
    )
    known = outcome(
        lambda: ReferenceKernels().gather(
            paged.tensors, paged.layout, spans, [memoryview(one) for one in theirs], layers
        )
    )
    assert done == known
    assert ours == theirs
    if not done:
        assert ours == [b"\xa5" * len(one) for one in ours]
        taken = outcome(
            lambda: CpuKernels(1).scatter(
                [memoryview(one) for one in ours], paged.tensors, paged.layout, spans, layers
            )
        )
        assert not taken
        assert all(
            torch.equal(a.view(torch.int16), b.view(torch.int16))
            for a, b in zip(before, paged.tensors, strict=True)
        )
