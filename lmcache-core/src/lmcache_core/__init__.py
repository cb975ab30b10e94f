"""KV-cache layer for LLM serving: the public API."""
