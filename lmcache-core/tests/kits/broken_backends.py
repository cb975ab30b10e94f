"""Backends with one typical mistake each. The kit must catch every one of them."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from lmcache_core.builtin.filesystem import FilesystemBackend, FilesystemConfig
from lmcache_core.builtin.memory import MemoryBackend, MemoryConfig
from lmcache_core.chunks.keys import ChunkKey
from lmcache_core.contracts.storage import MISS, BackendCapabilities, BackendContext, StoreOutcome

Views = Sequence[memoryview]
Keys = Sequence[ChunkKey]


class Correct(MemoryBackend):
    """No mistake: proves that what is caught below is the mistake and not the base class."""


class KeepsReference(MemoryBackend):
    """Stores the view instead of the bytes."""

    async def store(self, keys: Keys, sources: Views) -> list[StoreOutcome]:
        for key, source in zip(keys, sources, strict=True):
            self._chunks.setdefault(key, source)  # type: ignore[arg-type]
        return [StoreOutcome.STORED] * len(keys)


class RemembersBuffers(MemoryBackend):
    """Copies, but also keeps the last batch around."""

    async def load(self, keys: Keys, into: Views) -> list[int]:
        self.last = list(into)
        return await super().load(keys, into)


class RaisesOnMiss(MemoryBackend):
    async def load(self, keys: Keys, into: Views) -> list[int]:
        for key, buffer in zip(keys, into, strict=True):
            buffer[: len(self._chunks[key])] = self._chunks[key]
        return [len(self._chunks[key]) for key in keys]


class StopsAtTheFirstMiss(MemoryBackend):
    async def contains(self, keys: Keys) -> list[bool]:
        return [True] * await self.count_leading_hits(keys)


class AnswersHitsOnly(MemoryBackend):
    """Leaves the misses out of its answer."""

    async def load(self, keys: Keys, into: Views) -> list[int]:
        return [size for size in await super().load(keys, into) if size != MISS]


class Truncates(MemoryBackend):
    """Fills a buffer that is too small and calls it a hit."""

    async def load(self, keys: Keys, into: Views) -> list[int]:
        sizes = []
        for key, buffer in zip(keys, into, strict=True):
            chunk = self._chunks.get(key)
            if chunk is None:
                sizes.append(MISS)
                continue
            size = min(len(chunk), buffer.nbytes)
            buffer[:size] = chunk[:size]
            sizes.append(size)
        return sizes


class AnswersCapacity(MemoryBackend):
    """Reports the buffer's length instead of the value's."""

    async def load(self, keys: Keys, into: Views) -> list[int]:
        sizes = await super().load(keys, into)
        return [
            MISS if size == MISS else buffer.nbytes
            for size, buffer in zip(sizes, into, strict=True)
        ]


class WritesPastTheBuffer(MemoryBackend):
    """Takes the buffer's owner for the buffer."""

    async def load(self, keys: Keys, into: Views) -> list[int]:
        for key, buffer in zip(keys, into, strict=True):
            if chunk := self._chunks.get(key):
                whole = memoryview(buffer.obj)
                whole[: min(len(chunk), len(whole))] = chunk[: len(whole)]
        return await super().load(keys, into)


class ScramblesSource(MemoryBackend):
    """Encrypts in place."""

    async def store(self, keys: Keys, sources: Views) -> list[StoreOutcome]:
        outcomes = await super().store(keys, sources)
        for source in sources:
            source[:1] = b"\0"
        return outcomes


class DropsGroupIndex(MemoryBackend):
    """Takes the first 16 bytes for the whole key."""

    async def load(self, keys: Keys, into: Views) -> list[int]:
        return await super().load([ChunkKey(key[:16]) for key in keys], into)

    async def store(self, keys: Keys, sources: Views) -> list[StoreOutcome]:
        return await super().store([ChunkKey(key[:16]) for key in keys], sources)


class Sleeps(MemoryBackend):
    """A tenth of a millisecond for each batch: no clock would notice."""

    async def store(self, keys: Keys, sources: Views) -> list[StoreOutcome]:
        time.sleep(0.0001)
        return await super().store(keys, sources)


class ReadsFilesOnTheLoop(MemoryBackend):
    async def load(self, keys: Keys, into: Views) -> list[int]:
        Path(__file__).read_bytes()
        return await super().load(keys, into)


class WaitsForAThread(MemoryBackend):
    async def contains(self, keys: Keys) -> list[bool]:
        answer: list[list[bool]] = []
        inside = super().contains
        worker = threading.Thread(target=lambda: answer.append(asyncio.run(inside(keys))))
        worker.start()
        worker.join()
        return answer[0]


class IgnoresNamespace(MemoryBackend):
    """One dictionary for all; emptied at close so that one test doesn't spoil the next."""

    EVERYTHING: ClassVar[dict[str, object]] = {}

    async def open(self, context: BackendContext) -> None:
        self._chunks = self.EVERYTHING.setdefault("all", self._chunks)  # type: ignore[assignment]

    async def close(self) -> None:
        self.EVERYTHING.clear()


class LeaksThread(MemoryBackend):
    async def open(self, context: BackendContext) -> None:
        self.stop = threading.Event()
        # Ends by itself long after the test, and never keeps the test process alive.
        threading.Thread(target=self.stop.wait, args=(60,), daemon=True, name="leak").start()


class ClosesOnlyOnce(MemoryBackend):
    closed = False

    async def close(self) -> None:
        if self.closed:
            raise RuntimeError("already closed")
        self.closed = True


class ClaimsShared(MemoryBackend):
    @property
    def capabilities(self) -> BackendCapabilities:
        return BackendCapabilities(shared=True, persistent=False)


