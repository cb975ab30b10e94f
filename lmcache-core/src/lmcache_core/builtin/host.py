"""Registers core's own host memory, which is used where no other plugin has better."""

from __future__ import annotations

from lmcache_core.contracts.hookspecs import hookimpl
from lmcache_core.contracts.storage import HostRegion
from lmcache_core.memory.host_memory import allocate_region


@hookimpl(trylast=True)
def lmcache_host_region(
    nbytes: int, hugepages: bool, numa_mode: str | None, populate: bool, shared: bool
) -> HostRegion:
    """Map ordinary memory, for whatever device. It goes when the last view of it does.

    Raises:
        ConfigError: see `allocate_region`.
    """
    return allocate_region(
        nbytes, hugepages=hugepages, numa_mode=numa_mode, populate=populate, shared=shared
    ).region
