"""Connects vLLM to LMCache. `connector.LMCacheConnector` is what vLLM loads."""
