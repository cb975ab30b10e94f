"""What vLLM imports under LMCache's old module names when our plugin isn't loaded.

vLLM's built-in ``LMCacheConnectorV1`` is a wrapper that keeps from us what we
need to report failed stores, so running behind it isn't offered: it would
have to be believed that nothing fails.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from lmcache_core import ConfigError

if TYPE_CHECKING:
    from vllm.config import ModelConfig

ENGINE_NAME = "vllm-instance"


def mla_enabled(model_config: ModelConfig) -> bool:
    """Whether the model keeps MLA's latent instead of K and V."""
    return bool(model_config.use_mla)


class LMCacheConnectorV1Impl:
    """Stops vLLM's wrapper with the remedy."""

    def __init__(self, vllm_config: Any, role: Any, parent: Any) -> None:
        allowed = os.environ.get("VLLM_PLUGINS")
        raise ConfigError(
            "vLLM didn't load LMCache's plugin"
            + (f": VLLM_PLUGINS={allowed} leaves it out. " if allowed is not None else ". ")
            + "Add 'lmcache' to VLLM_PLUGINS, or unset it. (Or name the class yourself: "
            '"kv_connector": "LMCacheConnector", '
            '"kv_connector_module_path": "lmcache_connector_vllm.connector".)'
        )
