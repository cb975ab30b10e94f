"""Store and load through the public API, against host memory: how far from memcpy, end to end?

    python3 bench/public_api.py            about half a minute
    python3 bench/public_api.py --quick    a few seconds, wider spread

`Cache.store` and `Cache.load` of four chunks as Llama-3.1-8B makes them (32 layers, 8 KV heads of
128, bf16, 256 tokens; 32 MiB each), with all that is around the copy: hashing the tokens, finding
the chunks, making room. The arena is full, so that each store evicts as many chunks as it brings;
its pages are touched. The calibration is memcpy of the same bytes on as many threads, there and
back.

    buffer    KV in one contiguous array, as an application hands it over
    paged     KV in blocks of 16 tokens in random places, as an engine keeps it
    both      store and load, by memcpy there and back

Before it measures, it checks that what was loaded is what was stored.
"""

from __future__ import annotations

import os
import random
import statistics
from array import array
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from calibrations import Memcpy, address, aligned
from measuring import Report, Run, parse, parser, take_turns, throughput

from lmcache_core import (
    Cache,
    DType,
    KVLayout,
    Paged,
    PagedLayout,
    PlaneStrides,
    Plugins,
    full_attention,
    load_config,
)
from lmcache_core.contracts.paged import PagedConnector

LAYERS, HEADS, HEAD_SIZE, CHUNK_TOKENS, BLOCK_TOKENS = 32, 8, 128, 256, 16
CHUNKS = 4  # a call
TOKENS = CHUNKS * CHUNK_TOKENS
ARENA_GIB = 0.75
PROMPTS = 12  # twice what the arena holds
TURNS = 5
GROUP = full_attention(layers=LAYERS, heads=HEADS, head_size=HEAD_SIZE, dtype=DType.BF16)
NBYTES = GROUP.chunk_bytes(TOKENS)


class Flat:
    """KV in one array to store from, and another one to load into."""

    def __init__(self) -> None:
        self._memory = aligned(NBYTES), aligned(NBYTES)
        self.source, self.target = (self._shaped(memory) for memory in self._memory)
        self.source[:] = np.random.default_rng(0).integers(0, 1 << 16, self.source.shape)

    def same(self) -> bool:
        return np.array_equal(self.source, self.target)

    @staticmethod
    def _shaped(memory: memoryview) -> np.ndarray:
        shape = (LAYERS, 2, TOKENS, HEADS, HEAD_SIZE)
        return np.frombuffer(memory[:NBYTES], dtype=np.uint16).reshape(shape)


class Blocks:
    """KV in paged tensors: half of the blocks to store from, the others to load into."""

    def __init__(self) -> None:
        blocks = 2 * TOKENS // BLOCK_TOKENS
        size = 2 * blocks * BLOCK_TOKENS * HEADS * HEAD_SIZE
        self._tensors = [torch.empty(size, dtype=torch.bfloat16) for _ in range(LAYERS)]
        for tensor in self._tensors:
            tensor.view(torch.int16).random_()
        row, block = HEADS * HEAD_SIZE, BLOCK_TOKENS * HEADS * HEAD_SIZE
        planes = tuple(
            PlaneStrides(plane * blocks * block, block, row, HEAD_SIZE, 1) for plane in range(2)
        )
        layout = PagedLayout(GROUP, blocks, BLOCK_TOKENS, planes)
        engine = PagedConnector([layout], [self._tensors], Plugins().kernels("cpu"))
        numbers = random.Random(0).sample(range(blocks), blocks)
        halves = numbers[: blocks // 2], numbers[blocks // 2 :]
        self._halves = halves
        self.source, self.target = (Paged(engine, half, BLOCK_TOKENS) for half in halves)

    def same(self) -> bool:
        shape = (2, -1, BLOCK_TOKENS, HEADS, HEAD_SIZE)
        views = [tensor.view(torch.int16).view(shape) for tensor in self._tensors]
        here, there = self._halves
        return all(torch.equal(view[:, here], view[:, there]) for view in views)


@contextmanager
def opened() -> Iterator[Cache]:
    assignments = [f"chunk_size={CHUNK_TOKENS}", f"max_local_cpu_size={ARENA_GIB}"]
    config = load_config(Plugins(), environ={}, assignments=assignments)
    layout = KVLayout(CHUNK_TOKENS, (GROUP,))
    with Cache.open(model="bench", layout=layout, config=config) as cache:
        yield cache


def prompts() -> list[bytes]:
    draw = random.Random(1)
    return [
        array("I", [draw.randrange(128_256) for _ in range(TOKENS)]).tobytes()
        for _ in range(PROMPTS)
    ]


def measure(cache: Cache, kv: Flat | Blocks, memcpy: Memcpy, runs: int) -> dict[str, list[Run]]:
    """Store and load the same prompts, in turns with memcpy there and back."""
    texts = prompts()
    plain = aligned(NBYTES), aligned(NBYTES)
    here, there = map(address, plain)
    stored, loaded = [], []

    def store(turn: int) -> None:
        stored.append(cache.store(texts[turn % PROMPTS], kv.source))

    def load(turn: int) -> None:
        loaded.append(cache.load(texts[turn % PROMPTS], kv.target))

    for turn in range(PROMPTS):  # the arena is full after that, and all of it is touched
        store(turn)
        load(turn)
    assert kv.same(), "what was loaded isn't what was stored"
    found: dict[str, list[Run]] = {"store": [], "load": [], "both": []}
    turn = 0
    for _ in range(runs):
        seconds: list[list[float]] = [[], [], [], []]
        for _ in range(TURNS):
            put = take_turns(store, lambda _: memcpy(there, here, NBYTES), 1, first=turn)
            get = take_turns(load, lambda _: memcpy(here, there, NBYTES), 1, first=turn)
            turn += 1
            for column, (value,) in zip(seconds, (*put, *get), strict=True):
                column.append(value)
        store_s, there_s, load_s, back_s = map(statistics.median, seconds)
        found["store"].append(Run(store_s, there_s))
        found["load"].append(Run(load_s, back_s))
        found["both"].append(Run(store_s + load_s, there_s + back_s))
    short = [count for count in stored + loaded if count != TOKENS]
    assert not short, f"calls moved {short} tokens, not {TOKENS}"
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parse(options)
    torch.set_num_threads(1)
    report = Report(arguments, "memcpy")
    for kind, make in (("buffer", Flat), ("paged", Blocks)):
        for threads in arguments.threads:
            # Kernels are made when a connector or a cache is.
            os.environ["LMCACHE_KERNEL_THREADS"] = str(threads)
            with opened() as cache, Memcpy(threads) as memcpy:
                for what, runs in measure(cache, make(), memcpy, arguments.runs).items():
                    nbytes = 2 * NBYTES if what == "both" else NBYTES
                    report.add(throughput(f"{kind}/{what}/{threads}t", nbytes, runs))
    report.write()


if __name__ == "__main__":
    main()
