"""KV-cache layer for LLM serving: the public API.

Importing this package imports almost nothing; each name is imported when it is
first used. Nothing here ever imports torch, an engine or a client library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmcache_core.cache import Cache, Session
    from lmcache_core.config import Config, load_config
    from lmcache_core.connector import BlockSpan, EngineConnector, PagedLayout, Paging, PlaneStrides
    from lmcache_core.errors import (
        BackendError,
        BackendRejected,
        BackendTimeout,
        BackendUnavailable,
        ConfigError,
        LayoutError,
        LMCacheError,
        PluginError,
    )
    from lmcache_core.hookspecs import hookimpl
    from lmcache_core.keys import CacheNamespace, ChunkKey
    from lmcache_core.layout import (
        AttentionKind,
        DType,
        KVLayout,
        LayerGroup,
        full_attention,
        mla,
    )
    from lmcache_core.paged import Paged
    from lmcache_core.plugins import Plugins
    from lmcache_core.serde import Serde, SerdeDescriptor
    from lmcache_core.storage import (
        MISS,
        BackendCapabilities,
        BackendContext,
        BlockingBackend,
        StorageBackend,
        StorageBackendDescriptor,
        StoreOutcome,
    )

__version__ = "0.1.0"

_HOME = {
    "Cache": "cache",
    "Paged": "paged",
    "Session": "cache",
    "Config": "config",
    "load_config": "config",
    "BlockSpan": "connector",
    "EngineConnector": "connector",
    "PagedLayout": "connector",
    "Paging": "connector",
    "PlaneStrides": "connector",
    "BackendError": "errors",
    "BackendRejected": "errors",
    "BackendTimeout": "errors",
    "BackendUnavailable": "errors",
    "ConfigError": "errors",
    "LMCacheError": "errors",
    "LayoutError": "errors",
    "PluginError": "errors",
    "hookimpl": "hookspecs",
    "CacheNamespace": "keys",
    "ChunkKey": "keys",
    "AttentionKind": "layout",
    "DType": "layout",
    "KVLayout": "layout",
    "LayerGroup": "layout",
    "full_attention": "layout",
    "mla": "layout",
    "Plugins": "plugins",
    "Serde": "serde",
    "SerdeDescriptor": "serde",
    "MISS": "storage",
    "BackendCapabilities": "storage",
    "BackendContext": "storage",
    "BlockingBackend": "storage",
    "StorageBackend": "storage",
    "StorageBackendDescriptor": "storage",
    "StoreOutcome": "storage",
}

__all__ = [
    "MISS",
    "AttentionKind",
    "BackendCapabilities",
    "BackendContext",
    "BackendError",
    "BackendRejected",
    "BackendTimeout",
    "BackendUnavailable",
    "BlockSpan",
    "BlockingBackend",
    "Cache",
    "CacheNamespace",
    "ChunkKey",
    "Config",
    "ConfigError",
    "DType",
    "EngineConnector",
    "KVLayout",
    "LMCacheError",
    "LayerGroup",
    "LayoutError",
    "Paged",
    "PagedLayout",
    "Paging",
    "PlaneStrides",
    "PluginError",
    "Plugins",
    "Serde",
    "SerdeDescriptor",
    "Session",
    "StorageBackend",
    "StorageBackendDescriptor",
    "StoreOutcome",
    "full_attention",
    "hookimpl",
    "load_config",
    "mla",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first asked for (PEP 562)."""
    if (home := _HOME.get(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
