"""What a server holds, by namespace, as operators ask for it: in memory and in files.

Knows values, the disk tier, and what clients said that namespaces are of. Knows nothing about
connections.
"""

from __future__ import annotations

import heapq
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from lmcache_backend_lm.inventory import PAGE, PURGE_FILES, Purged, Stock

if TYPE_CHECKING:
    from lmcache_backend_lm.service import Service

MOST_DESCRIPTIONS = 1024


class Descriptions:
    """What namespaces are of, as their clients said last. Bounded; thread-safe."""

    def __init__(self, most: int = MOST_DESCRIPTIONS) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._texts: OrderedDict[str, str] = OrderedDict()

    def learn(self, space: str, text: str) -> None:
        """Remember ``text``; what was said longest ago goes."""
        with self._lock:
            self._texts.pop(space, None)
            self._texts[space] = text
            if len(self._texts) > self._most:
                self._texts.popitem(last=False)

    def __call__(self, space: str) -> str:
        """Empty: nobody said, or it was forgotten."""
        with self._lock:
            return self._texts.get(space, "")

    def __len__(self) -> int:
        return len(self._texts)


async def page(service: Service, after: str) -> list[Stock]:
    """The next namespaces behind ``after`` that hold anything, in order; fewer than `PAGE`: all."""
    values, disk = service.values, service.disk
    on_disk = {} if disk is None else await disk.spaces()
    behind = (space for space, nbytes in on_disk.items() if nbytes and space > after)
    names = {*values.spaces(after, PAGE), *heapq.nsmallest(PAGE, behind)}
    chosen = heapq.nsmallest(PAGE, names)
    texts = {space: service.descriptions(space) for space in chosen}
    unknown = [space for space, text in texts.items() if not text]
    if disk is not None and unknown:
        texts.update(await disk.described(unknown))
    return [
        Stock(space, *values.usage(space), on_disk.get(space, 0), texts[space]) for space in chosen
    ]


async def numbers(service: Service) -> dict[str, int]:
    """What the server holds altogether, under the names of its metrics."""
    found = {**service.facts(), **service.values.totals()}
    if service.disk is not None:
        found.update(await service.disk.totals())
    return found


async def purge(service: Service, space: str) -> Purged:
    """Forget a namespace: all of it in memory, and up to `PURGE_FILES` of its files."""
    values, nbytes = service.values.purge(space)
    files, file_bytes, more = 0, 0, False
    if service.disk is not None:
        files, file_bytes, more = await service.disk.purge(space, PURGE_FILES)
    return Purged(values, nbytes, files, file_bytes, more)
