"""KV-cache layer for LLM serving: the public API, for applications and for authors of plugins.

What isn't named here may change without notice; docs/public-api.md says what each name is for.
Importing this package imports almost nothing; each name is imported when it is first used. Nothing
here ever imports torch, an engine or a client library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmcache_core.aio.daemon_pool import DaemonPool
    from lmcache_core.aio.futures import settle_soon
    from lmcache_core.aio.guard import attempted
    from lmcache_core.aio.io_loop import IOLoop, left_of
    from lmcache_core.aio.pieces import IOV_MAX, last_first, next_of, take_out
    from lmcache_core.aio.secret_file import remark_if_public
    from lmcache_core.aio.stream import (
        TICK_S,
        WAKE_BYTES,
        PlainStream,
        Stream,
        TlsStream,
        dial,
        dial_unix,
        wake_from,
    )
    from lmcache_core.aio.tls import binding_of, client_context, server_context
    from lmcache_core.builtin.filesystem import FilesystemBackend, FilesystemConfig
    from lmcache_core.cache.cache import Cache, Session
    from lmcache_core.cache.holds import Hold
    from lmcache_core.cache.lookup import PrefixLookup
    from lmcache_core.cache.mover import Mover, slot_bytes, slots_in
    from lmcache_core.cache.plan import FetchOp, LoadOp, Report, StoreOp
    from lmcache_core.cache.planner import Planner
    from lmcache_core.cache.waiting import WaitingBudget
    from lmcache_core.chunks.digests import FileDigests
    from lmcache_core.chunks.hashing import PrefixHasher, request_root
    from lmcache_core.chunks.identity import (
        AdapterFacts,
        ModelFacts,
        adapter_identity,
        config_identity,
        is_address,
        weights_identity,
    )
    from lmcache_core.chunks.keys import CacheNamespace, ChunkKey
    from lmcache_core.chunks.layout import (
        AttentionKind,
        DType,
        KVLayout,
        LayerGroup,
        full_attention,
        mla,
    )
    from lmcache_core.cli.table import text_table
    from lmcache_core.config import Config, load_config
    from lmcache_core.config.dialect import Dialect
    from lmcache_core.contracts.blocking_channel import BlockingChannel, Stop
    from lmcache_core.contracts.connector import (
        BlockSpan,
        EngineConnector,
        EngineConnectorDescriptor,
        Kernels,
        PagedLayout,
        Paging,
        PlaneStrides,
    )
    from lmcache_core.contracts.eviction import (
        Admits,
        CachedChunks,
        CachePolicy,
        CachePolicyDescriptor,
        OrderedPolicy,
        PolicyRequest,
        SeesRequests,
    )
    from lmcache_core.contracts.hookspecs import hookimpl
    from lmcache_core.contracts.paged import Paged, PagedConnector
    from lmcache_core.contracts.report import ReportLine
    from lmcache_core.contracts.serde import Rope, Serde, SerdeDescriptor, SerdeFacts
    from lmcache_core.contracts.storage import (
        MISS,
        BackendCapabilities,
        BackendContext,
        BlockingBackend,
        HostRegion,
        StorageBackend,
        StorageBackendDescriptor,
        StoreOutcome,
    )
    from lmcache_core.contracts.transfer import (
        MAX_NAME_BYTES,
        MAX_NOTE_BYTES,
        Note,
        Peer,
        PeerDescriptor,
        Range,
        TransferCapabilities,
        TransferChannel,
        TransferChannelDescriptor,
        TransferContext,
        check_call,
    )
    from lmcache_core.errors import (
        BackendError,
        BackendRejected,
        BackendTimeout,
        BackendUnavailable,
        ConfigError,
        LayoutError,
        LeaseError,
        LMCacheError,
        PluginError,
        UnnamedError,
    )
    from lmcache_core.logging import Seldom, init_logger
    from lmcache_core.memory.host_memory import (
        PAGE_BYTES,
        HostArena,
        address_of,
        allocate_region,
        available_bytes,
        keep_writers_out,
        memfd,
        reader_of,
    )
    from lmcache_core.memory.leases import Lease, Ledger, SharedResource
    from lmcache_core.memory.reference import ReferenceKernels
    from lmcache_core.metrics import GAUGES, METRIC_PREFIX, METRICS, Counters, render_prometheus
    from lmcache_core.plugins.manager import Plugins
    from lmcache_core.plugins.upstream import refuse_upstream
    from lmcache_core.tiers.peers import Link, open_channel
    from lmcache_core.tiers.serde_chain import chain_serdes
    from lmcache_core.tiers.tiers import Tiers

__version__ = "0.1.0"

_ROLES = {
    "Applications": {
        "AttentionKind": "chunks.layout",
        "Cache": "cache.cache",
        "Config": "config",
        "ConfigError": "errors",
        "DType": "chunks.layout",
        "KVLayout": "chunks.layout",
        "LMCacheError": "errors",
        "LayerGroup": "chunks.layout",
        "LayoutError": "errors",
        "LeaseError": "errors",
        "Paged": "contracts.paged",
        "PluginError": "errors",
        "Plugins": "plugins.manager",
        "Session": "cache.cache",
        "UnnamedError": "errors",
        "full_attention": "chunks.layout",
        "load_config": "config",
        "mla": "chunks.layout",
    },
    "Every plugin": {
        "Counters": "metrics",
        "Dialect": "config.dialect",
        "GAUGES": "metrics",
        "METRICS": "metrics",
        "METRIC_PREFIX": "metrics",
        "ReportLine": "contracts.report",
        "Seldom": "logging",
        "hookimpl": "contracts.hookspecs",
        "init_logger": "logging",
        "render_prometheus": "metrics",
        "text_table": "cli.table",
    },
    "Storage backends": {
        "BackendCapabilities": "contracts.storage",
        "BackendContext": "contracts.storage",
        "BackendError": "errors",
        "BackendRejected": "errors",
        "BackendTimeout": "errors",
        "BackendUnavailable": "errors",
        "BlockingBackend": "contracts.storage",
        "CacheNamespace": "chunks.keys",
        "ChunkKey": "chunks.keys",
        "FilesystemBackend": "builtin.filesystem",
        "FilesystemConfig": "builtin.filesystem",
        "HostRegion": "contracts.storage",
        "MISS": "contracts.storage",
        "StorageBackend": "contracts.storage",
        "StorageBackendDescriptor": "contracts.storage",
        "StoreOutcome": "contracts.storage",
    },
    "Serdes and cache policies": {
        "Admits": "contracts.eviction",
        "CachePolicy": "contracts.eviction",
        "CachePolicyDescriptor": "contracts.eviction",
        "CachedChunks": "contracts.eviction",
        "OrderedPolicy": "contracts.eviction",
        "PolicyRequest": "contracts.eviction",
        "Rope": "contracts.serde",
        "SeesRequests": "contracts.eviction",
        "Serde": "contracts.serde",
        "SerdeDescriptor": "contracts.serde",
        "SerdeFacts": "contracts.serde",
        "chain_serdes": "tiers.serde_chain",
    },
    "Transfer channels": {
        "BlockingChannel": "contracts.blocking_channel",
        "Link": "tiers.peers",
        "MAX_NAME_BYTES": "contracts.transfer",
        "MAX_NOTE_BYTES": "contracts.transfer",
        "Note": "contracts.transfer",
        "Peer": "contracts.transfer",
        "PeerDescriptor": "contracts.transfer",
        "Range": "contracts.transfer",
        "Stop": "contracts.blocking_channel",
        "TransferCapabilities": "contracts.transfer",
        "TransferChannel": "contracts.transfer",
        "TransferChannelDescriptor": "contracts.transfer",
        "TransferContext": "contracts.transfer",
        "check_call": "contracts.transfer",
        "open_channel": "tiers.peers",
    },
    "What does I/O: threads, loops, streams": {
        "DaemonPool": "aio.daemon_pool",
        "IOLoop": "aio.io_loop",
        "IOV_MAX": "aio.pieces",
        "PlainStream": "aio.stream",
        "Stream": "aio.stream",
        "TICK_S": "aio.stream",
        "TlsStream": "aio.stream",
        "WAKE_BYTES": "aio.stream",
        "attempted": "aio.guard",
        "binding_of": "aio.tls",
        "client_context": "aio.tls",
        "dial": "aio.stream",
        "dial_unix": "aio.stream",
        "last_first": "aio.pieces",
        "left_of": "aio.io_loop",
        "next_of": "aio.pieces",
        "remark_if_public": "aio.secret_file",
        "server_context": "aio.tls",
        "settle_soon": "aio.futures",
        "take_out": "aio.pieces",
        "wake_from": "aio.stream",
    },
    "Host memory": {
        "HostArena": "memory.host_memory",
        "Lease": "memory.leases",
        "Ledger": "memory.leases",
        "PAGE_BYTES": "memory.host_memory",
        "ReferenceKernels": "memory.reference",
        "SharedResource": "memory.leases",
        "address_of": "memory.host_memory",
        "allocate_region": "memory.host_memory",
        "available_bytes": "memory.host_memory",
        "keep_writers_out": "memory.host_memory",
        "memfd": "memory.host_memory",
        "reader_of": "memory.host_memory",
    },
    "Engine connectors": {
        "AdapterFacts": "chunks.identity",
        "BlockSpan": "contracts.connector",
        "EngineConnector": "contracts.connector",
        "EngineConnectorDescriptor": "contracts.connector",
        "FetchOp": "cache.plan",
        "FileDigests": "chunks.digests",
        "Hold": "cache.holds",
        "Kernels": "contracts.connector",
        "LoadOp": "cache.plan",
        "ModelFacts": "chunks.identity",
        "Mover": "cache.mover",
        "PagedConnector": "contracts.paged",
        "PagedLayout": "contracts.connector",
        "Paging": "contracts.connector",
        "PlaneStrides": "contracts.connector",
        "Planner": "cache.planner",
        "PrefixHasher": "chunks.hashing",
        "PrefixLookup": "cache.lookup",
        "Report": "cache.plan",
        "StoreOp": "cache.plan",
        "Tiers": "tiers.tiers",
        "WaitingBudget": "cache.waiting",
        "adapter_identity": "chunks.identity",
        "config_identity": "chunks.identity",
        "is_address": "chunks.identity",
        "refuse_upstream": "plugins.upstream",
        "request_root": "chunks.hashing",
        "slot_bytes": "cache.mover",
        "slots_in": "cache.mover",
        "weights_identity": "chunks.identity",
    },
}
"""Whom it is for → public name → the module where it lives."""
_MODULES = {name: module for names in _ROLES.values() for name, module in names.items()}

__all__ = [
    "GAUGES",
    "IOV_MAX",
    "MAX_NAME_BYTES",
    "MAX_NOTE_BYTES",
    "METRICS",
    "METRIC_PREFIX",
    "MISS",
    "PAGE_BYTES",
    "TICK_S",
    "WAKE_BYTES",
    "AdapterFacts",
    "Admits",
    "AttentionKind",
    "BackendCapabilities",
    "BackendContext",
    "BackendError",
    "BackendRejected",
    "BackendTimeout",
    "BackendUnavailable",
    "BlockSpan",
    "BlockingBackend",
    "BlockingChannel",
    "Cache",
    "CacheNamespace",
    "CachePolicy",
    "CachePolicyDescriptor",
    "CachedChunks",
    "ChunkKey",
    "Config",
    "ConfigError",
    "Counters",
    "DType",
    "DaemonPool",
    "Dialect",
    "EngineConnector",
    "EngineConnectorDescriptor",
    "FetchOp",
    "FileDigests",
    "FilesystemBackend",
    "FilesystemConfig",
    "Hold",
    "HostArena",
    "HostRegion",
    "IOLoop",
    "KVLayout",
    "Kernels",
    "LMCacheError",
    "LayerGroup",
    "LayoutError",
    "Lease",
    "LeaseError",
    "Ledger",
    "Link",
    "LoadOp",
    "ModelFacts",
    "Mover",
    "Note",
    "OrderedPolicy",
    "Paged",
    "PagedConnector",
    "PagedLayout",
    "Paging",
    "Peer",
    "PeerDescriptor",
    "PlainStream",
    "PlaneStrides",
    "Planner",
    "PluginError",
    "Plugins",
    "PolicyRequest",
    "PrefixHasher",
    "PrefixLookup",
    "Range",
    "ReferenceKernels",
    "Report",
    "ReportLine",
    "Rope",
    "SeesRequests",
    "Seldom",
    "Serde",
    "SerdeDescriptor",
    "SerdeFacts",
    "Session",
    "SharedResource",
    "Stop",
    "StorageBackend",
    "StorageBackendDescriptor",
    "StoreOp",
    "StoreOutcome",
    "Stream",
    "Tiers",
    "TlsStream",
    "TransferCapabilities",
    "TransferChannel",
    "TransferChannelDescriptor",
    "TransferContext",
    "UnnamedError",
    "WaitingBudget",
    "adapter_identity",
    "address_of",
    "allocate_region",
    "attempted",
    "available_bytes",
    "binding_of",
    "chain_serdes",
    "check_call",
    "client_context",
    "config_identity",
    "dial",
    "dial_unix",
    "full_attention",
    "hookimpl",
    "init_logger",
    "is_address",
    "keep_writers_out",
    "last_first",
    "left_of",
    "load_config",
    "memfd",
    "mla",
    "next_of",
    "open_channel",
    "reader_of",
    "refuse_upstream",
    "remark_if_public",
    "render_prometheus",
    "request_root",
    "server_context",
    "settle_soon",
    "slot_bytes",
    "slots_in",
    "take_out",
    "text_table",
    "wake_from",
    "weights_identity",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first asked for (PEP 562)."""
    if (module := _MODULES.get(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
