"""A call of the public API has one deadline, however many steps, tiers and tries there are.

The clock stands still unless a test moves it: no test waits for a deadline.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import pytest
from mover_rig import CHUNK, WAIT_S, Clock, Rig, content, eventually, loaded, prompt

from lmcache_core import Cache
from lmcache_core.aio.io_loop import IOLoop

DEADLINE_S = 1000.0
"""Of the cache under test: so long that it never passes on any real clock."""
WITHIN = 1.1


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(tmp_path, monkeypatch)


def opened(rig: Rig, clock: Clock, *tiers: str, lookup_s: float = DEADLINE_S) -> Cache:
    more = [f"blocking_timeout_secs={DEADLINE_S}", f"lookup_timeout_ms={int(1000 * lookup_s)}"]
    return rig.open(*(tiers or ("one",)), slots=64, more=more, clock=clock)


class Waits(threading.Condition):
    """News that come, or that ``hung`` says won't come: then all of the time passes at once."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.hung = False

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        if self.hung:
            self.clock.now += timeout
            return False
        assert super().wait(WAIT_S), "nothing came, though nothing hangs"
        return True


async def for_ever() -> None:
    await asyncio.Event().wait()


# -- looking and loading -------------------------------------------------------------------


def test_a_slow_answer_and_a_hanging_load_share_one_deadline(rig: Rig) -> None:
    clock = Clock()
    with opened(rig, clock) as cache:
        tokens, kv = content(2, 1)
        cache.store(tokens, kv)
        assert cache.flush(WAIT_S)
        news = cache._news = Waits(clock)

        async def slow() -> None:
            clock.now += 0.9 * DEADLINE_S

        async def hanging() -> None:
            news.hung = True
            cache._hear()
            await for_ever()

        rig.stores["one"].before = {"contains": slow, "load": hanging}
        began = clock.now
        assert loaded(cache, tokens)[0] == 0
        assert rig.stores["one"].calls[-2:] == ["contains", "load"]
        assert clock.now - began <= WITHIN * DEADLINE_S


def test_nothing_is_fetched_when_the_deadline_has_passed(rig: Rig) -> None:
    clock = Clock()
    with opened(rig, clock) as cache:
        tokens, kv = content(2, 1)
        cache.store(tokens, kv)
        assert cache.flush(WAIT_S)

        async def late() -> None:
            clock.now += DEADLINE_S

        rig.stores["one"].before = {"contains": late}
        assert loaded(cache, tokens)[0] == 0
        assert "load" not in rig.stores["one"].calls
        assert cache._running.planner.leases == 0


