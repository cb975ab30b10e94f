"""What moves between host memory and slow tiers is right or missing, whatever a part of it does."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mover_rig import (
    CHUNK,
    ERRORS,
    GROUP,
    SLOT,
    WAIT_S,
    Engine,
    Odd,
    Rig,
    altered,
    content,
    counted,
    eventually,
    loaded,
    prompt,
    raising,
)

from lmcache_core import (
    Cache,
    Paged,
)
from lmcache_core.chunks.checksums import checksums
from lmcache_core.chunks.frame import HEADER_BYTES
from lmcache_core.chunks.keys import ChunkKey
from lmcache_core.chunks.layout import LayerGroup
from lmcache_core.errors import FrameError
from lmcache_core.tiers.sealing import Chunk, Sealer


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(tmp_path, monkeypatch)


@contextmanager
def at_rest(cache: Cache, slots: int = 8) -> Iterator[Cache]:
    """``cache``, and afterwards nobody has a slot of it."""
    with cache:
        yield cache
        assert cache.flush(WAIT_S)
        eventually(lambda: cache._running.mover.leases == 0)
        cache.lookup(prompt(999))  # takes the last report in
        assert cache._running.planner.pending == 0
        # Every slot can be had: as many chunks go in as there are.
        assert cache.store(*content(slots, 998)) == slots * CHUNK
        assert cache.flush(WAIT_S)


# -- who has a slot ------------------------------------------------------------------------


def test_a_tier_that_fails_gives_nothing_back_for_another(rig: Rig) -> None:
    """While one tier still encodes, the other's failure doesn't free the slots."""
    go_on, encoding = threading.Event(), threading.Event()

    def slow() -> None:
        encoding.set()
        assert go_on.wait(WAIT_S)

    rig.serdes["odd"].on_encode = slow
    rig.serdes["other"].on_encode = raising(ValueError("no profile for this layer"))
    with at_rest(rig.open("one:odd", "two:other", slots=2), slots=2) as cache:
        first, second = content(2, 1), content(2, 2)
        assert cache.store(*first) == 2 * CHUNK
        assert encoding.wait(WAIT_S)
        eventually(lambda: counted(cache, "plugin_failures") != {})
        assert cache.store(*second) == 0  # there are two slots, and both are being read
        go_on.set()
        assert cache.flush(WAIT_S)
        assert loaded(cache, first[0]) == (2 * CHUNK, first[1])
        assert counted(cache, "plugin_failures") == {("serde", "encode", "two"): 2}
        assert counted(cache, "store_dropped")["encode", "two"] == 2


def test_a_backend_that_still_reads_keeps_the_slots(rig: Rig) -> None:
    rig.stores["one"].may_store.clear()
    rig.serdes["other"].on_encode = raising(ValueError("broken"))
    with at_rest(rig.open("one", "two:other", slots=2), slots=2) as cache:
        first, second = content(2, 1), content(2, 2)
        assert cache.store(*first) == 2 * CHUNK
        eventually(lambda: counted(cache, "plugin_failures") != {})
        assert cache.store(*second) == 0
        rig.stores["one"].may_store.set()
        assert cache.flush(WAIT_S)
        assert loaded(cache, first[0]) == (2 * CHUNK, first[1])


def test_encoded_chunks_need_no_slots_while_they_are_sent(rig: Rig) -> None:
    rig.stores["one"].may_store.clear()
    with at_rest(rig.open("one:odd", slots=2), slots=2) as cache:
        assert cache.store(*content(2, 1)) == 2 * CHUNK
        eventually(lambda: cache._running.mover.leases == 0)
        cache.lookup(prompt(3))
        assert cache.store(*content(2, 2)) == 2 * CHUNK
        rig.stores["one"].may_store.set()


@pytest.mark.parametrize("serde", ["raw", "odd"])
def test_a_store_that_hangs_keeps_a_part_of_host_memory(rig: Rig, serde: str) -> None:
    """Its tier is offered no more than that; host memory and the other tier go on."""

    async def hang() -> None:
        await asyncio.Event().wait()

    rig.stores["one"].before["store"] = hang
    value_bytes = HEADER_BYTES + GROUP.chunk_bytes(CHUNK)
    room = 80 * SLOT // 8  # a quarter of host memory, half of it for each tier
    most = 4 * (room // 4 // value_bytes)  # in four calls
    with rig.open(f"one:{serde}", "two", slots=80, more=["backends.one.deadline_s=0.05"]) as cache:
        stored = 0
        for turn in range(3):
            tokens, kv = content(79, turn)
            new = cache.store(tokens, kv) // CHUNK
            assert new >= 80 - most - 1
            assert cache.flush(WAIT_S)  # what hangs was dropped, and nobody waits for it
            stored += new
        assert counted(cache, "tier_store_chunks") == {("two",): stored}
        dropped = counted(cache, "store_dropped")
        assert dropped["timeout", "one"] == most
        assert dropped["saturated", "one"] == stored - most
        assert cache._running.mover.leases == (most if serde == "raw" else 0)
        assert rig.stores["one"].calls.count("store") == 4


# -- serdes that fail ----------------------------------------------------------------------


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_an_encode_that_raises_is_counted_and_logged(
    rig: Rig, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    odd = rig.serdes["odd"]
    with at_rest(rig.open("one:odd")) as cache:
        odd.on_encode = raising(error)
        assert cache.store(*content(2, 1)) == 2 * CHUNK
        assert cache.flush(WAIT_S)
        assert counted(cache, "plugin_failures") == {("serde", "encode", "one"): 2}
        assert counted(cache, "store_dropped") == {("encode", "one"): 2}
        assert "one: serde encode failed" in caplog.text
        assert not rig.stores["one"].values
        odd.on_encode = lambda: None
        tokens, kv = content(2, 2)
        cache.store(tokens, kv)
        cache.flush(WAIT_S)
        assert loaded(cache, tokens) == (2 * CHUNK, kv)


@pytest.mark.parametrize("answer", [-1, 0, 1 << 40])
def test_an_encode_that_answers_nonsense(rig: Rig, answer: int) -> None:
    rig.serdes["odd"].answers = answer
    with at_rest(rig.open("one:odd")) as cache:
        cache.store(*content(2, 1))
        assert cache.flush(WAIT_S)
        assert counted(cache, "store_dropped") == {("encode", "one"): 2}
        assert not rig.stores["one"].values


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_a_limit_that_raises_in_a_fetch_costs_that_load_only(
    rig: Rig, error: BaseException
) -> None:
    odd = rig.serdes["odd"]
    with at_rest(rig.open("one:odd")) as cache:
        tokens, kv = content(2, 1)
        cache.store(tokens, kv)
        cache.flush(WAIT_S)
        odd.on_limit = raising(error)
        assert loaded(cache, tokens)[0] == 0
        assert counted(cache, "plugin_failures") == {("serde", "max_encoded_bytes", "one"): 2}
        odd.on_limit = lambda: None
        assert loaded(cache, tokens) == (2 * CHUNK, kv)


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_a_decode_that_raises_deletes_nothing(rig: Rig, error: BaseException) -> None:
    """What this serde can't decode may be somebody else's."""
    odd = rig.serdes["odd"]
    with at_rest(rig.open("one:odd")) as cache:
        tokens, kv = content(2, 1)
        cache.store(tokens, kv)
        cache.flush(WAIT_S)
        odd.on_decode = raising(error)
        assert loaded(cache, tokens)[0] == 0
        assert counted(cache, "frame_rejected") == {("decode",): 2}
        assert not rig.stores["one"].deleted
        assert cache.lookup(tokens) == 0  # not offered again and again
    odd.on_decode = lambda: None
    with rig.open("one:odd") as cache:
        assert loaded(cache, tokens) == (2 * CHUNK, kv)


# -- checksums from end to end -------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "while"])
def test_bytes_that_change_in_host_memory_are_never_encoded(
    rig: Rig, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal = Sealer.seal
    odd = rig.serdes["odd"]

    def damaging(self: Sealer, chunk: Chunk, sums: bytes) -> memoryview:
        if when == "before":
            altered(chunk.payload, 40)
        else:
            odd.on_encode = lambda: altered(chunk.payload, 40)
        return seal(self, chunk, sums)

    monkeypatch.setattr(Sealer, "seal", damaging)
    with rig.open("one:odd", keep=True) as cache:
        tokens, kv = content(2, 1)
        cache.store(tokens, kv)
        assert cache.flush(WAIT_S)
        assert counted(cache, "store_dropped") == {("checksum", "one"): 2}
        assert not rig.stores["one"].values
        assert cache.lookup(tokens) == 0  # nor are they offered from host memory


def test_raw_bytes_that_change_in_host_memory_are_refused(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seal = Sealer.seal

    def damaging(self: Sealer, chunk: Chunk, sums: bytes) -> memoryview:
        altered(chunk.payload, 40)
        return seal(self, chunk, sums)

    monkeypatch.setattr(Sealer, "seal", damaging)
    with rig.open("one") as cache:
        tokens, kv = content(2, 1)
        cache.store(tokens, kv)
        cache.flush(WAIT_S)
        assert loaded(cache, tokens)[0] == 0
        assert counted(cache, "frame_rejected") == {("payload",): 2}
        eventually(lambda: len(rig.stores["one"].deleted) == 2)  # proven damage


def test_an_exact_serde_that_decodes_to_something_else() -> None:
    class Wrong(Odd):
        def decode(self, encoded: memoryview, into: memoryview, group: LayerGroup, n: int) -> None:
            super().decode(encoded, into, group, n)
            altered(into, into.nbytes - 1)

    group = GROUP
    slot = memoryview(bytearray(SLOT))
    slot[HEADER_BYTES:] = random.Random(1).randbytes(SLOT - HEADER_BYTES)
    chunk = Chunk(ChunkKey(bytes(16)), slot, group, CHUNK)
    sums = checksums(chunk.payload, len(group.layers))
    fingerprint = "0123456789abcdef"
    for exact in (True, False):
        sealer = Sealer(Wrong(), exact=exact, fingerprint=fingerprint)
        frame = sealer.seal(chunk, sums)
        landing = Chunk(chunk.key, memoryview(bytearray(SLOT)), group, CHUNK)
        if exact:
            with pytest.raises(FrameError, match="other bytes than were stored"):
                sealer.open(frame, landing)
        else:
            assert sealer.open(frame, landing) == checksums(landing.payload, len(group.layers))


def test_a_batch_does_not_wait_until_its_damaged_chunk_is_deleted(rig: Rig) -> None:
    release, store = asyncio.Event(), rig.stores["one"]
    store.before["delete"] = release.wait
    with at_rest(rig.open("one", more=["blocking_timeout_secs=1000"])) as cache:
        tokens, kv = content(3, 1)
        cache.store(tokens, kv)
        assert cache.flush(WAIT_S)
        name = list(store.values)[2]
        store.values[name] = store.values[name][:-1] + b"?"
        assert cache.prefetch(tokens).result(WAIT_S) == 2 * CHUNK
        assert loaded(cache, tokens)[0] == 2 * CHUNK
        assert store.calls.count("delete") == 1
        assert not store.deleted
        assert cache._running.loop is not None
        cache._running.loop.call_soon(release.set)
        eventually(lambda: store.deleted == [name[1]])
        cache.store(tokens, kv)
        assert cache.flush(WAIT_S)
        assert loaded(cache, tokens) == (3 * CHUNK, kv)


# -- places --------------------------------------------------------------------------------


def test_another_serdes_values_are_elsewhere(rig: Rig) -> None:
    """Two instances that share a store, but not the serde, miss and leave the other's alone."""
    with rig.open("one") as raw, rig.open("one:odd") as odd, rig.open("one:other") as other:
        tokens, kv = content(2, 1)
        for turn, cache in enumerate((raw, odd, other)):
            assert cache.lookup(tokens) == 0
            assert loaded(cache, tokens)[0] == 0
            cache.store(tokens, kv)
            cache.flush(WAIT_S)
            assert len(rig.stores["one"].values) == 2 * (turn + 1)
        for cache in (raw, odd, other):
            assert loaded(cache, tokens) == (2 * CHUNK, kv)
        assert not rig.stores["one"].deleted


