"""How a value lies in InfiniStore: a head with its length and its beginning, and pieces.

A reader over RDMA isn't told how long a stored value is: it asks for a key and gets what fits into
its buffer. So the length is stored, in a head of a size that every reader knows. The head also
names the pieces, by a number that is random for each store, and is written after them, so that
two writers don't mix. Last comes a mark, which nobody reads: that it exists says that the head is
complete. A server shows a key that is being written over TCP as existing, and who then reads it
waits for ever. Knows no client.

A head is 64 KiB, the least that a server allocates unless told otherwise, and filled with the
value's beginning. A small one would be slow over TCP: its server sends a length and the value in
two segments, and the second waits 40 ms for an acknowledgement of the first unless it is full.

All pieces of a value have the same length, because one RDMA request has one; so the last one
overlaps what is before it, by fewer bytes than there are pieces.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Final

_FIELDS: Final = struct.Struct("<4sIQ8s")
_MAGIC: Final = b"LMIS"
HEAD_BYTES: Final = 64 << 10
MARK: Final = b"+"
BEGINNING: Final = _FIELDS.size
"""Where in a head the value begins."""
_ROOM: Final = HEAD_BYTES - BEGINNING


@dataclass(frozen=True)
class Head:
    """What is known about one stored value."""

    nbytes: int
    pieces: int
    nonce: bytes

    @classmethod
    def of(cls, nbytes: int, most: int) -> Head:
        """For a new value of ``nbytes`` in pieces of at most ``most`` bytes."""
        return cls(nbytes, -(-max(nbytes - _ROOM, 0) // most), os.urandom(8))

    @property
    def inline(self) -> int:
        """How many bytes of the value the head has room for."""
        return min(self.nbytes, _ROOM)

    @property
    def piece_bytes(self) -> int:
        """Length of each piece."""
        return -(-(self.nbytes - self.inline) // self.pieces) if self.pieces else 0

    def pack(self) -> bytes:
        """The head without the value's beginning."""
        return _FIELDS.pack(_MAGIC, self.pieces, self.nbytes, self.nonce)

    @classmethod
    def unpack(cls, data: memoryview) -> Head | None:
        """``None`` for what doesn't begin like a head."""
        magic, pieces, nbytes, nonce = _FIELDS.unpack_from(data)
        if magic != _MAGIC or not (
            pieces <= max(nbytes - _ROOM, 0) and (pieces or nbytes <= _ROOM)
        ):
            return None
        return cls(nbytes, pieces, nonce)

    @staticmethod
    def name(name: str) -> str:
        """Key of the head of the value whose mark is called ``name``."""
        return f"{name}:head"

    def names(self, name: str) -> list[str]:
        """Keys of the pieces of the value whose mark is called ``name``."""
        stem = f"{name}:{self.nonce.hex()}:"
        return [f"{stem}{i}" for i in range(self.pieces)]

    def starts(self) -> list[int]:
        """Where in the value each piece starts."""
        size = self.piece_bytes
        return [min(self.inline + i * size, self.nbytes - size) for i in range(self.pieces)]
