"""Plugins for `stress`: a backend and a serde that fail now and then, in every way that there is.

They come as a distribution on the module search path does, as everybody's. Knows which calls fail
and how often; what becomes of that is for `stress` to find out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np

from lmcache_core import Plugins
from lmcache_core.builtin.memory import MemoryBackend, MemoryConfig
from lmcache_core.chunks.layout import LayerGroup
from lmcache_core.contracts.hookspecs import hookimpl
from lmcache_core.contracts.serde import Serde, SerdeDescriptor
from lmcache_core.contracts.storage import StorageBackendDescriptor
from lmcache_core.testing.faults import (
    NEGATIVE,
    TOO_FEW,
    TOO_LARGE,
    WRONG_TYPE,
    Corrupt,
    Fault,
    Faults,
    Half,
    Raise,
)
from lmcache_core.testing.faulty import FaultyBackend, FaultySerde

CHANCE = 0.01
"""Of each fault below, in each call; the calls of a serde are about one chunk."""
BACKEND_CHANCE = 0.002
"""Less: five failures in a row, and a breaker leaves the backend alone for ten seconds."""
SERDE: tuple[tuple[str, Fault], ...] = (
    *(("encode", fault) for fault in (Raise(MemoryError), Raise(SystemExit), Half(), Corrupt())),
    *(("encode", fault) for fault in (TOO_LARGE, NEGATIVE, WRONG_TYPE)),
    *(("decode", fault) for fault in (Raise(ValueError), Raise(StopIteration), Half(), Corrupt())),
    *(("max_encoded_bytes", fault) for fault in (Raise(MemoryError), NEGATIVE, WRONG_TYPE)),
    *(("for_chunk", fault) for fault in (Raise(KeyboardInterrupt), WRONG_TYPE)),
)
BACKEND: tuple[tuple[str, Fault], ...] = (
    *(("load", fault) for fault in (Raise(MemoryError), Half(), TOO_FEW, TOO_LARGE)),
    *(("store", fault) for fault in (Raise(ValueError), TOO_FEW)),
    *(("contains", fault) for fault in (Raise(ValueError), TOO_FEW)),
)
DAMAGE: tuple[tuple[str, Fault], ...] = (("load", Corrupt()), ("store", Corrupt()))


class Inverted(Serde):
    """Turns every bit over: exact, not in place, and never mistaken for the chunk itself."""

    @property
    def wire_id(self) -> int:
        return 64_000

    def max_encoded_bytes(self, group: LayerGroup, tokens: int) -> int:
        return group.chunk_bytes(tokens)

    def encode(
        self,
        chunk: memoryview,
        into: memoryview,
        group: LayerGroup,  # noqa: ARG002
        tokens: int,  # noqa: ARG002
    ) -> int:
        invert(chunk, into[: chunk.nbytes])
        return chunk.nbytes

    def decode(self, encoded: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> None:
        if encoded.nbytes != group.chunk_bytes(tokens):
            raise ValueError(f"{encoded.nbytes} bytes for a chunk of {into.nbytes}")
        invert(encoded, into)


def invert(source: memoryview, into: memoryview) -> None:
    np.invert(np.frombuffer(source, np.uint8), out=np.frombuffer(into, np.uint8))


def begin(faults: Faults) -> None:
    """Let calls fail from now on; until `Faults.disarm`."""
    for operation, fault in (*SERDE, *DAMAGE):
        faults.arm(operation, fault, times=None, chance=CHANCE)
    for operation, fault in BACKEND:
        faults.arm(operation, fault, times=None, chance=BACKEND_CHANCE)


@contextmanager
def plugins(folder: Path, faults: Faults) -> Iterator[Plugins]:
    """All installed plugins, and ``shaky``: a backend in memory, and a serde."""

    @hookimpl
    def lmcache_storage_backends() -> list[StorageBackendDescriptor]:
        return [
            StorageBackendDescriptor(
                name="shaky",
                summary="memory that fails",
                config=MemoryConfig,
                create=lambda config: FaultyBackend(MemoryBackend(config), faults),
            )
        ]

    @hookimpl
    def lmcache_serdes() -> list[SerdeDescriptor]:
        return [
            SerdeDescriptor(
                name="shaky",
                summary="inverts bits, or fails",
                lossless=True,
                config=MemoryConfig,
                create=lambda _: FaultySerde(Inverted(), faults),
            )
        ]

    name = "lmcache_stress_shaky"
    info = folder / "stress_shaky-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stress-shaky\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[lmcache.plugins]\nshaky = {name}\n")
    sys.path.insert(0, str(folder))
    sys.modules[name] = module = ModuleType(name)
    vars(module).update(
        lmcache_storage_backends=lmcache_storage_backends, lmcache_serdes=lmcache_serdes
    )
    try:
        yield Plugins()
    finally:
        sys.path.remove(str(folder))
        del sys.modules[name]
