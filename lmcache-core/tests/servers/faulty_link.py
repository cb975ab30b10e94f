"""A network that fails, and traffic over it: for tests of clients, whatever they speak."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from lmcache_core.keys import ChunkKey
from lmcache_core.storage import MISS
from lmcache_core.testing.storage import buffers, views
from lmcache_core.tier import Tier


class FaultyLink:
    """A proxy whose connections break or fall silent after a random number of bytes."""

    def __init__(self, port: int, chance: random.Random) -> None:
        self.faults = 0
        self._target = ("127.0.0.1", port)
        self._chance = chance
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
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
                server = socket.create_connection(self._target)
            except OSError:  # the server is down
                client.close()
                continue
            with self._lock:
                self._open |= {client, server}
            left = [self._chance.choice([0, 50, 500, 5_000, 500_000, 5_000_000])]
            left[0] = self._chance.randint(0, left[0])
            silent = self._chance.random() < 0.05
            pumps = [
                threading.Thread(target=self._pump, args=(*ends, left, silent))
                for ends in ((client, server), (server, client))
            ]
            self._threads = [t for t in self._threads if t.is_alive()] + pumps
            for pump in pumps:
                pump.start()

    def _pump(
        self, source: socket.socket, sink: socket.socket, left: list[int], silent: bool
    ) -> None:
        """Both directions share ``left``; the last bytes before the fault are passed on."""
        try:
            while data := source.recv(1 << 16):
                if len(data) > left[0]:
                    with self._lock:
                        self.faults += 1
                    sink.sendall(data[: left[0]])
                    left[0] = 0
                    while silent and source.recv(1 << 16):
                        pass  # until somebody gives up
                    break
                left[0] -= len(data)
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for one in (source, sink):
                _shut(one)
            with self._lock:
                self._open.discard(source)
            source.close()


def _shut(one: socket.socket) -> None:
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)


class Traffic:
    """Random calls to a tier whose values are known. `seen` says what came of them."""

    def __init__(
        self,
        tier: Tier,
        contents: Mapping[ChunkKey, bytes],
        chance: random.Random,
        late_after_s: float,
    ) -> None:
        self.seen = {"hits": 0, "wrong": 0, "late": 0, "done": 0}
        self.late: list[str] = []
        """What took how long; for messages."""
        self._tier = tier
        self._contents = contents
        self._chance = chance
        self._late_after_s = late_after_s
        self._longest = max(map(len, contents.values()))

    async def flow(self, going_on: Callable[[], bool]) -> None:
        """One call after the other."""
        chance, tier, seen = self._chance, self._tier, self.seen
        while going_on():
            seen["done"] += 1
            batch = chance.sample(list(self._contents), chance.randint(1, 4))
            start = time.monotonic()
            kind = chance.choice(["load", "load", "store", "contains", "delete"])
            unsettled = None
            if kind == "load":
                targets = buffers(len(batch), self._longest)
                answer = await tier.load(batch, views(targets))
                unsettled = answer.unsettled
                for key, size, target in zip(batch, answer.sizes, targets, strict=True):
                    seen["hits"] += size != MISS
                    seen["wrong"] += size != MISS and target[:size] != self._contents[key]
            elif kind == "store":
                stored = await tier.store(batch, views([self._contents[key] for key in batch]))
                unsettled = stored.unsettled
            elif kind == "contains":
                await tier.contains(batch, leading=False)
            else:
                await tier.delete(batch)
            if (took := time.monotonic() - start) > self._late_after_s:
                seen["late"] += 1
                self.late.append(f"{kind} of {len(batch)}: {took:.1f} s")
            if unsettled is not None:
                await asyncio.wait([unsettled])
            await asyncio.sleep(0.001)
