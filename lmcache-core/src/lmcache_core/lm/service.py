"""What all sessions of a server share: memory, values and leases.

Knows nothing about connections or messages.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lmcache_core.lm.arena import Arena
from lmcache_core.lm.fence import fence
from lmcache_core.lm.mapping import ReadOnlyMapping
from lmcache_core.lm.values import Values
from lmcache_core.metrics import Counters

if TYPE_CHECKING:
    from lmcache_core.lm.disk import Disk

logger = logging.getLogger(__name__)


class Leases:
    """The numbers at the arena's beginning: one for each client that reads the arena itself."""

    def __init__(self, arena: Arena, nbytes: int) -> None:
        self._numbers = arena.view[:nbytes].cast("Q")
        self._free = list(range(len(self._numbers)))

    def take(self) -> int | None:
        """An index, or ``None`` if all are in use."""
        return self._free.pop() if self._free else None

    def give_back(self, index: int) -> None:
        """The client is gone; its number is changed, should it still be reading."""
        self.revoke(index)
        self._free.append(index)

    def epoch(self, index: int) -> int:
        """The number now."""
        return self._numbers[index]

    def revoke(self, index: int) -> None:
        """Tell the client that what it is reading doesn't count."""
        self._numbers[index] += 1
        fence()

    def close(self) -> None:
        """Let go of the arena."""
        self._numbers.release()


class Regions:
    """Memory of clients, each mapped once however many of its connections share it. Thread-safe."""

    def __init__(self) -> None:
        self._mapped: dict[tuple[int, int], ReadOnlyMapping] = {}
        self._users: dict[tuple[int, int], int] = {}
        self._lock = threading.Lock()

    def attach(self, fd: int, nbytes: int) -> ReadOnlyMapping:
        """Map at least ``nbytes`` of the file; for `detach`.

        Raises:
            OSError: it is shorter, or can't be mapped.
        """
        facts = os.fstat(fd)
        name = facts.st_dev, facts.st_ino
        with self._lock:
            mapping = self._mapped.get(name)
            if mapping is None:
                mapping = self._mapped[name] = ReadOnlyMapping(fd, max(nbytes, facts.st_size))
                self._users[name] = 0
            elif mapping.nbytes < nbytes:
                raise OSError(f"the region has less than {nbytes} bytes")
            self._users[name] += 1
            return mapping

    def detach(self, mapping: ReadOnlyMapping) -> None:
        """Let go of it; nothing of this user's may be reading any more."""
        with self._lock:
            name = next(name for name, one in self._mapped.items() if one is mapping)
            self._users[name] -= 1
            if not self._users[name]:
                del self._users[name], self._mapped[name]
                mapping.close()


@dataclass
class Service:
    """What all sessions of a server share."""

    arena: Arena
    values: Values
    counters: Counters
    leases: Leases
    instance: bytes
    token: bytes = b""
    max_value_bytes: int = 0
    unix_path: str = ""
    stall_s: float = 30.0
    regions: Regions = field(default_factory=Regions)
    disk: Disk | None = None
    log_times: dict[str, float] = field(default_factory=dict)

    def log(self, kind: str, text: str, *arguments: object) -> None:
        """One line for each ``kind`` in half a minute: peers must not fill a disk with lines."""
        now = time.monotonic()
        if now - self.log_times.get(kind, now - 31.0) > 30.0:
            self.log_times[kind] = now
            logger.warning(text, *arguments)
