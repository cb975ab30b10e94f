"""Where everything of a stream lies: what the host reads and writes of one.

Knows headers, directories, checksums and the lengths of sections' parts. Knows nothing about
symbols, and needs neither torch nor triton. Nothing of a stream is believed before it is checked:
every offset that comes out of here lies inside of the stream.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from lmcache_kernels import _native

LOSSLESS, VALUES, INT8, E4M3 = 1, 2, 3, 4
"""Numbers of codecs, and of the modes of their sections."""
RAW = 0
FIRST_RAW, TOKEN_STEPS, ROTATED, PROFILE_STEPS, PROFILE_MEANS = 1, 2, 4, 8, 16
BF16, F16, F32, BYTES = 0, 1, 2, 3
LANES = 32

_HEADER = struct.Struct("<4sHBBIHHIIIIffHHIQII")
_SECTION = struct.Struct("<QIIIIIBBH")
_CHECKSUM_AT = _HEADER.size - 4
_MAGIC, _VERSION, _TABLE_SET, _INTERLEAVED = b"KVC1", 1, 1, 1
_FLAGS = 31
_MOST_CHANNELS, _MOST_SYMBOLS = 65535, 1 << 30


@dataclass(frozen=True)
class Shape:
    """A chunk: layers x planes x tokens x heads x head size."""

    dtype: int
    layers: int
    planes: int
    heads: int
    head_size: int
    tokens: int

    @property
    def itemsize(self) -> int:
        return (2, 2, 4, 1)[self.dtype]

    @property
    def row(self) -> int:
        """Elements of one token in a plane."""
        return self.heads * self.head_size

    @property
    def nbytes(self) -> int:
        return self.layers * self.planes * self.tokens * self.row * self.itemsize


@dataclass(frozen=True)
class Block:
    """One section's place in a chunk: `heads` heads of a layer's plane."""

    layer: int
    plane: int
    first_head: int
    heads: int
    channels: int
    keys: bool

    @property
    def passes(self) -> int:
        return -(-self.channels // LANES)

    def codable(self, tokens: int) -> bool:
        """Whether a section of another mode than raw may be so large."""
        width = self.passes * LANES
        return self.channels <= _MOST_CHANNELS and tokens * width <= _MOST_SYMBOLS


def block_heads(shape: Shape) -> int:
    """How many heads an encoder puts into a section: about 128 channels."""
    few = 128 // shape.head_size if shape.head_size < 128 else 1
    blocks = shape.heads // few if shape.heads > few else 1
    return -(-shape.heads // blocks)


def blocks(shape: Shape, each: int, layers: range) -> list[Block]:
    """The sections of ``layers``, in the order of a stream; ``each`` has so many heads."""
    return [
        Block(layer, plane, first, count, count * shape.head_size, shape.planes == 2 and plane == 0)
        for layer in layers
        for plane in range(shape.planes)
        for first in range(0, shape.heads, each)
        for count in (min(each, shape.heads - first),)
    ]


@dataclass(frozen=True)
class Header:
    """What a stream says of all its sections."""

    interleaved: bool
    pairs: int
    key_step: float
    value_step: float
    block_heads: int
    profile: int
    turns: tuple[float, ...]
    """The cosine and the sine of each pair's angle for one token."""


@dataclass(frozen=True)
class Entry:
    """A section of a stream, by its place in the stream."""

    at: int
    nbytes: int
    words: int = 0
    escapes: int = 0
    patches: int = 0
    mode: int = RAW
    flags: int = 0


