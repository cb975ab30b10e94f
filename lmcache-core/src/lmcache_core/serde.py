"""The contract between lmcache-core and a (de)serialiser.

Knows how a chunk's bytes become the bytes that are stored. Framing, keys and
checksums are `frame`'s business, and where bytes go is nobody's here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from lmcache_core.layout import LayerGroup


class Serde(ABC):
    """Turns one chunk into bytes to store, and back. Pure, thread-safe, no I/O.

    What core guarantees: buffers are contiguous memoryviews of format ``B``; ``chunk`` holds
    ``group.chunk_bytes(tokens)`` bytes; ``into`` has at least ``max_encoded_bytes`` when encoding
    and exactly the chunk's size when decoding; ``encoded`` passed its checksum.

    What a serde owes: `decode` gives back what `encode` was given, exactly if the descriptor says
    ``lossless``; it raises rather than guesses; it never writes outside ``into`` and keeps no
    reference to a buffer.
    """

    @property
    @abstractmethod
    def wire_id(self) -> int:
        """The 2-byte id in the frame header of everything that this serde wrote.

        1-999 belong to this project, 1000-64999 are for everybody else.
        """

    @property
    def in_place(self) -> bool:
        """Whether the encoded bytes *are* the chunk's bytes, so that core needn't copy them."""
        return False

    @abstractmethod
    def max_encoded_bytes(self, group: LayerGroup, tokens: int) -> int:
        """The longest that ``encode`` may make a chunk of ``tokens`` tokens."""

    @abstractmethod
    def encode(self, chunk: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> int:
        """Encode ``chunk`` to the start of ``into`` and answer how many bytes it took."""

    @abstractmethod
    def decode(self, encoded: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> None:
        """Decode ``encoded``, exactly the bytes that `encode` wrote, into ``into``.

        Raises:
            ValueError: ``encoded`` isn't something that this serde wrote for such a chunk.
        """


@dataclass(frozen=True, kw_only=True)
class SerdeDescriptor:
    """What a plugin says about a serde."""

    name: str
    summary: str
    lossless: bool
    config: type[BaseModel]
    create: Callable[[Any], Serde]
    aliases: tuple[str, ...] = ()
    """Other names that configurations use for it, such as LMCache's ``naive``."""
