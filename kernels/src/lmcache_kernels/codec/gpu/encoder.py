"""Encodes a chunk on a GPU, to the CPU's very bytes. **Not run on hardware.**

Everything but the header is made on the device, and only the stream crosses the bus. The host waits
once, for the sections' sizes, and adds the checksums.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]

from lmcache_kernels.codec.gpu import encode_kernels, tables, write_kernels
from lmcache_kernels.codec.gpu import stream as streams
from lmcache_kernels.codec.gpu.device import EXACT, Device
from lmcache_kernels.codec.gpu.rounding import round_values
from lmcache_kernels.codec.gpu.stream import Block, Entry, Header, Shape
from lmcache_kernels.codec.gpu.work import TILE, WIDTH, EncoderOptions, Work

_MOST_LOSSLESS_TOKENS = 65536
_Write = Callable[[torch.Tensor, torch.Tensor], None]


class GpuEncoder:
    """`lmcache_kernels._native.Codec.encode` for chunks on ``device``.

    ``streams``: how many sections one program codes side by side. A warp has 32 lanes: 1.
    """

    def __init__(self, device: torch.device, streams: int = 1) -> None:
        self._device, self._streams = Device(device), streams

    def encode(
        self,
        shape: tuple[int, int, int, int, int, int],
        options: EncoderOptions,
        chunk: torch.Tensor,
    ) -> bytes:
        """The stream of ``chunk`` (uint8). ``shape``: dtype, layers, planes, heads, size, tokens.

        Raises:
            ValueError: the chunk hasn't so many bytes, or an option makes no sense for it.
        """
        whole = Shape(*shape)
        if chunk.dtype != torch.uint8 or not chunk.is_contiguous() or chunk.numel() != whole.nbytes:
            raise ValueError(f"the chunk has {whole.nbytes} contiguous bytes, not {chunk.shape}")
        if not all(step > 0 for step in options.steps):
            raise ValueError(f"steps are positive, unlike {options.steps}")
        if options.kind not in _PREPARE:
            raise ValueError(f"there is no codec {options.kind}")
        if options.profile is not None:
            options.profile.check(whole.layers * whole.row, whole.planes)
        work = Work(self._device, whole, options, _header(whole, options), chunk)
        stored = whole.dtype == streams.BYTES or not work.passes
        if options.kind == streams.LOSSLESS:
            stored |= whole.itemsize != 2 or whole.tokens > _MOST_LOSSLESS_TOKENS
        if stored:
            fixed, write = [0] * work.count, None
        else:
            fixed, write = _PREPARE[options.kind](work, self._streams)
        sections, payload = _assemble(work, fixed, write)
        return streams.write(whole, options.kind, work.header, sections, payload)


def _header(shape: Shape, options: EncoderOptions) -> Header:
    turns = memoryview(options.turns).cast("B")
    pairs = turns.nbytes // 16
    if turns.nbytes % 16 or pairs > shape.head_size // 2:
        raise ValueError(
            f"{turns.nbytes} bytes aren't angles: two float64 for each of at most "
            f"{shape.head_size // 2} pairs"
        )
    values = options.kind == streams.VALUES
    if not values or shape.planes != 2:
        pairs = 0
    return Header(
        options.interleaved,
        pairs,
        *options.steps,
        streams.block_heads(shape),
        options.profile.id if values and options.profile is not None else 0,
        struct.unpack_from(f"<{2 * pairs}d", turns),
    )


# -- by codec: what a section has whatever its content, in bytes, and what writes it ---------------


def _lossless(work: Work, side_by_side: int) -> tuple[list[int], _Write]:
    shape = work.shape
    encode_kernels.choose_exponents[(work.count, work.passes)](
        *(work.chunk, work.sections, work.device.costs, work.symbols, work.references),
        *(work.tables, shape.tokens, shape.row),
        DTYPE=shape.dtype,
        TILE=TILE,
        **EXACT,
    )
    _code(work, side_by_side, lossless=True)

    def write(fields: torch.Tensor, payload: torch.Tensor) -> None:
        write_kernels.write_lossless[(work.count,)](
            *(work.sections, fields, work.states, work.references, work.tables, work.escapes),
            *(work.words, work.ends, payload),
            **EXACT,
        )
        write_kernels.write_planes[work.grid()](
            *(work.chunk, work.sections, fields, payload, shape.tokens, shape.row),
            DTYPE=shape.dtype,
            TILE=TILE,
            WIDTH=WIDTH,
            **EXACT,
        )

    each = [
        4 * streams.LANES
        + 2 * block.channels
        + shape.tokens * (block.channels + streams.high_bytes(shape.dtype, block.channels))
        for block in work.blocks
    ]
    return each, write


def _eight_bits(work: Work, side_by_side: int) -> tuple[list[int], _Write]:  # noqa: ARG001
    shape = work.shape
    scales, low = work.room("token_head", torch.int16), work.room("numbers", torch.uint8)
    encode_kernels.to_eight_bits[work.heads_grid()](
        *(work.chunk, work.sections, scales, low, work.patches),
        *(shape.tokens, shape.row, shape.head_size),
        INTEGERS=work.options.kind == streams.INT8,
        DTYPE=shape.dtype,
        TILE=TILE,
        WIDTH=WIDTH,
        **EXACT,
    )

    def write(fields: torch.Tensor, payload: torch.Tensor) -> None:
        write_kernels.write_eight_bits[(work.count,)](
            work.sections, fields, scales, low, payload, shape.tokens, **EXACT
        )
        _write_patches(work, fields, payload)

    return [shape.tokens * (2 * b.heads + b.channels) for b in work.blocks], write


def _values(work: Work, side_by_side: int) -> tuple[list[int], _Write]:
    rounded = round_values(work)
    _code(work, side_by_side, lossless=False)

    def write(fields: torch.Tensor, payload: torch.Tensor) -> None:
        write_kernels.write_values[(work.count,)](
            *(work.chunk, work.sections, fields, work.states, rounded.steps.view(torch.int32)),
            *(rounded.means, work.tables, rounded.centres, work.step_tables, work.escapes),
            *(work.words, work.ends, payload),
            SIZE=work.shape.itemsize,
            **EXACT,
        )
        _write_patches(work, fields, payload)

    known = work.profile is not None
    each = [
        4 * streams.LANES
        + (0 if known and block.keys else 4 * block.heads)
        + (0 if known and not block.keys else 2 * block.channels)
        + block.channels
        + (0 if block.keys else block.heads + 1)
        for block in work.blocks
    ]
    return each, write


_PREPARE: dict[int, Callable[[Work, int], tuple[list[int], _Write]]] = {
    streams.LOSSLESS: _lossless,
    streams.VALUES: _values,
    streams.INT8: _eight_bits,
    streams.E4M3: _eight_bits,
}


def _code(work: Work, side_by_side: int, *, lossless: bool) -> None:
    """Symbols to words and escapes."""
    bad = work.bad if lossless else work.bad + (work.patches > work.limits())
    encode_kernels.encode_symbols[(triton.cdiv(work.count, side_by_side),)](
        *(work.sections, work.count, work.first, work.symbols, work.tables, work.step_tables),
        *(work.references, work.device.radii, work.device.codes, bad, work.ends, work.states),
        *(work.words, work.escapes, work.word_counts, work.escape_counts),
        *(work.shape.tokens, work.passes),
        FIRST_TABLE=tables.VALUE_TABLES if lossless else 0,
        LOSSLESS=lossless,
        STREAMS=side_by_side,
        num_warps=1,
        **EXACT,
    )


def _write_patches(work: Work, fields: torch.Tensor, payload: torch.Tensor) -> None:
    shape = work.shape
    write_kernels.write_patches[(work.count,)](
        *(work.chunk, work.sections, fields, payload, shape.tokens, shape.row),
        DTYPE=shape.dtype,
        WIDTH=WIDTH,
        num_warps=1,
        **EXACT,
    )


# -- together --------------------------------------------------------------------------------------


def _assemble(work: Work, fixed: list[int], write: _Write | None) -> tuple[list[Entry], memoryview]:
    """Sections one after the other; raw where the codec's mode isn't shorter, or can't be."""
    shape, fields = work.shape, _fields(work, fixed, coded=write is not None)
    payload = work.device.room(shape.nbytes, torch.uint8)
    if write is not None:
        write(fields, payload)
    write_kernels.write_raw[work.grid(max(block.channels for block in work.blocks))](
        *(work.chunk, work.every, fields, payload, shape.tokens, shape.row),
        SIZE=shape.itemsize,
        TILE=TILE,
        WIDTH=WIDTH,
        **EXACT,
    )
    sections = [
        Entry(at, nbytes, words, escapes, patches, mode, flags)
        for nbytes, words, escapes, patches, mode, flags, at in fields.tolist()
    ]
    stream = bytearray(sections[-1].at + sections[-1].nbytes)
    torch.frombuffer(stream, dtype=torch.uint8).copy_(payload[: len(stream)])
    return sections, memoryview(stream)


