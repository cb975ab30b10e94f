"""Keeps LMCache's chunks in InfiniStore. `plugin` is what lmcache-core finds."""
