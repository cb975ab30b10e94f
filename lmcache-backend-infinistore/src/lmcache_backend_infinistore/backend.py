"""The infinistore backend.

Knows what chunks are called in InfiniStore, and in which order their parts are written and read.
How bytes get there is `links`' business, how they lie there `layout`'s; retries, deadlines, metrics
and tiers are core's.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Final

from lmcache_backend_infinistore.client import library
from lmcache_backend_infinistore.config import InfinistoreConfig
from lmcache_backend_infinistore.layout import BEGINNING, MAX_VALUE_BYTES, Head
from lmcache_backend_infinistore.links import HEAD_BYTES, VALUES, Link, Links, Parts, TcpLink
from lmcache_backend_infinistore.rdma import RdmaLink, chosen_device
from lmcache_backend_infinistore.wire import Block
from lmcache_core import (
    MISS,
    BackendCapabilities,
    BackendContext,
    BackendUnavailable,
    BlockingBackend,
    ChunkKey,
    StoreOutcome,
)

logger = logging.getLogger(__name__)

_QUESTIONS: Final = 2
"""Lookups at the same time: over TCP whatever values take, so that they don't wait behind those."""
_OVER_RDMA: Final = 8
"""Values of a call there: of two calls, each on a connection, one is asked about while the other
moves. Over TCP, the server reads one connection at a time, and two are slower."""
_ASKED: Final = 64
"""Keys of a prefix that are looked up at once, though only the first that isn't there counts."""


class InfinistoreBackend(BlockingBackend):
    """Keeps each chunk as a head and pieces; an instance serves one namespace."""

    def __init__(self, config: InfinistoreConfig) -> None:
        self._config = config
        # Over TCP, nothing of the client is used.
        self._module = None if config.connection_type == "TCP" else library()
        self._questions: Links | None = None
        self._values: Links | None = None
        self._prefix = ""
        self._most_bytes = MAX_VALUE_BYTES

    @property
    def capabilities(self) -> BackendCapabilities:
        return BackendCapabilities(
            shared=True,
            persistent=True,
            max_chunk_bytes=MAX_VALUE_BYTES,
            preferred_batch=VALUES if self._config.connection_type == "TCP" else _OVER_RDMA,
            max_concurrency=self._config.connections + _QUESTIONS,
        )

    def open_blocking(self, context: BackendContext) -> None:
        config = self._config
        if context.max_value_bytes is not None:
            self._most_bytes = min(context.max_value_bytes, MAX_VALUE_BYTES)
        if config.without_effect:
            logger.warning(
                "%s: no effect over TCP: %s", context.name, ", ".join(config.without_effect)
            )
        # Chunks of different means of transport don't mix: see `links`.
        means = config.connection_type.lower()
        self._prefix = f"{config.prefix}:1:{means}:{context.namespace.fingerprint}:"
        self._questions = Links(lambda: TcpLink(config), _QUESTIONS)
        if not context.lookup_only:
            self._values = Links(self._connector(context), config.connections)
        # What can't work should say so at the start.
        try:
            for links in (self._questions, self._values):
                if links is not None:
                    with links.lend() as link:
                        link.probe()
        except BaseException:
            self.close_blocking()
            raise

    def contains_blocking(self, keys: Sequence[ChunkKey]) -> list[bool]:
        with _open(self._questions).lend() as link:
            return link.exist(self._names(keys))

    def load_blocking(self, keys: Sequence[ChunkKey], into: Sequence[memoryview]) -> list[int]:
        if not keys:
            return []
        names = self._names(keys)
        with _open(self._values).lend() as link:
            return [
                size
                for batch in _batches(len(names))
                for size in _load(link, names[batch], into[batch], self._most_bytes)
            ]

    def store_blocking(
        self, keys: Sequence[ChunkKey], sources: Sequence[memoryview]
    ) -> list[StoreOutcome]:
        if not keys:
            return []
        names, most = self._names(keys), self._config.piece_bytes
        with _open(self._values).lend() as link:
            return [
                outcome
                for batch in _batches(len(names))
                for outcome in _store(link, names[batch], sources[batch], most)
            ]

    async def count_leading_hits(self, keys: Sequence[ChunkKey]) -> int:
        """How many keys from the first on would hit, up to the first miss.

        InfiniStore's own prefix lookup halves the range, as if nothing were ever evicted from the
        middle of a prefix; this asks for each, many at a time.
        """
        return await self._run(self._count_leading_hits, keys)

    async def delete(self, keys: Sequence[ChunkKey]) -> int:
        """Forget ``keys``; answer how many of them were there."""
        return await self._run(self._delete, keys)

    def close_blocking(self) -> None:
        for links in (self._questions, self._values):
            if links is not None:
                links.close()

    def _connector(self, context: BackendContext) -> Callable[[], Link]:
        config, module = self._config, self._module
        if module is None:
            return lambda: TcpLink(config)
        device = chosen_device(config)
        return lambda: RdmaLink(module, config, device, context.region)

    def _count_leading_hits(self, keys: Sequence[ChunkKey]) -> int:
        with _open(self._questions).lend() as link:
            for first in range(0, len(keys), _ASKED):
                found = link.exist(self._names(keys[first : first + _ASKED]))
                if not all(found):
                    return first + found.index(False)
        return len(keys)

    def _delete(self, keys: Sequence[ChunkKey]) -> int:
        if not keys:
            return 0
        names = self._names(keys)
        with _open(self._values).lend() as link:
            return sum(
                link.forget(name, head.names(name))
                for batch in _batches(len(names))
                for name, head in zip(
                    names[batch], _Heads(link).read(names[batch], self._most_bytes), strict=True
                )
                if head is not None
            )

    def _names(self, keys: Sequence[ChunkKey]) -> list[str]:
        return [self._prefix + key.hex() for key in keys]


