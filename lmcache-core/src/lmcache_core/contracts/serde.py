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

from lmcache_core.chunks.layout import LayerGroup


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (arXiv 2104.09864) as a model applies it to keys.

    Element pair j of a head is turned by ``position * frequencies[j]`` radians. Pairs are
    ``(j, j + n)`` for n frequencies, or ``(2 j, 2 j + 1)`` if ``interleaved``; elements behind the
    last pair aren't turned. Scaled variants differ in their frequencies only, if these are the
    same at every position.
    """

    frequencies: tuple[float, ...]
    interleaved: bool = False

    @classmethod
    def of(cls, *, theta: float, rotary_size: int, interleaved: bool = False) -> Rope:
        """The unscaled variant: frequencies ``theta ** (-2 j / rotary_size)``."""
        pairs = rotary_size // 2
        return cls(tuple(theta ** (-2 * j / rotary_size) for j in range(pairs)), interleaved)


@dataclass(frozen=True)
class SerdeFacts:
    """What doesn't change while a tier is open. Anything may be unknown."""

    fingerprint: str = ""
    """The namespace's: model, layout, heads, layers, tenant."""
    rope: Rope | None = None
    """``None``: unknown, none, or of a kind that isn't one angle for each pair and position."""
    weights: str = ""
    """What names the model's weights: `model.weights_identity`. Empty if unknown."""


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

    def identity(self, group: LayerGroup) -> str:  # noqa: ARG002  for those whose output depends on it
        """What another serde must share with this one to read what it writes for ``group``.

        It is part of where values lie: those that this serde couldn't read, or that promise less,
        are elsewhere, and nobody deletes them. So whatever decoding needs beside the bytes belongs
        here (a key's id, a profile's digest), and options that change what comes back. The same in
        every process with the same configuration; printable ASCII without blanks; no secrets.
        Asked of the `bound` serde.
        """
        return str(self.wire_id)

    @property
    def in_place(self) -> bool:
        """Whether the encoded bytes *are* the chunk's bytes, so that core needn't copy them."""
        return False

    def bound(self, facts: SerdeFacts) -> Serde:  # noqa: ARG002  for those who want to know
        """This serde for a tier of which ``facts`` hold; asked once, before anything is encoded."""
        return self

    def for_chunk(self, key: bytes, start: int | None) -> Serde:  # noqa: ARG002
        """This serde for the one chunk that is called ``key``. Cheap: asked for every chunk.

        ``start`` is the position of the chunk's first token in its sequence, ``None`` where core
        doesn't know it: always before decoding. What decoding needs goes into the encoded bytes.
        """
        return self

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
    environment: tuple[str, ...] = ()
    """``LMCACHE_…`` variables that it reads itself; others that nobody knows are errors."""
