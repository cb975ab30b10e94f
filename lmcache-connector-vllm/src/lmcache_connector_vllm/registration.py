"""Registers our connector under the names that vLLM's users type.

Loaded by vLLM in every process through the entry-point group
``vllm.general_plugins``. vLLM's own ``LMCacheConnectorV1`` is a wrapper that
forwards only part of its connector interface: no asynchronous loading, no
statistics, no worker reports, no reset, no shutdown. Our class takes its name,
so that ``"kv_connector": "LMCacheConnectorV1"`` gets the whole interface.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from vllm.distributed.kv_transfer.kv_connector.base import KVConnectorBase
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

NAMES = ("LMCacheConnectorV1", "LMCacheMPConnector", "LMCacheConnector")
MODULE = "lmcache_connector_vllm.connector"


def _load() -> type[KVConnectorBase]:
    connector: type[KVConnectorBase] = importlib.import_module(MODULE).LMCacheConnector
    return connector


def register() -> None:
    """Idempotent: vLLM may call it more than once in a process."""
    # register_connector() refuses names that exist, and vLLM registers two of these itself.
    registry: dict[str, Callable[[], type[KVConnectorBase]]] = KVConnectorFactory._registry
    for name in NAMES:
        registry[name] = _load
