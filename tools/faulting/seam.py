"""Failing system calls below the filesystem backend, in the process that it lives in.

`install` gives the backend's own modules another ``os``, which is the real one but for a call now
and then that fails, or moves fewer bytes. Nothing else in the process sees it.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import Any

from faulting.kinds import Tally

CHANCE = 0.01
"""Of each call that can fail."""
_MODULES = "lmcache_core.builtin.filesystem"


class FaultyOs:
    """``os``, some of whose calls fail by a `Tally`."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self.stat = self._failing("stat", os.stat)
        self.fsync = self._failing("fsync", os.fsync)
        self.replace = self._failing("replace", os.replace)
        self.open = self._failing("open", os.open)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def preadv(self, fd: int, buffers: list[memoryview], offset: int, *more: int) -> int:
        """Reads, or fails, or reads less."""
        kind = self._tally.below("preadv", CHANCE)
        if kind == "end of file":
            return 0
        if kind == "short":
            buffers = [buffers[0][: max(1, memoryview(buffers[0]).nbytes // 2)]]
        elif kind:
            raise _error(kind)
        return os.preadv(fd, buffers, offset, *more)

    def pwrite(self, fd: int, source: memoryview, offset: int) -> int:
        """Writes, or fails, or writes less."""
        kind = self._tally.below("pwrite", CHANCE)
        if kind == "short":
            source = source[: max(1, len(source) // 2)]
        elif kind:
            raise _error(kind)
        return os.pwrite(fd, source, offset)

    def _failing(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if kind := self._tally.below(name, CHANCE):
                raise _error(kind)
            return real(*arguments, **named)

        return call


def install(tally: Tally) -> None:
    """Put the seam below the filesystem backend of this process."""
    for name, module in list(sys.modules.items()):
        if name.startswith(_MODULES) and hasattr(module, "os"):
            module.os = FaultyOs(tally)  # type: ignore[attr-defined]


def _error(kind: str) -> OSError:
    number = getattr(errno, kind)
    return OSError(number, os.strerror(number))
