"""How a value lies in InfiniStore: pieces, and a head with its length and its end.

A reader over RDMA isn't told how long a stored value is: it asks for a key and gets what fits into
its buffer. So the length is stored, in a head of a size that every reader knows. The head also
names the pieces, by a number that is random for each store, and is written after them, so that
two writers don't mix. Knows no client.

A server allocates whole blocks of 64 KiB, unless told otherwise; what a value has beyond its last
whole one is in the head, if there is room. All pieces of a value have the same length, because one
RDMA request has one. It is a multiple of 64, because copies between memory that is aligned
differently take twice as long. The last piece may overlap the one before.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

_FIELDS: Final = struct.Struct("<4sIQ8s")
_MAGIC: Final = b"LMIS"
_ALLOCATED: Final = 64 << 10
_ALIGNED: Final = 64
BEGINNING: Final = _ALIGNED
"""Bytes of a head before those of the value."""
LEAST_PIECE: Final = 64 << 10
MAX_VALUE_BYTES: Final = 512 << 20
"""No chunk comes near it."""


class Head(NamedTuple):
    """What is known about one stored value.

    ``nonce``, 8 bytes, is another one for each store; ``room`` is what its head has for the value's
    end.
    """

    nbytes: int
    pieces: int
    nonce: bytes
    room: int

    @classmethod
    def of(cls, nbytes: int, most: int, nonce: bytes, room: int) -> Head:
        """For a new value of ``nbytes`` in pieces of at most ``most`` bytes."""
        pieces = -(-(nbytes - _inline(nbytes, room)) // (most - most % _ALIGNED))
        return cls(nbytes, pieces, nonce, room)

    @property
    def inline(self) -> int:
        """How many bytes of the value, its last, are in the head."""
        return _inline(self.nbytes, self.room)

    @property
    def piece_bytes(self) -> int:
        """Length of each piece."""
        return _cut(self.nbytes - self.inline, self.pieces)[0]

    def pack(self) -> bytes:
        """The head without the value's end; `BEGINNING` bytes."""
        return _FIELDS.pack(_MAGIC, self.pieces, self.nbytes, self.nonce).ljust(BEGINNING, b"\0")

    @classmethod
    def unpack(cls, data: memoryview, most_bytes: int) -> Head | None:
        """``None`` for what doesn't begin like a head, or says what can't be.

        ``most_bytes`` is the longest value that there may be here: who believed a head that
        announces more would list, and ask for, that many pieces.
        """
        magic, pieces, nbytes, nonce = _FIELDS.unpack_from(data)
        room = data.nbytes - BEGINNING
        rest = nbytes - _inline(nbytes, room)
        if magic != _MAGIC or nbytes > most_bytes:
            return None
        if bool(pieces) != bool(rest) or pieces > 1 + rest // LEAST_PIECE:
            return None
        return cls(nbytes, pieces, nonce, room)

    def names(self, name: str) -> list[str]:
        """Keys of the pieces of the value ``name``."""
        stem = f"{name}:{self.nonce.hex()}:"
        return [f"{stem}{i}" for i in range(self.pieces)]

    def starts(self) -> Sequence[int]:
        """Where in the value each piece starts."""
        return _cut(self.nbytes - self.inline, self.pieces)[1]


@functools.lru_cache(maxsize=64)  # most values are as long as the one before
def _cut(nbytes: int, count: int) -> tuple[int, Sequence[int]]:
    """How long each of ``count`` pieces of ``nbytes`` is, and where it starts."""
    if not count:
        return 0, ()
    size = min(nbytes, -(-nbytes // (count * _ALIGNED)) * _ALIGNED)
    return size, tuple(min(i * size, nbytes - size) for i in range(count))


def _inline(nbytes: int, room: int) -> int:
    if nbytes <= room:
        return nbytes
    beyond = nbytes % _ALLOCATED
    return beyond if beyond <= room else 0
