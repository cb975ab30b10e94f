"""Coding of sections, in Triton: without loss, of 8 bits, and rANS. **Not run on hardware.**

A section's words and escapes are written from the end of its room backwards, as rANS does: in a
stream they lie in the order in which a decoder needs them. ``words`` and ``escapes`` have a place
for each symbol, where the section's symbols are in ``symbols``.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]

from lmcache_kernels.codec.gpu.columns import (
    CHANNEL,
    CHANNELS,
    CHUNK,
    COLUMNS,
    HEADS,
    KEYS,
    NUMBERS,
    SYMBOLS,
    TOKEN_HEAD,
)
from lmcache_kernels.codec.gpu.numbers import F16, bits, element, nearest, number, odd, widen

_STATE: tl.constexpr = tl.constexpr(65536)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _symbol(value, limit, LOSSLESS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The symbol of a number, or of an exponent, and whether it is an escape."""
    if LOSSLESS:
        symbol = tl.minimum((limit - value) & 0xFF, 15)
        escape = symbol == 15
    else:
        symbol = tl.where((value <= limit) & (value >= -limit), value + 64, 0)
        escape = symbol == 0
    return symbol, escape


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def encode_symbols(  # type: ignore[no-untyped-def]
    sections,
    count,  # of sections
    first,  # int32 [1]: tokens that are stored raw
    symbols,  # int16: integers, or exponents
    tables,  # uint8, by channel
    step_tables,  # uint8, by section
    references,  # uint8, by channel
    radii,  # int32 [32]
    codes,  # int32 [96, 128]: start << 16 | frequency
    bad,  # by section: nothing is coded
    ends,  # int64, by section: where its room for words and escapes ends
    states,  # int32 [sections, 32]
    words,  # int16
    escapes,  # int16
    word_counts,  # int32, by section
    escape_counts,
    tokens,
    passes,  # of the section that has most
    FIRST_TABLE: tl.constexpr,
    LOSSLESS: tl.constexpr,
    STREAMS: tl.constexpr,  # sections of one program
):
    section = tl.program_id(0) * STREAMS + tl.arange(0, STREAMS)
    there = section < count
    mine = sections + tl.where(there, section, 0) * COLUMNS
    lane = tl.arange(0, 32)[None, :]
    good = there & (tl.load(bad + section, mask=there, other=1) == 0)
    raw = tl.load(first)
    rows = tl.where(good, tokens - raw, 0)
    channels = tl.load(mine + CHANNELS).to(tl.int32)
    step_rows = tl.zeros([STREAMS], tl.int32)
    if not LOSSLESS:
        step_rows = (rows * tl.load(mine + HEADS).to(tl.int32) + 31) // 32
        step_rows = tl.where(tl.load(mine + KEYS) == 0, step_rows, 0)
    start = tl.load(mine + SYMBOLS)
    mine_passes = (channels + 31) // 32
    end = tl.load(ends + section, mask=there, other=0)
    x = tl.full([STREAMS, 32], 65536, tl.uint32)
    given = tl.zeros([STREAMS], tl.int32)
    escaped = tl.zeros([STREAMS], tl.int32)
    for back in range(passes + 1):
        p = passes - back
        length = tl.where(p == 0, step_rows, rows)
        length = tl.where(p <= mine_passes, length, 0)
        skipped = tl.where(p == 0, 0, step_rows + (p - 1) * rows.to(tl.int64))
        channel = (tl.load(mine + CHANNEL) + (p - 1) * 32)[:, None] + lane
        coded = (length > 0)[:, None] & (lane >= 0)
        at = step_tables + section[:, None] + 0 * lane if p == 0 else tables + channel
        table = tl.load(at, mask=coded, other=0).to(tl.int32)
        # What symbols are counted from, or how large a number has one.
        known = references + channel if LOSSLESS else radii + table
        limit = tl.load(known, mask=coded, other=0).to(tl.int32)
        row = symbols + (start + skipped * 32)[:, None] + lane
        for r in range(tl.max(length, 0)):
            active = coded & (r < length)[:, None]
            place = (length - 1 - r).to(tl.int64)[:, None] * 32
            value = tl.load(row + place, mask=active, other=0).to(tl.int32)
            symbol, escape = _symbol(value, limit, LOSSLESS)
            escape = active & escape
            code = codes + (FIRST_TABLE + table) * 128 + symbol
            e = tl.load(code, mask=active, other=1).to(tl.uint32)
            f = e & 0xFFFF
            need = active & (x >= f << 22)
            # Counted at once, in bytes of their own: there are 32 at most.
            counts = need.to(tl.int32) | escape.to(tl.int32) << 8
            place, total = tl.cumsum(counts, 1) - counts, tl.sum(counts, 1)
            given += total & 0xFF
            escaped += total >> 8
            tl.store(words + (end - given)[:, None] + (place & 0xFF), x.to(tl.int16), mask=need)
            to = escapes + (end - escaped)[:, None] + (place >> 8)
            tl.store(to, value.to(tl.int16), mask=escape)
            y = tl.where(need, x >> 16, x)
            y = ((y // f) << 10) + y % f + (e >> 16)
            x = tl.where(active, y, x)
    place = states + section[:, None] * 32 + lane
    tl.store(place, x.to(tl.int32, bitcast=True), mask=there[:, None] & (lane >= 0))
    tl.store(word_counts + section, given, mask=there)
    tl.store(escape_counts + section, escaped, mask=there)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def choose_exponents(  # type: ignore[no-untyped-def]
    chunk,
    sections,
    costs,  # int32 [16, 64]
    symbols,  # int16: exponents
    references,
    tables,
    tokens,
    row,
    DTYPE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Exponents of 32 channels, the largest of each, and the table that is cheapest for it."""
    mine = sections + tl.program_id(0) * COLUMNS
    channels = tl.load(mine + CHANNELS).to(tl.int32)
    p, lane = tl.program_id(1), tl.arange(0, 32)
    c = p * 32 + lane
    mask = c < channels
    if p * 32 < channels:
        wide = tl.zeros([1, 1], tl.int64)
        at = tl.load(mine + CHUNK) + c[None, :] + wide
        most = tl.zeros([32], tl.int32)
        for start in range(0, tokens, TILE):
            t = (start + tl.arange(0, TILE))[:, None]
            u = element(chunk, at + (wide + row) * t, mask[None, :] & (t < tokens))
            exponent = (u >> 10 & 0x1F) if DTYPE == F16 else (u >> 7 & 0xFF)
            most = tl.maximum(most, tl.max(exponent.to(tl.int32), 0))
        tl.store(references + tl.load(mine + CHANNEL) + c, most.to(tl.uint8))
        to = symbols + tl.load(mine + SYMBOLS) + p.to(tl.int64) * tokens * 32 + lane[None, :]
        kinds = tl.arange(0, 16)[None, :]
        counts = tl.zeros([32, 16], tl.int32)
        for start in range(0, tokens, TILE):
            t = (start + tl.arange(0, TILE))[:, None]
            u = element(chunk, at + (wide + row) * t, mask[None, :] & (t < tokens))
            exponent = ((u >> 10 & 0x1F) if DTYPE == F16 else (u >> 7 & 0xFF)).to(tl.int32)
            tl.store(to + (wide + 32) * t, exponent.to(tl.int16), mask=(lane >= 0) & (t < tokens))
            symbol = tl.minimum((most[None, :] - exponent) & 0xFF, 15)
            symbol = tl.where(t < tokens, symbol, 16)
            same = symbol[:, :, None] == kinds[:, None, :]
            counts += tl.sum(same.to(tl.int32), 0)
        total = tl.zeros([32, 64], tl.int32)
        for s in range(16):
            times = tl.sum(tl.where(kinds == s, counts, 0), 1)
            cost = tl.load(costs + s * 64 + tl.arange(0, 64))
            total += times[:, None] * cost[None, :]
        table = tl.argmin(total, 1, tie_break_left=True)
        tl.store(tables + tl.load(mine + CHANNEL) + c, table.to(tl.uint8))


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def to_eight_bits(  # type: ignore[no-untyped-def]
    chunk,
    sections,
    scales,  # int16, by token and head: bfloat16's bits
    low,  # uint8, where the numbers would be
    patches,  # int32, by section: how many elements aren't finite
    tokens,
    row,
    head_size,
    INTEGERS: tl.constexpr,  # or E4M3
    DTYPE: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Some tokens of a head: each has a scale, rounded up to bfloat16 so that the largest fits."""
    section, h = tl.program_id(0), tl.program_id(2)
    mine = sections + section * COLUMNS
    heads = tl.load(mine + HEADS)
    if h < heads:
        t = tl.program_id(1) * TILE + tl.arange(0, TILE)
        wide = t.to(tl.int64)
        at = (tl.load(mine + CHUNK) + h * head_size + wide * row)[:, None]
        most = tl.zeros([TILE], tl.int32)
        strange = tl.zeros([TILE], tl.int32)
        for start in range(0, head_size, WIDTH):
            d = (start + tl.arange(0, WIDTH))[None, :]
            mask = (t < tokens)[:, None] & (d < head_size)
            u = element(chunk, at + d, mask)
            x = widen(u, DTYPE)
            strange += tl.sum((mask & odd(u, DTYPE)).to(tl.int32), 1)
            most = tl.maximum(most, tl.max((bits(x) & 0x7FFFFFFF).to(tl.int32), 1))
        tl.atomic_add(patches + section, tl.sum(strange, 0))
        limit = tl.full([TILE], 127.0 if INTEGERS else 448.0, tl.float32)
        u = bits(tl.div_rn(number(most), limit)) + 0xFFFF
        scale = number(u >> 16 << 16)
        scale = tl.where(scale > 7.6e-37, scale, 0.0)  # below 2^-120 everything is 0
        to = scales + tl.load(mine + TOKEN_HEAD) + wide * heads + h
        tl.store(to, (bits(scale) >> 16).to(tl.int16), mask=t < tokens)
        one = tl.full([TILE], 1.0, tl.float32)
        inverse = tl.div_rn(one, tl.where(scale > 0.0, scale, 1.0))
        inverse = tl.where(scale > 0.0, inverse, 0.0)[:, None]
        to = tl.load(mine + NUMBERS) + h * head_size + wide * tl.load(mine + CHANNELS)
        for start in range(0, head_size, WIDTH):
            d = (start + tl.arange(0, WIDTH))[None, :]
            mask = (t < tokens)[:, None] & (d < head_size)
            x = widen(element(chunk, at + d, mask), DTYPE) * inverse
            if INTEGERS:
                x = tl.where(x < 127.0, x, 127.0)
                v = nearest(tl.where(x > -127.0, x, -127.0))
            else:
                v = _e4m3(x).to(tl.int32)
            tl.store(low + to[:, None] + d, v.to(tl.uint8), mask=mask)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _e4m3(x):  # type: ignore[no-untyped-def]
    """OCP 8-bit floating point: bias 7, no infinities, largest 448."""
    a = number(bits(x) & 0x7FFFFFFF)
    a = tl.where(a < 448.0, a, 448.0)
    tiny = bits(a + 16384.0) - 0x46800000  # in units of 2^-9
    u = bits(a)
    normal = ((u + 0x7FFFF + (u >> 20 & 1)) >> 20) - (120 << 3)
    return (bits(x) >> 24 & 0x80) | tl.where(a < 0.015625, tiny, normal)
