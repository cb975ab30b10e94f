"""Registers the eviction policies of `lmcache_core.contracts.eviction`."""

from __future__ import annotations

from collections.abc import Sequence

from lmcache_core.contracts.eviction import FIFO, LFU, LRU, MRU, CachePolicyDescriptor
from lmcache_core.contracts.hookspecs import hookimpl


@hookimpl
def lmcache_cache_policies() -> Sequence[CachePolicyDescriptor]:
    """LRU, LFU, FIFO and MRU."""
    return [
        CachePolicyDescriptor(
            name="LRU", summary="least recently used goes first", create=lambda _: LRU()
        ),
        CachePolicyDescriptor(
            name="LFU", summary="least often used goes first", create=lambda _: LFU()
        ),
        CachePolicyDescriptor(
            name="FIFO", summary="first stored goes first", create=lambda _: FIFO()
        ),
        CachePolicyDescriptor(
            name="MRU", summary="most recently used goes first", create=lambda _: MRU()
        ),
    ]
