"""Compatibility: the class that vLLM's own ``LMCacheConnectorV1`` wrapper looks for."""

from lmcache_connector_vllm.compat import LMCacheConnectorV1Impl

__all__ = ["LMCacheConnectorV1Impl"]
