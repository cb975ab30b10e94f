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
from lmcache_backend_infinistore.layout import HEAD_BYTES, Head
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
            link.probe()
            heads = _heads(link, names)
            fitting = [
                head if head is not None and head.nbytes <= buffer.nbytes else None
                for head, buffer in zip(heads, into, strict=True)
            ]
            complete = _moved(link.read, names, fitting, into)
            sizes = []
            for name, head, there in zip(names, fitting, complete, strict=True):
                sizes.append(head.nbytes if head is not None and there else MISS)
                if head is not None and not there:
                    # A piece was evicted: without its head, the next store writes it anew.
                    link.delete([name, *head.names(name)])
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
            packed = [head.pack() if head is not None else b"" for head in heads]
            # Last: a reader that sees a head finds all pieces.
            ready = [i for i, head in enumerate(heads) if head is not None and written[i]]
            stored = dict(zip(ready, _write_heads(link, names, packed, ready), strict=True))
            outcomes = []
            for i, (name, head) in enumerate(zip(names, heads, strict=True)):
                if head is None:
                    outcomes.append(StoreOutcome.ALREADY_PRESENT)
                elif stored.get(i, False):
                    outcomes.append(StoreOutcome.STORED)
                else:
                    outcomes.append(StoreOutcome.NOT_ADMITTED)
                    link.delete(head.names(name))
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
            link.probe()
            count = 0
            for name, head in zip(names, _heads(link, names), strict=True):
                if link.delete([name]):
                    count += 1
                if head is not None:
                    link.delete(head.names(name))
            return count

    def _names(self, keys: Sequence[ChunkKey]) -> list[str]:
        return [self._prefix + key.hex() for key in keys]


def _open(links: Links | None) -> Links:
    if links is None:
        raise BackendUnavailable("the backend isn't open")
    return links


def _heads(link: Link, names: Sequence[str]) -> list[Head | None]:
    """What is stored under ``names``; ``None`` for what isn't."""
    room = (ctypes.c_char * (HEAD_BYTES * len(names)))()
    start = ctypes.addressof(room)
    blocks = [Block(name, start + i * HEAD_BYTES, HEAD_BYTES) for i, name in enumerate(names)]
    found, data = link.read(blocks), room.raw
    return [
        Head.unpack(data[i * HEAD_BYTES : (i + 1) * HEAD_BYTES]) if there else None
        for i, there in enumerate(found)
    ]


def _write_heads(
    link: Link, names: Sequence[str], packed: Sequence[bytes], which: Sequence[int]
) -> list[bool]:
    room = ctypes.create_string_buffer(b"".join(packed[i] for i in which))
    start = ctypes.addressof(room)
    return link.write(
        [Block(names[i], start + at * HEAD_BYTES, HEAD_BYTES) for at, i in enumerate(which)]
    )


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
