"""Decoding on a GPU, in Triton. **Not run on hardware**: interpreted, and compiled for GPUs.

First the symbols of all sections, each by one program, 32 lanes side by side as they were coded;
then elements, by a program for each tile of tokens and channels. Whatever a stream's bytes are,
programs read only inside of the section's parts, which the host has checked to lie inside of the
stream, and write only the section's own symbols and elements. What doesn't fit is reported in
``errors``, by section.

``sections`` are rows of int64, a column for each constant below; ``chosen`` are the numbers of
those that a launch is for. Offsets of parts are bytes of ``stream``, all others elements.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]

from lmcache_kernels.codec.gpu.numbers import (
    F16,
    bits,
    narrow,
    number,
    partner,
    power,
    read16,
    read32,
    signed16,
    turn,
)

CHUNK: tl.constexpr = tl.constexpr(0)  # the section's first element of the chunk
HEADS: tl.constexpr = tl.constexpr(1)
CHANNELS: tl.constexpr = tl.constexpr(2)
FIRST: tl.constexpr = tl.constexpr(3)  # tokens that are raw: 0 or 1
STEP_ROWS: tl.constexpr = tl.constexpr(4)  # rows of 32 levels in front of the channels' rows
SYMBOLS: tl.constexpr = tl.constexpr(5)  # where the section's rows of symbols begin
KNOWN: tl.constexpr = tl.constexpr(6)  # the first channel's place in a profile
FLAGS: tl.constexpr = tl.constexpr(7)
STATES: tl.constexpr = tl.constexpr(8)
STEPS: tl.constexpr = tl.constexpr(9)
MEANS: tl.constexpr = tl.constexpr(10)
TABLES: tl.constexpr = tl.constexpr(11)
CENTRES: tl.constexpr = tl.constexpr(12)
STEP_TABLE: tl.constexpr = tl.constexpr(13)
ELEMENTS: tl.constexpr = tl.constexpr(14)
ESCAPES: tl.constexpr = tl.constexpr(15)
ESCAPE_COUNT: tl.constexpr = tl.constexpr(16)
PATCHES: tl.constexpr = tl.constexpr(17)
PATCH_COUNT: tl.constexpr = tl.constexpr(18)
WORDS: tl.constexpr = tl.constexpr(19)
WORD_COUNT: tl.constexpr = tl.constexpr(20)
REFERENCES: tl.constexpr = tl.constexpr(21)
SCALES: tl.constexpr = tl.constexpr(22)
LOW: tl.constexpr = tl.constexpr(23)
HIGH: tl.constexpr = tl.constexpr(24)
COLUMNS: tl.constexpr = tl.constexpr(25)
"""How many columns there are."""

BAD_WORDS: tl.constexpr = tl.constexpr(1)
BAD_ESCAPES: tl.constexpr = tl.constexpr(2)
BAD_TABLE: tl.constexpr = tl.constexpr(4)
BAD_LEVEL: tl.constexpr = tl.constexpr(8)
BAD_PATCH: tl.constexpr = tl.constexpr(16)
BAD_STEP: tl.constexpr = tl.constexpr(32)

_STATE: tl.constexpr = tl.constexpr(65536)
_SLOTS: tl.constexpr = tl.constexpr(1024)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _pass_tables(  # type: ignore[no-untyped-def]
    stream, mine, channel, step_rows, channels, both, COUNT: tl.constexpr, PADDING: tl.constexpr
):
    """The table of each lane of a pass, and what is wrong with a section's."""
    levels = (channel < 0) & (step_rows > 0)[:, None]
    coded = (channel >= 0) & (channel < channels[:, None])
    at = tl.where(levels, tl.load(mine + STEP_TABLE)[:, None], 0)
    at = tl.where(coded, tl.load(mine + TABLES)[:, None] + channel, at)
    table = tl.load(stream + at, mask=both & (coded | levels), other=PADDING).to(tl.int32)
    wrong = tl.max((table >= COUNT).to(tl.int32), 1)
    return tl.minimum(table, COUNT - 1), wrong * BAD_TABLE


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _next16(stream, start, used, count, place, mask):  # type: ignore[no-untyped-def]
    """Of a section's 16-bit integers, that behind the ``used`` ones; 0 where none is left."""
    at = used[:, None] + place
    return read16(stream + start[:, None] + 2 * at.to(tl.int64), mask & (at < count[:, None]))


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def decode_symbols(  # type: ignore[no-untyped-def]
    stream,  # bytes
    sections,
    chosen,  # int32
    count,  # of chosen
    slots,  # int32 [96, 1024]: frequency << 20 | slot - start << 8 | symbol
    symbols,  # int16: numbers by section, row and lane; exponents that were escapes are 256 more
    errors,  # int32, by section
    tokens,
    passes,  # of the section that has most
    FIRST_TABLE: tl.constexpr,
    TABLE_COUNT: tl.constexpr,
    PADDING: tl.constexpr,  # the table of lanes without a channel
    ESCAPE: tl.constexpr,
    ZERO: tl.constexpr,  # what a symbol is more than its number
    LOSSLESS: tl.constexpr,
    STREAMS: tl.constexpr,  # sections of one program
):
    each = tl.program_id(0) * STREAMS + tl.arange(0, STREAMS)
    there = each < count
    section = tl.load(chosen + each, mask=there, other=0)
    mine = sections + section * COLUMNS
    lane = tl.arange(0, 32)[None, :]
    both = there[:, None] & (lane >= 0)
    rows = tl.where(there, tokens - tl.load(mine + FIRST).to(tl.int32), 0)
    step_rows = tl.where(there, tl.load(mine + STEP_ROWS).to(tl.int32), 0)
    channels = tl.load(mine + CHANNELS).to(tl.int32)
    words, word_count = tl.load(mine + WORDS), tl.load(mine + WORD_COUNT).to(tl.int32)
    escapes, escape_count = tl.load(mine + ESCAPES), tl.load(mine + ESCAPE_COUNT).to(tl.int32)
    x = read32(stream + tl.load(mine + STATES)[:, None] + lane * 4, both)
    to = symbols + tl.load(mine + SYMBOLS)[:, None] + lane
    used = tl.zeros([STREAMS], tl.int32)
    taken = tl.zeros([STREAMS], tl.int32)
    bad = tl.zeros([STREAMS], tl.int32)
    for p in range(passes + 1):
        length = tl.where(p == 0, step_rows, rows)
        length = tl.where((p - 1) * 32 < channels, length, 0)
        channel = (p - 1) * 32 + lane
        table, wrong = _pass_tables(
            stream, mine, channel, step_rows, channels, both, TABLE_COUNT, PADDING
        )
        bad |= wrong
        table += FIRST_TABLE
        for r in range(tl.max(length, 0)):
            active = both & (r < length)[:, None]
            slot = (x & (_SLOTS - 1)).to(tl.int32)
            e = tl.load(slots + table * _SLOTS + slot, mask=active, other=0).to(tl.uint32)
            symbol = (e & 0xFF).to(tl.int32)
            after = (e >> 20) * (x >> 10) + (e >> 8 & 0xFFF)
            need = active & (after < _STATE)
            escaped = active & (symbol == ESCAPE)
            # Counted at once, in bytes of their own: there are 32 at most.
            counts = need.to(tl.int32) | escaped.to(tl.int32) << 8
            place, total = tl.cumsum(counts, 1) - counts, tl.sum(counts, 1)
            word = _next16(stream, words, used, word_count, place & 0xFF, need)
            x = tl.where(active, tl.where(need, after << 16 | word, after), x)
            value = symbol
            if tl.max(total, 0) > 0xFF:
                value = _next16(stream, escapes, taken, escape_count, place >> 8, escaped)
                value = value.to(tl.int32)
                value = 256 + (value & 0xFF) if LOSSLESS else signed16(value)
            used += total & 0xFF
            taken += total >> 8
            value = tl.where(escaped, value, symbol - ZERO)
            tl.store(to + r * 32, value.to(tl.int16), mask=active)
        to += length[:, None] * 32
    bad = tl.where(tl.max((x != _STATE).to(tl.int32), 1) != 0, bad | BAD_WORDS, bad)
    bad = tl.where(used != word_count, bad | BAD_WORDS, bad)
    bad = tl.where(taken != escape_count, bad | BAD_ESCAPES, bad)
    tl.store(errors + section, bad, mask=there)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _tile(  # type: ignore[no-untyped-def]
    sections, chosen, tokens, row, TILE: tl.constexpr, WIDTH: tl.constexpr
):
    """A program's section, tokens and channels, where they lie in the chunk, and which exist."""
    section = tl.load(chosen + tl.program_id(0))
    mine = sections + section * COLUMNS
    t = (tl.program_id(1) * TILE + tl.arange(0, TILE))[:, None]
    c = (tl.program_id(2) * WIDTH + tl.arange(0, WIDTH))[None, :]
    inside = (t < tokens) & (c < tl.load(mine + CHANNELS).to(tl.int32))
    place = tl.load(mine + CHUNK) + t.to(tl.int64) * row + c
    return section, mine, t, c, inside, place


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _symbol_at(mine, t, c, rows):  # type: ignore[no-untyped-def]
    """Where the symbols of a section's coded tokens and channels are."""
    at = tl.load(mine + STEP_ROWS) + (c // 32).to(tl.int64) * rows + t
    return tl.load(mine + SYMBOLS) + at * 32 + c % 32


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _coded(  # type: ignore[no-untyped-def]
    stream, mine, symbols, steps, means, key_step, t, c, by, mask, rows, head_size
):
    """The numbers of coded tokens ``t`` and channels ``c``, before rotation; and which can't be."""
    flags = tl.load(mine + FLAGS)
    known = tl.load(mine + KNOWN) + c
    if (flags & 8) != 0:
        step = tl.load(steps + known + 0 * t, mask=mask, other=0.0) * key_step
    else:
        at = stream + tl.load(mine + STEPS) + 4 * (c // head_size) + 0 * t
        step = number(read32(at, mask))
    if (flags & 16) != 0:
        mean = tl.load(means + known + 0 * t, mask=mask, other=0).to(tl.uint32)
    else:
        mean = read16(stream + tl.load(mine + MEANS) + 2 * c + 0 * t, mask)
    q = tl.load(symbols + _symbol_at(mine, t, c, rows), mask=mask, other=0).to(tl.float32)
    middle = number(mean << 16)
    most = 1152921504606846976.0  # 2^60
    known_good = (step >= 1 / most) & (step <= most) & (middle < most) & (middle > -most)
    return q * (step * by) + middle, mask & (known_good == 0)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def restore_values(  # type: ignore[no-untyped-def]
    stream,
    sections,
    chosen,
    symbols,
    steps,  # float32: a profile's
    means,  # int16: a profile's
    cosines,  # float32 [tokens, pairs]
    sines,
    chunk,
    errors,
    tokens,
    row,
    head_size,
    pairs,
    interleaved,
    key_step,
    DTYPE: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    section, mine, t, c, inside, place = _tile(sections, chosen, tokens, row, TILE, WIDTH)
    first = tl.load(mine + FIRST).to(tl.int32)
    flags = tl.load(mine + FLAGS)
    heads = tl.load(mine + HEADS).to(tl.int32)
    coded, rows = t - first, tokens - first
    mask = inside & (coded >= 0)
    head, d = c // head_size, c % head_size
    # Both elements of a pair have the same head, and so the same step.
    level = tl.zeros([TILE, WIDTH], tl.int32)
    if (flags & 2) != 0:
        centre = tl.load(stream + tl.load(mine + CENTRES) + head + 0 * t, mask=mask, other=0)
        at = tl.load(mine + SYMBOLS) + coded.to(tl.int64) * heads + head
        level = tl.load(symbols + at, mask=mask, other=0).to(tl.int32)
        level += (centre.to(tl.int32) << 24) >> 24
    wild = mask & ((level < -120) | (level > 120))
    worst = tl.max(tl.max(wild.to(tl.int32), 1), 0)
    tl.atomic_or(errors + section, BAD_LEVEL, mask=worst != 0)
    by = power(tl.where(wild, 0, level))
    y, odd = _coded(
        stream, mine, symbols, steps, means, key_step, coded, c, by, mask, rows, head_size
    )
    worst = tl.max(tl.max(odd.to(tl.int32), 1), 0)
    tl.atomic_or(errors + section, BAD_STEP, mask=worst != 0)
    if (flags & 4) != 0:
        turned = mask & (d < 2 * pairs)
        pair, away = partner(d, pairs, interleaved)
        angle = t * pairs + pair
        cosine = tl.load(cosines + angle, mask=turned, other=1.0)
        sine = tl.load(sines + angle, mask=turned, other=0.0)
        other = tl.where(turned, c + away, c)
        z, odd = _coded(
            stream, mine, symbols, steps, means, key_step, coded, other, by, mask, rows, head_size
        )
        y = tl.where(turned, turn(y, z, cosine, sine, away), y)
    u = narrow(y, DTYPE)
    raw = inside & (coded < 0)
    at = stream + tl.load(mine + ELEMENTS)
    if DTYPE == 2:
        u = tl.where(raw, read32(at + 4 * c, raw), u)
    else:
        u = tl.where(raw, read16(at + 2 * c, raw), u)
    tl.store(chunk + place, u.to(chunk.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def restore_lossless(  # type: ignore[no-untyped-def]
    stream,
    sections,
    chosen,
    symbols,
    chunk,
    tokens,
    row,
    DTYPE: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    _, mine, t, c, inside, place = _tile(sections, chosen, tokens, row, TILE, WIDTH)
    channels = tl.load(mine + CHANNELS).to(tl.int32)
    below = tl.load(symbols + _symbol_at(mine, t, c, tokens), mask=inside, other=0).to(tl.int32)
    reference = tl.load(stream + tl.load(mine + REFERENCES) + c, mask=inside, other=0)
    exponent = tl.where(below >= 256, below - 256, reference.to(tl.int32) - below)
    at = stream + tl.load(mine + LOW) + t.to(tl.int64) * channels + c
    low = tl.load(at, mask=inside, other=0).to(tl.int32)
    if DTYPE == F16:
        plane = (channels + 7) // 8
        at = stream + tl.load(mine + HIGH) + t.to(tl.int64) * (3 * plane) + c // 8
        u = low | (exponent & 0x1F) << 10
        u |= (tl.load(at, mask=inside, other=0).to(tl.int32) >> c % 8 & 1) << 8
        u |= (tl.load(at + plane, mask=inside, other=0).to(tl.int32) >> c % 8 & 1) << 9
        u |= (tl.load(at + 2 * plane, mask=inside, other=0).to(tl.int32) >> c % 8 & 1) << 15
    else:
        u = (low & 0x7F) | (low & 0x80) << 8 | (exponent & 0xFF) << 7
    tl.store(chunk + place, u.to(chunk.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def restore_eight_bits(  # type: ignore[no-untyped-def]
    stream,
    sections,
    chosen,
    chunk,
    tokens,
    row,
    head_size,
    INTEGERS: tl.constexpr,  # or E4M3
    DTYPE: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    _, mine, t, c, inside, place = _tile(sections, chosen, tokens, row, TILE, WIDTH)
    heads, channels = tl.load(mine + HEADS), tl.load(mine + CHANNELS)
    scale_at = stream + tl.load(mine + SCALES) + 2 * (t * heads + c // head_size)
    scale = number(read16(scale_at, inside) << 16)
    at = stream + tl.load(mine + LOW) + t * channels + c
    v = tl.load(at, mask=inside, other=0).to(tl.uint32)
    if INTEGERS:
        y = ((v << 24).to(tl.int32, bitcast=True) >> 24).to(tl.float32)
    else:
        magnitude = number((v & 0x7F) << 20) * 1329227995784915872903807060280344576.0  # 2^120
        y = number(bits(magnitude) | (v & 0x80) << 24)
    u = narrow(y * scale, DTYPE)
    tl.store(chunk + place, u.to(chunk.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def restore_raw(  # type: ignore[no-untyped-def]
    stream,
    sections,
    chosen,
    chunk,
    tokens,
    row,
    DTYPE: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    _, mine, t, c, inside, place = _tile(sections, chosen, tokens, row, TILE, WIDTH)
    at = t * tl.load(mine + CHANNELS) + c
    start = stream + tl.load(mine + ELEMENTS)
    if DTYPE == 2:
        u = read32(start + 4 * at, inside)
    elif DTYPE == 3:
        u = tl.load(start + at, mask=inside, other=0).to(tl.uint32)
    else:
        u = read16(start + 2 * at, inside)
    tl.store(chunk + place, u.to(chunk.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def patch(  # type: ignore[no-untyped-def]
    stream,
    sections,
    chosen,
    chunk,
    errors,
    tokens,
    row,
    TILE: tl.constexpr,
):
    """Elements that aren't finite, last. If one is named twice, which stays isn't said."""
    section = tl.load(chosen + tl.program_id(0))
    mine = sections + section * COLUMNS
    count, channels = tl.load(mine + PATCH_COUNT), tl.load(mine + CHANNELS)
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = i < count
    at = stream + tl.load(mine + PATCHES) + i.to(tl.int64) * 8
    position = read32(at, mask).to(tl.int64)
    t, c = position // channels, position % channels
    inside = mask & (t < tokens)
    wild = tl.max((mask & (t >= tokens)).to(tl.int32), 0)
    tl.atomic_or(errors + section, BAD_PATCH, mask=wild != 0)
    u = read32(at + 4, inside)
    place = tl.load(mine + CHUNK) + t * row + c
    tl.store(chunk + place, u.to(chunk.dtype.element_ty), mask=inside)
