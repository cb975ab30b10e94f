"""Decodes streams as docs/codec-format.md describes them, plainly and slowly.

Shares the tables with the C++, as the page does, and nothing else.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

TABLES = Path(__file__).parent.parent / "csrc/codec/tables.inc"
ITEM = (2, 2, 4, 1)
_F32 = np.float32
_QUARTERS = np.array([0x3F800000, 0x3F9837F0, 0x3FB504F3, 0x3FD744FD], "<u4").view("<f4")


def _frequencies() -> tuple[list[list[int]], list[list[int]]]:
    text = TABLES.read_text()
    found = []
    for name, symbols in (("kValueFrequencies", 128), ("kExponentFrequencies", 16)):
        body = text[text.index(name) :]
        numbers = [int(n) for n in re.findall(r"\d+", body[body.index("=") : body.index("};")])]
        found.append([numbers[i : i + symbols] for i in range(0, len(numbers), symbols)])
    return found[0], found[1]


VALUES, EXPONENTS = _frequencies()


@dataclass(frozen=True)
class Numbers:
    """What a profile says: float32 and bfloat16 of layers x heads x dims; bases of binary16."""

    steps: np.ndarray
    means: np.ndarray
    key_means: np.ndarray | None = None
    key_bases: Sequence[Sequence[np.ndarray]] = ()
    value_bases: Sequence[Sequence[np.ndarray]] = ()


class _Parts:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int, dtype: str = "u1") -> np.ndarray:
        size = count * np.dtype(dtype).itemsize
        assert self.at + size <= len(self.data)
        found = np.frombuffer(self.data[self.at : self.at + size], dtype)
        self.at += size
        return found


def _slots(frequencies: list[int]) -> list[tuple[int, int, int]]:
    """For each slot: symbol, frequency, slot - start."""
    return [(s, f, i) for s, f in enumerate(frequencies) for i in range(f)]


def _rans(
    states: np.ndarray, words: np.ndarray, passes: list[tuple[int, list[list[int]]]]
) -> list[np.ndarray]:
    x, at, found = [int(state) for state in states], 0, []
    for rows, tables in passes:
        made = {tuple(table): _slots(table) for table in tables}
        slots = [made[tuple(table)] for table in tables]
        symbols = np.zeros((rows, 32), "i4")
        for row in range(rows):
            for lane in range(32):
                symbol, f, rest = slots[lane][x[lane] % 1024]
                x[lane] = f * (x[lane] // 1024) + rest
                if x[lane] < 65536:
                    x[lane] = x[lane] * 65536 + int(words[at])
                    at += 1
                symbols[row, lane] = symbol
        found.append(symbols)
    assert at == len(words)
    assert x == [65536] * 32
    return found


def _resolve(
    passes: list[np.ndarray], escape: int, values: np.ndarray, zero: int
) -> list[np.ndarray]:
    left = iter(values.tolist())
    found = []
    for symbols in passes:
        out = symbols - zero
        for place in np.argwhere(symbols == escape):
            out[tuple(place)] = next(left)
        found.append(out)
    assert next(left, None) is None
    return found


def _widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype("<u4") << 16).view("<f4")


def _narrow(dtype: int, y: np.ndarray) -> np.ndarray:
    if dtype == 0:
        u = y.view("<u4").astype("u8")
        return ((u + 0x7FFF + (u >> 16 & 1)) >> 16).astype("<u2")
    if dtype == 1:
        return np.clip(y, -65504, 65504).astype("<f2").view("<u2")
    return y.view("<u4")


def _patch(block: np.ndarray, patches: np.ndarray) -> None:
    for position, bits in patches.reshape(-1, 2).tolist():
        block.reshape(-1)[position] = bits & (2 ** (8 * block.itemsize) - 1)


def decode(stream: bytes, profile: Numbers | None = None) -> bytes:
    """The chunk."""
    magic, version, _, dtype, layers, planes, flags, heads, size, tokens, pairs = (
        struct.unpack_from("<4sHBBIHHIIII", stream)
    )
    key_step, _, tables, block_heads, count, _, start, check = struct.unpack_from(
        "<ffHHIQII", stream, 32
    )
    assert (magic, version, tables) == (b"KVC1", 1, 1)
    directory = 64 + 16 * pairs
    payload = directory + 32 * count
    head = stream[:60] + bytes(4) + stream[64:payload]
    assert xxhash.xxh3_64_intdigest(head) & 0xFFFFFFFF == check
    turns = np.frombuffer(stream[64:directory], "<f8").reshape(pairs, 2)
    chunk = np.zeros((layers, planes, tokens, heads, size), f"<u{ITEM[dtype]}")
    places = [
        (layer, plane, slice(first, min(first + block_heads, heads)))
        for layer in range(layers)
        for plane in range(planes)
        for first in range(0, heads, block_heads)
    ]
    assert len(places) == count
    end = 0
    for i, (layer, plane, mine) in enumerate(places):
        entry = struct.unpack_from("<QIIIIIBBH", stream, directory + 32 * i)
        offset, size_, words, escapes, patches, check, mode, mode_flags, zero = entry
        assert (offset, zero) == (end, 0)
        end += size_
        data = stream[payload + offset : payload + end]
        assert xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF == check
        parts = _Parts(data)
        here = chunk[layer, plane, :, mine]
        channels = here.shape[1] * size
        numbers = (words, escapes, patches)
        if mode == 0:
            block = parts.take(tokens * channels, chunk.dtype.str).reshape(tokens, channels)
        elif mode == 1:
            block = _lossless(parts, dtype, tokens, channels, numbers)
        elif mode == 2:
            own = None
            if profile is not None:
                own = _own(profile, layer, plane, mine, block_heads, key_step)
            block = _values(
                parts,
                dtype,
                tokens,
                here.shape[1],
                size,
                numbers,
                mode_flags,
                turns,
                flags,
                start,
                own,
            )
        else:
            block = _bytes(parts, dtype, mode, tokens, here.shape[1], size, patches)
        assert parts.at == size_
        chunk[layer, plane, :, mine] = block.reshape(here.shape)
    assert payload + end == len(stream)
    return chunk.tobytes()


@dataclass(frozen=True)
class _Own:
    """A profile's numbers for a section."""

    steps: np.ndarray
    means: np.ndarray | None
    basis: np.ndarray | None


