"""Finds how much of a prefix can be loaded, going down the tiers without blocking.

One `PrefixLookup` follows one request: host memory first; then one batched
question to the slow tiers; then, if they have more, the chunks are fetched
into host memory, verified there, and only then counted as a hit. Whoever asks
polls; nobody waits on I/O in the asking thread. After ``deadline_s`` it settles
for what is in host memory by then: a late tier costs hits, never time.

Knows the planner and the tiers' ``locate``. Knows nothing about engines.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from lmcache_core.cache.holds import Hold
from lmcache_core.cache.plan import FetchOp
from lmcache_core.cache.planner import Planner
from lmcache_core.chunks.chunk_index import ChunkState
from lmcache_core.chunks.keys import ChunkKey
from lmcache_core.errors import LeaseError

Locate = Callable[[Sequence[ChunkKey]], "Future[list[int]]"]


class PrefixLookup:
    """One request's way through the tiers.

    ``find`` answers keys in prefix order: at least those up to the first that isn't in host memory,
    and all of them where there are slow tiers; ``tokens[i]`` is the token count of chunk ``i``.
    ``locate`` asks the slow tiers (``None``: there are none) and answers, for each key, a tier
    number or -1. Fetches that become necessary are handed to ``submit``. The found chunks are
    leased, as ``hold``, until `close`, or for whoever takes that over with `hand_on`.
    """

    def __init__(
        self,
        planner: Planner,
        find: Callable[[], Sequence[ChunkKey]],
        tokens: Sequence[int],
        *,
        locate: Locate | None,
        submit: Callable[[list[FetchOp]], None],
        deadline_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        keys = find()
        self.hold = planner.acquire(keys)
        self.memory_chunks = len(self.hold)
        """Chunks that were in host memory at the start; the others came from slow tiers."""
        self._planner = planner
        self._find = find
        self._tokens = tokens
        self._submit = submit
        self._clock = clock
        self._until = clock() + deadline_s
        self._wanted: list[ChunkKey] = []
        self._done = True
        self._over = False
        self._located: Future[list[int]] | None = None
        rest = keys[len(self.hold) :]
        if locate is not None and rest:
            try:
                self._located = locate(rest)
            except BaseException:
                self.hold.release()
                raise
            self._done = False

    @property
    def left_s(self) -> float:
        """Seconds until it settles for what is there; whoever waits for it waits no longer."""
        return max(0.0, self._until - self._clock())

    def poll(self) -> int | None:
        """Chunks that can be loaded now, or ``None``: ask again."""
        if self._done:
            # Others may have stored more while the request waited for its turn.
            self._extend()
            return len(self.hold)
        if self._clock() >= self._until:  # nothing is begun any more that nobody waits for
            return self.give_up()
        if self._located is not None:
            if not self._located.done():
                return None
            found, self._located = self._located, None
            self._plan(found)
        if all(self._planner.state(k) is not ChunkState.FETCHING for k in self._wanted):
            return self.give_up()
        return None

    def give_up(self) -> int:
        """Settle for what is in host memory now; answer how many chunks can be loaded."""
        self._forget_question()
        self._extend()
        self._done = True
        return len(self.hold)

    def close(self) -> None:
        """Give the leases back.

        Raises:
            LeaseError: that was done before, or they belong to somebody else now.
        """
        self._end().release()

    def hand_on(self) -> Hold:
        """End the lookup; the leases belong to the caller from now on.

        Raises:
            LeaseError: they were given back, or belong to somebody else already.
        """
        return self._end()

    def _end(self) -> Hold:
        if self._over:
            raise LeaseError("a lookup has ended before: what it held isn't its own any more")
        self._over = self._done = True
        self._forget_question()
        return self.hold

    def _plan(self, found: Future[list[int]]) -> None:
        if found.cancelled() or found.exception() is not None:
            return
        start = len(self.hold)
        fetches: list[FetchOp] = []
        keys = self._find()
        for position, tier in enumerate(found.result(), start):
            key = keys[position]
            parent = keys[position - 1] if position else None
            state = self._planner.state(key)
            if state is ChunkState.ABSENT:
                if tier < 0:
                    break
                tokens = self._tokens[position]
                fetch = self._planner.plan_fetch(key, tokens, tier, self.hold, parent)
                if fetch is None:
                    break
                fetches.append(fetch)
            elif state is ChunkState.STORING:
                break
            else:
                self._planner.join(key, self.hold)
            self._wanted.append(key)
        if fetches:
            self._submit(fetches)

    def _forget_question(self) -> None:
        if self._located is not None:
            self._located.cancel()
            self._located = None

    def _extend(self) -> None:
        self._planner.extend(self.hold, self._find()[len(self.hold) :])
