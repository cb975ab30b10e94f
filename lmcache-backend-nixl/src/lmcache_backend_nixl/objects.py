"""Chunks as objects of an S3 bucket, moved by NIXL's OBJ plugin.

    PREFIX/FINGERPRINT/KEY          the value
    PREFIX/FINGERPRINT/KEY.head     16 bytes: magic and the value's length

An object's length can't be asked for through NIXL, and reading more than there is looks like
success; hence the head. It is written once the value is there, so it also says that. Both are read
in one transfer. Nothing is ever evicted here: that is the bucket's lifecycle rules' business.

Knows names and heads. Descriptors are `batch`'s business.
"""

from __future__ import annotations

import itertools
import logging
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final
from urllib.parse import urlsplit

from lmcache_backend_nixl.agent import Agent, Agents, Lane, Memory, Moves, TransferFailed
from lmcache_backend_nixl.batch import Batches, Item
from lmcache_backend_nixl.config import PAGE_BYTES, NixlConfig
from lmcache_backend_nixl.slots import Places, rounded
from lmcache_core import (
    MISS,
    BackendCapabilities,
    BackendContext,
    BackendError,
    BackendRejected,
    BackendUnavailable,
    BlockingBackend,
    ChunkKey,
    StoreOutcome,
)

logger = logging.getLogger(__name__)

MAGIC: Final = b"LMNIXL\x00\x01"
HEAD: Final = struct.Struct("<8sQ")
UNKNOWN_VALUE_BYTES: Final = 16 << 20
_WHOLE: Final[Places] = ((0, 0),)
_CONNECT_TIMEOUT_S: Final = 2.0


