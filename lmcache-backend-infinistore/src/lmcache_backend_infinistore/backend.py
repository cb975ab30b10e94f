"""The infinistore backend.

Knows what chunks are called in InfiniStore, and in which order their parts are written and read.
How bytes get there is `links`' business, how they lie there `layout`'s; retries, deadlines, metrics
and tiers are core's.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from typing import Any, Final

from lmcache_backend_infinistore.config import InfinistoreConfig
from lmcache_backend_infinistore.layout import BEGINNING, HEAD_BYTES, MARK, Head
from lmcache_backend_infinistore.links import (
    Block,
    Link,
    Links,
    RdmaLink,
    TcpLink,
    chosen_device,
    library,
)
from lmcache_core.errors import BackendUnavailable
from lmcache_core.keys import ChunkKey
from lmcache_core.storage import (
    MISS,
    BackendCapabilities,
    BackendContext,
    BlockingBackend,
    StoreOutcome,
)

logger = logging.getLogger(__name__)

_QUESTIONS: Final = 2
"""Lookups at the same time: over TCP whatever values take, so that they don't wait behind those."""


class InfinistoreBackend(BlockingBackend):
    """Keeps each chunk as a head and pieces; an instance serves one namespace."""

    def __init__(self, config: InfinistoreConfig) -> None:
        self._config = config
        self._module = library()
        self._questions: Links | None = None
        self._values: Links | None = None
        self._prefix = ""

    @property
    def capabilities(self) -> BackendCapabilities:
        return BackendCapabilities(
            shared=True,
            persistent=True,
            preferred_batch=16,
            max_concurrency=self._config.connections + _QUESTIONS,
        )

    def open_blocking(self, context: BackendContext) -> None:
        config, module = self._config, self._module
        if config.without_effect:
            logger.warning(
                "%s: no effect over TCP: %s", context.name, ", ".join(config.without_effect)
            )
        self._prefix = f"{config.prefix}:1:{context.namespace.fingerprint}:"
        self._questions = Links(lambda: TcpLink(module, config), _QUESTIONS)
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
            return [link.exists(name) for name in self._names(keys)]

    def load_blocking(self, keys: Sequence[ChunkKey], into: Sequence[memoryview]) -> list[int]:
        if not keys:
            return []
        names = self._names(keys)
        with _open(self._values).lend() as link:
            beginnings = _Heads(len(keys))
            fitting = [
                head if head is not None and head.nbytes <= buffer.nbytes else None
                for head, buffer in zip(beginnings.read(link, names), into, strict=True)
            ]
            complete = _moved(link.read, names, fitting, into)
            sizes = []
            for i, (name, head, there) in enumerate(zip(names, fitting, complete, strict=True)):
                sizes.append(head.nbytes if head is not None and there else MISS)
                if head is not None and there:
                    into[i][: head.inline] = beginnings.value(i)[: head.inline]
                elif head is not None:
                    # A piece was evicted: without its mark, the next store writes it anew.
                    link.delete([name, Head.name(name), *head.names(name)])
            return sizes

    def store_blocking(
        self, keys: Sequence[ChunkKey], sources: Sequence[memoryview]
    ) -> list[StoreOutcome]:
        if not keys:
            return []
        names = self._names(keys)
        with _open(self._values).lend() as link:
            heads = [
                None if link.exists(name) else Head.of(source.nbytes, self._config.piece_bytes)
                for name, source in zip(names, sources, strict=True)
            ]
            written = _moved(link.write, names, heads, sources)
            # In this order: a reader that sees a mark finds the head, and then all pieces.
            ready = [head if done else None for head, done in zip(heads, written, strict=True)]
            headed = _Heads(len(keys)).write(link, names, ready, sources)
            stored = _marked(link, names, headed)
            outcomes = []
            for name, head, there in zip(names, heads, stored, strict=True):
                if head is None:
                    outcomes.append(StoreOutcome.ALREADY_PRESENT)
                elif there:
                    outcomes.append(StoreOutcome.STORED)
                else:
                    outcomes.append(StoreOutcome.NOT_ADMITTED)
                    link.delete([Head.name(name), *head.names(name)])
            return outcomes

    async def count_leading_hits(self, keys: Sequence[ChunkKey]) -> int:
        """How many keys from the first on would hit, up to the first miss.

        InfiniStore's own prefix lookup halves the range, as if nothing were ever evicted from the
        middle of a prefix; this asks for one after the other.
        """
        return await self._run(self._count_leading_hits, keys)

    async def delete(self, keys: Sequence[ChunkKey]) -> int:
        """Forget ``keys``; answer how many of them were there."""
        return await self._run(self._delete, keys)

    def close_blocking(self) -> None:
        for links in (self._questions, self._values):
            if links is not None:
                links.close()

    def _connector(self, context: BackendContext) -> Any:
        config, module = self._config, self._module
        if config.connection_type == module.TYPE_TCP:
            return lambda: TcpLink(module, config)
        device = chosen_device(config)
        return lambda: RdmaLink(module, config, device, context.region)

    def _count_leading_hits(self, keys: Sequence[ChunkKey]) -> int:
        with _open(self._questions).lend() as link:
            for count, name in enumerate(self._names(keys)):
                if not link.exists(name):
                    return count
        return len(keys)

    def _delete(self, keys: Sequence[ChunkKey]) -> int:
        if not keys:
            return 0
        names = self._names(keys)
        with _open(self._values).lend() as link:
            heads = _Heads(len(names)).read(link, names)
            count = 0
            for name, head in zip(names, heads, strict=True):
                count += link.delete([name])
                link.delete([Head.name(name), *(head.names(name) if head is not None else [])])
            return count

    def _names(self, keys: Sequence[ChunkKey]) -> list[str]:
        return [self._prefix + key.hex() for key in keys]


