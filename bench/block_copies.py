"""Chunks between an engine's blocks and canonical memory: how far from memcpy?

    python3 bench/block_copies.py            about 1 minute
    python3 bench/block_copies.py --quick    a few seconds, wider spread

Chunks are shaped as Llama-3.1-8B's: 32 layers, 8 KV heads of 128, bf16, 256 tokens, blocks of 16
tokens in random places; 32 MiB each. Each figure is bytes of chunks per second. Its calibration is
`ctypes.memmove` of the same bytes between the same places, on as many threads, in the same run:
figure and calibration take turns, chunk after chunk, so that whatever else the machine does hits
both. The ratio of a run is that of its medians; the reported ratio is the median of the runs.

    whole      chunks that begin and end with a block
    tokens     chunks that begin in the middle of one
    nhd        [2, blocks, tokens, heads, dim]                FlashAttention
    hnd        [blocks, 2, heads, tokens, dim]                FlashInfer
    packed     [blocks, heads, K as [dim, tokens] + V]        vLLM on CPU
    verify     checks in passing: a damaged chunk is reported after it was scattered
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from calibrations import Memcpy
from measuring import Report, parse, parser, runs_of, throughput

from lmcache_core.chunks.layout import DType, LayerGroup, full_attention
from lmcache_core.contracts.connector import BlockSpan, Kernels, PagedLayout, PlaneStrides
from lmcache_core.memory.reference import ReferenceKernels
from lmcache_kernels.cpu import CpuKernels

LAYERS, HEADS, HEAD_SIZE, CHUNK_TOKENS, BLOCK_TOKENS = 32, 8, 128, 256, 16
CHUNKS = 8
"""256 MiB on each side, so that no chunk is still in a cache when its turn comes again."""

REPEATS = 3  # rounds over all chunks in a run


class Memory:
    """Paged tensors of one order, chunk buffers, and a plain copy of both for memcpy."""

    def __init__(self, order: str) -> None:
        self.group = full_attention(
            layers=LAYERS, heads=HEADS, head_size=HEAD_SIZE, dtype=DType.BF16
        )
        per_chunk = CHUNK_TOKENS // BLOCK_TOKENS
        # One block more a chunk, for spans that begin inside of one.
        self.blocks = CHUNKS * (per_chunk + 1)
        self.layout = layout(order, self.group, self.blocks)
        elements = 2 * self.blocks * BLOCK_TOKENS * HEADS * HEAD_SIZE
        self.tensors = [torch.zeros(elements, dtype=torch.bfloat16) for _ in range(LAYERS)]
        for tensor in self.tensors:
            tensor.view(torch.int16).random_()
        self.size = self.group.chunk_bytes(CHUNK_TOKENS)
        # As in an arena: chunks begin 128 bytes into a page.
        stride = self.size + 4096
        self._arena = torch.ones(CHUNKS * stride + 4096, dtype=torch.uint8)
        start = -self._arena.data_ptr() % 4096 + 128
        view = memoryview(self._arena.numpy()).cast("B")
        begins = [start + i * stride for i in range(CHUNKS)]
        self.chunks = [view[begin : begin + self.size] for begin in begins]
        self.addresses = [self._arena.data_ptr() + begin for begin in begins]
        self._plain = torch.ones(CHUNKS * self.size, dtype=torch.uint8)
        self.plain = [self._plain.data_ptr() + i * self.size for i in range(CHUNKS)]
        self.numbers = random.Random(0).sample(range(self.blocks), self.blocks)

    def span(self, chunk: int, first: int) -> BlockSpan:
        each = CHUNK_TOKENS // BLOCK_TOKENS + 1
        blocks = self.numbers[chunk * each : (chunk + 1) * each]
        return BlockSpan(blocks, first, CHUNK_TOKENS, CHUNK_TOKENS)


def layout(order: str, group: LayerGroup, blocks: int) -> PagedLayout:
    """What `order` looks like, as a connector would say it."""
    row, block = HEADS * HEAD_SIZE, BLOCK_TOKENS * HEADS * HEAD_SIZE
    head = BLOCK_TOKENS * HEAD_SIZE
    planes = {
        "nhd": (
            PlaneStrides(0, block, row, HEAD_SIZE, 1),
            PlaneStrides(blocks * block, block, row, HEAD_SIZE, 1),
        ),
        "hnd": (
            PlaneStrides(0, 2 * block, HEAD_SIZE, head, 1),
            PlaneStrides(block, 2 * block, HEAD_SIZE, head, 1),
        ),
        "packed": (
            PlaneStrides(0, 2 * block, 1, 2 * head, BLOCK_TOKENS),
            PlaneStrides(head, 2 * block, HEAD_SIZE, 2 * head, 1),
        ),
    }
    return PagedLayout(group, blocks, BLOCK_TOKENS, planes[order])


Move = Callable[[int], object]
"""Moves a chunk."""


def operation(name: str, kernels: Kernels, memory: Memory, first: int) -> Move:
    """What moves chunk ``i``."""
    t, la, layers = memory.tensors, memory.layout, range(LAYERS)
    spans = [memory.span(i, first) for i in range(CHUNKS)]
    one = [[chunk] for chunk in memory.chunks]
    if name == "gather":
        return lambda i: kernels.gather(t, la, [spans[i]], one[i], layers)
    if name == "scatter":
        return lambda i: kernels.scatter(one[i], t, la, [spans[i]], layers)
    assert isinstance(kernels, CpuKernels)
    if name == "gather+checksum":
        return lambda i: kernels.gather_checked(t, la, [spans[i]], one[i], layers)
    sums = [kernels.gather_checked(t, la, [spans[i]], one[i], layers) for i in range(CHUNKS)]

    def verified(i: int) -> None:
        bad = kernels.scatter_checked(one[i], t, la, [spans[i]], layers, sums[i])
        assert not bad

    return verified


def plain(memcpy: Memcpy, memory: Memory, back: bool) -> Move:
    """What moves as many bytes as chunk ``i`` has between the same places."""

    def move(i: int) -> None:
        here, there = memory.plain[i], memory.addresses[i]
        memcpy(here if back else there, there if back else here, memory.size)

    return move


CASES = [
    ("nhd", "whole", ("gather", "scatter", "gather+checksum", "verify+scatter")),
    ("nhd", "tokens", ("gather+checksum", "verify+scatter")),
    ("hnd", "whole", ("gather+checksum", "verify+scatter")),
    ("packed", "whole", ("gather+checksum", "verify+scatter")),
    ("packed", "tokens", ("gather+checksum", "verify+scatter")),
]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options.add_argument("--only", default="", help="names that contain this")
    options.add_argument("--reference", action="store_true", help="the torch reference too")
    arguments = parse(options)
    turns = CHUNKS * (1 if arguments.quick else REPEATS)
    torch.set_num_threads(1)
    report = Report(arguments, "memcpy")

    def add(title: str, move: Move, same: Move, size: int) -> None:
        runs = runs_of(
            lambda turn: move(turn % CHUNKS),
            lambda turn: same(turn % CHUNKS),
            runs=arguments.runs,
            turns=turns,
        )
        report.add(throughput(title, size, runs))

    for order, path, names in CASES:
        memory = Memory(order)
        first = 0 if path == "whole" else BLOCK_TOKENS // 2 - 1
        for threads in arguments.threads:
            with Memcpy(threads) as memcpy:
                for name in names:
                    title = f"{order}/{path}/{name}/{threads}t"
                    if arguments.only in title:
                        move = operation(name, CpuKernels(threads), memory, first)
                        add(title, move, plain(memcpy, memory, "scatter" in name), memory.size)
        if arguments.reference:
            with Memcpy(1) as memcpy:
                for name in ("gather", "scatter"):
                    move = operation(name, ReferenceKernels(), memory, first)
                    same = plain(memcpy, memory, name == "scatter")
                    add(f"{order}/{path}/{name}/reference", move, same, memory.size)
    report.write()


if __name__ == "__main__":
    main()
