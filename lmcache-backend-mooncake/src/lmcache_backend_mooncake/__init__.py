"""Keeps LMCache's chunks in a Mooncake store. `plugin` is what lmcache-core finds."""
