"""What was cleared isn't found again, whatever its tier did meanwhile."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from pathlib import Path

import pytest
from mover_rig import CHUNK, WAIT_S, Rig, content, counted, eventually, loaded

from lmcache_core import Cache
from lmcache_core.aio.guard import Guard
from lmcache_core.aio.io_loop import IOLoop
from lmcache_core.errors import BackendRejected, BackendUnavailable
from lmcache_core.tiers.tiers import CLEAR_AGAIN_S, Tiers


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(tmp_path, monkeypatch)


def opened(rig: Rig, *tiers: str, again_after_s: float = WAIT_S) -> Cache:
    cache = rig.open(*tiers)
    assert cache._running.tiers is not None
    cache._running.tiers._again_after_s = again_after_s
    return cache


async def away() -> None:
    raise BackendUnavailable("nobody answers")


def stored(cache: Cache, seed: int) -> tuple[list[int], bytearray]:
    tokens, kv = content(2, seed)
    assert cache.store(tokens, kv) == 2 * CHUNK
    assert cache.flush(WAIT_S)
    return tokens, kv


def test_a_tier_that_was_away_is_hidden_and_then_cleared(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = rig.stores["one"], rig.stores["two"]
    with opened(rig, "one", "two", again_after_s=0.01) as cache:
        tokens, _ = stored(cache, 1)
        one.before["clear"] = away
        cache.clear()
        assert list(cache.uncleared) == ["one"]
        assert "nobody answers" in cache.uncleared["one"]
        assert counted(cache, "clear_owed") == {("one",): 1}
        assert len(one.values) == 2
        assert not two.values
        assert cache.lookup(tokens) == 0
        assert loaded(cache, tokens)[0] == 0
        stored(cache, 2)
        assert len(one.values) == len(two.values) == 2, "the other tier goes on"
        assert counted(cache, "store_dropped") == {("clear_owed", "one"): 2}
        assert cache.lookup(tokens) == 0
        one.before.clear()
        eventually(lambda: not cache.uncleared)
        assert not one.values
        assert counted(cache, "clear_owed") == {("one",): 0}
        tokens, kv = stored(cache, 3)
        assert len(one.values) == 2
        assert loaded(cache, tokens) == (2 * CHUNK, kv)
    lines = [record.getMessage() for record in caplog.records]
    assert sum("one couldn't be cleared: one: " in line for line in lines) <= 1
    assert sum("one couldn't be cleared" in line for line in lines) == 1


def test_a_clear_that_hangs_hides_the_tier(rig: Rig) -> None:
    async def hang() -> None:
        await asyncio.Event().wait()

    with opened(rig, "one", "two") as cache:
        tokens, _ = stored(cache, 1)
        rig.stores["one"].before["clear"] = hang
        cache.clear(0.05)
        assert list(cache.uncleared) == ["one"]
        assert cache.lookup(tokens) == 0
        assert not rig.stores["two"].values


def test_what_was_to_be_written_is_not_written_after_a_clear(rig: Rig) -> None:
    go_on, encoding = threading.Event(), threading.Event()

    def slow() -> None:
        encoding.set()
        assert go_on.wait(WAIT_S)

    rig.serdes["odd"].on_encode = slow
    with opened(rig, "one:odd") as cache:
        tokens, kv = content(2, 1)
        cache.store(tokens, kv)
        assert encoding.wait(WAIT_S)
        cache.clear()
        assert cache.uncleared == {}
        go_on.set()
        assert cache.flush(WAIT_S)
        assert not rig.stores["one"].values
        assert counted(cache, "store_dropped") == {("cleared", "one"): 2}
        tokens, kv = stored(cache, 2)
        assert loaded(cache, tokens) == (2 * CHUNK, kv)


def test_a_store_that_is_under_way_ends_before_the_tier_is_cleared(rig: Rig) -> None:
    one, release, begun = rig.stores["one"], asyncio.Event(), threading.Event()

    async def slow() -> None:
        begun.set()
        await release.wait()

    with opened(rig, "one", again_after_s=0.01) as cache:
        assert cache._running.loop is not None
        one.before["store"] = slow
        tokens, kv = content(2, 1)
        cache.store(tokens, kv)
        assert begun.wait(WAIT_S)
        cache.clear(0.05)
        assert list(cache.uncleared) == ["one"]
        assert "clear" not in one.calls
        one.before.clear()
        cache._running.loop.call_soon(release.set)
        eventually(lambda: not cache.uncleared)
        assert not one.values
        assert cache.lookup(tokens) == 0


def test_what_can_never_be_cleared_is_said(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    async def refused() -> None:
        raise BackendRejected("this user may not clear")

    with opened(rig, "one", "two") as cache:
        tokens, kv = stored(cache, 1)
        rig.stores["one"].before["clear"] = refused
        cache.clear()
        assert "may not clear" in cache.uncleared["one"]
        assert "may not clear; what is in it stays" in caplog.text
        assert counted(cache, "clear_owed") == {}
        assert loaded(cache, tokens) == (2 * CHUNK, kv), "it goes on as it was"
        stored(cache, 2)
        del rig.stores["one"].before["clear"]
        cache.clear()
        assert cache.uncleared == {}
        assert cache.lookup(tokens) == 0


def test_clearing_again_after_it_was_cleared_owes_nothing(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with opened(rig, "one", again_after_s=0.01) as cache:
        for seed in range(3):
            stored(cache, seed)
            cache.clear()
            assert cache.uncleared == {}
            assert not rig.stores["one"].values
        assert counted(cache, "clear_owed") == {}
    assert "cleared" not in caplog.text


def test_what_failed_once_is_used_again_within_15_seconds_of_an_outage() -> None:
    """Its breaker stays open for so long; after that, two tries may be needed."""
    cooldown = inspect.signature(Guard).parameters["breaker_cooldown_s"].default
    assert cooldown + 2 * CLEAR_AGAIN_S < 15
    loop = IOLoop("test")
    assert Tiers([], loop)._again_after_s == CLEAR_AGAIN_S
    loop.close(WAIT_S)
