"""Keeps LMCache's chunks in Redis or Valkey. `plugin` is what lmcache-core finds."""