def _open(links: Links | None) -> Links:
    if links is None:
        raise BackendUnavailable("the backend isn't open")
    return links


class _Heads:
    """Memory for the heads of ``count`` values."""

    def __init__(self, count: int) -> None:
        memory = bytearray(count * HEAD_BYTES)
        self._view = memoryview(memory)
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(memory)) if count else 0

    def read(self, link: Link, names: Sequence[str]) -> list[Head | None]:
        """What is stored under ``names``; ``None`` for what isn't."""
        marked = [i for i, name in enumerate(names) if link.exists(name)]
        found = link.read([self._block(i, names[i]) for i in marked])
        heads: list[Head | None] = [None] * len(names)
        for i, there in zip(marked, found, strict=True):
            heads[i] = Head.unpack(self._of(i)) if there else None
            if heads[i] is None:
                link.delete([names[i]])  # the head was evicted before its mark
        return heads

    def write(
        self,
        link: Link,
        names: Sequence[str],
        heads: Sequence[Head | None],
        sources: Sequence[memoryview],
    ) -> list[bool]:
        """Store the heads that there are; say for each position if it is stored."""
        blocks = {}
        for i, (name, head, source) in enumerate(zip(names, heads, sources, strict=True)):
            if head is not None:
                self._of(i)[:BEGINNING] = head.pack()
                self.value(i)[: head.inline] = source[: head.inline]
                blocks[i] = self._block(i, name)
        stored = dict(zip(blocks, link.write(list(blocks.values())), strict=True))
        return [stored.get(i, False) for i in range(len(heads))]

    def value(self, i: int) -> memoryview:
        """The beginning of value ``i``, and what room there is behind it."""
        return self._of(i)[BEGINNING:]

    def _of(self, i: int) -> memoryview:
        return self._view[i * HEAD_BYTES : (i + 1) * HEAD_BYTES]

    def _block(self, i: int, name: str) -> Block:
        return Block(Head.name(name), self._start + i * HEAD_BYTES, HEAD_BYTES)


def _marked(link: Link, names: Sequence[str], complete: Sequence[bool]) -> list[bool]:
    """Mark the values that are complete; say for each position if it is marked."""
    mark = ctypes.create_string_buffer(MARK)
    which = [i for i, done in enumerate(complete) if done]
    blocks = [Block(names[i], ctypes.addressof(mark), len(MARK)) for i in which]
    marked = dict(zip(which, link.write(blocks), strict=True))
    return [marked.get(i, False) for i in range(len(names))]


def _moved(
    move: Any, names: Sequence[str], heads: Sequence[Head | None], buffers: Sequence[memoryview]
) -> list[bool]:
    """Move the pieces of all values that have a head; say for each value if all of it was moved."""
    blocks: list[Block] = []
    owners: list[int] = []
    held = []  # exports of the buffers, until their pieces are moved
    for owner, (name, head, buffer) in enumerate(zip(names, heads, buffers, strict=True)):
        if head is None or not head.pieces:
            continue
        held.append(_pinned(buffer))
        start = ctypes.addressof(held[-1])
        for piece, offset in zip(head.names(name), head.starts(), strict=True):
            blocks.append(Block(piece, start + offset, head.piece_bytes))
            owners.append(owner)
    whole = [head is not None for head in heads]
    for owner, moved in zip(owners, move(blocks), strict=True):
        whole[owner] &= moved
    return whole


def _pinned(buffer: memoryview) -> Any:
    """Something at the address of ``buffer`` that keeps its memory where it is.

    For read-only memory, whose address Python doesn't tell, a copy.
    """
    if buffer.readonly:
        return (ctypes.c_char * buffer.nbytes).from_buffer_copy(buffer)
    return ctypes.c_char.from_buffer(buffer)
