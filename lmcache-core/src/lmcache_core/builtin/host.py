"""Registers core's own host memory, which is used where no other plugin has better."""

from __future__ import annotations

from lmcache_core.hookspecs import hookimpl
from lmcache_core.host_memory import allocate_region
from lmcache_core.storage import HostRegion


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