def test_a_lookup_waits_for_its_deadline_alone(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the I/O loop itself is late; and what the tiers say in their time arrives in it."""
    clock = Clock()
    with opened(rig, clock, lookup_s=0.2) as cache:
        asked: list[float] = []
        waited: list[float] = []
        tiers = cache._running.tiers
        assert tiers is not None
        locate, settle = tiers.locate, type(cache._running).settle

        def settles(parts: Any) -> None:
            settle(parts)
            clock.now += 0.1

        def locating(keys: Any, deadline_s: float) -> Any:
            asked.append(deadline_s)
            return locate(keys, deadline_s)

        def late(self: IOLoop, coro: Any, timeout_s: float) -> None:
            coro.close()
            waited.append(timeout_s)
            raise TimeoutError

        monkeypatch.setattr(type(cache._running), "settle", settles)
        monkeypatch.setattr(tiers, "locate", locating)
        monkeypatch.setattr(IOLoop, "run", late)
        assert cache.lookup(prompt(1)) == 0
        monkeypatch.undo()
    assert waited == [pytest.approx(0.1)], "what the call itself took is part of it"
    assert asked == [pytest.approx(0.95 * waited[0])]


# -- prefetching ---------------------------------------------------------------------------


def hanging_prefetches(rig: Rig, clock: Clock, count: int) -> tuple[Cache, list[Future[int]]]:
    """So many of one prefix, once its load hangs."""
    cache = opened(rig, clock)
    tokens, kv = content(2, 1)
    cache.store(tokens, kv)
    assert cache.flush(WAIT_S)
    rig.stores["one"].before = {"load": for_ever}
    futures = [cache.prefetch(tokens) for _ in range(count)]
    eventually(lambda: rig.stores["one"].calls.count("contains") == count)
    eventually(lambda: "load" in rig.stores["one"].calls)
    return cache, futures


def test_prefetches_of_one_hanging_chunk_share_a_fetch_and_a_deadline(rig: Rig) -> None:
    clock = Clock()
    cache, futures = hanging_prefetches(rig, clock, 6)
    with cache:
        assert not any(future.done() for future in futures)
        clock.now += DEADLINE_S
        cache._hear()
        assert [future.result(WAIT_S) for future in futures] == [0] * 6
        assert rig.stores["one"].calls.count("load") == 1
        eventually(lambda: cache._running.planner._holds.out == 0)


def test_a_hanging_prefetch_holds_up_no_other(rig: Rig) -> None:
    cache, _ = hanging_prefetches(rig, Clock(), 3)
    with cache:
        rig.stores["one"].before = {}
        tokens, kv = content(2, 2)
        cache.store(tokens, kv)
        assert cache.flush(WAIT_S)
        assert cache.prefetch(tokens).result(WAIT_S) == 2 * CHUNK


def test_a_cancelled_prefetch_gives_its_leases_back(rig: Rig) -> None:
    cache, (one, other) = hanging_prefetches(rig, Clock(), 2)
    with cache:
        eventually(lambda: cache._running.planner._holds.out == 2)
        assert one.cancel()
        cache._hear()
        eventually(lambda: cache._running.planner._holds.out == 1)
        with pytest.raises(CancelledError):
            one.result(WAIT_S)
        assert not other.done()


def test_what_is_told_of_a_prefetch_may_raise(rig: Rig) -> None:
    """Whoever asked to be told ends no thread of ours, and may use the cache."""
    clock = Clock()
    cache, (one,) = hanging_prefetches(rig, clock, 1)
    with cache:
        looked: list[int] = []

        def tell(_: Future[int]) -> None:
            looked.append(cache.lookup(prompt(9)))
            raise SystemExit(3)

        one.add_done_callback(tell)
        clock.now += DEADLINE_S
        cache._hear()
        assert one.result(WAIT_S) == 0
        eventually(lambda: looked == [0])
        rig.stores["one"].before = {}
        tokens, kv = content(2, 2)
        cache.store(tokens, kv)
        assert cache.flush(WAIT_S)
        assert cache.prefetch(tokens).result(WAIT_S) == 2 * CHUNK


def test_closing_ends_prefetches_with_what_is_there(rig: Rig) -> None:
    cache, futures = hanging_prefetches(rig, Clock(), 2)
    cache.close()
    assert [future.result(WAIT_S) for future in futures] == [0, 0]
    with pytest.raises(RuntimeError, match="closed"):
        cache.prefetch(prompt(1))


# -- the end -------------------------------------------------------------------------------


Call = Callable[[Cache, float | None], object]
CALLS: dict[str, Call] = {
    "clear": lambda cache, timeout_s: cache.clear(timeout_s),
    "close": lambda cache, timeout_s: cache.close(timeout_s),
}


@pytest.mark.parametrize("timeout_s", [None, 8.0])
@pytest.mark.parametrize("name", CALLS)
def test_the_steps_of_a_call_share_its_deadline(
    rig: Rig, name: str, timeout_s: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes all that it is given."""
    clock = Clock()
    cache = opened(rig, clock)
    taken: list[str] = []

    def takes_all(owner: Any, method: str, answer: object) -> None:
        def step(*args: Any) -> object:
            for arg in args:
                if asyncio.iscoroutine(arg):
                    arg.close()
            taken.append(method)
            clock.now += args[-1]
            return answer

        monkeypatch.setattr(owner, method, step)

    loop = cache._running.loop
    assert loop is not None
    takes_all(cache._running.mover, "flush", False)
    takes_all(loop, "run", 0)
    takes_all(loop, "close", None)
    takes_all(cache._running.mover, "close", None)
    began = clock.now
    CALLS[name](cache, timeout_s)
    steps = {"clear": ["run"], "close": ["flush", "run", "close", "close"]}
    assert taken == steps[name]
    assert clock.now - began <= WITHIN * (timeout_s or DEADLINE_S)
    monkeypatch.undo()
    if name == "close":
        loop.close(WAIT_S)
    cache.close()


def test_closing_a_tier_that_is_opened_again_has_one_deadline(rig: Rig) -> None:
    """What is left of it, not all of it again, is for the backends."""
    cache = opened(rig, Clock())
    asked: list[float] = []
    tiers = cache._running.tiers
    assert tiers is not None
    assert cache._running.loop is not None
    (tier,) = tiers.tiers
    once = tier.guard.once

    async def noting(operation: str, make: Any, *, deadline_s: float) -> Any:
        asked.append(deadline_s)
        return await once(operation, make, deadline_s=deadline_s)

    tier.guard.once = noting  # type: ignore[method-assign,assignment]

    async def begin() -> None:
        tiers._reopening = [asyncio.ensure_future(slow_to_end())]
        await asyncio.sleep(0)

    async def slow_to_end() -> None:
        try:
            await for_ever()
        finally:
            await asyncio.sleep(0)

    cache._running.loop.run(begin(), WAIT_S)
    tiers.close(20.0)
    cache.close()
    assert len(asked) == 1
    assert asked[0] < 20.0
