"""A server's parts without its listeners and threads: for tests that look inside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmcache_backend_lm.arena import LEASE_BYTES, Arena, whole_pages
from lmcache_backend_lm.disk import Disk
from lmcache_backend_lm.service import Epochs, Regions, Service
from lmcache_backend_lm.values import Values
from lmcache_core.chunks.keys import ChunkKey
from lmcache_core.metrics import Counters


def a_service(nbytes: int, folder: Path | None = None, **more: Any) -> Service:
    """With ``nbytes`` of memory, and files below ``folder``; ``more`` are `Service`'s fields."""
    counters, arena = Counters(), Arena(nbytes)
    values = Values(arena, counters)
    service = Service(
        arena,
        values,
        counters,
        Epochs(arena, LEASE_BYTES, counters),
        Regions(counters),
        instance=bytes(16),
        max_value_bytes=arena.capacity,
        **more,
    )
    if folder is not None:
        service.disk = Disk(folder, None, values=values, arena=arena, counters=counters)
    return service


def held(service: Service) -> int:
    """How many leases of anything are out."""
    ledgers = (service.values.leases, service.epochs.leases, service.regions.leases)
    return sum(ledger.out for ledger in ledgers)


def check_at_rest(
    service: Service, content: Callable[[ChunkKey, int], bytes] | None = None
) -> None:
    """Nothing is held, nothing is lost, and what is there is right if ``content`` is known.

    Raises:
        AssertionError: it isn't so.
    """
    assert held(service) == 0, "leases are held"
    arena, linked = service.arena, list(service.values._used)
    assert all(value.leases == 0 for value in linked)
    used = sum(whole_pages(value.nbytes) for value in linked)
    assert arena.extents.free_bytes + used == arena.capacity
    for value in linked if content is not None else ():
        stored = b"".join(arena.views(value.parts, value.nbytes))
        assert stored == content(value.key, value.nbytes)
    assert not any(name == "leases_forgotten" for name, _ in service.counters.snapshot())


def close(service: Service) -> None:
    """Give everything back."""
    if service.disk is not None:
        service.disk.close(5.0)
    service.epochs.close()
    service.arena.close()
