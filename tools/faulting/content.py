"""What the bytes of every key must be: made from the key, by nothing that is tested.

Each 8-byte word of a chunk is its position in the chunk, XORed with 64 bits that name the chunk's
whole prefix and its salt. So another key's chunk, a torn and a misplaced one are all found.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lmcache_core import DType, KVLayout, full_attention

CHUNK_TOKENS = 16
DEPTH, BRANCHES = 8, (10, 2, 1)
"""A prompt has up to so many chunks; each goes on in one of three ways, with these weights."""
OF_ONE_TREE = 400
"""Prompts that are drawn from one tree on the average, before the next one grows."""
UNTOUCHED = 0xDEAD_BEEF_DEAD_BEEF
SALTS = ("", "tenant")
SHAPES = {"small": (2, 1, 32), "large": (4, 2, 64)}
"""Layers, heads and head size: chunks of 4 and of 32 KiB."""
_FIRST_TREE = 1 << 18
_TREES = 1 << 17
"""Their roots are those of no prompt that `rest` makes."""


@dataclass(frozen=True)
class Prompt:
    """A path in a tree of prompts: which branch after each chunk."""

    path: tuple[int, ...]
    tail: int = 0
    """Tokens after the last whole chunk."""
    salt: str = ""

    @property
    def tokens(self) -> bytes:
        """Token ids: the same for the same branch at the same depth, so that prefixes decide."""
        firsts = [
            1000 + CHUNK_TOKENS * (depth << 20 | branch) for depth, branch in enumerate(self.path)
        ]
        ids = np.add.outer(np.array(firsts, "<u4"), _IN_CHUNK)
        return ids.tobytes() + _IN_CHUNK[: self.tail].tobytes()


class Prompts:
    """Draws prompts that share prefixes with others. Thread-safe.

    A tree is left for the next one after a while: a tier refuses for minutes what its serde
    couldn't decode, and soon nothing of an old tree could be loaded any more. Older ones are asked
    for again now and then, when they are in slow tiers at most.
    """

    def __init__(self) -> None:
        self._drawn = itertools.count()

    def draw(self, chance: random.Random) -> Prompt:
        """The next prompt."""
        age = int(chance.expovariate(2.0))
        tree = max(0, next(self._drawn) // OF_ONE_TREE - age) % _TREES
        path = chance.choices(range(len(BRANCHES)), BRANCHES, k=chance.randint(1, DEPTH))
        path[0] += _FIRST_TREE + len(BRANCHES) * tree
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
        one = np.arange(words, dtype=np.uint64).reshape((layers, 2, 1, CHUNK_TOKENS, self._row))
        self._positions = one.repeat(DEPTH, axis=2)
        """By layer, plane, chunk, token, and word of these."""

    def empty(self, prompt: Prompt) -> np.ndarray:
        """KV of that length, each word `UNTOUCHED`."""
        tokens = len(prompt.path) * CHUNK_TOKENS + prompt.tail
        return np.full((self._layers, 2, tokens, self._row), UNTOUCHED, dtype=np.uint64)

    def made(self, prompt: Prompt) -> np.ndarray:
        """The KV of a prompt."""
        kv = self.empty(prompt)
        count = len(prompt.path)
        kv[:, :, : count * CHUNK_TOKENS] = self._expected(prompt, count)
        return kv

    def wrong_words(self, kv: np.ndarray, prompt: Prompt, chunks: int) -> int:
        """How many words of its first ``chunks`` aren't what they must be."""
        found = kv[:, :, : chunks * CHUNK_TOKENS]
        return int(np.count_nonzero(found != self._expected(prompt, chunks)))

    def _expected(self, prompt: Prompt, count: int) -> np.ndarray:
        """The first ``count`` chunks of a prompt."""
        names = (_name(prompt.path[: index + 1], prompt.salt) for index in range(count))
        chunks = self._positions[:, :, :count] ^ _column(names, count)
        return chunks.reshape((self._layers, 2, count * CHUNK_TOKENS, self._row))


def as_bytes(kv: np.ndarray) -> np.ndarray:
    """The same memory as KV is handed over: four elements are in each word here."""
    return kv.view(np.uint8).reshape(-1)


def _column(names: Iterable[int], count: int) -> np.ndarray:
    return np.fromiter(names, np.uint64, count).reshape((count, 1, 1))


@lru_cache(maxsize=1 << 14)
def _name(path: tuple[int, ...], salt: str) -> int:
    digest = hashlib.sha256(repr((path, salt)).encode()).digest()
    return int.from_bytes(digest[:8], "little")


_IN_CHUNK = np.arange(CHUNK_TOKENS, dtype="<u4")
