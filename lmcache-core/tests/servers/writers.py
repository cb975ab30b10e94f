"""What writers of a folder do, by a seed: `filesystem` backends, a server's disk, a cache.

Each says to ``say`` what it is about to do and what it has done, in the words of `Promises`, and
raises `WrongError` where it finds what can't be.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path

from promises import CHUNKS, EACH, KEYS, LENGTHS, SPACES, Promises, chunks_of, content

from lmcache_backend_lm.arena import Arena
from lmcache_backend_lm.disk import Disk
from lmcache_backend_lm.folders import Folder
from lmcache_backend_lm.values import Value, Values
from lmcache_core import Cache, Plugins, load_config
from lmcache_core.builtin import filesystem_manifest, filesystem_usage
from lmcache_core.builtin.filesystem import FilesystemBackend, FilesystemConfig
from lmcache_core.chunks.frame import read_header
from lmcache_core.chunks.hashing import PrefixHasher, request_root
from lmcache_core.chunks.keys import CacheNamespace, ChunkKey
from lmcache_core.contracts.storage import MISS, BackendContext, StoreOutcome
from lmcache_core.errors import FrameError
from lmcache_core.metrics import Counters
from lmcache_core.plugins.discovery import core_version
from lmcache_core.testing.storage import LAYOUT, TOKENS, VALUE_BYTES, value

GIB = 1 << 30
ROOMY = 1 << 20
"""A bound that all chunks fit into, and what writers that died had set aside as well."""
PATIENCE_S = 120.0
CACHE = CacheNamespace("cache", LAYOUT)
PLUGINS = Plugins()
Say = Callable[[str, Iterable[int], int], None]


class WrongError(Exception):
    """Something is there that can't be, or isn't that has to be."""


def framed(chunk: int, data: memoryview) -> bool:
    """Whether core would take ``data`` for a chunk.

    Raises:
        WrongError: it would, and it is another one.
    """
    key, fingerprint = KEYS[chunk], SPACES[chunk // EACH].fingerprint
    try:
        read_header(data, key=key, fingerprint=fingerprint)
    except FrameError:
        return False
    if data.nbytes not in LENGTHS or data != content(chunk, data.nbytes):
        raise WrongError(f"chunk {chunk} has other bytes")
    return True


def total(top: Path) -> int:
    """Bytes of all chunk files."""
    return sum(one.stat().st_size for one in top.glob("*/*/*") if len(one.name) == 32)


class Writer(ABC):
    """Does things below ``top``, which takes ``bound`` bytes if it isn't ``None``.

    It stores a ``part`` of its chunks, and loads and forgets the others as well. ``alone``: nobody
    else writes.
    """

    chunks: range = CHUNKS
    keys: Sequence[ChunkKey] = KEYS
    tight: int = 24 << 10
    """A bound that about half of them fit into."""

    def __init__(
        self,
        top: Path,
        chance: random.Random,
        say: Say,
        *,
        bound: int | None,
        alone: bool = True,
        part: slice = slice(None),
    ) -> None:
        self._top = top
        self._chance = chance
        self._say = say
        self._bound = bound
        self._alone = alone
        self._mine = self.chunks[part]

    @abstractmethod
    def open(self) -> None:
        """Become a writer."""

    @abstractmethod
    def found(self, chunk: int) -> int | None:
        """How long a chunk is, if it is there.

        Raises:
            WrongError: its bytes are wrong.
        """

    @abstractmethod
    def step(self) -> None:
        """Do something."""

    @abstractmethod
    def close(self) -> None:
        """Let go of everything."""

    def check(self, promises: Promises) -> None:
        """Compare what is there with what was said.

        Raises:
            WrongError: it isn't so.
        """
        for chunk in promises.known:
            if problem := promises.problem(chunk, self.found(chunk)):
                raise WrongError(problem)
        if self._alone and self._bound is not None and total(self._top) > self._bound:
            raise WrongError(f"{total(self._top)} bytes, and the bound is {self._bound}")

    def _some(self, of: Sequence[int]) -> list[int]:
        return self._chance.sample(of, min(len(of), self._chance.randint(1, 3)))


class FileWriter(Writer):
    """One backend for each of the namespaces, of which some are closed and opened now and then.

    ``durable``: it has `fsync`. ``promises``: what it acknowledges is there afterwards; after a
    power cut that takes `fsync`. ``damaged``: chunks whose files may hold what core wouldn't take.
    """

    def __init__(
        self,
        *place: object,
        durable: bool = True,
        promises: bool = True,
        damaged: Container[int] = (),
        **more: object,
    ) -> None:
        super().__init__(*place, **more)  # type: ignore[arg-type]
        self._durable = durable
        self._promises = promises
        self._damaged = damaged
        self._backends: dict[int, FilesystemBackend] = {}

    def open(self) -> None:
        for space in self._chance.sample(range(len(SPACES)), len(SPACES)):
            self._open(space)

    def found(self, chunk: int) -> int | None:
        into = memoryview(bytearray(max(LENGTHS) + 1))
        (size,) = self._backends[chunk // EACH].load_blocking([KEYS[chunk]], [into])
        if size == MISS:
            return None
        if framed(chunk, into[:size]):
            return size
        if chunk not in self._damaged:
            raise WrongError(f"chunk {chunk} is damaged")
        return None

    def step(self) -> None:
        steps = (self._store, self._load, self._delete, self._clear, self._reopen)
        self._chance.choices(steps, (10, 3, 2, 1, 2))[0]()

    def close(self) -> None:
        while self._backends:
            self._close(self._chance.choice(list(self._backends)))

    def _open(self, space: int) -> None:
        bound = None if self._bound is None else self._bound / GIB
        config = FilesystemConfig(
            path=self._top,
            min_free_gib=0,
            max_size_gib=bound,
            fsync=self._durable,
            direct_io=self._chance.random() < 0.2,
        )
        # A server's is the same, but for an empty folder that goes when it is closed.
        kind = self._chance.choice((FilesystemBackend, Folder))
        backend = kind(config) if kind is FilesystemBackend else Folder(config, None)  # type: ignore[arg-type]
        backend.open_blocking(BackendContext("writer", SPACES[space]))
        self._backends[space] = backend

    def _close(self, space: int) -> None:
        self._backends.pop(space).close_blocking()

    def _reopen(self) -> None:
        space = self._chance.choice(list(self._backends))
        self._close(space)
        self._open(space)

    def _store(self) -> None:
        space = self._chance.choice(list(self._backends))
        mine = [chunk for chunk in chunks_of(space) if chunk in self._mine]
        some, nbytes = self._some(mine), self._chance.choice(LENGTHS)
        sources = [memoryview(content(chunk, nbytes)) for chunk in some]
        self._say("storing" if self._promises else "storing_loosely", some, nbytes)
        outcomes = self._backends[space].store_blocking([KEYS[one] for one in some], sources)
        took = [outcome is not StoreOutcome.NOT_ADMITTED for outcome in outcomes]
        if self._alone and not all(took):
            raise WrongError(f"no room for {nbytes} bytes")
        if self._promises:
            for chunk, yes in zip(some, took, strict=True):
                self._say("stored" if yes else "refused", [chunk], nbytes)

    def _load(self) -> None:
        self.found(self._chance.choice(CHUNKS))

    def _delete(self) -> None:
        space = self._chance.choice(list(self._backends))
        self._forget(space, self._some(chunks_of(space)), all_of_it=False)

    def _clear(self) -> None:
        space = self._chance.choice(list(self._backends))
        self._forget(space, chunks_of(space), all_of_it=True)

    def _forget(self, space: int, chunks: Sequence[int], *, all_of_it: bool) -> None:
        self._say("deleting", chunks, 0)
        backend = self._backends[space]
        if all_of_it:
            backend._clear()
        else:
            backend._delete([KEYS[chunk] for chunk in chunks])
        if self._promises:
            self._say("deleted", chunks, 0)


class ServerWriter(Writer):
    """The disk of a server: what it has written when nothing waits is there after a restart."""

    def open(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._counters = Counters()
        self._arena = Arena(1 << 20)
        self._values = Values(self._arena, self._counters)
        bound = None if self._bound is None else self._bound / GIB
        more = {"values": self._values, "arena": self._arena, "counters": self._counters}
        self._disk = Disk(self._top, bound, **more)  # type: ignore[arg-type]
        self._disk.check()

    def found(self, chunk: int) -> int | None:
        return self._loop.run_until_complete(self._found(chunk))

    async def _found(self, chunk: int) -> int | None:
        space, key = SPACES[chunk // EACH].fingerprint, KEYS[chunk]
        self._values.delete(space, [key])
        before = self._failures()
        sizes = await self._disk.sizes(space, [key])
        if not sizes[0]:
            if self._failures() > before:  # which a client is told as a miss
                raise WrongError(f"the disk couldn't be asked for chunk {chunk}")
            return None
        with self._values.acquire(space, [key], sizes) as held:
            await self._disk.fetch(space, [key], sizes, held, [0])
            (read,) = held.values
            if read is None and self._bound is not None:
                return None  # evicted meanwhile
            if read is None:
                raise WrongError(f"chunk {chunk} has a file that can't be read")
            data = b"".join(self._arena.views(read.parts, read.nbytes))
        if not framed(chunk, memoryview(data)):
            raise WrongError(f"chunk {chunk} is damaged")
        return len(data)

    def step(self) -> None:
        steps = (self._store, self._load, self._delete, self._clear)
        self._loop.run_until_complete(self._chance.choices(steps, (10, 3, 2, 1))[0]())

    def close(self) -> None:
        self._disk.close(PATIENCE_S)
        self._loop.close()
        self._arena.close()

    async def _store(self) -> None:
        space = self._chance.randrange(len(SPACES))
        some = self._some(chunks_of(space))
        before = self._failures()
        for chunk in some:
            nbytes = self._length(chunk)
            self._say("storing", [chunk], nbytes)
            with self._values.hold() as held:
                name = SPACES[space].fingerprint
                made = held.reserve(name, KEYS[chunk], nbytes, one_piece=True)
                if isinstance(made, Value):
                    (view,) = self._arena.views(made.parts, nbytes)
                    view[:] = content(chunk, nbytes)
                    held.commit()
        self._disk.write_behind(SPACES[space].fingerprint, [KEYS[chunk] for chunk in some])
        if self._chance.random() < 0.3:  # what follows finds them half way
            self._say("refused", some, 0)
            return
        until = time.monotonic() + PATIENCE_S
        while self._disk._writes:
            if time.monotonic() > until:
                raise WrongError("a write doesn't end")
            await asyncio.sleep(0.001)
        fine = self._failures() == before
        for chunk in some:
            self._say("stored" if fine else "refused", [chunk], self._length(chunk))

    async def _load(self) -> None:
        await self._found(self._chance.choice(CHUNKS))

    async def _delete(self) -> None:
        space = self._chance.randrange(len(SPACES))
        some = self._some(chunks_of(space))
        name, keys = SPACES[space].fingerprint, [KEYS[chunk] for chunk in some]
        self._say("deleting", some, 0)
        self._values.delete(name, keys)
        await self._disk.delete(name, keys)
        self._say("deleted", some, 0)

    async def _clear(self) -> None:
        space = self._chance.randrange(len(SPACES))
        self._say("deleting", chunks_of(space), 0)
        self._values.clear(SPACES[space].fingerprint)
        await self._disk.clear(SPACES[space].fingerprint)
        self._say("deleted", chunks_of(space), 0)

    def _length(self, chunk: int) -> int:
        # One for each chunk: of two that are written at the same time, either may be the last.
        return LENGTHS[chunk % len(LENGTHS)]

    def _failures(self) -> float:
        names = ("server_disk_dropped", "server_disk_errors")
        return sum(n for (name, _), n in self._counters.snapshot().items() if name in names)


def _cache_keys() -> list[ChunkKey]:
    """Of one chunk each, the first one of a sequence of its own."""
    root = request_root(CACHE.root)
    return [PrefixHasher(root, TOKENS).extend([chunk] * TOKENS)[0] for chunk in range(EACH)]


@functools.cache
def stored(chunk: int) -> bytes:
    """What a cache stores for a chunk."""
    return bytes(value(chunk, VALUE_BYTES))


class CacheWriter(Writer):
    """A whole cache with ``fsync``: what it has stored when `Cache.flush` answers is durable."""

    chunks = range(EACH)
    tight = 10 << 10
    keys = _cache_keys()

    def open(self) -> None:
        options = [
            f"chunk_size={TOKENS}",
            "max_local_cpu_size=0.001",
            f"blocking_timeout_secs={PATIENCE_S}",
            f"lookup_timeout_ms={1000 * PATIENCE_S}",
            "backends.disk.type=filesystem",
            f"backends.disk.path={self._top}",
            "backends.disk.min_free_gib=0",
            "backends.disk.fsync=true",
        ]
        if self._bound is not None:
            options.append(f"backends.disk.max_size_gib={self._bound / GIB}")
        config = load_config(PLUGINS, environ={}, assignments=options)
        self._cache = Cache(CACHE, config, PLUGINS)

    def found(self, chunk: int) -> int | None:
        into = bytearray(VALUE_BYTES)
        tokens = [chunk] * TOKENS
        if self._cache.load(tokens, into) != TOKENS:
            return None
        if into != stored(chunk):
            raise WrongError(f"chunk {chunk} has other bytes")
        return VALUE_BYTES

    def step(self) -> None:
        self._chance.choices((self._store, self._load, self._clear), (10, 3, 1))[0]()

    def close(self) -> None:
        self._cache.close(PATIENCE_S)

    def _store(self) -> None:
        some = self._some(self._mine)
        self._say("storing", some, VALUE_BYTES)
        before = self._dropped()
        new = [self._cache.store([chunk] * TOKENS, stored(chunk)) > 0 for chunk in some]
        done = self._chance.random() < 0.7 and self._cache.flush(PATIENCE_S)
        fine = done and self._dropped() == before
        for chunk, written in zip(some, new, strict=True):
            # What was in host memory before may have been evicted from the disk since then.
            self._say("stored" if fine and written else "refused", [chunk], VALUE_BYTES)

    def _load(self) -> None:
        self.found(self._chance.choice(self.chunks))

    def _clear(self) -> None:
        self._say("deleting", self.chunks, 0)
        self._cache.clear()
        if not self._cache.uncleared:
            self._say("deleted", self.chunks, 0)

    def _dropped(self) -> float:
        names = ("store_dropped", "backend_errors", "backend_timeouts")
        return sum(n for (name, _), n in self._cache.counters.snapshot().items() if name in names)


KINDS: dict[str, type[Writer]] = {
    "files": FileWriter,
    "server": ServerWriter,
    "cache": CacheWriter,
}


def prepare() -> None:
    """Import and find what writers need, before they are forked."""
    place = ("backends.disk.type=filesystem", "backends.disk.path=/tmp")
    load_config(PLUGINS, environ={}, assignments=place)
    PLUGINS.host_kernels()
    PLUGINS.chunk_index(len(CHUNKS))
    version = core_version()  # which reads files each time
    filesystem_manifest.core_version = lambda: version
    filesystem_usage.LOCK_PATIENCE_S = PATIENCE_S  # another writer may wait for a processor
    for chunk in CHUNKS:
        for nbytes in LENGTHS:
            content(chunk, nbytes)
    for chunk in CacheWriter.chunks:
        stored(chunk)
    gc.collect()
    gc.freeze()
