"""The contract between lmcache-core and a storage backend.

Knows what a backend owes and what core guarantees it. Holds no policy: tiers,
deadlines, retries, metrics and eviction of host memory are core's business.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Final, Protocol, TypeVar, runtime_checkable

from pydantic import BaseModel

from lmcache_core.aio.daemon_pool import DaemonPool
from lmcache_core.chunks.keys import CacheNamespace, ChunkKey
from lmcache_core.errors import BackendUnavailable

_T = TypeVar("_T")

MISS: Final = -1
"""What `StorageBackend.load` answers for a chunk that it doesn't have."""


class StoreOutcome(Enum):
    """What became of one chunk that was handed to `StorageBackend.store`."""

    STORED = auto()
    ALREADY_PRESENT = auto()
    NOT_ADMITTED = auto()
    """There is no room, or the chunk isn't worth it. Not an error."""


@dataclass(frozen=True)
class BackendCapabilities:
    """Facts about a backend that core plans with. Optional methods are Protocols instead."""

    shared: bool
    """Other processes see what this one stores."""
    persistent: bool
    """Stored chunks outlive this process."""
    max_chunk_bytes: int | None = None
    """A longer value is never offered. ``None``: no limit."""
    preferred_batch: int = 64
    max_concurrency: int = 8
    cancellable: bool = False
    """A load or store that is cancelled ends soon, and nobody touches its buffers afterwards. Core
    cancels those that miss their deadline. Where this isn't so, as where a thread does it, they are
    left to run, and keep their buffers."""


@dataclass(frozen=True)
class HostRegion:
    """The memory that every buffer is cut from, for backends that register it."""

    address: int
    nbytes: int
    view: memoryview
    fd: int | None = None
    """What other processes can map this memory by, while ``view`` lives; ``None``: they can't."""


@dataclass(frozen=True)
class BackendContext:
    """What core gives a backend when it opens it."""

    name: str
    """The instance name from the configuration; for messages."""
    namespace: CacheNamespace
    """Chunks of different namespaces must never mix: use ``namespace.fingerprint`` in names."""
    region: HostRegion | None = None
    max_value_bytes: int | None = None
    """No value will be longer than this. ``None``: not known."""
    lookup_only: bool = False
    """Only ``contains`` and `SupportsPrefixLookup` will be called: a scheduler process asks what
    its workers stored. Sweep, reserve and evict nothing."""
    deadline_s: float | None = None
    """Seconds after which nobody waits for a call any more, unless told otherwise; core keeps it.
    For clients that have a time limit of their own. ``None``: not known."""


class StorageBackend(ABC):
    """Keeps chunks of bytes.

    What core guarantees:

    * ``open`` comes first and once, ``close`` last; every call comes from one event loop.
    * Buffers are contiguous memoryviews of format ``B``, belong to core, and stay valid and
      unchanged until the call returns. ``keys`` and buffers have the same length, and no key
      stands twice in one call.
    * Two calls never store the same key at the same time from the same process.
    * Whatever is raised degrades to a miss. Nobody else retries, times out, counts or logs.

    What a backend owes:

    * Batches are answered position by position. A miss isn't an error; raise a ``BackendError``
      only when the whole call failed.
    * A value is atomic: a reader sees all of it or none of it, even after a crash.
    * The event loop is never blocked; use `BlockingBackend` for a client that blocks.
    * Keep no reference to a buffer after the call returned, and never allocate, pin, count
      references or evict on core's behalf.
    """

    @property
    @abstractmethod
    def capabilities(self) -> BackendCapabilities:
        """Facts that core plans with; constant after ``open``."""

    @abstractmethod
    async def open(self, context: BackendContext) -> None:
        """Connect. Called once, before any other method.

        Raises:
            BackendUnavailable: nothing answers at the configured address.
            BackendRejected: the credentials or options are refused.
        """

    @abstractmethod
    async def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        """Say, for each key, whether a ``load`` right now would hit."""

    @abstractmethod
    async def load(self, keys: Sequence[ChunkKey], into: Sequence[memoryview]) -> list[int]:
        """Copy each stored value to the start of the buffer at the same position.

        Answers the number of bytes loaded, or `MISS`. A buffer is a capacity: a shorter value is
        fine, a longer one is a `MISS`. After a `MISS` the buffer's content is undefined, and so is
        what lies behind a loaded value.
        """

    @abstractmethod
    async def store(
        self, keys: Sequence[ChunkKey], sources: Sequence[memoryview]
    ) -> list[StoreOutcome]:
        """Keep a copy of each source under the key at the same position.

        Atomic per key. Values of one key are interchangeable, so an existing one may be kept.
        """

    @abstractmethod
    async def close(self) -> None:
        """Finish or cancel what is under way and let go of everything. Idempotent."""


@runtime_checkable
class SupportsDelete(Protocol):
    """A backend that can forget chunks."""

    async def delete(self, keys: Sequence[ChunkKey]) -> int:
        """Forget ``keys``; answer how many of them were there."""


@runtime_checkable
class SupportsPrefixLookup(Protocol):
    """A backend that counts leading hits in one round trip; core falls back to ``contains``."""

    async def count_leading_hits(self, keys: Sequence[ChunkKey]) -> int:
        """How many keys from the first on would hit, up to the first miss."""


@runtime_checkable
class SupportsClear(Protocol):
    """A backend that can forget everything in its namespace."""

    async def clear(self) -> int:
        """Forget every chunk of the namespace; answer how many there were."""


