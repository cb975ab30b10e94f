"""A network that fails, and traffic over it: for tests of clients, whatever they speak."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lmcache_core.chunks.keys import ChunkKey
from lmcache_core.contracts.storage import MISS
from lmcache_core.testing.storage import buffers, views
from lmcache_core.tiers.tier import Tier

CUTS = (0, 50, 500, 5_000, 500_000, 5_000_000)
"""A connection ends before it passed one of so many bytes."""


class FaultyLink:
    """A proxy whose connections break or fall silent after a random number of bytes.

    ``target`` is a port of this machine, or a Unix socket; then the proxy's own is made ``at`` some
    place, and descriptors are passed on too.
    """

    def __init__(
        self,
        target: int | Path,
        chance: random.Random,
        *,
        at: Path | None = None,
        cuts: Sequence[int] = CUTS,
    ) -> None:
        self.faults = 0
        self.breaks = True
        """Otherwise everything is passed on."""
        self._target = target
        self._chance = chance
        self._cuts = cuts
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        if at is None:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self.port: int = self._listener.getsockname()[1]
        else:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(at))
            self._listener.listen()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        """Break everything and wait for every thread."""
        with self._lock:
            for one in (self._listener, *self._open):
                _shut(one)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = self._connect()
            except OSError:  # the server is down
                client.close()
                continue
            with self._lock:
                self._open |= {client, server}
            left = [self._chance.randint(0, self._chance.choice(self._cuts))]
            silent = self._chance.random() < 0.05
            pumps = [
                threading.Thread(target=self._pump, args=(*ends, left, silent))
                for ends in ((client, server), (server, client))
            ]
            self._threads = [t for t in self._threads if t.is_alive()] + pumps
            for pump in pumps:
                pump.start()

    def _connect(self) -> socket.socket:
        if isinstance(self._target, int):
            return socket.create_connection(("127.0.0.1", self._target))
        server = socket.socket(socket.AF_UNIX)
        try:
            server.connect(str(self._target))
        except OSError:
            server.close()
            raise
        return server

    def _pump(
        self, source: socket.socket, sink: socket.socket, left: list[int], silent: bool
    ) -> None:
        """Both directions share ``left``; the last bytes before the fault are passed on."""
        try:
            while (got := _receive(source))[0]:
                data, fds = got
                broken = self.breaks and len(data) > left[0]
                some = data[: left[0]] if broken else data
                left[0] = max(0, left[0] - len(some))
                if broken:
                    self._broke(silent)
                _send(sink, self._passed(source, some), fds)
                while broken and silent and self.breaks and source.recv(1 << 16):
                    pass  # until somebody gives up
                if broken:
                    break
        except OSError:
            pass
        finally:
            for one in (source, sink):
                _shut(one)
            with self._lock:
                self._open.discard(source)
            source.close()

    def _passed(self, source: socket.socket, data: bytes) -> bytes:
        """What becomes of ``data`` on its way from ``source``."""
        return data

    def _broke(self, silent: bool) -> None:
        """A connection is broken now, or falls silent."""
        with self._lock:
            self.faults += 1


def _receive(source: socket.socket) -> tuple[bytes, list[int]]:
    """What has come, and the descriptors that came with it; no bytes at the end."""
    if source.family != socket.AF_UNIX:
        return source.recv(1 << 16), []
    data, fds, _, _ = socket.recv_fds(source, 1 << 16, 4, socket.MSG_CMSG_CLOEXEC)
    return data, fds


def _send(sink: socket.socket, data: bytes, fds: list[int]) -> None:
    """Pass on ``data``, and ``fds`` unless there is none; close ``fds``."""
    try:
        sent = socket.send_fds(sink, [data], fds) if data and fds else 0
        sink.sendall(data[sent:])
    finally:
        for fd in fds:
            os.close(fd)


def _shut(one: socket.socket) -> None:
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)


class Traffic:
    """Random calls to a tier whose values are known. `seen` says what came of them.

    What a store reads changes as soon as the tier lets go of it. Most of it lies in ``room``, while
    there is space.
    """

    def __init__(
        self,
        tier: Tier,
        contents: Mapping[ChunkKey, bytes],
        chance: random.Random,
        late_after_s: float,
        room: memoryview | None = None,
    ) -> None:
        self.seen = {"hits": 0, "wrong": 0, "late": 0, "done": 0}
        self.late: list[str] = []
        """What took how long; for messages."""
        self._tier = tier
        self._contents = contents
        self._chance = chance
        self._late_after_s = late_after_s
        self._longest = max(map(len, contents.values()))
        self._noise = b"\xff" * self._longest  # no `value` has this byte
        self._free: list[memoryview] = []
        if room is not None:
            starts = range(0, room.nbytes - self._longest + 1, self._longest)
            self._free = [room[start : start + self._longest] for start in starts]

    async def flow(self, going_on: Callable[[], bool]) -> None:
        """One call after the other."""
        chance, tier, seen = self._chance, self._tier, self.seen
        while going_on():
            seen["done"] += 1
            batch = chance.sample(list(self._contents), chance.randint(1, 4))
            start = time.monotonic()
            kind = chance.choice(["load", "load", "store", "contains", "delete"])
            if kind == "load":
                await self._load(batch, start)
            elif kind == "store":
                await self._store(batch, start)
            elif kind == "contains":
                await tier.contains(batch, leading=False)
                self._took(start, "contains")
            else:
                await tier.delete(batch)
                self._took(start, "delete")
            await asyncio.sleep(0.001)

    async def store(
        self, batch: Sequence[ChunkKey], sources: Sequence[memoryview]
    ) -> asyncio.Task[Any] | None:
        """Store once; answer what may still read ``sources``."""
        return (await self._tier.store(batch, sources)).unsettled

    async def _load(self, batch: Sequence[ChunkKey], start: float) -> None:
        targets = buffers(len(batch), self._longest)
        answer = await self._tier.load(batch, views(targets))
        self._took(start, "load")
        for key, size, target in zip(batch, answer.sizes, targets, strict=True):
            self.seen["hits"] += size != MISS
            self.seen["wrong"] += size != MISS and target[:size] != self._contents[key]
        if answer.unsettled is not None:
            await asyncio.wait([answer.unsettled])

    async def _store(self, batch: Sequence[ChunkKey], start: float) -> None:
        in_room = len(self._free) >= len(batch) and self._chance.random() < 0.8
        if in_room:
            slots = [self._free.pop() for _ in batch]
        else:
            slots = views(buffers(len(batch), self._longest))
        sources = []
        for key, slot in zip(batch, slots, strict=True):
            content = self._contents[key]
            sources.append(slot[: len(content)])
            sources[-1][:] = content
        unsettled = await self.store(batch, sources)
        if unsettled is None:
            self._spoil(sources)
        self._took(start, "store")
        if unsettled is not None:
            await asyncio.wait([unsettled])
            self._spoil(sources)
        if in_room:
            self._free += slots

    def _spoil(self, sources: Sequence[memoryview]) -> None:
        for source in sources:
            source[:] = self._noise[: source.nbytes]

    def _took(self, start: float, kind: str) -> None:
        if (took := time.monotonic() - start) > self._late_after_s:
            self.seen["late"] += 1
            self.late.append(f"{kind}: {took:.1f} s")
