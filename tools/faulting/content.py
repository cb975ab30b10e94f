"""What the bytes of every key must be: made from the key, by nothing that is tested.

Each 8-byte word of a chunk is its position in the chunk, XORed with 64 bits that name the chunk's
whole prefix and its salt. So another key's chunk, a torn and a misplaced one are all found.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lmcache_core import DType, KVLayout, full_attention

CHUNK_TOKENS = 16
DEPTH, BRANCHES = 8, (6, 3, 2)
"""A prompt has up to so many chunks; each goes on in one of three ways, with these weights."""
UNTOUCHED = 0xDEAD_BEEF_DEAD_BEEF
SALTS = ("", "tenant")
SHAPES = {"small": (2, 1, 32), "large": (4, 2, 64)}
"""Layers, heads and head size: chunks of 4 and of 32 KiB."""


@dataclass(frozen=True)
class Prompt:
    """A path in the tree of prompts: which branch after each chunk."""

    path: tuple[int, ...]
    tail: int = 0
    """Tokens after the last whole chunk."""
    salt: str = ""

    @property
    def tokens(self) -> bytes:
        """Token ids: the same for the same branch at the same depth, so that prefixes decide."""
        ids = array("I")
        for depth, branch in enumerate(self.path):
            first = 1000 + CHUNK_TOKENS * (depth << 20 | branch)
            ids.extend(range(first, first + CHUNK_TOKENS))
        ids.extend(range(self.tail))
        return ids.tobytes()


def drawn(chance: random.Random) -> Prompt:
    """A prompt that shares prefixes with others."""
    path = chance.choices(range(len(BRANCHES)), BRANCHES, k=chance.randint(1, DEPTH))
    return Prompt(tuple(path), chance.randrange(CHUNK_TOKENS), chance.choice(SALTS))


class Content:
    """Fills and checks KV in one of `SHAPES`."""

    def __init__(self, shape: str) -> None:
        layers, heads, head_size = SHAPES[shape]
        self._layers, self._row = layers, heads * head_size * DType.BF16.itemsize // 8
        group = full_attention(layers=layers, heads=heads, head_size=head_size, dtype=DType.BF16)
        self.layout = KVLayout(CHUNK_TOKENS, (group,))
        self.chunk_bytes = group.chunk_bytes(CHUNK_TOKENS)
        words = self.chunk_bytes // 8
        self._positions = np.arange(words, dtype=np.uint64).reshape(
            (layers, 2, CHUNK_TOKENS, self._row)
        )

    def empty(self, prompt: Prompt) -> np.ndarray:
        """KV of that length, each word `UNTOUCHED`."""
        tokens = len(prompt.path) * CHUNK_TOKENS + prompt.tail
        return np.full((self._layers, 2, tokens, self._row), UNTOUCHED, dtype=np.uint64)

    def made(self, prompt: Prompt) -> np.ndarray:
        """The KV of a prompt."""
        kv = self.empty(prompt)
        for name, part in self._chunks(kv, prompt, len(prompt.path)):
            np.bitwise_xor(self._positions, name, out=part)
        return kv

    def wrong_words(self, kv: np.ndarray, prompt: Prompt, chunks: int) -> int:
        """How many words of its first ``chunks`` aren't what they must be."""
        return sum(
            int(np.count_nonzero((part ^ name) != self._positions))
            for name, part in self._chunks(kv, prompt, chunks)
        )

    def _chunks(
        self, kv: np.ndarray, prompt: Prompt, count: int
    ) -> Iterator[tuple[np.uint64, np.ndarray]]:
        for index in range(count):
            part = kv[:, :, index * CHUNK_TOKENS : (index + 1) * CHUNK_TOKENS]
            yield _name(prompt.path[: index + 1], prompt.salt), part


def as_bytes(kv: np.ndarray) -> np.ndarray:
    """The same memory as KV is handed over: four elements are in each word here."""
    return kv.view(np.uint8).reshape(-1)


@lru_cache(maxsize=1 << 14)
def _name(path: tuple[int, ...], salt: str) -> np.uint64:
    digest = hashlib.sha256(repr((path, salt)).encode()).digest()
    return np.uint64(int.from_bytes(digest[:8], "little"))
