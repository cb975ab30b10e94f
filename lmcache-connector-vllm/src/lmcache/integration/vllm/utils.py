"""Compatibility: names that vLLM and its examples import from here."""

from lmcache_connector_vllm.compat import ENGINE_NAME, mla_enabled

__all__ = ["ENGINE_NAME", "mla_enabled"]
