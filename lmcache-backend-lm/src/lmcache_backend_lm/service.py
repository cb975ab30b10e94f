"""What all sessions of a server share: memory, values and what they lease.

Knows nothing about connections or messages.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from lmcache_backend_lm.arena import Arena
from lmcache_backend_lm.fence import fence
from lmcache_backend_lm.guesses import Guesses
from lmcache_backend_lm.holdings import Descriptions
from lmcache_backend_lm.mapping import Backing, ReadOnlyMapping
from lmcache_backend_lm.shares import Budget
from lmcache_backend_lm.values import Values
from lmcache_core import Counters, Lease, Ledger, Seldom, SharedResource

if TYPE_CHECKING:
    from lmcache_backend_lm.disk import Disk

logger = logging.getLogger(__name__)

LONG_REQUESTS_BYTES = 8 << 20
"""Meta of requests that have much of it, all that are under way together. What is made of it, keys
above all, takes about four times as much."""


class Epoch:
    """A number in the arena that one client looks at, who reads the arena itself. A lease."""

    __slots__ = ("_index", "_lease", "_numbers")

    def __init__(self, numbers: memoryview, index: int, lease: Lease) -> None:
        self._numbers = numbers
        self._index = index
        self._lease = lease

    @property
    def offset(self) -> int:
        """Where in the arena it is."""
        return 8 * self._index

    @property
    def number(self) -> int:
        """What it is now."""
        return int(self._numbers[self._index])

    def revoke(self) -> None:
        """Tell the client that what it is reading doesn't count."""
        self._numbers[self._index] += 1
        fence()

    def release(self) -> None:
        """The client is gone; should it still be reading, it is told.

        Raises:
            LeaseError: that was done before.
        """
        self._lease.release()


class Epochs:
    """The numbers at the arena's beginning: one for each client that reads the arena itself."""

    def __init__(self, arena: Arena, nbytes: int, counters: Counters) -> None:
        self._numbers = arena.view[:nbytes].cast("Q")
        self._free = list(range(len(self._numbers)))
        self.leases = Ledger("server epoch", counters)

    def take(self) -> Epoch | None:
        """One that nobody has, or ``None`` if all are in use."""
        try:
            index = self._free.pop()
        except IndexError:
            return None
        return Epoch(self._numbers, index, self.leases.lease(partial(self._give_back, index)))

    def close(self) -> None:
        """Let go of the arena."""
        self._numbers.release()

    def _give_back(self, index: int) -> None:
        self._numbers[index] += 1
        fence()
        self._free.append(index)


class Region:
    """A client's memory, mapped for as long as the lease is held that this is."""

    __slots__ = ("_lease", "_regions", "address", "backing", "nbytes")

    def __init__(
        self, regions: Regions, mapping: ReadOnlyMapping, backing: Backing, lease: Lease
    ) -> None:
        self._regions = regions
        self._lease = lease
        self.backing = backing
        self.address = mapping.address
        self.nbytes = mapping.nbytes

    def release(self) -> None:
        """Let go of it; nothing of this user's may be reading any more.

        Raises:
            LeaseError: that was done before.
        """
        with self._regions._lock:
            self._lease.release()


class Regions:
    """Memory of clients, each mapped once however many of its connections share it. Thread-safe."""

    def __init__(self, counters: Counters) -> None:
        self.leases = Ledger("client region", counters)
        self._mapped: dict[tuple[int, int], tuple[ReadOnlyMapping, Backing, SharedResource]] = {}
        self._lock = threading.Lock()

    def attach(self, fd: int, nbytes: int) -> Region:
        """Map at least ``nbytes`` of the file.

        Raises:
            OSError: it is shorter, or can't be mapped.
        """
        facts = os.fstat(fd)
        name = facts.st_dev, facts.st_ino
        with self._lock:
            if name in self._mapped:
                mapping, backing, users = self._mapped[name]
                if mapping.nbytes < nbytes:
                    raise OSError(f"the region has less than {nbytes} bytes")
            else:
                mapping = ReadOnlyMapping(fd, max(nbytes, facts.st_size))
                try:
                    backing = Backing(fd, mapping)
                except OSError:
                    mapping.close()
                    raise
                users = SharedResource(self.leases, partial(self._unmap, name))
                self._mapped[name] = mapping, backing, users
            return Region(self, mapping, backing, users.lease())

    def _unmap(self, name: tuple[int, int]) -> None:
        mapping, backing, _ = self._mapped.pop(name)
        backing.close()
        mapping.close()


@dataclass
class Service:
    """What all sessions of a server share."""

    arena: Arena
    values: Values
    counters: Counters
    epochs: Epochs
    regions: Regions
    instance: bytes
    version: str = "unknown"
    token: bytes = b""
    max_value_bytes: int = 0
    unix_path: str = ""
    stall_s: float = 30.0
    disk: Disk | None = None
    requests: Budget = field(default_factory=lambda: Budget(LONG_REQUESTS_BYTES))
    """Bytes of meta beyond what every request may have, by client."""
    descriptions: Descriptions = field(default_factory=Descriptions)
    facts: Callable[[], dict[str, int]] = dict
    """Numbers of the server itself, for operators, under the names of its metrics."""
    guesses: Guesses = field(default_factory=Guesses)
    seldom: Seldom = field(default_factory=lambda: Seldom(logger))
    """Tells of what peers do, who must not fill a disk with lines."""
