"""Codecs: how many bytes of bf16 KV a second, and how much smaller?

    python3 bench/codec_speed.py                        about 2 minutes
    python3 bench/codec_speed.py --quick                some seconds, wider spread
    python3 bench/codec_speed.py --kv FILE.npz          real KV, see below

Chunks are Llama-3.1-8B's: 32 layers, 8 KV heads of 128, bf16, 256 tokens; 32 MiB each. Their
numbers are drawn: channels of K have means of one and a half deviations, one in thirty is eight
times as large, deviations vary by e^N(0, 0.5), K is turned by RoPE; V's tokens vary in size by
e^N(0, 0.3). ``--kv`` takes uint16 bits of layers x 2 x tokens x heads x head size named ``kv``,
with ``--theta`` for its RoPE.

Figures are bytes of chunks by CPU time on one thread, by elapsed time on more. The calibration is
`ctypes.memmove` of a chunk into another buffer in the same turns. The ratio of a run is that of its
medians; the reported ratio is the median of the runs.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from lmcache_core.chunks.layout import DType, full_attention
from lmcache_core.contracts.serde import Rope, Serde
from lmcache_kernels import _native
from lmcache_kernels.codec.config import CacheGenConfig, CodecConfig
from lmcache_kernels.codec.profile import Profile
from lmcache_kernels.codec.serdes import (
    CacheGenSerde,
    Fp8Serde,
    Int8Serde,
    LosslessSerde,
    engine,
)

TOKENS = 256
CHUNKS = 3
"""96 MiB, more than most caches, so that chunks come from memory as they do in use."""


@dataclass(frozen=True)
class Result:
    """One line of the table. Values in GB/s, but for the sizes."""

    name: str
    value: float
    unit: str
    calibration: float
    ratio: float
    runs: int
    spread: float
    """Half the distance between the quartiles of the runs' ratios, by their median."""


