"""How a value lies in InfiniStore: a head that says how long it is, and pieces.

A reader over RDMA isn't told how long a stored value is: it asks for a key and gets what fits into
its buffer. So the length is a value of its own, the head, of a size that every reader knows. It
also names the pieces, by a number that is random for each store, and is written after them: who
sees a head sees a value that is complete, and two writers don't mix. Knows no client.

All pieces of a value have the same length, because one RDMA request has one; so the last one
overlaps the one before it, by fewer bytes than there are pieces.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Final

_HEAD: Final = struct.Struct("<4sIQ8s")
_MAGIC: Final = b"LMIS"
HEAD_BYTES: Final = _HEAD.size


@dataclass(frozen=True)
class Head:
    """What is known about one stored value."""

    nbytes: int
    pieces: int
    nonce: bytes

    @classmethod
    def of(cls, nbytes: int, most: int) -> Head:
        """For a new value of ``nbytes`` in pieces of at most ``most`` bytes."""
        return cls(nbytes, -(-nbytes // most), os.urandom(8))

    @property
    def piece_bytes(self) -> int:
        """Length of each piece."""
        return -(-self.nbytes // self.pieces) if self.pieces else 0

    def pack(self) -> bytes:
        return _HEAD.pack(_MAGIC, self.pieces, self.nbytes, self.nonce)

    @classmethod
    def unpack(cls, data: bytes | bytearray) -> Head | None:
        """``None`` for what isn't a head."""
        if len(data) != HEAD_BYTES:
            return None
        magic, pieces, nbytes, nonce = _HEAD.unpack(data)
        if magic != _MAGIC or (pieces == 0) != (nbytes == 0) or pieces > nbytes:
            return None
        return cls(nbytes, pieces, nonce)

    def names(self, name: str) -> list[str]:
        """Keys of the pieces of the value whose head is called ``name``."""
        stem = f"{name}:{self.nonce.hex()}:"
        return [f"{stem}{i}" for i in range(self.pieces)]

    def starts(self) -> list[int]:
        """Where in the value each piece starts."""
        size = self.piece_bytes
        return [min(i * size, self.nbytes - size) for i in range(self.pieces)]
