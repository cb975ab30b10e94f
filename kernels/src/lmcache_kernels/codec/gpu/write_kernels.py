"""Puts an encoder's sections together, in Triton. **Not run on hardware.**

``fields`` say what became of each section, ``payload`` is what follows a stream's directory. A
program writes only inside of the section's bytes.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]

from lmcache_kernels.codec.gpu.columns import (
    AT,
    BYTES,
    CHANNEL,
    CHANNELS,
    CHUNK,
    COLUMNS,
    ESCAPES,
    FIELDS,
    FLAGS,
    HEAD,
    HEADS,
    MODE,
    NUMBERS,
    PATCHES,
    TOKEN_HEAD,
    WORDS,
)
from lmcache_kernels.codec.gpu.numbers import F16, element, odd


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _put(to, source, count, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """``count`` integers of ``SIZE`` bytes, little-endian, at any address. Where the next goes."""
    for start in range(0, count, 128):
        i = start + tl.arange(0, 128)
        mask = i < count
        u = tl.load(source + i, mask=mask, other=0).to(tl.uint32)
        for b in tl.static_range(SIZE):
            tl.store(to + i * SIZE + b, (u >> (8 * b)).to(tl.uint8), mask=mask)
    return to + count * SIZE


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def write_values(  # type: ignore[no-untyped-def]
    chunk,
    sections,
    fields,
    states,
    steps,  # int32, by head: bits
    means,
    tables,
    centres,
    step_tables,
    escapes,
    words,
    ends,  # int64, by section: where its room for words and escapes ends
    payload,
    SIZE: tl.constexpr,  # bytes of an element
):
    section = tl.program_id(0)
    mine, found = sections + section * COLUMNS, fields + section * FIELDS
    if tl.load(found + MODE) == 2:
        flags = tl.load(found + FLAGS)
        heads = tl.load(mine + HEADS).to(tl.int32)
        channels = tl.load(mine + CHANNELS).to(tl.int32)
        escape_count = tl.load(found + ESCAPES).to(tl.int32)
        word_count = tl.load(found + WORDS).to(tl.int32)
        end, channel = tl.load(ends + section), tl.load(mine + CHANNEL)
        scaled = ((flags & 2) != 0).to(tl.int32)
        to = payload + tl.load(found + AT)
        to = _put(to, states + section * 32, 32, 4)
        own = ((flags & 8) == 0).to(tl.int32)
        to = _put(to, steps + tl.load(mine + HEAD), heads * own, 4)
        own = ((flags & 16) == 0).to(tl.int32)
        to = _put(to, means + channel, channels * own, 2)
        to = _put(to, tables + channel, channels, 1)
        to = _put(to, centres + tl.load(mine + HEAD), heads * scaled, 1)
        to = _put(to, step_tables + section, scaled, 1)
        raw = (flags & 1).to(tl.int32)
        to = _put(to, chunk + tl.load(mine + CHUNK), channels * raw, SIZE)
        to = _put(to, escapes + end - escape_count, escape_count, 2)
        to += tl.load(found + PATCHES) * 8
        _put(to, words + end - word_count, word_count, 2)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def write_lossless(  # type: ignore[no-untyped-def]
    sections,
    fields,
    states,
    references,
    tables,
    escapes,
    words,
    ends,
    payload,
):
    """All but the planes that aren't coded."""
    section = tl.program_id(0)
    mine, found = sections + section * COLUMNS, fields + section * FIELDS
    if tl.load(found + MODE) == 1:
        channels = tl.load(mine + CHANNELS).to(tl.int32)
        escape_count = tl.load(found + ESCAPES).to(tl.int32)
        word_count = tl.load(found + WORDS).to(tl.int32)
        end, channel = tl.load(ends + section), tl.load(mine + CHANNEL)
        to = payload + tl.load(found + AT)
        to = _put(to, states + section * 32, 32, 4)
        to = _put(to, references + channel, channels, 1)
        to = _put(to, tables + channel, channels, 1)
        to = _put(to, escapes + end - escape_count, escape_count, 2)
        _put(to, words + end - word_count, word_count, 2)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def write_planes(  # type: ignore[no-untyped-def]
    chunk,
    sections,
    fields,
    payload,
    tokens,
    row,
    DTYPE: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Signs and mantissas of sections without loss, at the section's end."""
    section = tl.program_id(0)
    mine, found = sections + section * COLUMNS, fields + section * FIELDS
    if tl.load(found + MODE) == 1:
        channels = tl.load(mine + CHANNELS).to(tl.int32)
        t = (tl.program_id(1) * TILE + tl.arange(0, TILE))[:, None]
        c = (tl.program_id(2) * WIDTH + tl.arange(0, WIDTH))[None, :]
        wide = t.to(tl.int64)
        at = tl.load(mine + CHUNK) + wide * row
        end = payload + tl.load(found + AT) + tl.load(found + BYTES)
        mask = (t < tokens) & (c < channels)
        u = element(chunk, at + c, mask)
        if DTYPE == F16:
            plane = (channels + 7) // 8
            high = end - 3 * tokens * plane.to(tl.int64)
            to = high - tokens * channels.to(tl.int64) + wide * channels + c
            tl.store(to, (u & 0xFF).to(tl.uint8), mask=mask)
            inside = (t < tokens) & (c < plane)
            eight = tl.zeros([TILE, WIDTH], tl.uint32)
            nine = eight
            sign = eight
            for i in tl.static_range(8):
                u = element(chunk, at + c * 8 + i, inside & (c * 8 + i < channels))
                eight |= (u >> 8 & 1) << i
                nine |= (u >> 9 & 1) << i
                sign |= (u >> 15 & 1) << i
            to = high + wide * (3 * plane) + c
            tl.store(to, eight.to(tl.uint8), mask=inside)
            tl.store(to + plane, nine.to(tl.uint8), mask=inside)
            tl.store(to + 2 * plane, sign.to(tl.uint8), mask=inside)
        else:
            to = end - tokens * channels.to(tl.int64) + wide * channels + c
            u = (u & 0x7F) | (u >> 15 & 1) << 7
            tl.store(to, u.to(tl.uint8), mask=mask)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def write_eight_bits(  # type: ignore[no-untyped-def]
    sections,
    fields,
    scales,
    low,
    payload,
    tokens,
):
    section = tl.program_id(0)
    mine, found = sections + section * COLUMNS, fields + section * FIELDS
    if tl.load(found + MODE) > 2:
        heads, channels = tl.load(mine + HEADS), tl.load(mine + CHANNELS)
        to = payload + tl.load(found + AT)
        to = _put(to, scales + tl.load(mine + TOKEN_HEAD), (tokens * heads).to(tl.int32), 2)
        _put(to, low + tl.load(mine + NUMBERS), (tokens * channels).to(tl.int32), 1)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def write_patches(  # type: ignore[no-untyped-def]
    chunk,
    sections,
    fields,
    payload,
    tokens,
    row,
    DTYPE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """What isn't finite, in the order of tokens and channels. Words are the only part behind."""
    section = tl.program_id(0)
    mine, found = sections + section * COLUMNS, fields + section * FIELDS
    if tl.load(found + PATCHES) > 0:
        channels = tl.load(mine + CHANNELS).to(tl.int32)
        behind = tl.load(found + PATCHES) * 8 + tl.load(found + WORDS) * 2
        to = payload + tl.load(found + AT) + tl.load(found + BYTES) - behind
        done = tl.zeros([1], tl.int32)
        for t in range(tokens):
            for start in range(0, channels, WIDTH):
                c = start + tl.arange(0, WIDTH)
                mask = c < channels
                place = tl.load(mine + CHUNK) + (tl.zeros([1], tl.int64) + row) * t + c
                u = element(chunk, place, mask)
                strange = mask & odd(u, DTYPE)
                at = done + tl.cumsum(strange.to(tl.int32), 0) - 1
                position = (t * channels + c).to(tl.uint32)
                for b in tl.static_range(4):
                    here = to + at.to(tl.int64) * 8 + b
                    tl.store(here, (position >> (8 * b)).to(tl.uint8), mask=strange)
                    tl.store(here + 4, (u >> (8 * b)).to(tl.uint8), mask=strange)
                done += tl.sum(strange.to(tl.int32), 0)


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def write_raw(  # type: ignore[no-untyped-def]
    chunk,
    sections,
    fields,
    payload,
    tokens,
    row,
    SIZE: tl.constexpr,  # bytes of an element
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    section = tl.program_id(0)
    mine, found = sections + section * COLUMNS, fields + section * FIELDS
    if tl.load(found + MODE) == 0:
        channels = tl.load(mine + CHANNELS)
        t = (tl.program_id(1) * TILE + tl.arange(0, TILE)).to(tl.int64)[:, None]
        c = (tl.program_id(2) * WIDTH + tl.arange(0, WIDTH))[None, :]
        mask = (t < tokens) & (c < channels)
        u = element(chunk, tl.load(mine + CHUNK) + t * row + c, mask)
        to = payload + tl.load(found + AT) + (t * channels + c) * SIZE
        for b in tl.static_range(SIZE):
            tl.store(to + b, (u >> (8 * b)).to(tl.uint8), mask=mask)
