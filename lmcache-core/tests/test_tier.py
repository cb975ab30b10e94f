"""One tier: whatever its backend does, the answer is a miss or the truth."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from lmcache_core.aio.guard import BreakerState, Guard
from lmcache_core.aio.io_loop import IOLoop
from lmcache_core.builtin.raw import RawSerde
from lmcache_core.chunks.keys import CacheNamespace, ChunkKey
from lmcache_core.chunks.layout import DType, KVLayout, full_attention
from lmcache_core.contracts.storage import (
    MISS,
    BackendCapabilities,
    BackendContext,
    BlockingBackend,
    StorageBackend,
    StoreOutcome,
)
from lmcache_core.errors import BackendUnavailable
from lmcache_core.metrics import Counters
from lmcache_core.tiers.damage import MAX_DAMAGED
from lmcache_core.tiers.tier import Tier

LONG_S = 30.0
SHORT_S = 0.01
STORED, PRESENT, REFUSED = (
    StoreOutcome.STORED,
    StoreOutcome.ALREADY_PRESENT,
    StoreOutcome.NOT_ADMITTED,
)


def key(number: int) -> ChunkKey:
    return ChunkKey(number.to_bytes(16, "little"))


class Fake(StorageBackend):
    """Keeps values in a dict. ``faults[operation]`` is awaited instead of the real thing."""

    def __init__(self, **capabilities: Any) -> None:
        self.values: dict[bytes, bytes] = {}
        self.faults: dict[str, Callable[..., Any]] = {}
        self.calls: list[tuple[str, int]] = []
        self._capabilities = BackendCapabilities(shared=False, persistent=False, **capabilities)

    @property
    def capabilities(self) -> BackendCapabilities:
        return self._capabilities

    async def open(self, context: BackendContext) -> None:
        pass

    async def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        return await self._do("contains", keys, lambda: [k in self.values for k in keys])

    async def load(self, keys: Sequence[ChunkKey], into: Sequence[memoryview]) -> list[int]:
        return await self._do("load", keys, lambda: list(map(self._read, keys, into)))

    async def store(
        self, keys: Sequence[ChunkKey], sources: Sequence[memoryview]
    ) -> list[StoreOutcome]:
        return await self._do("store", keys, lambda: list(map(self._write, keys, sources)))

    async def close(self) -> None:
        pass

    async def _do(self, operation: str, keys: Sequence[ChunkKey], real: Callable[[], Any]) -> Any:
        self.calls.append((operation, len(keys)))
        fault = self.faults.get(operation)
        return real() if fault is None else await fault(keys)

    def _read(self, name: ChunkKey, buffer: memoryview) -> int:
        value = self.values.get(name)
        if value is None or len(value) > buffer.nbytes:
            return MISS
        buffer[: len(value)] = value
        return len(value)

    def _write(self, name: ChunkKey, source: memoryview) -> StoreOutcome:
        if name in self.values:
            return PRESENT
        self.values[name] = bytes(source)
        return STORED


class Able(Fake):
    """Has every optional method."""

    async def count_leading_hits(self, keys: Sequence[ChunkKey]) -> int:
        def count() -> int:
            hits = [k in self.values for k in keys]
            return [*hits, False].index(False)

        return await self._do("count_leading_hits", keys, count)

    async def delete(self, keys: Sequence[ChunkKey]) -> int:
        return await self._do(
            "delete", keys, lambda: sum(self.values.pop(k, None) is not None for k in keys)
        )

    async def clear(self) -> int:
        return await self._do("clear", [], lambda: len(self.values))

    def usage(self) -> tuple[int, int]:
        if "usage" in self.faults:
            raise RuntimeError("no idea")
        return len(self.values), sum(map(len, self.values.values()))


class Rig:
    def __init__(self, backend: Fake, *, is_open: bool = True, **guard: Any) -> None:
        self.backend = backend
        self.counters = Counters()
        guard = {"deadline_s": LONG_S, "retries": 0, **guard}
        self.tier = Tier(
            "disk",
            backend,
            RawSerde(),
            guard=Guard("disk", counters=self.counters, **guard),
            counters=self.counters,
            deadline_s=LONG_S,
        )
        if is_open:
            self.tier.opened(backend, backend.capabilities)

    def count(self, name: str, **labels: str) -> float:
        labels = {"tier": "disk", **labels}
        return self.counters.snapshot().get((name, tuple(sorted(labels.items()))), 0)


def raising(error: BaseException) -> Callable[..., Coroutine[Any, Any, Any]]:
    async def fault(keys: Sequence[ChunkKey]) -> Any:
        raise error

    return fault


def answering(value: Any) -> Callable[..., Coroutine[Any, Any, Any]]:
    async def fault(keys: Sequence[ChunkKey]) -> Any:
        return value

    return fault


def buffers(count: int, nbytes: int = 8) -> list[memoryview]:
    return [memoryview(bytearray(nbytes)) for _ in range(count)]


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


# -- the good case -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Fake, Able])
def test_what_was_stored_is_there_and_comes_back(kind: type[Fake]) -> None:
    async def test() -> None:
        rig = Rig(kind())
        keys = [key(i) for i in range(3)]
        answer = await rig.tier.store(keys[:2], [memoryview(b"one"), memoryview(b"three")])
        assert answer.outcomes == [STORED, STORED]
        assert (rig.count("tier_store_chunks"), rig.count("tier_store_bytes")) == (2, 8)
        assert (await rig.tier.store(keys[:1], [memoryview(b"one")])).outcomes == [PRESENT]
        assert rig.count("tier_store_chunks") == 2
        assert await rig.tier.contains(keys) == [True, True, False]
        into = buffers(3)
        loaded = await rig.tier.load(keys, into)
        assert (loaded.sizes, loaded.unsettled) == ([3, 5, MISS], None)
        assert [bytes(into[0][:3]), bytes(into[1][:5])] == [b"one", b"three"]
        assert rig.count("load_failures", reason="miss") == 1

    run(test)


def test_nothing_asked_is_nothing_called() -> None:
    async def test() -> None:
        rig = Rig(Able())
        assert await rig.tier.contains([]) == []
        assert (await rig.tier.load([], [])).sizes == []
        assert (await rig.tier.store([], [])).outcomes == []
        assert await rig.tier.delete([]) == 0
        assert rig.backend.calls == []

    run(test)


def test_values_go_in_batches_and_presence_in_one_call() -> None:
    async def test() -> None:
        rig = Rig(Fake(preferred_batch=4))
        keys = [key(i) for i in range(10)]
        values = [memoryview(bytes([i]) * (i + 1)) for i in range(10)]
        assert (await rig.tier.store(keys, values)).outcomes == [STORED] * 10
        assert await rig.tier.contains(keys) == [True] * 10
        into = buffers(10, 16)
        assert (await rig.tier.load(keys, into)).sizes == list(range(1, 11))
        assert [bytes(b[: i + 1]) for i, b in enumerate(into)] == [bytes(v) for v in values]
        assert sorted(rig.backend.calls) == [
            ("contains", 10),
            *[("load", n) for n in (2, 4, 4)],
            *[("store", n) for n in (2, 4, 4)],
        ]

    run(test)


def test_batches_run_at_the_same_time_up_to_the_backends_limit() -> None:
    async def test() -> None:
        rig = Rig(Fake(preferred_batch=1, max_concurrency=2))
        running, most, release = 0, 0, asyncio.Event()

        async def slow(keys: Sequence[ChunkKey]) -> list[int]:
            nonlocal running, most
            running += 1
            most = max(most, running)
            if most == 2:
                release.set()
            await release.wait()
            running -= 1
            return [1]

        rig.backend.faults["load"] = slow
        assert (await rig.tier.load([key(i) for i in range(5)], buffers(5))).sizes == [1] * 5
        assert most == 2

    run(test)


def test_leading_hits_are_counted_where_that_is_offered() -> None:
    async def test() -> None:
        rig = Rig(Able())
        keys = [key(i) for i in range(3)]
        rig.backend.values = {keys[0]: b"", keys[2]: b""}
        assert await rig.tier.contains(keys) == [True, False, False]
        assert await rig.tier.contains(keys, leading=False) == [True, False, True]
        assert rig.backend.calls == [("count_leading_hits", 3), ("contains", 3)]

    run(test)


def test_optional_methods() -> None:
    async def test() -> None:
        able, plain = Rig(Able()), Rig(Fake())
        able.backend.values = {key(1): b"ab", key(2): b"c"}
        assert able.tier.usage() == (2, 3)
        assert await able.tier.delete([key(1), key(5)]) == 1
        assert await able.tier.clear() == 1
        assert plain.tier.usage() is None
        assert await plain.tier.delete([key(1)]) is None
        assert await plain.tier.clear() is None
        able.backend.faults = {
            "delete": raising(BackendUnavailable("gone")),
            "clear": answering("all"),
            "usage": answering(None),
        }
        assert await able.tier.delete([key(2)]) is None
        assert await able.tier.clear() is None
        assert able.tier.usage() is None

    run(test)


# -- faults --------------------------------------------------------------------------------


def test_a_tier_that_is_not_open_misses_everything_and_calls_nothing() -> None:
    async def test() -> None:
        rig = Rig(Able(), is_open=False)
        assert not rig.tier.ready
        assert await rig.tier.contains([key(1)]) == [False]
        assert (await rig.tier.load([key(1)], buffers(1))).sizes == [MISS]
        assert (await rig.tier.store([key(1)], buffers(1))).outcomes == [REFUSED]
        assert await rig.tier.clear() is None
        assert rig.tier.usage() is None
        assert rig.backend.calls == []
        assert rig.count("load_failures", reason="not_open") == 1
        assert rig.count("store_dropped", reason="not_open") == 1

    run(test)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (raising(BackendUnavailable("gone")), "unavailable"),
        (raising(ZeroDivisionError()), "exception"),
        (answering(None), "failed"),
        (answering([]), "failed"),
        (answering([1, 1, 1]), "failed"),
        (answering("ab"), "failed"),
        (answering([1, "x"]), "failed"),
        (answering([-7, 1.0]), "failed"),
    ],
)
def test_failures_and_nonsense_are_misses(
    fault: Callable[..., Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        rig = Rig(Able())
        for operation in ("contains", "count_leading_hits", "load", "store"):
            rig.backend.faults[operation] = fault
        keys = [key(1), key(2)]
        assert await rig.tier.contains(keys) == [False, False]
        assert await rig.tier.contains(keys, leading=False) == [False, False]
        assert (await rig.tier.load(keys, buffers(2))).sizes == [MISS, MISS]
        assert (await rig.tier.store(keys, buffers(2))).outcomes == [REFUSED, REFUSED]
        assert rig.count("load_failures", reason=reason) == 2
        assert rig.count("store_dropped", reason=reason) == 2
        assert rig.tier.guard._failures == 4

    run(test)
    if reason == "failed":
        assert f"{Able.__module__}.Able answered load for 2 keys" in caplog.text


@pytest.mark.parametrize("count", [-1, 3, True, 1.0, None])
def test_a_nonsensical_number_of_leading_hits_is_a_miss(count: object) -> None:
    async def test() -> None:
        rig = Rig(Able())
        rig.backend.faults["count_leading_hits"] = answering(count)
        assert await rig.tier.contains([key(1), key(2)]) == [False, False]

    run(test)


def test_more_bytes_than_the_buffer_has_are_a_miss() -> None:
    async def test() -> None:
        rig = Rig(Fake())
        rig.backend.faults["load"] = answering([9, 8])
        assert (await rig.tier.load([key(1), key(2)], buffers(2, 8))).sizes == [MISS, 8]
        assert rig.count("load_failures", reason="too_large") == 1

    run(test)


def test_one_failed_batch_leaves_the_others_alone() -> None:
    async def test() -> None:
        rig = Rig(Fake(preferred_batch=2))

        async def odd(keys: Sequence[ChunkKey]) -> list[int]:
            if key(2) in keys:
                raise BackendUnavailable("gone")
            return [4] * len(keys)

        rig.backend.faults["load"] = odd
        answer = await rig.tier.load([key(i) for i in range(5)], buffers(5))
        assert answer.sizes == [4, 4, MISS, MISS, 4]

    run(test)


def test_values_that_are_too_long_are_never_offered() -> None:
    async def test() -> None:
        rig = Rig(Fake(max_chunk_bytes=4, preferred_batch=2))
        values = [memoryview(bytes(n)) for n in (4, 5, 3, 6, 1)]
        answer = await rig.tier.store([key(i) for i in range(5)], values)
        assert answer.outcomes == [STORED, REFUSED, STORED, REFUSED, STORED]
        assert set(rig.backend.values) == {key(0), key(2), key(4)}
        assert rig.count("store_dropped", reason="too_large") == 2

    run(test)


def test_what_the_backend_does_not_admit_is_counted() -> None:
    async def test() -> None:
        rig = Rig(Fake())
        rig.backend.faults["store"] = answering([REFUSED])
        assert (await rig.tier.store([key(1)], buffers(1))).outcomes == [REFUSED]
        assert rig.count("store_dropped", reason="not_admitted") == 1

    run(test)


# -- buffers of calls that hang ------------------------------------------------------------


def test_a_hanging_load_is_a_miss_and_says_until_when_the_buffers_are_not_free() -> None:
    async def test() -> None:
        rig = Rig(Fake(preferred_batch=1))
        releases = {key(i): asyncio.Event() for i in range(3)}
        releases[key(1)].set()

        async def hang(keys: Sequence[ChunkKey]) -> list[int]:
            await releases[keys[0]].wait()
            return [5]

        rig.backend.faults["load"] = hang
        answer = await rig.tier.load(list(releases), buffers(3), SHORT_S)
        assert answer.sizes == [MISS, 5, MISS]
        assert rig.count("load_failures", reason="timeout") == 2
        assert answer.unsettled is not None
        releases[key(0)].set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not answer.unsettled.done()  # the other one still hangs
        releases[key(2)].set()
        await asyncio.wait_for(answer.unsettled, LONG_S)
        assert answer.sizes == [MISS, 5, MISS]

    run(test)


def test_a_key_is_not_stored_twice_at_a_time() -> None:
    async def test() -> None:
        rig, release = Rig(Fake()), asyncio.Event()

        async def hang(keys: Sequence[ChunkKey]) -> list[StoreOutcome]:
            await release.wait()
            return [STORED] * len(keys)

        rig.backend.faults["store"] = hang
        first = await rig.tier.store([key(1)], buffers(1), SHORT_S)
        assert first.outcomes == [REFUSED]
        del rig.backend.faults["store"]
        second = await rig.tier.store([key(1), key(2)], buffers(2))
        assert second.outcomes == [REFUSED, STORED]
        assert rig.count("store_dropped", reason="under_way") == 1
        release.set()
        assert first.unsettled is not None
        await asyncio.wait([first.unsettled])
        assert (await rig.tier.store([key(1)], buffers(1))).outcomes == [STORED]

    run(test)


def test_a_refused_store_may_be_tried_again() -> None:
    async def test() -> None:
        rig = Rig(Fake(), breaker_threshold=1, clock=lambda: 0.0)
        rig.backend.faults["store"] = raising(BackendUnavailable("gone"))
        await rig.tier.store([key(1)], buffers(1))
        assert rig.tier.guard.state is BreakerState.OPEN
        await rig.tier.store([key(1)], buffers(1))
        assert rig.count("store_dropped", reason="circuit_open") == 1
        assert rig.count("store_dropped", reason="under_way") == 0

    run(test)


@pytest.mark.parametrize("turns", [1, 2])
def test_a_cancelled_store_blocks_its_keys_only_while_it_goes_on(turns: int) -> None:
    async def test() -> None:
        rig, release = Rig(Fake(max_concurrency=turns)), asyncio.Event()

        async def hang(keys: Sequence[ChunkKey]) -> list[StoreOutcome]:
            await release.wait()
            return [STORED] * len(keys)

        rig.backend.faults["store"] = hang
        first = asyncio.ensure_future(rig.tier.store([key(1)], buffers(1)))
        second = asyncio.ensure_future(rig.tier.store([key(2)], buffers(1)))  # may have no turn
        await asyncio.sleep(0.0)
        await asyncio.sleep(0.0)
        await asyncio.sleep(0.0)
        second.cancel()
        await asyncio.wait([second])
        assert (key(2) in rig.tier._storing) == (turns == 2)
        release.set()
        assert (await first).outcomes == [STORED]
        await asyncio.sleep(0.0)
        assert not rig.tier._storing

    run(test)


def test_a_tier_whose_calls_hang_promises_nothing() -> None:
    async def test() -> None:
        rig, release = Rig(Fake(), breaker_threshold=1, breaker_cooldown_s=0.0), asyncio.Event()
        rig.backend.values[key(1)] = b"x"

        async def hang(keys: Sequence[ChunkKey]) -> None:
            await release.wait()

        rig.backend.faults["load"] = hang
        answer = await rig.tier.load([key(1)], buffers(1), SHORT_S)
        assert await rig.tier.contains([key(1)]) == [False]  # for a load would be refused
        release.set()
        assert answer.unsettled is not None
        await asyncio.wait([answer.unsettled])
        assert await rig.tier.contains([key(1)]) == [True]

    run(test)


# -- damaged values ------------------------------------------------------------------------


async def until(holds: Callable[[], bool]) -> None:
    for _ in range(1000):
        if holds():
            return
        await asyncio.sleep(0)
    raise AssertionError("it didn't become true")


def test_a_damaged_value_is_absent_and_deleted_beside_everything_else() -> None:
    async def test() -> None:
        rig, release = Rig(Able()), asyncio.Event()
        rig.backend.values = {key(i): b"x" for i in range(4)}

        async def slow(keys: Sequence[ChunkKey]) -> int:
            await release.wait()
            return sum(rig.backend.values.pop(k, None) is not None for k in keys)

        rig.backend.faults["delete"] = slow
        rig.tier.damaged([key(1)])
        await until(lambda: ("delete", 1) in rig.backend.calls)
        rig.tier.damaged([key(2)])
        rig.tier.damaged([key(2), key(3)])
        assert await rig.tier.contains([key(0), key(1), key(2)], leading=False) == [
            True,
            False,
            False,
        ]
        assert [call for call in rig.backend.calls if call[0] == "delete"] == [("delete", 1)]
        again = asyncio.ensure_future(rig.tier.store([key(2)], [memoryview(b"good")]))
        other = await rig.tier.store([key(9)], [memoryview(b"good")])
        assert other.outcomes == [STORED], "what isn't deleted doesn't wait"
        release.set()
        assert (await again).outcomes == [STORED]
        assert rig.backend.values == {key(0): b"x", key(2): b"good", key(9): b"good"}
        assert await rig.tier.contains([key(2)]) == [True]
        assert [call for call in rig.backend.calls if call[0] == "delete"][1:] == [("delete", 2)]

    run(test)


def test_a_store_waits_for_a_deletion_within_its_deadline() -> None:
    async def test() -> None:
        rig, release = Rig(Able()), asyncio.Event()

        async def slow(keys: Sequence[ChunkKey]) -> int:
            await release.wait()
            return 0

        rig.backend.faults["delete"] = slow
        rig.tier.damaged([key(1)])
        answer = await rig.tier.store([key(1), key(2)], buffers(2), SHORT_S)
        assert answer.outcomes[0] == REFUSED
        assert rig.count("store_dropped", reason="under_way") == 1
        release.set()
        await until(lambda: not rig.tier._damage)
        assert (await rig.tier.store([key(1)], buffers(1))).outcomes == [STORED]

    run(test)


@pytest.mark.parametrize("able", [True, False])
def test_what_cannot_be_deleted_is_refused(able: bool) -> None:
    async def test() -> None:
        rig = Rig(Able() if able else Fake())
        rig.backend.values = {key(1): b"x"}
        rig.backend.faults["delete"] = raising(BackendUnavailable("gone"))
        rig.tier.damaged([key(1)])
        await until(lambda: not rig.tier._damage)
        assert await rig.tier.contains([key(1)]) == [False]

    run(test)


def test_damage_that_is_too_much_to_remember_is_refused() -> None:
    async def test() -> None:
        rig, release = Rig(Able()), asyncio.Event()

        async def slow(keys: Sequence[ChunkKey]) -> int:
            await release.wait()
            return len(keys)

        rig.backend.faults["delete"] = slow
        many = [key(i) for i in range(MAX_DAMAGED + 5)]
        rig.tier.damaged(many)
        rig.tier.damaged(many)
        assert len(rig.tier._damage) == MAX_DAMAGED
        release.set()
        await until(lambda: not rig.tier._damage)
        rig.backend.values = dict.fromkeys(many, b"x")
        found = await rig.tier.contains(many, leading=False)
        assert found == [True] * MAX_DAMAGED + [False] * 5

    run(test)


def a_context() -> BackendContext:
    attention = full_attention(layers=1, heads=1, head_size=1, dtype=DType.BF16)
    return BackendContext("client", CacheNamespace("m", KVLayout(1, (attention,))), None, 4)


class Raising(BlockingBackend):
    """Loads raise ``error`` while there is one."""

    error: BaseException | None = None
    capabilities = BackendCapabilities(shared=False, persistent=False, max_concurrency=1)

    def close_blocking(self) -> None:
        if self.error is not None:
            raise self.error

    def contains_blocking(self, keys: Sequence[ChunkKey]) -> list[bool]:
        return [True] * len(keys)

    def load_blocking(self, keys: Sequence[ChunkKey], into: Sequence[memoryview]) -> list[int]:
        if self.error is not None:
            raise self.error
        return [buffer.nbytes for buffer in into]

    def store_blocking(
        self, keys: Sequence[ChunkKey], sources: Sequence[memoryview]
    ) -> list[StoreOutcome]:
        return [STORED] * len(keys)


@pytest.mark.parametrize(
    "kind", [StopIteration, SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError]
)
def test_whatever_a_blocking_client_raises_the_call_ends_and_the_tier_lives(
    kind: type[BaseException],
) -> None:
    """``StopIteration`` can't be a future's result: nobody was ever told."""
    counters, loop, backend = Counters(), IOLoop("tier"), Raising()
    guard = Guard("client", deadline_s=LONG_S, retries=0, counters=counters)
    tier = Tier("client", backend, RawSerde(), guard=guard, counters=counters, deadline_s=LONG_S)
    loop.run(backend.open(a_context()), LONG_S)
    tier.opened(backend, backend.capabilities)
    try:
        backend.error = kind("from a client")
        answer = loop.run(tier.load([key(1)], [memoryview(bytearray(4))]), LONG_S)
        assert answer.sizes == [MISS]
        assert answer.unsettled is None
        backend.error = None
        answer = loop.run(tier.load([key(1)], [memoryview(bytearray(4))]), LONG_S)
        assert answer.sizes == [4]
        loop.run(backend.close(), LONG_S)
    finally:
        loop.close(10.0)
    failures = {labels: n for (name, labels), n in counters.snapshot().items() if "errors" in name}
    assert sum(failures.values()) == 1


def test_a_client_that_cannot_be_closed_leaves_no_thread() -> None:
    async def test() -> None:
        backend, before = Raising(), set(threading.enumerate())
        await backend.open(a_context())
        assert await backend.contains([key(1)]) == [True]
        (worker,) = set(threading.enumerate()) - before
        backend.error = OSError("from a client")
        with pytest.raises(OSError, match="from a client"):
            await backend.close()
        worker.join(LONG_S)
        assert not worker.is_alive()

    run(test)
