"""Decodes streams into a chunk on a GPU. **Not run on hardware.**

The host checks header, directory and checksums, and where the parts of sections lie; the stream
crosses the bus encoded; symbols and elements are made on the device.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
from typing_extensions import Buffer

from lmcache_kernels.codec.gpu import decode_kernels as kernels
from lmcache_kernels.codec.gpu import stream as streams
from lmcache_kernels.codec.gpu import tables
from lmcache_kernels.codec.gpu.device import ELEMENTS, EXACT, Device, DeviceProfile
from lmcache_kernels.codec.gpu.stream import Block, Entry, Header, Shape

_TILE, _WIDTH = 16, 128
"""Tokens and channels of a program that restores elements."""
_PATCHES = 128
_REASONS = {
    kernels.BAD_WORDS.value: "words don't fit to its states",
    kernels.BAD_ESCAPES.value: "escapes aren't as many as it says",
    kernels.BAD_TABLE.value: "tables aren't there",
    kernels.BAD_LEVEL.value: "steps are out of range",
    kernels.BAD_STEP.value: "steps or means are out of range",
    kernels.BAD_PATCH.value: "patches lie outside of it",
}


class GpuDecoder:
    """`lmcache_kernels._native.Codec.decode` for chunks on ``device``.

    ``streams``: how many sections one program decodes side by side. A warp has 32 lanes: 1.
    """

    def __init__(self, device: torch.device, streams: int = 1) -> None:
        self._device, self._streams = Device(device), streams

    def decode(
        self,
        kind: int,
        shape: tuple[int, int, int, int, int, int],
        encoded: Buffer,
        into: torch.Tensor,
        profile: DeviceProfile | None = None,
        first_layer: int = 0,
        layers: int | None = None,
    ) -> None:
        """Decode ``layers`` layers from ``first_layer``; ``into`` (uint8) begins with that one.

        ``shape`` is dtype, layers, planes, heads, head size, tokens. ``encoded`` may end behind the
        last of these layers' sections, unless they are all.

        Raises:
            IndexError: there are no such layers.
            ValueError: the stream is damaged, or isn't one of such a chunk; ``into`` may have been
                written to. Or ``into`` isn't as large as these layers.
        """
        whole = Shape(*shape)
        count = whole.layers - first_layer if layers is None else layers
        if first_layer < 0 or count < 1 or first_layer + count > whole.layers:
            raise IndexError(f"a chunk of {whole.layers} layers has no {count} from {first_layer}")
        needed = whole.nbytes // whole.layers * count
        if into.dtype != torch.uint8 or not into.is_contiguous() or into.numel() != needed:
            raise ValueError(f"decoding needs {needed} contiguous bytes, not {into.shape}")
        if profile is not None:
            profile.check(whole.layers * whole.row, whole.planes)
        data = memoryview(encoded).cast("B")
        wanted = range(first_layer, first_layer + count)
        id_ = None if profile is None else profile.id
        header, entries = streams.read(data, whole, kind, id_, wanted)
        call = _Call(self._device, whole, header, entries, wanted, data)
        call.run(into.view(ELEMENTS[whole.dtype]), profile, self._streams)


class _Call:
    """One stream's way through the kernels."""

    def __init__(
        self,
        device: Device,
        shape: Shape,
        header: Header,
        entries: list[Entry],
        layers: range,
        data: memoryview,
    ) -> None:
        self._device, self._shape, self._header = device, shape, header
        self._entries, self._layers = entries, layers
        self._blocks = streams.blocks(shape, header.block_heads, layers)
        self._symbols = 0
        rows = [self._columns(*each) for each in zip(entries, self._blocks, strict=True)]
        # torch warns about memory that it mustn't write to; a copy is the way to be left alone.
        plain = torch.frombuffer(bytearray(data) if data.readonly else data, dtype=torch.uint8)
        self._stream = plain.to(device.device)
        self._sections = device.tensor(rows, torch.int64)
        self._errors = torch.zeros(len(rows), dtype=torch.int32, device=device.device)

    def _columns(self, entry: Entry, block: Block) -> list[int]:
        """The section's row of `decode_kernels`' columns."""
        shape = self._shape
        at = streams.parts(entry, block, shape, self._header)
        first = entry.flags & streams.FIRST_RAW
        rows = shape.tokens - first
        scaled = entry.flags & streams.TOKEN_STEPS
        step_rows = -(-rows * block.heads // streams.LANES) if scaled else 0
        plane = (block.layer - self._layers.start) * shape.planes + block.plane
        chunk = plane * shape.tokens * shape.row + block.first_head * shape.head_size
        known = block.layer * shape.row + block.first_head * shape.head_size
        found = [
            *(chunk, block.heads, block.channels, first, step_rows, self._symbols, known),
            entry.flags,
            *(at.get(name, 0) for name in ("states", "steps", "means", "tables", "centres")),
            *(at.get(name, 0) for name in ("step_table", "elements", "escapes")),
            *(entry.escapes, at.get("patches", 0), entry.patches),
            *(at.get("words", 0), entry.words),
            *(at.get(name, 0) for name in ("references", "scales", "low", "high")),
        ]
        if entry.mode in (streams.VALUES, streams.LOSSLESS):
            self._symbols += streams.LANES * (step_rows + rows * block.passes)
        return found

    def run(self, chunk: torch.Tensor, profile: DeviceProfile | None, side_by_side: int) -> None:
        symbols = self._device.room(self._symbols, torch.int16)
        for mode in sorted({entry.mode for entry in self._entries}):
            numbers = [i for i, entry in enumerate(self._entries) if entry.mode == mode]
            chosen = self._device.tensor(numbers, torch.int32)
            if mode in (streams.VALUES, streams.LOSSLESS):
                self._decode(mode, numbers, chosen, symbols, side_by_side)
            self._restore(mode, numbers, chosen, symbols, chunk, profile)
        self._patch(chunk)
        self._report()

    def _decode(
        self,
        mode: int,
        numbers: list[int],
        chosen: torch.Tensor,
        symbols: torch.Tensor,
        side_by_side: int,
    ) -> None:
        lossless = mode == streams.LOSSLESS
        kernels.decode_symbols[(triton.cdiv(len(numbers), side_by_side),)](
            self._stream,
            self._sections,
            chosen,
            len(numbers),
            self._device.slots,
            symbols,
            self._errors,
            self._shape.tokens,
            max(self._blocks[i].passes for i in numbers),
            FIRST_TABLE=tables.VALUE_TABLES if lossless else 0,
            TABLE_COUNT=tables.EXPONENT_TABLES if lossless else tables.VALUE_TABLES,
            PADDING=tables.padding_table() if lossless else 0,
            ESCAPE=15 if lossless else 0,
            ZERO=0 if lossless else 64,
            LOSSLESS=lossless,
            STREAMS=side_by_side,
            num_warps=1,
            **EXACT,
        )

    def _restore(
        self,
        mode: int,
        numbers: list[int],
        chosen: torch.Tensor,
        symbols: torch.Tensor,
        chunk: torch.Tensor,
        profile: DeviceProfile | None,
    ) -> None:
        shape, header = self._shape, self._header
        grid = self._grid(numbers)
        common = (self._stream, self._sections, chosen)
        sizes = {"DTYPE": shape.dtype, "TILE": _TILE, "WIDTH": _WIDTH, **EXACT}
        if mode == streams.RAW:
            kernels.restore_raw[grid](*common, chunk, shape.tokens, shape.row, **sizes)
        elif mode == streams.LOSSLESS:
            kernels.restore_lossless[grid](
                *common, symbols, chunk, shape.tokens, shape.row, **sizes
            )
        elif mode == streams.VALUES:
            cosines, sines = self._device.angles(header.turns, shape.tokens)
            kernels.restore_values[grid](
                *common,
                symbols,
                cosines if profile is None else profile.steps,
                self._device.room(1, torch.int16) if profile is None else profile.means,
                cosines,
                sines,
                chunk,
                self._errors,
                *(shape.tokens, shape.row, shape.head_size),
                *(header.pairs, int(header.interleaved), header.key_step),
                **sizes,
            )
        else:
            kernels.restore_eight_bits[grid](
                *common,
                chunk,
                *(shape.tokens, shape.row, shape.head_size),
                INTEGERS=mode == streams.INT8,
                **sizes,
            )

    def _grid(self, numbers: Iterable[int]) -> tuple[int, int, int]:
        widest = max(self._blocks[i].channels for i in numbers)
        return (
            len(list(numbers)),
            triton.cdiv(self._shape.tokens, _TILE),
            triton.cdiv(widest, _WIDTH),
        )

    def _patch(self, chunk: torch.Tensor) -> None:
        numbers = [i for i, entry in enumerate(self._entries) if entry.patches]
        if not numbers:
            return
        most = max(self._entries[i].patches for i in numbers)
        kernels.patch[(len(numbers), triton.cdiv(most, _PATCHES))](
            self._stream,
            self._sections,
            self._device.tensor(numbers, torch.int32),
            chunk,
            self._errors,
            self._shape.tokens,
            self._shape.row,
            TILE=_PATCHES,
            **EXACT,
        )

    def _report(self) -> None:
        """Wait for the device, and raise ValueError for what its programs found."""
        for number, code in enumerate(self._errors.tolist()):
            if code:
                block = self._blocks[number]
                reasons = [text for bit, text in _REASONS.items() if code & bit]
                raise ValueError(
                    f"the section of layer {block.layer}, plane {block.plane}, head "
                    f"{block.first_head}: its {' and '.join(reasons)}"
                )