def test_a_frame_of_another_version_is_left_alone(rig: Rig) -> None:
    store = rig.stores["one"]
    with rig.open("one") as cache:
        tokens, kv = content(2, 1)
        cache.store(tokens, kv)
        cache.flush(WAIT_S)
        for name, value in list(store.values.items()):
            store.values[name] = value[:8] + b"\x63\x00" + value[10:]
        assert loaded(cache, tokens)[0] == 0
        assert counted(cache, "frame_rejected") == {("version",): 2}
        assert not store.deleted
        assert len(store.values) == 2


# -- connectors that fail ------------------------------------------------------------------


BAD_SUMS: dict[str, Callable[[list[bytes]], object]] = {
    "too few": lambda sums: sums[:-1],
    "too many": lambda sums: [*sums, sums[0]],
    "too short": lambda sums: [one[:-1] for one in sums],
    "none": lambda sums: None,
    "numbers": lambda sums: [1] * len(sums),
    "raises": lambda sums: raising(OSError("device lost"))(),
    "exits": lambda sums: raising(SystemExit(3))(),
}


@pytest.mark.parametrize("name", BAD_SUMS)
def test_a_connector_that_gathers_badly_stores_nothing(rig: Rig, name: str) -> None:
    with at_rest(rig.open("one")) as cache:
        tokens, kv = content(2, 1)
        engine = Engine(kv, len(tokens))
        engine.sums = BAD_SUMS[name]
        assert cache.store(tokens, Paged(engine, [0], len(tokens))) == 0
        assert counted(cache, "store_dropped") == {("gather",): 2}
        assert counted(cache, "plugin_failures") == {("connector", "gather", "host"): 1}
        assert cache.store(tokens, kv) == 2 * CHUNK  # nothing is left of the failure