@runtime_checkable
class ReportsUsage(Protocol):
    """A backend that knows how full it is."""

    def usage(self) -> tuple[int, int]:
        """Chunks and bytes held at present."""


async def _delete(self: Any, keys: Sequence[ChunkKey]) -> int:
    """See `SupportsDelete.delete`."""
    count: int = await self._run(self.delete_blocking, keys)
    return count


async def _count_leading_hits(self: Any, keys: Sequence[ChunkKey]) -> int:
    """See `SupportsPrefixLookup.count_leading_hits`."""
    count: int = await self._run(self.count_leading_hits_blocking, keys)
    return count


async def _clear(self: Any) -> int:
    """See `SupportsClear.clear`."""
    count: int = await self._run(self.clear_blocking)
    return count


_ON_A_THREAD: dict[str, Callable[..., Any]] = {
    "delete": _delete,
    "count_leading_hits": _count_leading_hits,
    "clear": _clear,
}
"""The optional methods of a `BlockingBackend` that has their blocking namesakes."""


class BlockingBackend(StorageBackend):
    """Base for clients that block.

    What core guarantees: the ``*_blocking`` methods are never called on the event loop; one call
    takes one thread of this backend's own pool of ``capabilities.max_concurrency`` threads, so they
    must be thread-safe, and so must `ReportsUsage.usage`, where there is one. What a subclass owes
    is as in `StorageBackend`, without the ``async``.

    ``delete_blocking``, ``count_leading_hits_blocking`` and ``clear_blocking`` are optional: a
    subclass that has one is a `SupportsDelete`, `SupportsPrefixLookup` or `SupportsClear`.
    """

    _pool: DaemonPool | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name, call in _ON_A_THREAD.items():
            blocking = getattr(cls, f"{name}_blocking", None)
            if blocking is not None and getattr(cls, name, None) is None:
                setattr(cls, name, call)

    async def open(self, context: BackendContext) -> None:
        self._pool = DaemonPool(self.capabilities.max_concurrency, f"lmcache-{context.name}")
        try:
            await self._run(self.open_blocking, context)
        except BaseException as error:
            pool, self._pool = self._pool, None
            pool.shutdown()
            if isinstance(error, Exception):  # the thread has nothing else to do
                pool.join(1.0)
            raise

    async def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        return await self._run(self.contains_blocking, keys)

    async def load(self, keys: Sequence[ChunkKey], into: Sequence[memoryview]) -> list[int]:
        return await self._run(self.load_blocking, keys, into)

    async def store(
        self, keys: Sequence[ChunkKey], sources: Sequence[memoryview]
    ) -> list[StoreOutcome]:
        return await self._run(self.store_blocking, keys, sources)

    async def close(self) -> None:
        if self._pool is None:
            return
        pool, self._pool = self._pool, None
        try:
            await asyncio.wrap_future(pool.submit(self.close_blocking))
        finally:  # whatever it raised, and when nobody waits for it any more
            ending = pool.shutdown()
        # Calls that were abandoned at their deadline may take for ever; so may this, within
        # core's patience.
        for ended in ending:
            await asyncio.wrap_future(ended)
        pool.join(1.0)

    async def _run(self, call: Callable[..., _T], *args: Any) -> _T:
        if self._pool is None:
            raise BackendUnavailable("the backend isn't open")
        return await self._pool.run(call, *args)

    def open_blocking(self, context: BackendContext) -> None:
        """Connect; see `StorageBackend.open`."""

    @abstractmethod
    def contains_blocking(self, keys: Sequence[ChunkKey]) -> list[bool]:
        """See `StorageBackend.contains`."""

    @abstractmethod
    def load_blocking(self, keys: Sequence[ChunkKey], into: Sequence[memoryview]) -> list[int]:
        """See `StorageBackend.load`."""

    @abstractmethod
    def store_blocking(
        self, keys: Sequence[ChunkKey], sources: Sequence[memoryview]
    ) -> list[StoreOutcome]:
        """See `StorageBackend.store`."""

    def close_blocking(self) -> None:
        """Let go of everything; see `StorageBackend.close`."""


@dataclass(frozen=True, kw_only=True)
class StorageBackendDescriptor:
    """What a plugin says about a backend before anything heavy is imported."""

    name: str
    """What a configuration calls it: ``backends: {NAME: {…}}`` or ``type: NAME``."""
    summary: str
    config: type[BaseModel]
    """Its options; ``extra="forbid"``."""
    create: Callable[[Any], StorageBackend]
    """Makes the backend from a validated ``config``. Imports the client library."""
    url_schemes: tuple[str, ...] = ()
    """Schemes of LMCache's ``remote_url`` that this backend opens."""
    config_from_url: Callable[[str], dict[str, Any]] | None = None
    """Turns such a URL into options."""
    extra_config_keys: Mapping[str, str] = field(default_factory=dict)
    """LMCache ``extra_config`` names that this backend honours, and its own names for them.

    A name for ``type`` turns the backend on. A top-level key that has no effect by itself may be
    among them too."""
    environment: tuple[str, ...] = ()
    """``LMCACHE_…`` variables that it reads itself; others that nobody knows are errors."""
    maps_region: Callable[[Any], bool] | None = None
    """Whether a backend with this ``config`` lets another process map `BackendContext.region`; the
    region then has a file descriptor."""
    isolated: bool = False
    """Its client library may crash or hang: unless the user says otherwise, run it in a process of
    its own. ``create`` is then called there. See `lmcache_core.isolation`."""