def _own(
    profile: Numbers, layer: int, plane: int, heads: slice, block_heads: int, step: float
) -> _Own:
    means = (profile.key_means, profile.means)[plane]
    bases = (profile.key_bases, profile.value_bases)[plane]
    return _Own(
        profile.steps[layer, heads].reshape(-1) * _F32(step),
        None if means is None else means[layer, heads].reshape(-1),
        bases[layer][heads.start // block_heads] if bases else None,
    )


def _channel_passes(
    ids: np.ndarray, family: list[list[int]], rows: int, other: list[int]
) -> Iterator[tuple[int, list[list[int]]]]:
    tables = [family[i] for i in ids] + [other] * (-len(ids) % 32)
    for g in range(0, len(tables), 32):
        yield rows, tables[g : g + 32]


def _lossless(
    parts: _Parts, dtype: int, tokens: int, channels: int, numbers: tuple[int, int, int]
) -> np.ndarray:
    words, escapes, _ = numbers
    states = parts.take(32, "<u4")
    references = parts.take(channels).astype("i4")
    ids = parts.take(channels)
    values = parts.take(escapes, "<i2")
    coded = parts.take(words, "<u2")
    other = max(EXPONENTS, key=lambda table: table[0])
    symbols = _rans(states, coded, list(_channel_passes(ids, EXPONENTS, tokens, other)))
    # An escape is the exponent itself.
    exponents = []
    left = iter(values.tolist())
    for g, one in enumerate(symbols):
        padded = np.zeros(32, "i4")
        part = references[32 * g : 32 * g + 32]
        padded[: len(part)] = part
        out = padded - one
        for place in np.argwhere(one == 15):
            out[tuple(place)] = next(left)
        exponents.append(out)
    e = np.concatenate(exponents, 1)[:, :channels].astype("u4")
    low = parts.take(tokens * channels).reshape(tokens, channels).astype("u4")
    if dtype == 0:
        return ((low & 0x7F) | (low & 0x80) << 8 | (e & 0xFF) << 7).astype("<u2")
    high = parts.take(3 * tokens * ((channels + 7) // 8)).reshape(tokens, 3, -1)
    bits = np.unpackbits(high, axis=2, bitorder="little")[:, :, :channels].astype("u4")
    rest = bits[:, 0] << 8 | bits[:, 1] << 9 | bits[:, 2] << 15
    return (low | rest | (e & 0x1F) << 10).astype("<u2")


def _values(
    parts: _Parts,
    dtype: int,
    tokens: int,
    heads: int,
    size: int,
    numbers: tuple[int, int, int],
    flags: int,
    turns: np.ndarray,
    stream_flags: int,
    start: int,
    own: _Own | None,
) -> np.ndarray:
    words, escapes, patch_count = numbers
    channels, first = heads * size, flags & 1
    rows = tokens - first
    states = parts.take(32, "<u4")
    step = own.steps if own and flags & 8 else np.repeat(parts.take(heads, "<f4"), size)
    mean = _widen(own.means if own and flags & 16 else parts.take(channels, "<u2"))  # type: ignore[arg-type]
    ids = parts.take(channels)
    centres = parts.take(heads, "i1").astype("i4") if flags & 2 else np.zeros(heads, "i4")
    passes: list[tuple[int, list[list[int]]]] = []
    if flags & 2:
        passes.append((-(-rows * heads // 32), [VALUES[parts.take(1)[0]]] * 32))
    passes += _channel_passes(ids, VALUES, rows, VALUES[0])
    item = f"<u{ITEM[dtype]}"
    raw = parts.take(first * channels, item)
    values = parts.take(escapes, "<i2")
    patches = parts.take(2 * patch_count, "<u4")
    resolved = _resolve(_rans(states, parts.take(words, "<u2"), passes), 0, values, 64)
    level = np.tile(centres, (rows, 1))
    if flags & 2:
        level = level + resolved.pop(0).reshape(-1)[: rows * heads].reshape(rows, heads)
    q = np.concatenate(resolved, 1)[:, :channels].astype("f4")
    scale = np.ldexp(_QUARTERS[level % 4], level // 4).astype("f4").repeat(size, 1)
    if flags & 32:
        assert own is not None
        assert own.basis is not None
        q = _from_components(q, own.basis.astype("f4"))
    y = (q * (step * scale) + mean).astype("f4")
    if flags & 4:
        y = y.reshape(rows, heads, size)
        y = _turn(y, turns, start, first, bool(stream_flags & 1)).reshape(rows, channels)
    block = np.zeros((tokens, channels), item)
    block[:first] = raw.reshape(first, channels)
    block[first:] = _narrow(dtype, np.ascontiguousarray(y))
    _patch(block, patches)
    return block


def _from_components(q: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Sums over components, one after the other, each product and each sum rounded."""
    sums = np.zeros_like(q)
    for k in range(q.shape[1]):
        sums = sums + q[:, k : k + 1] * basis[:, k]
    return sums


def _turn(
    y: np.ndarray, turns: np.ndarray, start: int, first: int, interleaved: bool
) -> np.ndarray:
    pairs = len(turns)
    c1, s1 = turns[:, 0], turns[:, 1]
    c, s = np.ones(pairs), np.zeros(pairs)
    for bit in range(31, -1, -1):
        c, s = c * c - s * s, s * c + c * s
        if start >> bit & 1:
            c, s = c * c1 - s * s1, s * c1 + c * s1
    for t in range(first + len(y)):
        if t >= first:
            row = y[t - first]
            a = slice(0, 2 * pairs, 2) if interleaved else slice(0, pairs)
            b = slice(1, 2 * pairs, 2) if interleaved else slice(pairs, 2 * pairs)
            x, z, cos, sin = row[:, a].copy(), row[:, b].copy(), c.astype("f4"), s.astype("f4")
            row[:, a] = x * cos - z * sin + _F32(0)
            row[:, b] = z * cos + x * sin + _F32(0)
        c, s = c * c1 - s * s1, s * c1 + c * s1
    return y


def _bytes(
    parts: _Parts, dtype: int, mode: int, tokens: int, heads: int, size: int, patches: int
) -> np.ndarray:
    scale = _widen(parts.take(tokens * heads, "<u2")).repeat(size).reshape(tokens, -1)
    v = parts.take(tokens * heads * size).reshape(tokens, -1)
    if mode == 3:
        y = v.view("i1").astype("f4") * scale
    else:
        exponent, mantissa = (v >> 3 & 0xF).astype("i4"), (v & 7).astype("f4")
        tiny = mantissa * _F32(2**-9)
        a = np.where(exponent == 0, tiny, np.ldexp(1 + mantissa / 8, exponent - 7)).astype("f4")
        y = np.where(v & 0x80, -a, a) * scale
    block = _narrow(dtype, np.ascontiguousarray(y.astype("f4")))
    _patch(block, parts.take(2 * patches, "<u4"))
    return block