def _open(links: Links | None) -> Links:
    if links is None:
        raise BackendUnavailable("the backend isn't open")
    return links


def _load(
    link: Link, names: Sequence[str], into: Sequence[memoryview], most_bytes: int
) -> list[int]:
    """Load up to `VALUES` values, each of ``most_bytes`` at most; their lengths."""
    heads = _Heads(link)
    found = [
        head if head is not None and head.nbytes <= buffer.nbytes else None
        for head, buffer in zip(heads.read(names, most_bytes), into, strict=True)
    ]
    held = [_pinned(buffer) for buffer in into]  # until the pieces have been moved
    blocks = [
        block
        for head, name, start in zip(found, names, held, strict=True)
        if head is not None
        for block in _pieces(head, name, start)
    ]
    arriving = link.read_pieces(blocks)
    for i, (head, buffer) in enumerate(zip(found, into, strict=True)):
        if head is not None and head.inline:
            end = head.nbytes - head.inline
            buffer[end : head.nbytes] = heads.end(i)[: head.inline]
    there = iter(arriving())
    sizes = []
    for head, name in zip(found, names, strict=True):
        if head is None:
            sizes.append(MISS)
        elif all(list(islice(there, head.pieces))):
            sizes.append(head.nbytes)
        else:
            # A piece was evicted: what is left would keep the value from being stored anew.
            link.forget(name, head.names(name))
            sizes.append(MISS)
    return sizes


def _store(
    link: Link, names: Sequence[str], sources: Sequence[memoryview], most: int
) -> list[StoreOutcome]:
    """Store up to `VALUES` values, in pieces of at most ``most`` bytes."""
    heads, nonce = _Heads(link), os.urandom(8)
    held: list[Any] = []  # until all is written

    def values() -> Iterator[Parts]:
        for i, (name, source) in enumerate(zip(names, sources, strict=True)):
            held.append(_pinned(source))
            head = Head.of(source.nbytes, most, nonce, HEAD_BYTES - BEGINNING)
            yield Parts(_pieces(head, name, held[i]), heads.fill(i, name, head, source))

    return link.store(names, values())


def _batches(count: int) -> Iterator[slice]:
    """Ranges of at most `VALUES` positions."""
    for first in range(0, count, VALUES):
        yield slice(first, min(first + VALUES, count))


class _Heads:
    """The heads of up to `VALUES` values, in the memory of a connection."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def read(self, names: Sequence[str], most_bytes: int) -> list[Head | None]:
        """What is stored under ``names``, of ``most_bytes`` at most; ``None`` for what isn't."""
        link = self._link
        found = link.read_heads([self._block(i, name) for i, name in enumerate(names)])
        heads = []
        for i, there in enumerate(found):
            heads.append(Head.unpack(self._of(i), most_bytes) if there else None)
            if there and heads[i] is None:
                link.forget(names[i], ())  # isn't ours, or is broken
        return heads

    def fill(self, i: int, name: str, head: Head, source: memoryview) -> Block:
        """What to store as the head of value ``i``."""
        self._of(i)[:BEGINNING] = head.pack()
        self.end(i)[: head.inline] = source[head.nbytes - head.inline :]
        return self._block(i, name)

    def end(self, i: int) -> memoryview:
        """The end of value ``i``, and what room there is behind it."""
        return self._of(i)[BEGINNING:]

    def _of(self, i: int) -> memoryview:
        return self._link.heads[i * HEAD_BYTES : (i + 1) * HEAD_BYTES]

    def _block(self, i: int, name: str) -> Block:
        return Block(name, self._link.heads_address + i * HEAD_BYTES, HEAD_BYTES)


def _pieces(head: Head, name: str, start: Any) -> list[Block]:
    """The pieces of the value at ``start``, something that `_pinned` made."""
    address = ctypes.addressof(start)
    return [
        Block(piece, address + offset, head.piece_bytes)
        for piece, offset in zip(head.names(name), head.starts(), strict=True)
    ]


def _pinned(buffer: memoryview) -> Any:
    """Something at the address of ``buffer`` that keeps its memory where it is.

    For read-only memory, whose address Python doesn't tell, a copy.
    """
    if buffer.readonly or not buffer.nbytes:
        return (ctypes.c_char * buffer.nbytes).from_buffer_copy(buffer)
    return ctypes.c_char.from_buffer(buffer)
