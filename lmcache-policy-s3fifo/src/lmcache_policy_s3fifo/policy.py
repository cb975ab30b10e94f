"""S3-FIFO: three queues, two of slots and one of keys.

Yang, Zhang, Qiu, Yue, Vigfusson: "FIFO queues are all you need for cache eviction" (SOSP 2023).
New chunks wait in a small queue; those that are used there move on to the main one, the others are
evicted, and only their keys are remembered. One that comes back while it is remembered goes to the
main queue at once. In the main queue a chunk that was used is put back to the end, for each use.

What is special here is the tree. A prompt's chunks are stored from its beginning and must go from
its end: a run of them leaves a queue end first. Where something continues a chunk whose turn it is,
the end of its prefix goes in its place. And where a prompt's own chunks fill the small queue, the
rest of it isn't stored: it would have pushed out its own beginning.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from lmcache_core import CachedChunks, CachePolicy, ChunkKey, PolicyRequest
from lmcache_policy_s3fifo.config import S3FifoConfig
from lmcache_policy_s3fifo.queue import RunQueue

MOST_USES = 3
"""So many uses are counted."""
MOST_PASSED, MOST_MOVED = 64, 1024
"""So many runs are passed over, and slots moved, for one victim: what is in use is passed over, and
a move is paid for by the use that it forgets."""


class S3Fifo(CachePolicy):
    """See the module. The state is two dictionaries' entries a slot, and one a remembered key."""

    def __init__(self, config: S3FifoConfig) -> None:
        self._config = config
        self._small, self._main = RunQueue(), RunQueue()
        self._ghosts: OrderedDict[ChunkKey, None] = OrderedDict()
        self._prompt: Sequence[ChunkKey] = ()

    def open(self, chunks: CachedChunks) -> None:
        self._chunks = chunks
        self._small_slots = max(1, int(self._config.small_share * chunks.slots))
        self._most_ghosts = int(self._config.ghost_share * chunks.slots)
        self._uses = bytearray(chunks.slots)

    # -- what happened ---------------------------------------------------------------------

    def requested(self, request: PolicyRequest) -> None:
        self._prompt = request.keys

    def finished(self, name: str, tokens: int) -> None:
        """Nothing that is kept here ends with a request."""

    def added(self, slot: int) -> None:
        if slot in self._small or slot in self._main:
            raise ValueError(f"slot {slot} holds a chunk already")
        key = self._chunks.key(slot)
        queue = self._small
        if key is not None and key in self._ghosts:
            del self._ghosts[key]
            queue = self._main
        # One run with its parent, unless that was asked for again since it was stored.
        parent = self._chunks.parent(slot)
        queue.put(slot, after=None if parent is None or self._uses[parent] else parent)
        self._uses[slot] = 0

    def touched(self, slots: Sequence[int]) -> None:
        uses = self._uses
        for slot in slots:
            if slot not in self._small and slot not in self._main:
                raise KeyError(slot)
            if uses[slot] < MOST_USES:
                uses[slot] += 1

    def removed(self, slot: int, evicted: bool = False) -> None:
        if slot in self._small:
            self._small.take(slot)
            if evicted:
                self._remember(self._chunks.key(slot))
        else:
            self._main.take(slot)

    def clear(self) -> None:
        self._small.clear()
        self._main.clear()
        self._ghosts.clear()

    # -- what goes -------------------------------------------------------------------------

    def admit(self, key: ChunkKey, parent: int | None) -> bool:
        if self.victim(parent) is not None:
            return True
        # It, and what would have continued it, would have been the first to go again.
        rest = self._prompt[self._prompt.index(key) :] if key in self._prompt else [key]
        for one in reversed(rest):
            self._remember(one)
        return False

    def victim(self, spared: int | None) -> int | None:
        chunks, uses = self._chunks, self._uses
        small, main = self._small, self._main
        passed = 0
        for _ in range(MOST_MOVED):
            if len(small) >= self._small_slots or not len(main):
                if passed >= min(MOST_PASSED, small.runs):
                    return None
                slot = small.first()
                if uses[slot] >= self._config.promoted_after:
                    small.take(slot)
                    uses[slot] = 0
                    main.put(slot)
                    continue
                queue = small
            else:
                if passed >= min(MOST_PASSED, main.runs):
                    return None
                slot = main.first()
                if uses[slot]:
                    uses[slot] -= 1
                    main.take(slot)
                    main.put(slot)
                    continue
                queue = main
            leaf = chunks.leaf(slot)
            if leaf != spared and chunks.evictable(leaf):
                return leaf
            queue.postpone()
            passed += 1
        return None

    def _remember(self, key: ChunkKey | None) -> None:
        if key is None or not self._most_ghosts:
            return
        self._ghosts[key] = None
        self._ghosts.move_to_end(key)
        if len(self._ghosts) > self._most_ghosts:
            self._ghosts.popitem(last=False)
