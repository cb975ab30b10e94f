"""What a chunk is called in Redis and what is kept under these names.

    PREFIX:1:FINGERPRINT:{KEY}              the head, and behind it the whole value if it is short
    PREFIX:1:FINGERPRINT:{KEY}:NONCE:I      piece I of a longer value

FINGERPRINT is the namespace's, KEY the chunk's in hexadecimal; the braces keep a chunk and its
pieces in one slot of a cluster. A head is 24 bytes, integers little-endian:

    offset  bytes  field
    0       4      magic        b"LMR\\x01"
    4       4      piece bytes  0: the value follows
    8       8      value bytes
    16      8      nonce        random, other for each store: pieces of two stores never mix

The head of a long value is set last, by one transaction, once every piece is there. A reader asks
for the pieces that it names and for nothing else, so it sees one store's value or none.

Knows names and bytes. Knows nothing about servers.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Final

from lmcache_core import ChunkKey

MAGIC: Final = b"LMR\x01"
HEAD: Final = struct.Struct("<4sIQ8s")
MAX_VALUE_BYTES: Final = 512 << 20
"""As Redis's own limit on one string. No chunk comes near it."""
MIN_PIECE_BYTES: Final = 4 << 10


class Names:
    """The keys of one namespace."""

    def __init__(self, prefix: str, fingerprint: str) -> None:
        self._start = f"{prefix}:1:{fingerprint}:".encode("ascii")

    @property
    def pattern(self) -> bytes:
        """What SCAN matches: every key of the namespace."""
        return self._start + b"*"  # the prefix has no character that means something there

    def head(self, key: ChunkKey) -> bytes:
        """The name that a chunk is found under."""
        return b"%b{%b}" % (self._start, key.hex().encode("ascii"))

    @staticmethod
    def is_head(name: bytes) -> bool:
        """Whether a name of the namespace is a head's and not a piece's."""
        return name.endswith(b"}")


@dataclass(frozen=True)
class Head:
    """What is known of a value once its head has been read."""

    value_bytes: int
    piece_bytes: int
    nonce: bytes = bytes(8)

    @classmethod
    def of(cls, value_bytes: int, piece_bytes: int) -> Head:
        """The head of a value that is about to be stored; short ones aren't cut."""
        if value_bytes <= piece_bytes:
            return cls(value_bytes, 0)
        return cls(value_bytes, piece_bytes, os.urandom(8))

    @classmethod
    def unpack(cls, head: bytes, most_bytes: int) -> Head | None:
        """Read a head; ``None`` if these bytes aren't one of this version.

        Nor are they if they announce more than ``most_bytes``, the longest value that the reader
        has room for or that there may be here: who believed them would list, and ask for, that
        many pieces.
        """
        if len(head) != HEAD.size:
            return None
        magic, piece_bytes, value_bytes, nonce = HEAD.unpack(head)
        if magic != MAGIC or value_bytes > most_bytes:
            return None
        if piece_bytes and not MIN_PIECE_BYTES <= piece_bytes < value_bytes:
            return None
        return cls(value_bytes, piece_bytes, nonce)

    def pack(self) -> bytes:
        """The 24 bytes."""
        return HEAD.pack(MAGIC, self.piece_bytes, self.value_bytes, self.nonce)

    def pieces(self, head_name: bytes) -> list[tuple[bytes, slice]]:
        """Name and place of each piece; none for a value that isn't cut."""
        if not self.piece_bytes:
            return []
        nonce = self.nonce.hex().encode("ascii")
        return [
            (
                b"%b:%b:%d" % (head_name, nonce, number),
                slice(start, min(start + self.piece_bytes, self.value_bytes)),
            )
            for number, start in enumerate(range(0, self.value_bytes, self.piece_bytes))
        ]
