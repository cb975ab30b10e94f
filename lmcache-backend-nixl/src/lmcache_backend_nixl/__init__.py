"""Keeps LMCache's chunks through NIXL's storage plugins. `plugin` is what lmcache-core finds."""
