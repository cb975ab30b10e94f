"""Where the bytes of a value lie: in which of a pool's files, and at which offset.

A long value is cut between pages into as many parts as there are files; shorter ones take turns.
Each file's part of a call is moved by an agent of its own, at the same time: one thread copies as
fast as one core can, and two threads that write to one file wait for each other in the kernel. The
idea is RAID 0's.

Knows arithmetic.
"""

from __future__ import annotations

import functools
from typing import Final, NamedTuple, TypeAlias

from lmcache_backend_nixl.config import PAGE_BYTES

_FILES: Final = 2
_WORTH_CUTTING: Final = 8 << 20

Places: TypeAlias = tuple[tuple[int, int], ...]
"""A file's number and an offset in it, for each part of a value."""


class Shape(NamedTuple):
    """Of a pool."""

    slot_bytes: int
    files: int
    parts: int
    """Of a slot: 1, or one in each file."""

    @classmethod
    def for_values(cls, longest: int) -> Shape:
        """For values of up to ``longest`` bytes; always the same for the same length."""
        parts = _FILES if longest >= _WORTH_CUTTING else 1
        return cls(rounded(longest, parts * PAGE_BYTES), _FILES, parts)

    def bytes_in_each(self, slots: int) -> int:
        """How long each file is."""
        return -(-slots * self.parts // self.files) * self.slot_bytes // self.parts

    def slots_in(self, nbytes: int) -> int:
        """How many slots are in files of this length."""
        return nbytes * self.parts // self.slot_bytes * self.files // self.parts

    def places(self, slot: int) -> Places:
        """Where the parts of a slot begin."""
        if self.parts > 1:
            offset = slot * self.slot_bytes // self.parts
            return tuple((file, offset) for file in range(self.files))
        return ((slot % self.files, slot // self.files * self.slot_bytes),)


@functools.lru_cache(maxsize=256)
def cut(nbytes: int, parts: int) -> tuple[tuple[int, int], ...]:
    """Where each part of a value of ``nbytes`` begins and ends; the last ones may be empty."""
    step = rounded(-(-nbytes // parts), PAGE_BYTES)
    return tuple((min(i * step, nbytes), min((i + 1) * step, nbytes)) for i in range(parts))


def rounded(nbytes: int, to: int) -> int:
    """The next multiple of ``to``."""
    return -(-nbytes // to) * to
