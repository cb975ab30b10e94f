"""Keeps LMCache's chunks in newthing. `plugin` is what lmcache-core finds."""
