"""Values of a tier that are proven to be damaged, until they are deleted.

Knows keys, and one task. Knows nothing about how damage is found. Lives on one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence

from lmcache_core.chunks.keys import ChunkKey

MAX_DAMAGED = 1 << 10
"""How many values that are to be deleted are remembered."""


class Damage:
    """Deletes in the background, one call at a time.

    ``delete`` answers ``None`` where it couldn't; those, and what is too much to remember, go to
    ``refuse``.
    """

    def __init__(
        self,
        delete: Callable[[Sequence[ChunkKey]], Awaitable[int | None]],
        refuse: Callable[[Iterable[ChunkKey]], None],
    ) -> None:
        self._delete = delete
        self._refuse = refuse
        self._keys: dict[ChunkKey, None] = {}
        self._task: asyncio.Task[None] | None = None

    def __bool__(self) -> bool:
        return bool(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: ChunkKey) -> bool:
        return key in self._keys

    def add(self, keys: Iterable[ChunkKey]) -> None:
        """Delete these, too."""
        new = [key for key in keys if key not in self._keys]
        room = max(0, MAX_DAMAGED - len(self._keys))
        self._refuse(new[room:])
        self._keys.update(dict.fromkeys(new[:room]))
        if self._keys and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._work())

    async def over(self, keys: Iterable[ChunkKey], timeout_s: float) -> None:
        """Wait until none of ``keys`` is to be deleted, for ``timeout_s`` at most."""
        if self._task is not None and not self._keys.keys().isdisjoint(keys):
            await asyncio.wait([self._task], timeout=timeout_s)

    async def _work(self) -> None:
        while self._keys:
            keys = list(self._keys)
            if await self._delete(keys) is None:
                self._refuse(keys)
            for key in keys:
                self._keys.pop(key, None)
