"""Reads LMCache's configuration out of vLLM's.

What vLLM passes (``kv_connector_extra_config``, ``--kv-offloading-size``) is
one configuration layer among others; see ``lmcache_core.config``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmcache_core import Config, ConfigError, Plugins, init_logger, load_config, refuse_upstream

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(__name__)

FORCE_SKIP_SAVE = "LMCACHE_FORCE_SKIP_SAVE"


@dataclass(frozen=True)
class Settings:
    """What both sides of the connector need to know before anything is allocated."""

    config: Config
    plugins: Plugins
    saves: bool
    """Whether this engine stores. A ``kv_consumer`` only loads."""
    asynchronous: bool
    layerwise: bool

    @property
    def arena_bytes(self) -> int:
        """Host memory of one rank."""
        return int(self.config.core.max_local_cpu_size * 2**30)


def read_settings(vllm_config: VllmConfig) -> Settings:
    """Load and check the configuration.

    Raises:
        ConfigError: the configuration is wrong, or the upstream ``lmcache`` is installed beside
            ours and would shadow it file by file.
        PluginError: the configuration needs a plugin that is missing or broken.
    """
    refuse_upstream()
    transfer = vllm_config.kv_transfer_config
    if transfer is None:
        raise ConfigError("LMCache was created without a --kv-transfer-config")
    plugins = Plugins()
    extra: dict[str, Any] = dict(transfer.kv_connector_extra_config)
    config = load_config(plugins, engine=("vLLM", _offloading(vllm_config) | extra))
    for notice in config.notices:
        logger.info("%s", notice)
    core = config.core
    skip = os.environ.get(FORCE_SKIP_SAVE, "").lower() in ("1", "true", "yes")
    return Settings(
        config=config,
        plugins=plugins,
        saves=transfer.kv_role != "kv_consumer" and not skip,
        asynchronous=core.enable_async_loading,
        layerwise=core.use_layerwise and not core.enable_async_loading,
    )


def _offloading(vllm_config: VllmConfig) -> dict[str, Any]:
    """``--kv-offloading-size N`` is GiB over all ranks; ours is per rank."""
    cache = vllm_config.cache_config
    if cache.kv_offloading_size is None or cache.kv_offloading_backend != "lmcache":
        return {}
    ranks = vllm_config.parallel_config.tensor_parallel_size
    return {"lmcache.max_local_cpu_size": cache.kv_offloading_size / ranks}
