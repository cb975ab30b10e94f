"""How an encoder rounds values, in Triton. **Not run on hardware.**

Means, steps, levels, integers, tables: each float operation as csrc/codec/values.cpp has it, in its
order, so that the same integers come out. Sums go token by token, or channel by channel where the
C++ does; what depends on nobody is done side by side. ``bad`` counts, by section, what forces it to
be stored raw.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]

from lmcache_kernels.codec.gpu.columns import (
    CHANNEL,
    CHANNELS,
    COLUMNS,
    HEAD,
    HEADS,
    KEYS,
    KNOWN,
    LAYER,
    NUMBERS,
    SYMBOLS,
    TOKEN_HEAD,
)
from lmcache_kernels.codec.gpu.numbers import (
    bfloat16,
    bits,
    folded,
    nearest,
    number,
    power,
    spread,
)

LEAST: tl.constexpr = tl.constexpr(8.67e-19)  # 2^-60 and 2^60: steps that are trusted
MOST: tl.constexpr = tl.constexpr(1.15e18)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def find_means(  # type: ignore[no-untyped-def]
    numbers,
    sections,
    first,  # int32 [1]: tokens that are stored raw
    known,  # int16: a profile's means
    means,  # int16, by channel: bfloat16's bits
    spreads,  # float32, by channel
    bad,
    tokens,
    KNOWN_MEANS: tl.constexpr,
):
    """Means and variances of the coded tokens of 32 channels."""
    section = tl.program_id(0)
    mine = sections + section * COLUMNS
    channels = tl.load(mine + CHANNELS).to(tl.int32)
    raw = tl.load(first)
    c = tl.program_id(1) * 32 + tl.arange(0, 32)
    mask = c < channels
    sums = tl.zeros([32], tl.float32)
    squares = tl.zeros([32], tl.float32)
    at = numbers + tl.load(mine + NUMBERS) + c
    for t in range(raw, tokens):
        x = tl.load(at + tl.full([32], 0, tl.int64) + t * channels, mask=mask, other=0.0)
        sums += x
        squares += x * x
    count = tl.full([32], 0.0, tl.float32) + (tokens - raw)
    u = bfloat16(tl.div_rn(sums, count))
    if KNOWN_MEANS:  # noqa: SIM102  (decided when compiling)
        if tl.load(mine + KEYS) == 0:
            u = tl.load(known + tl.load(mine + KNOWN) + c, mask=mask, other=0).to(tl.uint32)
    far = mask & ((tl.abs(number(u << 16)) < MOST) == 0)
    tl.atomic_add(bad + section, tl.sum(far.to(tl.int32), 0))
    to = tl.load(mine + CHANNEL) + c
    tl.store(means + to, u.to(tl.int16), mask=mask)
    tl.store(spreads + to, spread(sums, squares, count), mask=mask)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _distrusted(step):  # type: ignore[no-untyped-def]
    return ((step >= LEAST) & (step <= MOST)) == 0


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def find_steps(  # type: ignore[no-untyped-def]
    sections,
    spreads,
    key_rms,
    steps,  # float32, by head
    bad,
    key_step,
    value_step,
    head_size,
    KNOWN_STEPS: tl.constexpr,
    MOST_HEADS: tl.constexpr,
):
    """Of keys, the layer's share, neither too coarse nor too fine for the head."""
    section = tl.program_id(0)
    mine = sections + section * COLUMNS
    h = tl.arange(0, MOST_HEADS)
    mask = h < tl.load(mine + HEADS)
    step = tl.full([MOST_HEADS], 0.0, tl.float32) + value_step
    if tl.load(mine + KEYS) != 0:
        if KNOWN_STEPS:
            step = tl.full([MOST_HEADS], 1.0, tl.float32)  # not used: steps are channels'
        else:
            variance = tl.zeros([MOST_HEADS], tl.float32)
            at = spreads + tl.load(mine + CHANNEL) + h * head_size
            for c in range(head_size):
                variance += tl.load(at + c, mask=mask, other=0.0)
            variance = tl.div_rn(variance, tl.full([MOST_HEADS], 0.0, tl.float32) + head_size)
            own = key_step * tl.sqrt_rn(variance)
            step = key_step * tl.load(key_rms + tl.load(mine + LAYER) + h * 0)
            finest, coarsest = own * 0.25, own * 4.0
            step = tl.where(step < finest, finest, step)
            step = tl.where(coarsest < step, coarsest, step)
            step = tl.where(variance == 0.0, 1.0, step)
    tl.store(steps + tl.load(mine + HEAD) + h, step, mask=mask)
    wrong = (mask & _distrusted(step)).to(tl.int32)
    tl.atomic_add(bad + section, tl.sum(wrong, 0))


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def find_energies(  # type: ignore[no-untyped-def]
    numbers,
    sections,
    first,
    energies,  # float32, by coded token and head: the mean of squares
    tokens,
    head_size,
    TILE: tl.constexpr,
):
    mine = sections + tl.program_id(0) * COLUMNS
    heads = tl.load(mine + HEADS).to(tl.int32)
    h = tl.program_id(2)
    if (tl.load(mine + KEYS) == 0) & (h < heads):
        raw = tl.load(first)
        t = (tl.program_id(1) * TILE + tl.arange(0, TILE))[:, None]
        lane = tl.arange(0, 16)[None, :]
        at = numbers + tl.load(mine + NUMBERS) + h * head_size
        at += (t + raw).to(tl.int64) * tl.load(mine + CHANNELS)
        part = tl.zeros([TILE, 16], tl.float32)
        for d in range(0, head_size, 16):
            inside = (t < tokens - raw) & (d + lane < head_size)
            x = tl.load(at + d + lane, mask=inside, other=0.0)
            part += x * x
        energy = tl.div_rn(folded(part, TILE), tl.full([TILE], 0.0, tl.float32) + head_size)
        t = tl.program_id(1) * TILE + tl.arange(0, TILE)
        to = energies + tl.load(mine + TOKEN_HEAD) + t.to(tl.int64) * heads + h
        tl.store(to, energy, mask=t < tokens - raw)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _level(square):  # type: ignore[no-untyped-def]
    """The level nearest to the root of ``square``: 2 log2(square), rounded."""
    u = bits(square)
    mantissa = (u & 0x7FFFFF).to(tl.int32)
    exponent = (u >> 23 & 0xFF).to(tl.int32) - 127
    more = (mantissa >= 0x1837F0).to(tl.int32) + (mantissa >= 0x5744FD).to(tl.int32)
    return 2 * exponent + more


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def find_centres(  # type: ignore[no-untyped-def]
    sections,
    first,
    energies,
    centres,  # int8, by head
    bad,
    tokens,
    MOST_HEADS: tl.constexpr,
):
    section = tl.program_id(0)
    mine = sections + section * COLUMNS
    if tl.load(mine + KEYS) == 0:
        heads = tl.load(mine + HEADS)
        h = tl.arange(0, MOST_HEADS)
        mask = h < heads
        rows = tokens - tl.load(first)
        total = tl.zeros([MOST_HEADS], tl.float32)
        at = energies + tl.load(mine + TOKEN_HEAD) + h
        for t in range(rows):
            total += tl.load(at + t * heads, mask=mask, other=0.0)
        count = tl.full([MOST_HEADS], 0.0, tl.float32) + rows
        centre = _level(tl.div_rn(total, count))
        far = mask & (((total < MOST) == 0) | (centre > 108))
        tl.atomic_add(bad + section, tl.sum(far.to(tl.int32), 0))
        centre = tl.minimum(tl.maximum(centre, -96), 108)
        tl.store(centres + tl.load(mine + HEAD) + h, centre.to(tl.int8), mask=mask)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def find_levels(  # type: ignore[no-untyped-def]
    sections,
    first,
    energies,
    centres,
    symbols,  # int16: the first rows of a section's, filled up with 0
    tokens,
    TILE: tl.constexpr,
):
    mine = sections + tl.program_id(0) * COLUMNS
    if tl.load(mine + KEYS) == 0:
        heads = tl.load(mine + HEADS)
        count = (tokens - tl.load(first)) * heads
        i = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
        mask = i < count
        energy = tl.load(energies + tl.load(mine + TOKEN_HEAD) + i, mask=mask, other=1.0)
        centre = tl.load(centres + tl.load(mine + HEAD) + i % heads, mask=mask, other=0)
        level = tl.minimum(tl.maximum(_level(energy) - centre.to(tl.int32), -24), 12)
        level = tl.where(mask, level, 0).to(tl.int16)
        whole = (count + 31) // 32 * 32
        tl.store(symbols + tl.load(mine + SYMBOLS) + i, level, mask=i < whole)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def quantise(  # type: ignore[no-untyped-def]
    numbers,
    sections,
    first,
    means,
    steps,
    known,  # float32: a profile's steps of keys
    centres,
    symbols,
    bad,
    tokens,
    head_size,
    key_step,
    KNOWN_STEPS: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """round((number - mean) / step / the token's step), by multiplication with inverses."""
    section = tl.program_id(0)
    mine = sections + section * COLUMNS
    heads, channels = tl.load(mine + HEADS), tl.load(mine + CHANNELS).to(tl.int32)
    keys, raw = tl.load(mine + KEYS), tl.load(first)
    rows = tokens - raw
    t = (tl.program_id(1) * TILE + tl.arange(0, TILE))[:, None]
    c = (tl.program_id(2) * WIDTH + tl.arange(0, WIDTH))[None, :]
    there = (t < rows) & (c < (channels + 31) // 32 * 32)
    mask = there & (c < channels)
    head = c // head_size
    at = tl.load(mine + NUMBERS) + (t + raw).to(tl.int64) * channels + c
    x = tl.load(numbers + at, mask=mask, other=0.0)
    mean = tl.load(means + tl.load(mine + CHANNEL) + c, mask=c < channels, other=0)
    step = tl.load(steps + tl.load(mine + HEAD) + head, mask=c < channels, other=1.0)
    step_rows = tl.zeros([1, 1], tl.int64)
    by = tl.full([TILE, WIDTH], 1.0, tl.float32)
    if keys != 0:
        if KNOWN_STEPS:
            step = tl.load(known + tl.load(mine + KNOWN) + c, mask=c < channels, other=1.0)
            step = step * key_step
            wrong = ((c < channels) & _distrusted(step)).to(tl.int32)
            tl.atomic_add(bad + section, tl.sum(tl.sum(wrong, 1), 0))
    else:
        step_rows += (rows * heads + 31) // 32
        level = tl.load(centres + tl.load(mine + HEAD) + head, mask=c < channels, other=0)
        at = tl.load(mine + SYMBOLS) + t.to(tl.int64) * heads + head
        level = level.to(tl.int32) + tl.load(symbols + at, mask=mask, other=0).to(tl.int32)
        by = tl.div_rn(by, power(level))
    inverse = tl.div_rn(tl.full([1, WIDTH], 1.0, tl.float32), step)
    x = (x - number((mean.to(tl.uint32) & 0xFFFF) << 16)) * inverse * by
    wide = mask & ((bits(x) & 0x7FFFFFFF) > 0x46FFFE00)  # 32767
    tl.atomic_add(bad + section, tl.sum(tl.sum(wide.to(tl.int32), 1), 0))
    q = tl.where(mask & (wide == 0), nearest(x), 0)
    at = (step_rows + (c // 32).to(tl.int64) * rows + t) * 32 + c % 32
    tl.store(symbols + tl.load(mine + SYMBOLS) + at, q.to(tl.int16), mask=there)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _table(mean, thresholds):  # type: ignore[no-untyped-def]
    """The table for each mean magnitude, in 4096ths: how many thresholds it reaches."""
    limit = tl.load(thresholds + tl.arange(0, 32))[None, :]
    return tl.sum((mean[:, None] >= limit).to(tl.int32), 1)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def choose_tables(  # type: ignore[no-untyped-def]
    sections,
    first,
    symbols,
    thresholds,
    tables,  # uint8, by channel
    step_tables,  # uint8, by section
    tokens,
    TILE: tl.constexpr,
):
    """Of 32 channels, or (program 0) of the levels in front of them."""
    section = tl.program_id(0)
    mine = sections + section * COLUMNS
    rows = tokens - tl.load(first)
    scaled = tl.load(mine + KEYS) == 0
    count = rows * tl.load(mine + HEADS)
    step_rows = tl.where(scaled, (count + 31) // 32, 0)
    p, lane = tl.program_id(1) - 1, tl.arange(0, 32)
    if p * 32 < tl.load(mine + CHANNELS):
        start = tl.where(p < 0, 0, step_rows + p.to(tl.int64) * rows)
        length = tl.where(p < 0, step_rows, rows).to(tl.int32)
        at = symbols + tl.load(mine + SYMBOLS) + start * 32 + lane[None, :]
        total = tl.zeros([32], tl.int64)
        for r in range(0, length, TILE):
            here = (r + tl.arange(0, TILE))[:, None]
            q = tl.load(at + here * 32, mask=here < length, other=0).to(tl.int32)
            total += tl.sum(tl.minimum(tl.abs(q), 127), 0)
        if p < 0:
            if scaled:
                total = tl.sum(total, 0) + tl.zeros([32], tl.int64)
                table = _table((total << 12) // tl.maximum(count, 1), thresholds)
                tl.store(step_tables + section + lane, table.to(tl.uint8), mask=lane == 0)
        else:
            table = _table((total << 12) // rows, thresholds)
            to = tables + tl.load(mine + CHANNEL) + p * 32 + lane
            tl.store(to, table.to(tl.uint8))