class ClaimsPersistent(MemoryBackend):
    @property
    def capabilities(self) -> BackendCapabilities:
        return BackendCapabilities(shared=False, persistent=True)


class PublishesBeforeComplete(MemoryBackend):
    """Makes the value visible and fills it afterwards."""

    async def store(self, keys: Keys, sources: Views) -> list[StoreOutcome]:
        for key, source in zip(keys, sources, strict=True):
            growing = bytearray(source.nbytes)
            self._chunks[key] = growing  # type: ignore[assignment]
            self._bytes += source.nbytes
            half = source.nbytes // 2
            growing[:half] = source[:half]
            await asyncio.sleep(0)
            growing[half:] = source[half:]
        return [StoreOutcome.STORED] * len(keys)


class MixesBatches(MemoryBackend):
    """Keeps the batch that it is working on in itself."""

    async def load(self, keys: Keys, into: Views) -> list[int]:
        self.keys = keys
        await asyncio.sleep(0)
        return await super().load(self.keys[: len(into)], into)


class DeletesWithoutCounting(MemoryBackend):
    async def delete(self, keys: Keys) -> int:
        await super().delete(keys)
        return len(keys)


class DeletesOnlyTheAnswer(MemoryBackend):
    """`contains` forgets, `load` doesn't."""

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        self.deleted: set[ChunkKey] = set()

    async def delete(self, keys: Keys) -> int:
        found = {key for key in keys if key in self._chunks}
        self.deleted |= found
        return len(found)

    async def contains(self, keys: Keys) -> list[bool]:
        return [key in self._chunks and key not in self.deleted for key in keys]


class CountsAllHits(MemoryBackend):
    async def count_leading_hits(self, keys: Keys) -> int:
        return sum(await self.contains(keys))


class ClearsEverybody(FilesystemBackend):
    """Empties the whole folder instead of its namespace's."""

    def _clear(self) -> int:
        mine, count = self._folder, 0
        for folder in list(self._top.iterdir()):
            self._folder = folder
            count += super()._clear()
        self._folder = mine
        return count


class WritesInPlace(FilesystemBackend):
    """Opens the final name and writes into it bit by bit."""

    def _write(self, key: ChunkKey, source: memoryview) -> bool:
        path = Path(self._place(key))
        path.parent.mkdir(exist_ok=True)
        with path.open("wb", buffering=0) as file:
            for start in range(0, source.nbytes, 1 << 16):
                file.write(source[start : start + (1 << 16)])
                time.sleep(0.0005)
        return True


class CancelsItsWaitingOnly(MemoryBackend):
    """Says that a call can be cancelled, while a thread goes on with it."""

    async def store(self, keys: Keys, sources: Views) -> list[StoreOutcome]:
        def slowly() -> None:
            time.sleep(0.2)
            for key, source in zip(keys, sources, strict=True):
                self._chunks[key] = bytes(source)

        await asyncio.to_thread(slowly)
        return [StoreOutcome.STORED] * len(keys)


class AnswersSixtyFour(MemoryBackend):
    """As many as it expects."""

    async def contains(self, keys: Keys) -> list[bool]:
        return await super().contains(keys[:64])


class AnswersNewOnly(MemoryBackend):
    async def store(self, keys: Keys, sources: Views) -> list[StoreOutcome]:
        outcomes = await super().store(keys, sources)
        return [outcome for outcome in outcomes if outcome is StoreOutcome.STORED]


class ClosesForAll(MemoryBackend):
    """One client in the class, closed with the first instance."""

    client: ClassVar[list[object]] = []

    async def open(self, context: BackendContext) -> None:
        self.client.append(self)

    async def store(self, keys: Keys, sources: Views) -> list[StoreOutcome]:
        if not self.client:
            raise OSError("the client is closed")
        return await super().store(keys, sources)

    async def close(self) -> None:
        self.client.clear()


class LeaksSocket(MemoryBackend):
    kept: ClassVar[list[socket.socket]] = []

    async def open(self, context: BackendContext) -> None:
        self.kept.append(socket.socket())


class ReconnectsAfterClose(MemoryBackend):
    closed = False

    async def close(self) -> None:
        self.closed = True
        await super().close()

    async def contains(self, keys: Keys) -> list[bool]:
        if self.closed:
            wait = threading.Event().wait
            threading.Thread(target=wait, args=(60,), daemon=True, name="again").start()
        return await super().contains(keys)


class RaisesWhenFull(MemoryBackend):
    async def store(self, keys: Keys, sources: Views) -> list[StoreOutcome]:
        if len(self._chunks) + len(keys) > 100:
            raise OSError("no space left")
        return await super().store(keys, sources)


class OpensAnything(MemoryBackend):
    """Its ``make_unreachable`` is itself."""


class RaisesRawErrors(MemoryBackend):
    async def open(self, context: BackendContext) -> None:
        if context.name == "unreachable":
            raise ConnectionRefusedError("nobody listens")


class Hangs(MemoryBackend):
    async def store(self, keys: Keys, sources: Views) -> list[StoreOutcome]:
        await asyncio.Event().wait()
        return []


class CountsEveryStore(MemoryBackend):
    """Adds up what was offered instead of what is held."""

    stored = 0

    async def store(self, keys: Keys, sources: Views) -> list[StoreOutcome]:
        self.stored += len(keys)
        return await super().store(keys, sources)

    def usage(self) -> tuple[int, int]:
        return self.stored, self._bytes


def make(kind: type, folder: Path) -> MemoryBackend | FilesystemBackend:
    """One backend of ``kind``."""
    if issubclass(kind, FilesystemBackend):
        return kind(FilesystemConfig(path=folder, min_free_gib=0))
    return kind(MemoryConfig())
