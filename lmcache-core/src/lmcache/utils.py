"""Name that engines import from LMCache; the code is in `lmcache_core.logging`."""

from lmcache_core.logging import init_logger

__all__ = ["init_logger"]
