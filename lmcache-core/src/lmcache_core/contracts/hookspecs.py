"""Every extension point of LMCache.

Hooks run while a process starts and stops, never once per chunk: they return
descriptors, and core calls the objects that the descriptors create directly.
A hook may gain arguments in a minor release; implementations name only the
arguments they use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from argparse import ArgumentParser, _SubParsersAction

    from lmcache_core.chunks.chunk_index import ChunkIndex
    from lmcache_core.config.dialect import Dialect
    from lmcache_core.contracts.connector import EngineConnectorDescriptor, Kernels
    from lmcache_core.contracts.eviction import CachePolicyDescriptor
    from lmcache_core.contracts.report import ReportLine
    from lmcache_core.contracts.serde import SerdeDescriptor
    from lmcache_core.contracts.storage import HostRegion, StorageBackendDescriptor
    from lmcache_core.contracts.transfer import TransferChannelDescriptor

PROJECT = "lmcache"
PLUGIN_API = 1
"""Version of what plugins and core promise each other: these hooks, descriptors, contracts.

One more with each change that a plugin must know of to work; see docs/plugin-api.md.
"""
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def lmcache_storage_backends() -> Sequence[StorageBackendDescriptor]:  # type: ignore[empty-body]
    """Describe the storage backends in this plugin.

    Called once. Import nothing heavier than pydantic here: the client library
    is imported by the descriptor's ``create``.
    """


@hookspec
def lmcache_serdes() -> Sequence[SerdeDescriptor]:  # type: ignore[empty-body]
    """Describe the serdes in this plugin."""


@hookspec
def lmcache_transfer_channels() -> Sequence[TransferChannelDescriptor]:  # type: ignore[empty-body]
    """Describe what moves bytes between processes' memory; imports as with storage backends."""


@hookspec
def lmcache_engine_connectors() -> Sequence[EngineConnectorDescriptor]:  # type: ignore[empty-body]
    """Describe the engine integrations in this plugin."""


@hookspec
def lmcache_cache_policies() -> Sequence[CachePolicyDescriptor]:  # type: ignore[empty-body]
    """Describe eviction policies for ``cache_policy``.

    One that has the name of core's own is used instead of it.
    """


@hookspec
def lmcache_dialects() -> Sequence[Dialect]:  # type: ignore[empty-body]
    """What understands how other software writes our options.

    Asked when a configuration is read.
    """


@hookspec(firstresult=True)
def lmcache_kernels(device: str) -> Kernels | None:
    """What gathers and scatters blocks on ``device``; ``None`` passes to the next plugin.

    Core's own implementation, the torch reference, runs last.
    """


@hookspec(firstresult=True)
def lmcache_chunk_index(slots: int) -> ChunkIndex | None:
    """An empty index of ``slots`` slots; ``None`` passes to the next plugin.

    Core's own, made of Python's containers, is used where no plugin has one.
    """


@hookspec(firstresult=True)
def lmcache_host_region(
    nbytes: int,
    device: str,
    hugepages: bool,
    numa_mode: str | None,
    populate: bool,
    shared: bool,
) -> HostRegion | None:
    """Allocate the host memory that chunks live in; ``None`` passes to the next plugin.

    ``hugepages``, ``numa_mode`` and ``populate`` (touch all of it now) are the configuration's
    wishes. ``shared``: backends in processes of their own will map it too, so it should have an
    ``fd``; without one, values are copied on their way there. Core's own implementation allocates
    pageable memory and runs last.
    """


@hookspec
def lmcache_cli(subcommands: _SubParsersAction[ArgumentParser]) -> None:
    """Add subcommands to the ``lmcache`` command."""


@hookspec
def lmcache_report() -> Sequence[str | ReportLine]:  # type: ignore[empty-body]
    """Lines for ``lmcache doctor``: versions, devices, what is missing. A text is ``ok``."""
