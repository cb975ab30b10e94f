"""What an encoder reads of a chunk before it rounds anything, in Triton. **Not run on hardware.**

Elements as numbers, keys without their rotation, and what all sections of a layer must agree on.
Float operations are those of csrc/codec/values.cpp, in their order.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]

from lmcache_kernels.codec.gpu.columns import CHANNELS, CHUNK, COLUMNS, KEYS, NUMBERS
from lmcache_kernels.codec.gpu.numbers import element, folded, odd, partner, spread, turn, widen

SAMPLE: tl.constexpr = tl.constexpr(32)  # tokens that a survey looks at


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _unturned(  # type: ignore[no-untyped-def]
    chunk, place, t, c, mask, cosines, sines, head_size, pairs, interleaved, DTYPE: tl.constexpr
):
    """Keys without their rotation."""
    x = widen(element(chunk, place, mask), DTYPE)
    d = c % head_size
    turned = mask & (d < 2 * pairs)
    pair, away = partner(d, pairs, interleaved)
    angle = t * pairs + pair
    cosine = tl.load(cosines + angle, mask=turned, other=1.0)
    sine = tl.load(sines + angle, mask=turned, other=0.0)
    other = widen(element(chunk, place + tl.where(turned, away, 0), mask), DTYPE)
    return tl.where(turned, turn(x, other, cosine, -sine, away), x)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def survey_keys(  # type: ignore[no-untyped-def]
    chunk,
    cosines,
    sines,
    spreads,  # float32 [layers, row]: each channel's variance
    tokens,
    row,
    head_size,
    pairs,
    interleaved,
    sample,
    DTYPE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A layer's keys, at tokens spread over the chunk. The chunk has two planes."""
    layer = tl.program_id(0)
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = c < row
    sums = tl.zeros([WIDTH], tl.float32)
    squares = tl.zeros([WIDTH], tl.float32)
    for i in range(sample):
        t = (i + 1) * tokens // sample - 1
        place = (layer.to(tl.int64) * 2 * tokens + t) * row + c
        x = _unturned(
            chunk, place, t, c, mask, cosines, sines, head_size, pairs, interleaved, DTYPE
        )
        sums += x
        squares += x * x
    count = tl.full([WIDTH], 0.0, tl.float32) + sample
    tl.store(spreads + layer.to(tl.int64) * row + c, spread(sums, squares, count), mask=mask)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def survey_layers(  # type: ignore[no-untyped-def]
    chunk,
    spreads,
    key_rms,  # float32 [layers]
    drained,  # int32 [layers]: 1 where the first token's values are much smaller than others
    tokens,
    row,
    planes,
    sample,
    DTYPE: tl.constexpr,
):
    layer = tl.program_id(0).to(tl.int64)
    one = tl.arange(0, 1)
    if planes == 2:
        variance = tl.zeros([1], tl.float32)
        for c in range(row):
            variance += tl.load(spreads + layer * row + c + one)
        tl.store(
            key_rms + layer + one,
            tl.sqrt_rn(tl.div_rn(variance, tl.full([1], 0.0, tl.float32) + row)),
        )
    i = tl.arange(0, 2 * SAMPLE)[:, None]  # the one behind the sample is the first token
    lane = tl.arange(0, 16)[None, :]
    t = tl.where(i < sample, (i + 1) * tokens // sample - 1, 0)
    start = ((layer * planes + planes - 1) * tokens + t) * row
    part = tl.zeros([2 * SAMPLE, 16], tl.float32)
    for c in range(0, row, 16):
        x = widen(element(chunk, start + c + lane, (i <= sample) & (c + lane < row)), DTYPE)
        part += x * x
    energy = folded(part, 2 * SAMPLE)[None, :]
    number_ = tl.arange(0, 2 * SAMPLE)[None, :]
    others = tl.zeros([1], tl.float32)
    for k in range(sample):
        others += tl.sum(tl.where(number_ == k, energy, 0.0), 1)
    first = tl.sum(tl.where(number_ == sample, energy, 0.0), 1)
    less = 4.0 * first < tl.div_rn(others, tl.full([1], 0.0, tl.float32) + sample)
    tl.store(drained + layer + one, less.to(tl.int32))


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def read_numbers(  # type: ignore[no-untyped-def]
    chunk,
    sections,
    cosines,
    sines,
    numbers,  # float32: elements as numbers, keys without their rotation
    patches,  # int32, by section: how many elements aren't finite
    tokens,
    row,
    head_size,
    pairs,
    interleaved,
    DTYPE: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    section = tl.program_id(0)
    mine = sections + section * COLUMNS
    channels = tl.load(mine + CHANNELS).to(tl.int32)
    t = (tl.program_id(1) * TILE + tl.arange(0, TILE))[:, None]
    c = (tl.program_id(2) * WIDTH + tl.arange(0, WIDTH))[None, :]
    mask = (t < tokens) & (c < channels)
    place = tl.load(mine + CHUNK) + t.to(tl.int64) * row + c
    mine_pairs = pairs * tl.load(mine + KEYS).to(tl.int32)
    x = _unturned(
        chunk, place, t, c, mask, cosines, sines, head_size, mine_pairs, interleaved, DTYPE
    )
    tl.store(numbers + tl.load(mine + NUMBERS) + t.to(tl.int64) * channels + c, x, mask=mask)
    strange = (mask & odd(element(chunk, place, mask), DTYPE)).to(tl.int32)
    tl.atomic_add(patches + section, tl.sum(tl.sum(strange, 1), 0))
