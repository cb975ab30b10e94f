"""Chunks that writers keep in a folder, and what has to be in it by what they said.

A writer says what it is about to do and what it has done. `Promises` knows from that what must be
there, what must not, and how long a file may be, wherever the writers stopped. Content follows from
a chunk's number and length, so that anybody knows it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto

from lmcache_core.chunks.checksums import checksums
from lmcache_core.chunks.frame import HEADER_BYTES, write_header
from lmcache_core.chunks.keys import CacheNamespace, ChunkKey
from lmcache_core.testing.storage import LAYOUT, keys, value

EACH = 8
"""Chunks of a namespace; chunk number i is of namespace i // EACH."""
SPACES = tuple(CacheNamespace(f"model {number}", LAYOUT) for number in range(3))
KEYS = [key for number in range(len(SPACES)) for key in keys(EACH, number)]
CHUNKS = range(len(KEYS))
NUMBERS = {key.hex(): number for number, key in enumerate(KEYS)}
LENGTHS = (HEADER_BYTES + 300, HEADER_BYTES + 1700, HEADER_BYTES + 4500)


def chunks_of(space: int) -> range:
    """Numbers of a namespace's chunks."""
    return range(space * EACH, space * EACH + EACH)


def framed(key: ChunkKey, namespace: CacheNamespace, payload: bytes | bytearray) -> bytearray:
    """What core stores for a chunk that isn't encoded."""
    whole = bytearray(HEADER_BYTES) + payload
    write_header(
        memoryview(whole),
        key=key,
        fingerprint=namespace.fingerprint,
        serde=1,
        exact=True,
        raw_bytes=len(payload),
        payload_bytes=len(payload),
        chunk_sums=checksums(memoryview(whole)[HEADER_BYTES:], 1),
        raw=True,
    )
    return whole


@functools.cache
def content(chunk: int, nbytes: int) -> bytes:
    """What core stores for a chunk, in ``nbytes`` bytes."""
    payload = nbytes - HEADER_BYTES
    kept = value(10 * chunk + payload % 7, payload)
    return bytes(framed(KEYS[chunk], SPACES[chunk // EACH], kept))


class State(Enum):
    """What is known of a chunk."""

    THERE = auto()
    GONE = auto()
    GOING = auto()
    """Somebody is about to forget it."""
    ANY = auto()


@dataclass
class Known:
    """A chunk as its writers left it."""

    state: State = State.GONE
    lengths: set[int] = field(default_factory=set)
    """That its file may have."""
    loose: bool = False
    """Somebody wrote it who promised nothing; until it is forgotten, nobody does."""
    storing: int = 0
    forgetting: int = 0
    removing: int = 0
    removals: int = 0
    """Beginnings and ends of them."""
    removals_before: int = 0
    """The latest store."""


class Promises:
    """What was said of ``chunks``, in the order in which it was said."""

    def __init__(self, chunks: Iterable[int]) -> None:
        self.known = {chunk: Known() for chunk in chunks}

    def note(self, what: str, chunks: Iterable[int], nbytes: int = 0) -> None:
        """One thing that a writer said, ``what`` being one of the methods below."""
        for chunk in chunks:
            getattr(self, what)(self.known[chunk], nbytes)

    def storing(self, one: Known, nbytes: int) -> None:
        """A store begins."""
        one.lengths.add(nbytes)
        one.storing += 1
        one.removals_before = one.removals
        if one.state is not State.THERE:
            one.state = State.ANY

    def stored(self, one: Known, nbytes: int) -> None:
        """It was acknowledged."""
        one.storing -= 1
        one.lengths = {nbytes}
        if not one.loose and not one.removing and one.removals == one.removals_before:
            one.state = State.THERE

    def refused(self, one: Known, _: int) -> None:
        """There was no room for it."""
        one.storing -= 1

    def storing_loosely(self, one: Known, nbytes: int) -> None:
        """A store that promises nothing begins."""
        one.lengths.add(nbytes)
        one.loose = True
        one.state = State.ANY

    def deleting(self, one: Known, _: int) -> None:
        """It is about to be forgotten."""
        one.forgetting += 1
        one.state = State.ANY if one.storing else State.GOING

    def deleted(self, one: Known, _: int) -> None:
        """That was acknowledged."""
        one.forgetting -= 1
        if one.state is State.GOING:
            one.state, one.loose = State.GONE, False

    def removing(self, one: Known, _: int) -> None:
        """A file of it is about to be removed, for whatever reason."""
        one.removing += 1
        one.removals += 1
        if one.state is State.THERE:
            one.state = State.ANY

    def removed(self, one: Known, _: int) -> None:
        """That was done."""
        one.removing -= 1
        one.removals += 1  # a store that began in between may have seen it there

    def ended(self) -> None:
        """No writer is left, wherever each of them was."""
        for one in self.known.values():
            one.storing = one.forgetting = one.removing = 0
            if one.state is State.GOING:
                one.state = State.ANY

    def of(self, state: State) -> int:
        """How many chunks are known to be so."""
        return sum(one.state is state for one in self.known.values())

    def surprise(self, chunk: int) -> str | None:
        """What is wrong with removing a chunk now, where nothing has to give way."""
        one = self.known[chunk]
        if one.state is not State.THERE or one.forgetting:
            return None
        return f"chunk {chunk} is removed, and nobody asked for it"

    def problem(self, chunk: int, found: int | None) -> str | None:
        """What is wrong with a chunk of which so many bytes were found; ``None``: it is missing."""
        one = self.known[chunk]
        if found is None:
            return f"chunk {chunk} is missing" if one.state is State.THERE else None
        if one.state is State.GONE:
            return f"chunk {chunk} is there, and was forgotten"
        return None if found in one.lengths else f"chunk {chunk} has {found} bytes: {one.lengths}"
