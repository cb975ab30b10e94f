"""Compatibility: the class that vLLM's ``LMCacheMPConnector`` looks for."""

from lmcache_connector_vllm.connector import LMCacheConnector as LMCacheMPConnector

__all__ = ["LMCacheMPConnector"]
