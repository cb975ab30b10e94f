"""An encoder's memory on the device: the table of sections, and room for what they become.

Knows sizes. Knows nothing about kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
from typing_extensions import Buffer

from lmcache_kernels.codec.gpu import stream as streams
from lmcache_kernels.codec.gpu.device import ELEMENTS, Device, DeviceProfile
from lmcache_kernels.codec.gpu.stream import Block, Header, Shape

TILE, WIDTH = 16, 128
"""Tokens and channels of one program."""


@dataclass(frozen=True)
class EncoderOptions:
    """How a chunk is encoded: what `lmcache_kernels._native.Codec.encode` is told."""

    kind: int
    steps: tuple[float, float] = (0.3, 0.35)
    """Of keys and values, by their rms."""
    turns: Buffer = b""
    """float64: the cosine and the sine of each rotary pair's angle for one token."""
    interleaved: bool = False
    first_raw: int = -1
    """The first token: 1 raw, 0 not, -1 if it stands out."""
    profile: DeviceProfile | None = None


class Work:
    """One chunk's. Sections that are too large for any mode but raw have no channels here."""

    def __init__(
        self,
        device: Device,
        shape: Shape,
        options: EncoderOptions,
        header: Header,
        chunk: torch.Tensor,
    ) -> None:
        self.device, self.shape, self.options, self.header = device, shape, options, header
        self.chunk = chunk.view(ELEMENTS[shape.dtype])
        self.profile = options.profile if options.kind == streams.VALUES else None
        self.blocks = streams.blocks(shape, header.block_heads, range(shape.layers))
        self.count = len(self.blocks)
        self.sizes = {"numbers": 0, "symbols": 0, "channel": 0, "head": 0, "token_head": 0}
        """How much of each there is of all sections, and so where the next one's begins."""
        rows, ends = zip(*(self._columns(block) for block in self.blocks), strict=True)
        self.every = device.tensor(rows, torch.int64)
        """The rows of all sections, as `columns` has them."""
        good = [block.codable(shape.tokens) for block in self.blocks]
        self.sections = self.every.clone()
        self.sections[:, 1:3] *= device.tensor(good, torch.int64)[:, None]
        self.ends = device.tensor(ends, torch.int64)
        self.bad = device.tensor([not each for each in good], torch.int32)
        self.patches = self.zeros(self.count)
        self.first = self.zeros(1)
        """How many tokens are stored raw: 0 or 1."""
        self.word_counts, self.escape_counts = self.zeros(self.count), self.zeros(self.count)
        codable = [block for block, each in zip(self.blocks, good, strict=True) if each]
        self.passes = max((block.passes for block in codable), default=0)
        self.heads = max((block.heads for block in codable), default=1)
        self.symbols = self.room("symbols", torch.int16)
        self.words = self.room("symbols", torch.int16)
        self.escapes = self.room("symbols", torch.int16)
        self.tables = self.room("channel", torch.uint8)
        self.references = self.room("channel", torch.uint8)
        self.step_tables = device.room(self.count, torch.uint8)
        self.states = device.room(self.count * streams.LANES, torch.int32)

    def _columns(self, block: Block) -> tuple[list[int], int]:
        """The section's row, and where its room for symbols ends."""
        shape, sizes = self.shape, self.sizes
        plane = block.layer * shape.planes + block.plane
        inside = block.first_head * shape.head_size
        found = [
            plane * shape.tokens * shape.row + inside,
            *(block.heads, block.channels, int(block.keys), block.layer),
            block.layer * shape.row + inside,
            *sizes.values(),
        ]
        if block.codable(shape.tokens):
            token_heads = shape.tokens * block.heads
            rows = shape.tokens * block.passes + -(-token_heads // streams.LANES)
            sizes["numbers"] += shape.tokens * block.channels
            sizes["symbols"] += streams.LANES * rows
            sizes["channel"] += streams.LANES * block.passes
            sizes["head"] += block.heads
            sizes["token_head"] += token_heads
        return found, sizes["symbols"]

    def room(self, of: str, dtype: torch.dtype) -> torch.Tensor:
        """Memory for all sections, one for each ``of``."""
        return self.device.room(self.sizes[of], dtype)

    def zeros(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int32, device=self.device.device)

    def grid(self, channels: int | None = None) -> tuple[int, int, int]:
        """Programs for each tile of sections, tokens and ``channels``, or those that are coded."""
        widest = self.passes * streams.LANES if channels is None else channels
        return self.count, triton.cdiv(self.shape.tokens, TILE), triton.cdiv(widest, WIDTH)

    def heads_grid(self) -> tuple[int, int, int]:
        return self.count, triton.cdiv(self.shape.tokens, TILE), self.heads

    def limits(self) -> torch.Tensor:
        """How many elements that aren't finite each section may have."""
        tokens = self.shape.tokens
        return self.device.tensor([tokens * b.channels // 32 for b in self.blocks], torch.int64)