def drawn(layers: int, heads: int, size: int, theta: float) -> np.ndarray:
    """Bits of one chunk: layers x 2 x tokens x heads x size."""
    draw = np.random.default_rng(1)
    shape = (layers, 1, heads, size)
    deviation = np.exp(draw.normal(0, 0.5, shape))
    mean = draw.normal(0, 1.5, shape) * deviation * np.where(draw.random(shape) < 1 / 30, 8, 1)
    keys = draw.normal(size=(layers, TOKENS, heads, size)) * deviation + mean
    angles = (1000 + np.arange(TOKENS))[:, None] * theta ** (-np.arange(0, size, 2) / size)
    cosines, sines = np.cos(angles)[:, None], np.sin(angles)[:, None]
    a, b = keys[..., : size // 2], keys[..., size // 2 :]
    keys = np.concatenate([a * cosines - b * sines, b * cosines + a * sines], -1)
    values = draw.normal(size=keys.shape) * np.exp(draw.normal(0, 0.3, shape))
    values += draw.normal(0, 0.3, shape)
    values *= np.exp(draw.normal(0, 0.3, (layers, TOKENS, heads, 1)))
    both = np.stack([keys, values], 1).astype("<f4").view("<u4")
    return ((both + 0x7FFF + (both >> 16 & 1)) >> 16).astype("<u2")


def chunks_of(arguments: argparse.Namespace) -> list[np.ndarray]:
    if arguments.kv is None:
        chunk = drawn(32, 8, 128, arguments.theta)
        return [np.roll(chunk, i, 0) for i in range(CHUNKS)]
    kv = np.load(arguments.kv)["kv"]
    parts = [kv[:, :, t : t + TOKENS] for t in range(0, kv.shape[2] - TOKENS + 1, TOKENS)]
    return [np.ascontiguousarray(part) for part in parts]


Job = Callable[[int], object]


def measure(
    name: str, job: Job, plain: Job, count: int, size: int, runs: int, clock: Callable[[], float]
) -> Result:
    """Take turns with memcpy, chunk after chunk."""
    ratios, own, others = [], [], []
    for i in range(count):
        job(i)
        plain(i)
    for _ in range(runs):
        mine, theirs = [], []
        for i in range(count):
            for work, times in ((job, mine), (plain, theirs)):
                began = clock()
                work(i)
                times.append(clock() - began)
        a, b = statistics.median(mine), statistics.median(theirs)
        ratios.append(b / a)
        own.append(size / a / 1e9)
        others.append(size / b / 1e9)
    quartiles = statistics.quantiles(ratios, n=4) if runs > 1 else [ratios[0]] * 3
    ratio = statistics.median(ratios)
    spread = (quartiles[2] - quartiles[0]) / 2 / ratio
    return Result(
        name,
        round(statistics.median(own), 2),
        "GB/s",
        round(statistics.median(others), 2),
        round(ratio, 3),
        runs,
        round(spread, 3),
    )


def profile_of(chunk: np.ndarray) -> Profile:
    """One of kind T2: steps as wide as each channel's deviation asks for, and means of values."""
    layers, _, _, heads, size = chunk.shape
    both = (chunk.astype("<u4") << 16).view("<f4")
    steps = 2 * both[:, 0].std(1)
    means = both[:, 1].mean(1).astype("<f4").view("<u4") >> 16
    return Profile(
        layers, heads, size, steps.astype("<f4").tobytes(), means.astype("<u2").tobytes()
    )


def serdes(threads: int, level: str, rope: Rope, profile: Profile) -> dict[str, Serde]:
    codec, plain = engine(threads, level), CodecConfig()
    return {
        "lossless": LosslessSerde(plain, codec),
        "cachegen": CacheGenSerde(CacheGenConfig(), codec, rope=rope),
        "cachegen/t2": CacheGenSerde(CacheGenConfig(), codec, rope=rope, profile=profile),
        "cachegen/norope": CacheGenSerde(CacheGenConfig(), codec),
        "int8": Int8Serde(plain, codec),
        "fp8": Fp8Serde(plain, codec),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer runs")
    parser.add_argument("--runs", type=int, default=None)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--simd", nargs="+", default=_native.simd_levels(), help="levels")
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--kv", type=Path, metavar="FILE", help="real KV instead of drawn")
    parser.add_argument("--theta", type=float, default=500_000.0, help="RoPE's")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    runs = arguments.runs or (3 if arguments.quick else 15)
    chunks = chunks_of(arguments)
    layers, _, _, heads, size = chunks[0].shape
    group = full_attention(layers=layers, heads=heads, head_size=size, dtype=DType.BF16)
    rope = Rope.of(theta=arguments.theta, rotary_size=size)
    profile = profile_of(chunks[0])
    nbytes = chunks[0].nbytes
    sources = [memoryview(bytearray(chunk.tobytes())) for chunk in chunks]
    targets = [memoryview(bytearray(nbytes)) for _ in chunks]
    from_, to = (
        [ctypes.addressof(ctypes.c_char.from_buffer(view)) for view in views]
        for views in (sources, targets)
    )
    print(f"{len(os.sched_getaffinity(0))} CPUs, load {os.getloadavg()[0]:.1f}")
    results: list[Result] = []

    def plain(i: int) -> None:
        ctypes.memmove(to[i], from_[i], nbytes)

    for level in arguments.simd:
        for threads in arguments.threads:
            clock = time.thread_time if threads == 1 else time.perf_counter
            for name, serde in serdes(threads, level, rope, profile).items():
                title = f"{name}/{level}/{threads}t"
                if arguments.only not in title:
                    continue
                room = serde.max_encoded_bytes(group, TOKENS)
                rooms = [memoryview(bytearray(room)) for _ in chunks]

                def encode(i: int, serde: Serde = serde, rooms: list[memoryview] = rooms) -> int:
                    return serde.encode(sources[i], rooms[i], group, TOKENS)

                sizes = [encode(i) for i in range(len(chunks))]
                encoded = [view[:size] for view, size in zip(rooms, sizes, strict=True)]

                def decode(
                    i: int, serde: Serde = serde, encoded: list[memoryview] = encoded
                ) -> None:
                    serde.decode(encoded[i], targets[i], group, TOKENS)

                smaller = nbytes * len(chunks) / sum(sizes)
                if threads == 1 and level == arguments.simd[0]:
                    results.append(
                        Result(
                            f"{name}/size",
                            round(smaller, 3),
                            "times smaller",
                            1,
                            round(smaller, 3),
                            1,
                            0,
                        )
                    )
                    show(results[-1])
                for what, job in (("encode", encode), ("decode", decode)):
                    results.append(
                        measure(f"{title}/{what}", job, plain, len(chunks), nbytes, runs, clock)
                    )
                    show(results[-1])
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(one) for one in results], indent=1))


def show(result: Result) -> None:
    if result.unit != "GB/s":
        print(f"{result.name:36} {result.value:7.2f} {result.unit}", flush=True)
        return
    print(
        f"{result.name:36} {result.value:7.2f} {result.unit}   memcpy {result.calibration:7.2f}   "
        f"ratio {result.ratio:5.3f} ± {result.spread:4.0%}",
        flush=True,
    )


if __name__ == "__main__":
    main()