def read(
    data: memoryview, shape: Shape, kind: int, profile: int | None, layers: range
) -> tuple[Header, list[Entry]]:
    """The header, and the entries of ``layers``' sections. ``profile`` is the id of the one here.

    Raises:
        ValueError: it isn't a stream of such a chunk and codec, it is damaged, or was written with
            another profile.
    """
    if data.nbytes < _HEADER.size:
        raise ValueError("a stream is shorter than its header")
    magic, version, codec, dtype, count, planes, flags, heads, size, tokens, *rest = (
        _HEADER.unpack_from(data)
    )
    pairs, key_step, value_step, table_set, each, sections, needed, reserved, check = rest
    if magic != _MAGIC:
        raise ValueError("no stream of these codecs begins like this")
    if (version, table_set, reserved) != (_VERSION, _TABLE_SET, 0) or flags & ~_INTERLEAVED:
        raise ValueError("a stream of a later format")
    found = Shape(dtype, count, planes, heads, size, tokens)
    if found != shape:
        raise ValueError(f"a stream of {found}, which isn't the chunk's {shape}")
    if pairs > size // 2 or not 1 <= each <= heads:
        raise ValueError("a stream's heads can't be so")
    if codec != kind:
        raise ValueError(f"a stream of codec {codec}, not of {kind}")
    if needed not in (0, profile):
        raise ValueError(f"a stream was written with profile {needed:#x}, which isn't here")
    directory = _HEADER.size + 16 * pairs
    payload = directory + _SECTION.size * sections
    if sections != count * planes * -(-heads // each) or data.nbytes < payload:
        raise ValueError("a stream is shorter than its directory")
    if _head_checksum(data[:payload]) != check:
        raise ValueError("a stream's directory is damaged")
    turns = struct.unpack_from(f"<{2 * pairs}d", data, _HEADER.size)
    if not all(
        abs(c * c + s * s - 1) <= 1e-6 for c, s in zip(turns[::2], turns[1::2], strict=True)
    ):
        raise ValueError("a stream's angles are no cosines and sines")
    header = Header(bool(flags), pairs, key_step, value_step, each, needed, turns)
    per_layer = sections // count
    wanted = range(layers.start * per_layer, layers.stop * per_layer)
    return header, list(_entries(data, directory, payload, sections, wanted))


def _entries(
    data: memoryview, directory: int, payload: int, sections: int, wanted: range
) -> Iterator[Entry]:
    end = 0
    rows = _SECTION.iter_unpack(data[directory:payload])
    for i, (offset, size, words, escapes, patches, check, mode, flags, zero) in enumerate(rows):
        if offset != end:
            raise ValueError("a stream's sections aren't one after the other")
        end += size
        if i not in wanted:
            continue
        at = payload + offset
        if at + size > data.nbytes:
            raise ValueError("a stream ends before its last section")
        if zero:
            raise ValueError("a section has bits of a later format")
        if _checksum(data[at : at + size]) != check:
            raise ValueError("a section is damaged")
        yield Entry(at, size, words, escapes, patches, mode, flags)
    if len(wanted) == sections and payload + end != data.nbytes:
        raise ValueError("a stream is longer than its sections")


def parts(entry: Entry, block: Block, shape: Shape, header: Header) -> dict[str, int]:
    """Where in the stream the parts of a section begin, by their names below.

    Raises:
        ValueError: flags or numbers contradict the mode, or the parts' lengths the section's.
    """
    if entry.mode != RAW and (
        not block.codable(shape.tokens)
        or entry.words > shape.tokens * LANES * (block.passes + block.heads) + LANES
    ):
        raise ValueError("a section is larger than its elements")
    if entry.mode not in _PARTS:
        raise ValueError(f"a section has mode {entry.mode}, which this reader doesn't know")
    sizes = _PARTS[entry.mode](entry, block, shape, header)
    found, at = {}, entry.at
    for name, size in sizes.items():
        found[name] = at
        at += size
    if at != entry.at + entry.nbytes:
        raise ValueError(
            f"a section of mode {entry.mode} has {entry.nbytes} bytes, its parts {at - entry.at}"
        )
    return found


def _raw(entry: Entry, block: Block, shape: Shape, _: Header) -> dict[str, int]:
    if entry.flags or entry.words or entry.escapes or entry.patches:
        raise ValueError("a raw section has flags, words, escapes or patches")
    return {"elements": shape.tokens * block.channels * shape.itemsize}


def _values(entry: Entry, block: Block, shape: Shape, header: Header) -> dict[str, int]:
    flags = entry.flags
    if flags & ~_FLAGS or shape.dtype == BYTES:
        raise ValueError("a section of values has flags or elements that it can't have")
    if flags & (PROFILE_STEPS | PROFILE_MEANS) and not header.profile:
        raise ValueError("a section needs a profile")
    if flags & ROTATED and not header.pairs:
        raise ValueError("a section was turned, but the angles aren't there")
    if flags & FIRST_RAW and shape.tokens < 2:
        raise ValueError("a section has no tokens left")
    scaled = bool(flags & TOKEN_STEPS)
    return {
        "states": 4 * LANES,
        "steps": 0 if flags & PROFILE_STEPS else 4 * block.heads,
        "means": 0 if flags & PROFILE_MEANS else 2 * block.channels,
        "tables": block.channels,
        "centres": scaled * block.heads,
        "step_table": scaled * 1,
        "elements": (flags & FIRST_RAW) * block.channels * shape.itemsize,
        "escapes": 2 * entry.escapes,
        "patches": 8 * entry.patches,
        "words": 2 * entry.words,
    }


def _lossless(entry: Entry, block: Block, shape: Shape, _: Header) -> dict[str, int]:
    if entry.flags or entry.patches or shape.itemsize != 2:
        raise ValueError("a section without loss has flags, patches or elements it can't have")
    return {
        "states": 4 * LANES,
        "references": block.channels,
        "tables": block.channels,
        "escapes": 2 * entry.escapes,
        "words": 2 * entry.words,
        "low": shape.tokens * block.channels,
        "high": shape.tokens * high_bytes(shape.dtype, block.channels),
    }


def _eight_bits(entry: Entry, block: Block, shape: Shape, _: Header) -> dict[str, int]:
    if entry.flags or entry.words or entry.escapes or shape.dtype == BYTES:
        raise ValueError("a section of 8-bit values has flags, words or elements it can't have")
    return {
        "scales": 2 * shape.tokens * block.heads,
        "low": shape.tokens * block.channels,
        "patches": 8 * entry.patches,
    }


_PARTS = {
    RAW: _raw,
    LOSSLESS: _lossless,
    VALUES: _values,
    INT8: _eight_bits,
    E4M3: _eight_bits,
}


def high_bytes(dtype: int, channels: int) -> int:
    """Of the sign and the mantissa's upper bits of a token's binary16: three planes of bits."""
    return 3 * -(-channels // 8) if dtype == F16 else 0


def write(
    shape: Shape, kind: int, header: Header, sections: list[Entry], payload: memoryview
) -> bytes:
    """A stream of ``sections``, which are one after the other in ``payload``, from 0."""
    flags = _INTERLEAVED if header.interleaved else 0
    fields = (
        *(_MAGIC, _VERSION, kind, shape.dtype, shape.layers, shape.planes, flags),
        *(shape.heads, shape.head_size, shape.tokens, header.pairs),
        *(header.key_step, header.value_step, _TABLE_SET, header.block_heads, len(sections)),
        *(header.profile, 0, 0),
    )
    head = bytearray(_HEADER.pack(*fields))
    head += struct.pack(f"<{2 * header.pairs}d", *header.turns)
    for entry in sections:
        check = _checksum(payload[entry.at : entry.at + entry.nbytes])
        numbers = (entry.words, entry.escapes, entry.patches, check)
        head += _SECTION.pack(entry.at, entry.nbytes, *numbers, entry.mode, entry.flags, 0)
    struct.pack_into("<I", head, _CHECKSUM_AT, _checksum(head))
    return bytes(head) + bytes(payload)


def _checksum(data: memoryview | bytearray) -> int:
    return _native.xxh3_64(data) & 0xFFFFFFFF


def _head_checksum(head: memoryview) -> int:
    copy = bytearray(head)
    struct.pack_into("<I", copy, _CHECKSUM_AT, 0)
    return _checksum(copy)
