"""The plugin ``harness``: real backends, a serde and a policy, with faults around and below them.

Installed as a distribution for the time of a run, so that the process of an isolated tier finds it,
too. With `BREAK` in the environment it has a mistake of its own, which a run must find.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from shaky import Inverted

from faulting import kinds, seam
from lmcache_backend_lm.config import LmConfig
from lmcache_core.builtin.raw import RawSerde
from lmcache_core.chunks.keys import ChunkKey
from lmcache_core.chunks.layout import LayerGroup
from lmcache_core.contracts.eviction import LRU, CachePolicy, CachePolicyDescriptor
from lmcache_core.contracts.hookspecs import hookimpl
from lmcache_core.contracts.serde import Serde, SerdeDescriptor
from lmcache_core.contracts.storage import StorageBackend, StorageBackendDescriptor
from lmcache_core.plugins.manager import Plugins
from lmcache_core.testing.faulty import FaultyBackend, FaultyPolicy, FaultySerde

FOLDER, SEED, BREAK = "FAULT_HARNESS_FOLDER", "FAULT_HARNESS_SEED", "FAULT_HARNESS_BREAK"
BREAKS = ("wrong-byte", "leak", "deadline")
"""Mistakes for `BREAK`: a serde that claims to be lossy changes a byte; a backend keeps a thread
and a descriptor at each load; a policy stands still."""


SERDES: dict[str, type[Serde]] = {"harness-raw": RawSerde, "harness-inverting": Inverted}


class Options(BaseModel):
    """What is wrapped, and its options."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    inner: str
    options: dict[str, Any] = {}


class Unused(BaseModel):
    """No options."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class BrokenSerde(Inverted):
    """Decodes one bit of each chunk wrongly."""

    def decode(self, encoded: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> None:
        super().decode(encoded, into, group, tokens)
        into[into.nbytes // 2] ^= 1


class LeakyBackend(FaultyBackend):
    """Keeps a thread and a descriptor at each load."""

    async def load(self, keys: Sequence[ChunkKey], into: Sequence[memoryview]) -> list[int]:
        os.dup(0)
        threading.Thread(target=threading.Event().wait, daemon=True, name="leaked").start()
        return await super().load(keys, into)


class SlowPolicy(LRU):
    """Stands still now and then, on the thread that asks."""

    calls = 0

    def added(self, slot: int) -> None:
        self.calls += 1
        if not self.calls % 20:
            time.sleep(2.0)
        super().added(slot)


def tally() -> kinds.Tally:
    """This process's faults."""
    return kinds.tally(Path(os.environ[FOLDER]), int(os.environ[SEED]))


def broken() -> str:
    """Which of `BREAKS` there is, if any."""
    return os.environ.get(BREAK, "")


def _backend(options: Options) -> StorageBackend:
    descriptor = Plugins().storage_backend(options.inner)
    real = descriptor.create(descriptor.config.model_validate(options.options))
    if options.inner == "filesystem":
        seam.install(tally())
    return (LeakyBackend if broken() == "leak" else FaultyBackend)(real, tally())


def _serde(real: type[Serde], _: BaseModel) -> Serde:
    return FaultySerde(BrokenSerde() if broken() == "wrong-byte" else real(), tally())


def _policy(_: BaseModel) -> CachePolicy:
    return SlowPolicy() if broken() == "deadline" else FaultyPolicy(LRU(), tally())


@hookimpl
def lmcache_storage_backends() -> list[StorageBackendDescriptor]:
    return [
        StorageBackendDescriptor(
            name="harness",
            summary="another backend, with faults",
            config=Options,
            create=_backend,
            maps_region=lambda o: o.inner == "lm" and LmConfig(**o.options).is_near,
        )
    ]


@hookimpl
def lmcache_serdes() -> list[SerdeDescriptor]:
    return [
        SerdeDescriptor(
            name=name,
            summary="a serde with faults",
            lossless=broken() != "wrong-byte",
            config=Unused,
            create=partial(_serde, real),
        )
        for name, real in SERDES.items()
    ]


@hookimpl
def lmcache_cache_policies() -> list[CachePolicyDescriptor]:
    return [CachePolicyDescriptor(name="harness", summary="LRU with faults", create=_policy)]


def install(site: Path) -> None:
    """Make a distribution of this module in ``site``, a folder on the module search path."""
    info = site / "fault_harness-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fault-harness\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lmcache.plugins]\nharness = faulting.plugin\n")
