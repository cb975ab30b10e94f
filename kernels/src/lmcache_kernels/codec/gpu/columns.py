"""Columns of the encoder's table of sections, int64, one row for each section.

Places are elements of what the name says; a channel's arrays are padded to whole passes.
"""

from __future__ import annotations

import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]

CHUNK: tl.constexpr = tl.constexpr(0)  # the section's first element of the chunk
HEADS: tl.constexpr = tl.constexpr(1)
CHANNELS: tl.constexpr = tl.constexpr(2)
KEYS: tl.constexpr = tl.constexpr(3)  # 1 or 0
LAYER: tl.constexpr = tl.constexpr(4)
KNOWN: tl.constexpr = tl.constexpr(5)  # the first channel's place in a profile
NUMBERS: tl.constexpr = tl.constexpr(6)  # tokens x channels
SYMBOLS: tl.constexpr = tl.constexpr(7)  # rows of 32
CHANNEL: tl.constexpr = tl.constexpr(8)
HEAD: tl.constexpr = tl.constexpr(9)
TOKEN_HEAD: tl.constexpr = tl.constexpr(10)  # tokens x heads
COLUMNS: tl.constexpr = tl.constexpr(11)
"""How many columns there are."""

BYTES: tl.constexpr = tl.constexpr(0)
WORDS: tl.constexpr = tl.constexpr(1)
ESCAPES: tl.constexpr = tl.constexpr(2)
PATCHES: tl.constexpr = tl.constexpr(3)
MODE: tl.constexpr = tl.constexpr(4)
FLAGS: tl.constexpr = tl.constexpr(5)
AT: tl.constexpr = tl.constexpr(6)  # where the section begins behind the directory
FIELDS: tl.constexpr = tl.constexpr(7)
"""Columns of the table of what became of sections, int64."""