def _fields(work: Work, fixed: list[int], *, coded: bool) -> torch.Tensor:
    """What becomes of sections, int64 [sections, fields], in `columns`' order."""
    wide, shape, tensor = torch.int64, work.shape, work.device.tensor
    one_row = tensor([block.channels * shape.itemsize for block in work.blocks], wide)
    words, escapes = work.word_counts.to(wide), work.escape_counts.to(wide)
    patches, first = work.patches.to(wide), work.first.to(wide)
    nbytes = tensor(fixed, wide) + first * one_row + 2 * words + 2 * escapes + 8 * patches
    raw = (work.bad > 0) | (patches > work.limits()) | (nbytes >= one_row * shape.tokens)
    if not coded:
        raw = torch.ones_like(raw)
    flags = tensor([_flags(work, block) for block in work.blocks], wide)
    modes = torch.full_like(words, work.options.kind)
    numbers = torch.stack([words, escapes, patches, modes, flags + first * streams.FIRST_RAW])
    nbytes = torch.where(raw, one_row * shape.tokens, nbytes)
    numbers = torch.where(raw, torch.zeros_like(numbers), numbers)
    at = torch.cumsum(nbytes, 0) - nbytes
    return torch.cat([nbytes[None], numbers, at[None]]).t().contiguous()


def _flags(work: Work, block: Block) -> int:
    """A section's flags, but for `FIRST_RAW`."""
    if work.options.kind != streams.VALUES:
        return 0
    known = work.profile is not None
    if block.keys:
        turned = streams.ROTATED if work.header.pairs else 0
        return turned + (streams.PROFILE_STEPS if known else 0)
    return streams.TOKEN_STEPS + (streams.PROFILE_MEANS if known else 0)
