"""A backend over a client that nobody should let into a process; `mode` says what it does wrong.

Its values are files in a folder, so that they outlive the processes which it ends. Tests install
the text of this module as a distribution of its own; it isn't imported from here.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from lmcache_core.chunks.keys import ChunkKey
from lmcache_core.contracts.hookspecs import hookimpl
from lmcache_core.contracts.storage import (
    MISS,
    BackendCapabilities,
    BackendContext,
    BlockingBackend,
    StorageBackend,
    StorageBackendDescriptor,
    StoreOutcome,
)
from lmcache_core.errors import BackendRejected, BackendUnavailable, ConfigError

CRASHES_AT, HANGS_AT, LEAKS_BYTES = 100, 200, 128 << 10


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")
    path: Path
    mode: str = ""


def crash() -> None:
    """As a segmentation fault ends a process."""
    signal.raise_signal(signal.SIGSEGV)


def create(options: Options) -> StorageBackend:
    if options.mode == "import":
        import lmcache_no_such_client  # noqa: F401
    if options.mode == "create":
        raise ConfigError("`path` is on the moon")
    if options.mode == "crash in create":
        crash()
    if options.mode == "loop":
        return Blocked(options)
    return Bad(options)


class Bad(BlockingBackend):
    """Files in a folder, through a client that counts its calls over all processes."""

    capabilities = BackendCapabilities(shared=True, persistent=True, max_concurrency=2)

    def __init__(self, options: Options) -> None:
        self._mode = options.mode
        self._folder = options.path
        self._leak: list[bytearray] = []
        self._lock = threading.Lock()

    def _client(self, what: str) -> None:
        """What the client does before it does what it was asked to."""
        if self._mode == "all" and what == "contains":
            return  # how often that is asked depends on who asks
        with self._lock:  # which a call that hangs never gives back
            number = self._count()
            if self._mode == "all":
                self._leak.append(bytearray(os.urandom(4096) * (LEAKS_BYTES // 4096)))
                if number == CRASHES_AT:
                    crash()
                if number == HANGS_AT:
                    time.sleep(3600)
        if self._mode == what:
            print("the client says goodbye", file=sys.stderr)
            crash()
        if self._mode == f"hang in {what}":
            time.sleep(3600)
        if self._mode == f"exit in {what}":
            os._exit(3)

    def _count(self) -> int:
        """The number of this call."""
        with (self._folder / "calls").open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(".")
            file.flush()
            return os.fstat(file.fileno()).st_size

    def _place(self, key: ChunkKey) -> Path:
        return self._folder / key.hex()

    def open_blocking(self, context: BackendContext) -> None:
        if self._mode == "rejected":
            raise BackendRejected("the password is wrong")
        if self._mode == "value error":
            raise ValueError("boom")
        if self._mode == "die once in open" and not (self._folder / "died").exists():
            (self._folder / "died").touch()
            crash()
        if self._mode == "die in later opens":
            if (self._folder / "opened").exists():
                raise BackendUnavailable("the master is gone")
            (self._folder / "opened").touch()

    def contains_blocking(self, keys: Sequence[ChunkKey]) -> list[bool]:
        if self._mode == "torch":
            return ["torch" in sys.modules for _ in keys]
        if self._mode == "nonsense":
            return [object()]  # type: ignore[list-item]
        self._client("contains")
        return [self._place(key).exists() for key in keys]

    def load_blocking(self, keys: Sequence[ChunkKey], into: Sequence[memoryview]) -> list[int]:
        self._client("load")
        sizes = []
        for key, buffer in zip(keys, into, strict=True):
            found = self._place(key).read_bytes() if self._place(key).exists() else None
            if found is None or len(found) > len(buffer):
                sizes.append(MISS)
            else:
                buffer[: len(found)] = found
                sizes.append(len(found))
        return sizes

    def store_blocking(
        self, keys: Sequence[ChunkKey], sources: Sequence[memoryview]
    ) -> list[StoreOutcome]:
        if self._mode == "nonsense":
            return [7]  # type: ignore[list-item]
        self._client("store")
        for key, source in zip(keys, sources, strict=True):
            place = self._place(key)
            temporary = place.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
            temporary.write_bytes(source)
            temporary.rename(place)
        return [StoreOutcome.STORED for _ in keys]


class Blocked(StorageBackend):
    """Blocks its event loop."""

    capabilities = BackendCapabilities(shared=True, persistent=True)

    def __init__(self, options: Options) -> None:
        pass

    async def open(self, context: BackendContext) -> None:
        pass

    async def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        time.sleep(3600)
        return []

    async def load(self, keys: Sequence[ChunkKey], into: Sequence[memoryview]) -> list[int]:
        time.sleep(3600)
        return []

    async def store(
        self, keys: Sequence[ChunkKey], sources: Sequence[memoryview]
    ) -> list[StoreOutcome]:
        time.sleep(3600)
        return []

    async def close(self) -> None:
        pass


@hookimpl
def lmcache_storage_backends() -> list[StorageBackendDescriptor]:
    return [
        StorageBackendDescriptor(
            name="bad", summary="", config=Options, create=create, isolated=True
        )
    ]
