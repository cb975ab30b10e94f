"""One slow tier: a storage backend behind its guard.

Knows how to ask a backend and how far to trust its answers: whatever fails,
and whatever makes no sense, is a miss here. Knows nothing about the other
tiers, nor about what the bytes mean.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmcache_core.aio.guard import Answer, Guard, failure_kind
from lmcache_core.chunks.keys import ChunkKey
from lmcache_core.contracts.serde import Serde
from lmcache_core.contracts.storage import (
    MISS,
    BackendCapabilities,
    ReportsUsage,
    StorageBackend,
    StoreOutcome,
    SupportsClear,
    SupportsDelete,
    SupportsPrefixLookup,
)
from lmcache_core.errors import BackendError, BackendRejected
from lmcache_core.metrics import Counters
from lmcache_core.tiers.clearing import Clearing
from lmcache_core.tiers.damage import Damage

REFUSED_S = 300.0
"""How long a value that isn't for us is taken for absent; then it is tried once more."""
MAX_REFUSED = 1 << 16
_CALLS = 4
"""One call has at most one part in so many of the bytes that calls may have: others go on."""


@dataclass(frozen=True)
class LoadAnswer:
    """For each key the bytes loaded, or `MISS`.

    Until ``hanging[position]`` is done, the backend may still write into the buffer there;
    ``unsettled`` is done when all of them are.
    """

    sizes: list[int]
    unsettled: asyncio.Task[Any] | None = None
    hanging: Mapping[int, asyncio.Task[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class StoreAnswer:
    """For each key what became of it.

    Until ``hanging[position]`` is done, the backend may still read the source there, which says
    ``NOT_ADMITTED``, and may even store it; ``unsettled`` is done when all of them are.
    """

    outcomes: list[StoreOutcome]
    unsettled: asyncio.Task[Any] | None = None
    hanging: Mapping[int, asyncio.Task[Any]] = field(default_factory=dict)


class Tier:
    """One configured backend. Lives on the I/O loop; only `usage` may be called elsewhere.

    Nothing raises but for ``CancelledError``. While the backend isn't open, everything is a miss.
    ``deadline_s`` is what a call without a deadline of its own gets. ``exact``: the serde gives
    back every bit. ``fingerprint`` is that of the namespace, with this tier's place in it. Stores
    have ``max_bytes`` of buffers at one time at most, and so have loads; ``None``: any number. One
    that hangs keeps its part, and what finds no room for that reason is refused at once.
    """

    def __init__(
        self,
        name: str,
        backend: StorageBackend,
        serde: Serde,
        *,
        guard: Guard,
        counters: Counters,
        deadline_s: float,
        exact: bool = True,
        fingerprint: str = "",
        max_bytes: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.backend = backend
        self.serde = serde
        self.guard = guard
        self.guard.max_bytes = max_bytes
        self.deadline_s = deadline_s
        self.exact = exact
        self.fingerprint = fingerprint
        self._clock = clock
        self._counters = counters
        self._refused: dict[ChunkKey, float] = {}
        self._capabilities: BackendCapabilities | None = None
        self._prefix_lookup: SupportsPrefixLookup | None = None
        self._storing: set[ChunkKey] = set()
        self._stores_over: list[asyncio.Future[None]] = []
        self._damage = Damage(self.delete, self.refuse)
        self._clearing = Clearing(name, counters)

    @property
    def ready(self) -> bool:
        """Whether the backend is open."""
        return self._capabilities is not None

    @property
    def capabilities(self) -> BackendCapabilities | None:
        """What the backend says about itself; ``None`` while it isn't open."""
        return self._capabilities

    @property
    def clears(self) -> int:
        """How often it was asked to forget everything: `store` drops what is older."""
        return self._clearing.times

    @property
    def owes_clear(self) -> bool:
        """Whether it is still to be cleared. Nothing of it is offered until then, nor stored."""
        return self._clearing.owed

    @property
    def uncleared(self) -> str:
        """Why the last `clear` didn't clear it; empty if it did."""
        return self._clearing.uncleared

    def opened(self, backend: StorageBackend, capabilities: BackendCapabilities) -> None:
        """Use ``backend``, which is open, from now on."""
        self.backend = backend
        self._prefix_lookup = backend if isinstance(backend, SupportsPrefixLookup) else None
        self.guard.max_concurrency = max(1, capabilities.max_concurrency)
        self.guard.cancels = capabilities.cancellable
        self._capabilities = capabilities

    def closing(self) -> None:
        """Call the backend no more."""
        self._capabilities = None

    async def contains(
        self, keys: Sequence[ChunkKey], deadline_s: float | None = None, *, leading: bool = True
    ) -> list[bool]:
        """Say which keys a `load` would hit, in one call to the backend.

        ``leading``: the caller wants the hits up to the first miss only, which some backends count
        faster; the rest is then ``False``.
        """
        count = len(keys)
        nothing = [False] * count
        if not count or not self.ready or self.owes_clear:
            return nothing
        if self.guard.saturated or self.guard.is_full("load"):
            return nothing
        backend, prefix = self.backend, self._prefix_lookup
        if leading and prefix is not None:
            counting = prefix

            async def hits() -> list[bool]:
                found = await counting.count_leading_hits(keys)
                if not _is_count(found) or not 0 <= found <= count:
                    raise self._nonsense("count_leading_hits", count, found)
                return [True] * found + nothing[found:]
        else:

            async def hits() -> list[bool]:
                found = await backend.contains(keys)
                return self._checked("contains", found, count, lambda hit: isinstance(hit, bool))

        answer = await self.guard.call("contains", hits, deadline_s=self._deadline(deadline_s))
        found = nothing if answer.value is None else answer.value
        if self.owes_clear:  # since it was asked
            return nothing
        if self._refused or self._damage:
            now = self._clock()
            found = [
                hit and self._refused.get(key, now) <= now and key not in self._damage
                for key, hit in zip(keys, found, strict=True)
            ]
        return found

    async def load(
        self,
        keys: Sequence[ChunkKey],
        into: Sequence[memoryview],
        deadline_s: float | None = None,
    ) -> LoadAnswer:
        """Read stored values into buffers. What can't be had until the deadline is a `MISS`."""
        sizes = [MISS] * len(keys)
        capabilities = self._capabilities
        if capabilities is None or self.owes_clear:
            self._failed_loads(len(keys), "not_open" if capabilities is None else "clear_owed")
            return LoadAnswer(sizes)
        backend, deadline_s = self.backend, self._deadline(deadline_s)

        async def batch(start: int, stop: int) -> asyncio.Task[Any] | None:
            names, buffers = keys[start:stop], into[start:stop]

            async def read() -> list[int]:
                found = await backend.load(names, buffers)
                return self._checked("load", found, len(names), _is_size)

            answer = await self.guard.call(
                "load",
                read,
                deadline_s=deadline_s,
                owns_buffers=True,
                nbytes=sum(buffer.nbytes for buffer in buffers),
            )
            if answer.value is None:
                self._failed_loads(stop - start, _reason(answer.error))
                return answer.unsettled
            for position, (size, buffer) in enumerate(zip(answer.value, buffers, strict=True)):
                if size > buffer.nbytes:
                    self._failed_loads(1, "too_large")
                elif size == MISS:
                    self._failed_loads(1, "miss")
                else:
                    sizes[start + position] = size
            return None

        lengths = [buffer.nbytes for buffer in into]
        unsettled, hanging = await self._in_batches(batch, lengths, capabilities.preferred_batch)
        return LoadAnswer(sizes, unsettled, hanging)

    async def store(
        self,
        keys: Sequence[ChunkKey],
        sources: Sequence[memoryview],
        deadline_s: float | None = None,
        *,
        clears: int | None = None,
    ) -> StoreAnswer:
        """Write values. What isn't acknowledged until the deadline is ``NOT_ADMITTED``.

        ``clears``: what `clears` was when they were to be kept; they aren't where it has grown.
        """
        outcomes = [StoreOutcome.NOT_ADMITTED] * len(keys)
        deadline_s = self._deadline(deadline_s)
        if self._damage:  # or a new value would be deleted
            until = asyncio.get_running_loop().time() + deadline_s
            await self._damage.over(keys, deadline_s)
            deadline_s = until - asyncio.get_running_loop().time()
        capabilities, asked = self._capabilities, self.clears
        if capabilities is None:
            self._dropped(len(keys), "not_open")
            return StoreAnswer(outcomes)
        if self.owes_clear or clears not in (None, asked):
            self._dropped(len(keys), "clear_owed" if self.owes_clear else "cleared")
            return StoreAnswer(outcomes)
        backend = self.backend
        offered = self._worth_offering(keys, sources, capabilities)

        async def batch(start: int, stop: int) -> asyncio.Task[Any] | None:
            positions = offered[start:stop]
            names = [keys[i] for i in positions]
            values = [sources[i] for i in positions]
            if self.clears != asked:
                self._dropped(len(names), "cleared")
                return None
            running = over = False

            async def write() -> list[StoreOutcome]:
                nonlocal running
                running = True
                try:
                    done = await backend.store(names, values)
                finally:
                    running = False
                    if over:  # nobody waited for the end
                        self._stored(names)
                return self._checked("store", done, len(names), _is_outcome)

            self._storing.update(names)
            try:
                answer = await self.guard.call(
                    "store",
                    write,
                    deadline_s=deadline_s,
                    owns_buffers=True,
                    nbytes=sum(value.nbytes for value in values),
                )
            finally:
                over = True
                if not running:
                    self._stored(names)
            if answer.value is None:
                self._dropped(len(names), _reason(answer.error))
                return answer.unsettled
            for i, outcome in zip(positions, answer.value, strict=True):
                outcomes[i] = outcome
                if outcome is StoreOutcome.NOT_ADMITTED:
                    self._dropped(1, "not_admitted")
                elif outcome is StoreOutcome.STORED:
                    self._counters.add("tier_store_chunks", tier=self.name)
                    self._counters.add("tier_store_bytes", sources[i].nbytes, tier=self.name)
            return None

        lengths = [sources[i].nbytes for i in offered]
        unsettled, hanging = await self._in_batches(batch, lengths, capabilities.preferred_batch)
        return StoreAnswer(outcomes, unsettled, {offered[i]: task for i, task in hanging.items()})

    async def delete(self, keys: Sequence[ChunkKey], deadline_s: float | None = None) -> int | None:
        """Forget ``keys``; answer how many were there, or ``None`` where that can't be done."""
        backend = self.backend
        if not keys or not self.ready or not isinstance(backend, SupportsDelete):
            return None if keys else 0
        answer = await self._counted("delete", lambda: backend.delete(keys), deadline_s)
        return answer.value

    def damaged(self, keys: Iterable[ChunkKey]) -> None:
        """Delete these in the background: it is proven that they are damaged.

        They are absent from now on. What can't be deleted, or is too much to remember, is refused
        for now (`refuse`), and found again when it is loaded then.
        """
        self._damage.add(keys)

    def hide(self) -> None:
        """Offer nothing and store nothing until `clear` has cleared it. On any thread."""
        self._clearing.asked()

    async def clear(self, deadline_s: float | None = None) -> int | None:
        """Forget everything; answer how many chunks, or ``None``: that couldn't be done.

        Then `uncleared` says why, and `owes_clear` whether it is worth another try. What was to be
        written before isn't afterwards: a store that is under way ends first.
        """
        self.hide()
        return await self.clear_again(deadline_s)

    async def clear_again(self, deadline_s: float | None = None) -> int | None:
        """Try once more to do what `clear` couldn't do."""
        asked = self.clears
        until = asyncio.get_running_loop().time() + self._deadline(deadline_s)
        backend = self.backend
        if not self.ready:
            self._clearing.failed("it isn't open")
            return None
        if not isinstance(backend, SupportsClear):
            self._clearing.failed("its backend can't be cleared", for_good=True)
            return None
        if self._storing:
            over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._stores_over.append(over)
            await asyncio.wait([over], timeout=self._deadline(deadline_s))
            if self._storing:
                self._clearing.failed("a store doesn't end")
                return None
        left_s = until - asyncio.get_running_loop().time()
        answer = await self._counted("clear", backend.clear, left_s)
        if answer.value is None:
            refused = isinstance(answer.error, BackendRejected)
            self._clearing.failed(str(answer.error), for_good=refused)
            return None
        self._clearing.done(asked)
        return answer.value

    def refuse(self, keys: Iterable[ChunkKey]) -> None:
        """Take these for absent, for `REFUSED_S`: values are there, but not for us.

        Deleting them would be wrong, since others may read them; and offering them would cost a
        load each time.
        """
        until = self._clock() + REFUSED_S
        for key in keys:
            self._refused.pop(key, None)
            self._refused[key] = until
        while len(self._refused) > MAX_REFUSED:
            del self._refused[next(iter(self._refused))]

    def serde_failed(self, operation: str, error: BaseException | None) -> None:
        """Count a call of the serde that raised, and say so quietly. On any thread."""
        self._counters.add("plugin_failures", kind="serde", operation=operation, tier=self.name)
        self.guard.log(f"serde {operation}", error or BackendError("no answer"))

    def usage(self) -> tuple[int, int] | None:
        """Chunks and bytes that the backend holds; ``None`` where it doesn't say."""
        backend = self.backend
        if not self.ready or not isinstance(backend, ReportsUsage):
            return None
        return self.guard.now("usage", backend.usage).value

    # -- inside ----------------------------------------------------------------------------

    def _deadline(self, deadline_s: float | None) -> float:
        return self.deadline_s if deadline_s is None else deadline_s

    async def _in_batches(
        self,
        batch: Callable[[int, int], Awaitable[asyncio.Task[Any] | None]],
        lengths: Sequence[int],
        size: int,
    ) -> tuple[asyncio.Task[Any] | None, dict[int, asyncio.Task[Any]]]:
        """Run all; answer what hasn't settled: as one task, and by position."""
        room = self.guard.max_bytes
        ranges = _batches(lengths, max(1, size), None if room is None else room // _CALLS)
        tasks = await asyncio.gather(*(batch(*positions) for positions in ranges))
        hanging = {
            position: task
            for positions, task in zip(ranges, tasks, strict=True)
            if task is not None
            for position in range(*positions)
        }
        left = [task for task in tasks if task]
        if len(left) < 2:
            return (left[0] if left else None), hanging

        async def all_settled() -> None:
            await asyncio.wait(left)

        return asyncio.get_running_loop().create_task(all_settled()), hanging

    def _worth_offering(
        self,
        keys: Sequence[ChunkKey],
        sources: Sequence[memoryview],
        capabilities: BackendCapabilities,
    ) -> list[int]:
        """Positions of what the backend is asked to store."""
        limit, offered = capabilities.max_chunk_bytes, []
        for i, (key, source) in enumerate(zip(keys, sources, strict=True)):
            if limit is not None and source.nbytes > limit:
                self._dropped(1, "too_large")
            elif key in self._storing or key in self._damage:
                # Promised to backends: never one key twice at a time.
                self._dropped(1, "under_way")
            else:
                offered.append(i)
        return offered

    async def _counted(
        self, operation: str, make: Callable[[], Awaitable[int]], deadline_s: float | None
    ) -> Answer[int]:
        async def counted() -> int:
            found = await make()
            if not _is_count(found):
                raise self._nonsense(operation, 1, found)
            return found

        return await self.guard.call(operation, counted, deadline_s=self._deadline(deadline_s))

    def _stored(self, keys: Iterable[ChunkKey]) -> None:
        """These stores are over."""
        self._storing.difference_update(keys)
        if not self._storing:
            over, self._stores_over = self._stores_over, []
            for one in over:
                if not one.done():
                    one.set_result(None)

    def _checked(
        self, operation: str, found: list[Any], count: int, good: Callable[[Any], bool]
    ) -> list[Any]:
        """``found``, if it is what the contract says."""
        if not isinstance(found, (list, tuple)) or len(found) != count:
            raise self._nonsense(operation, count, found)
        if not all(map(good, found)):
            raise self._nonsense(operation, count, next(one for one in found if not good(one)))
        return list(found)

    def _nonsense(self, operation: str, count: int, found: object) -> BackendError:
        plugin = f"{type(self.backend).__module__}.{type(self.backend).__qualname__}"
        shown = f"{len(found)} answers" if isinstance(found, (list, tuple)) else repr(found)
        return BackendError(
            f"{self.name}: {plugin} answered {operation} for {count} keys with {shown[:80]}, which "
            "isn't what the storage contract says; this is a mistake in the plugin"
        )

    def _failed_loads(self, count: int, reason: str) -> None:
        if count:
            self._counters.add("load_failures", count, tier=self.name, reason=reason)

    def _dropped(self, count: int, reason: str) -> None:
        if count:
            self._counters.add("store_dropped", count, tier=self.name, reason=reason)


def _batches(lengths: Sequence[int], size: int, max_bytes: int | None) -> list[tuple[int, int]]:
    """Positions from and to: ``size`` values each at most, and ``max_bytes`` or a single value."""
    count = len(lengths)
    if max_bytes is None or sum(lengths) <= max_bytes:
        return [(start, min(start + size, count)) for start in range(0, count, size)]
    ranges = []
    start, nbytes = 0, 0
    for position, length in enumerate(lengths):
        if position > start and (position - start == size or nbytes + length > max_bytes):
            ranges.append((start, position))
            start, nbytes = position, 0
        nbytes += length
    ranges.append((start, count))
    return ranges


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_size(value: object) -> bool:
    return value == MISS or _is_count(value)


def _is_outcome(value: object) -> bool:
    return isinstance(value, StoreOutcome)


def _reason(error: BaseException | None) -> str:
    return "failed" if error is None else failure_kind(error)