class NixlObjectBackend(BlockingBackend):
    """Two objects for each chunk."""

    def __init__(self, config: NixlConfig) -> None:
        self._config = config
        self._params = config.params()
        self._bucket = self._params.get("bucket") or os.environ.get("AWS_DEFAULT_BUCKET", "")
        if not self._bucket:
            raise BackendRejected(
                "backend_params (nixl_backend_params) names no `bucket`, and there is no "
                "AWS_DEFAULT_BUCKET"
            )
        self._start = config.prefix
        self._value_bytes = UNKNOWN_VALUE_BYTES
        self._numbers = itertools.count(1)
        self._agent: Agent | None = None
        self._memory: Memory | None = None
        self._batches: Batches | None = None

    @property
    def capabilities(self) -> BackendCapabilities:
        return BackendCapabilities(
            shared=True,
            persistent=True,
            max_chunk_bytes=self._value_bytes,
            preferred_batch=self._config.pool_size,
            max_concurrency=self._config.calls,
        )

    # -- opening and closing ---------------------------------------------------------------

    def open_blocking(self, context: BackendContext) -> None:
        self._start = f"{self._config.prefix}/{context.namespace.fingerprint}/"
        if context.max_value_bytes is not None:
            self._value_bytes = rounded(context.max_value_bytes, PAGE_BYTES)
        self._reach()
        agent = Agent("OBJ", self._params)
        lookups = context.lookup_only
        agents = Agents([agent], calls=self._config.calls)
        memory = Memory(
            agents,
            None if lookups else context.region,
            lanes=1 if lookups else self._config.calls,
            values=self._config.pool_size,
            slot_bytes=PAGE_BYTES if lookups else self._value_bytes,
            buffer_bytes=None if lookups else self._config.buffer_bytes,
        )
        self._agent, self._memory = agent, memory
        self._batches = Batches(agents, memory, "OBJ", whole_pages=False)
        if not lookups:
            for notice in self._config.notices():
                logger.warning("%s: %s", context.name, notice)
            self._probe()

    def close_blocking(self) -> None:
        if self._agent is not None:
            self._agent.close()
        self._agent = self._memory = self._batches = None

    def _reach(self) -> None:
        """Find out soon whether anything answers: NIXL's client tries for half a minute."""
        endpoint = self._params.get("endpoint_override", "")
        parts = urlsplit(endpoint if "://" in endpoint else f"//{endpoint}")
        if not parts.hostname:
            return
        secure = (parts.scheme or self._params.get("scheme", "https")) == "https"
        try:
            address = (parts.hostname, parts.port or (443 if secure else 80))
            socket.create_connection(address, _CONNECT_TIMEOUT_S).close()
        except (OSError, ValueError) as error:
            raise BackendUnavailable(
                f"nothing answers at endpoint_override {endpoint}: {error}"
            ) from error

    def _probe(self) -> None:
        try:
            with self._opened().lane() as lane:
                self._write_heads([f"{self._config.prefix}/probe"], [0], lane)
        except TransferFailed as error:
            self._reach()
            raise BackendRejected(
                f"can't write to the bucket {self._bucket!r}: {error}. NIXL names no cause: check "
                "bucket, access_key, secret_key, region and endpoint_override in backend_params "
                "(nixl_backend_params), and that this key may put and get objects"
            ) from error

    # -- calls -----------------------------------------------------------------------------

    def contains_blocking(self, keys: Sequence[ChunkKey]) -> list[bool]:
        with self._about("look into"):
            return self._present(keys)

    def load_blocking(self, keys: Sequence[ChunkKey], into: Sequence[memoryview]) -> list[int]:
        memory = self._opened()
        sizes: list[int] = []
        count = self._config.pool_size
        with self._about("read from"), memory.lane() as lane:
            for start in range(0, len(keys), count):
                part = slice(start, start + count)
                sizes += self._load(keys[part], into[part], lane)
        return sizes

    def store_blocking(
        self, keys: Sequence[ChunkKey], sources: Sequence[memoryview]
    ) -> list[StoreOutcome]:
        memory = self._opened()
        with self._about("write to"):
            present = self._present(keys)
            outcomes = [
                StoreOutcome.ALREADY_PRESENT if there else StoreOutcome.NOT_ADMITTED
                for there in present
            ]
            new = [
                index
                for index, (there, source) in enumerate(zip(present, sources, strict=True))
                if not there and 0 < source.nbytes <= self._value_bytes
            ]
            with memory.lane() as lane:
                for start in range(0, len(new), self._config.pool_size):
                    part = new[start : start + self._config.pool_size]
                    self._store([keys[i] for i in part], [sources[i] for i in part], lane)
                    for index in part:
                        outcomes[index] = StoreOutcome.STORED
        return outcomes

    def _present(self, keys: Sequence[ChunkKey]) -> list[bool]:
        return self._client().present("OBJ", [_head(self._name(key)) for key in keys])

    # -- one transfer ----------------------------------------------------------------------

    def _store(self, keys: Sequence[ChunkKey], sources: Sequence[memoryview], lane: Lane) -> None:
        names = [self._name(key) for key in keys]
        lengths = [source.nbytes for source in sources]
        with self._objects(names, lengths) as devices:
            items = [Item(i, sources[i], _WHOLE, (devices[i],)) for i in range(len(keys))]
            self._mover().write(items, lane)
        self._write_heads([_head(name) for name in names], lengths, lane)

    def _write_heads(self, names: Sequence[str], lengths: Sequence[int], lane: Lane) -> None:
        with self._objects(names, [HEAD.size] * len(names)) as devices:
            moves = Moves()
            for index, length in enumerate(lengths):
                address, page = lane.page(index)
                page[: HEAD.size] = HEAD.pack(MAGIC, length)
                moves.add(address, 0, HEAD.size, devices[index])
            self._client().transfer("WRITE", "OBJ", moves)

    def _load(self, keys: Sequence[ChunkKey], into: Sequence[memoryview], lane: Lane) -> list[int]:
        names = [self._name(key) for key in keys]
        lengths = self._read_heads([_head(name) for name in names], lane)
        sizes = [
            length if 0 < length <= min(buffer.nbytes, self._value_bytes) else MISS
            for length, buffer in zip(lengths, into, strict=True)
        ]
        hits = [index for index, size in enumerate(sizes) if size != MISS]
        if not hits:
            return sizes
        with self._objects([names[i] for i in hits], [sizes[i] for i in hits]) as devices:
            items = [
                Item(index, into[index][: sizes[index]], _WHOLE, (device,))
                for index, device in zip(hits, devices, strict=True)
            ]
            done = set(self._mover().read(items, lane))
        return [size if index in done else MISS for index, size in enumerate(sizes)]

    def _read_heads(self, names: Sequence[str], lane: Lane) -> list[int]:
        """The length of each value, 0 where there is none."""
        try:
            return self._read_these_heads(names, lane)
        except TransferFailed:
            # One that is missing fails the others too.
            present = self._client().present("OBJ", names)
        if all(present):
            return self._read_these_heads(names, lane)
        there = [name for name, found in zip(names, present, strict=True) if found]
        lengths = iter(self._read_these_heads(there, lane) if there else [])
        return [next(lengths) if found else 0 for found in present]

    def _read_these_heads(self, names: Sequence[str], lane: Lane) -> list[int]:
        pages = [lane.page(index) for index in range(len(names))]
        with self._objects(names, [HEAD.size] * len(names)) as devices:
            moves = Moves()
            for (address, page), device in zip(pages, devices, strict=True):
                page[: HEAD.size] = bytes(HEAD.size)
                moves.add(address, 0, HEAD.size, device)
            self._client().transfer("READ", "OBJ", moves)
        heads = [HEAD.unpack_from(page) for _, page in pages]
        return [length if magic == MAGIC else 0 for magic, length in heads]

    @contextmanager
    def _objects(self, names: Sequence[str], lengths: Sequence[int]) -> Iterator[list[int]]:
        """Numbers that NIXL knows these objects by, for as long as this lasts."""
        devices = [next(self._numbers) for _ in names]
        client = self._client()
        registered = client.register(
            "OBJ",
            [(0, n, d, name) for name, n, d in zip(names, lengths, devices, strict=True)],
        )
        try:
            yield devices
        finally:
            client.deregister(registered)

    def _name(self, key: ChunkKey) -> str:
        return self._start + key.hex()

    def _client(self) -> Agent:
        if self._agent is None:
            raise BackendUnavailable("the backend isn't open")
        return self._agent

    def _opened(self) -> Memory:
        if self._memory is None:
            raise BackendUnavailable("the backend isn't open")
        return self._memory

    def _mover(self) -> Batches:
        if self._batches is None:
            raise BackendUnavailable("the backend isn't open")
        return self._batches

    @contextmanager
    def _about(self, doing: str) -> Iterator[None]:
        """Ask first whether anything answers, and say which bucket failed: NIXL doesn't tell."""
        self._reach()
        try:
            yield
        except TransferFailed as error:
            raise BackendError(
                f"can't {doing} the bucket {self._bucket!r}: {error}. NIXL names no cause; the "
                "server answers, so check its log, the credentials and the bucket"
            ) from error


def _head(name: str) -> str:
    return f"{name}.head"