BAD_POSITIONS: dict[str, Callable[[list[int]], object]] = {
    "none": lambda bad: None,
    "beyond": lambda bad: [2],
    "negative": lambda bad: [-1],
    "raises": lambda bad: raising(OSError("device lost"))(),
    "stops": lambda bad: raising(StopIteration())(),
}


@pytest.mark.parametrize("name", BAD_POSITIONS)
def test_a_connector_that_scatters_badly_unlearns_nothing(rig: Rig, name: str) -> None:
    with at_rest(rig.open("one", keep=True)) as cache:
        tokens, kv = content(2, 1)
        cache.store(tokens, kv)
        into = bytearray(len(kv))
        engine = Engine(into, len(tokens))
        engine.positions = BAD_POSITIONS[name]
        assert cache.load(tokens, Paged(engine, [0], len(tokens))) == 0
        assert counted(cache, "plugin_failures") == {("connector", "scatter", "host"): 1}
        assert cache.lookup(tokens) == 2 * CHUNK
        assert loaded(cache, tokens) == (2 * CHUNK, kv)


def test_an_interrupted_gather_reaches_the_user_and_leaves_nothing(rig: Rig) -> None:
    """Ctrl-C while a store copies: in the main thread it is the user's."""
    with at_rest(rig.open("one")) as cache:
        tokens, kv = content(2, 1)
        engine = Engine(kv, len(tokens))
        engine.sums = lambda _: raising(KeyboardInterrupt())()
        with pytest.raises(KeyboardInterrupt):
            cache.store(tokens, Paged(engine, [0], len(tokens)))
        assert cache.store(tokens, kv) == 2 * CHUNK


# -- the end -------------------------------------------------------------------------------


def test_closing_while_a_serde_works(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """Neither a forgotten lease nor an error: what is under way ends, or stays taken."""
    caplog.set_level(logging.ERROR)
    for turn in range(3):
        cache = rig.open("one:odd", "two")
        cache.store(*content(2, turn))
        cache.close()
    assert "forgotten" not in caplog.text
    assert "bug of ours" not in caplog.text
