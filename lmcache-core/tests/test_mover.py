"""What moves between host memory and slow tiers is right or missing, whatever a part of it does."""

from __future__ import annotations

import asyncio
import logging
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict

from lmcache_core import (
    BackendCapabilities,
    Cache,
    DType,
    KVLayout,
    Paged,
    Plugins,
    StorageBackend,
    StorageBackendDescriptor,
    StoreOutcome,
    full_attention,
    hookimpl,
    load_config,
)
from lmcache_core.checksums import checksums
from lmcache_core.connector import BlockSpan
from lmcache_core.errors import FrameError
from lmcache_core.frame import HEADER_BYTES
from lmcache_core.keys import ChunkKey
from lmcache_core.layout import LayerGroup
from lmcache_core.paged import CanonicalBuffer
from lmcache_core.sealing import Chunk, Sealer
from lmcache_core.serde import Serde, SerdeDescriptor
from lmcache_core.storage import MISS, BackendContext

CHUNK = 16
GROUP = full_attention(layers=3, heads=2, head_size=8, dtype=DType.BF16)
LAYOUT = KVLayout(CHUNK, (GROUP,))
SLOT = -(-(HEADER_BYTES + GROUP.chunk_bytes(CHUNK)) // 4096) * 4096
WAIT_S = 30.0


class NoOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Store:
    """What a `Remembers` keeps: outlives caches, shared by them, by namespace."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, ChunkKey], bytes] = {}
        self.deleted: list[ChunkKey] = []
        self.may_store = threading.Event()
        self.may_store.set()


class Remembers(StorageBackend):
    """A backend over a dictionary, that can be held up."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._space = ""

    @property
    def capabilities(self) -> BackendCapabilities:
        return BackendCapabilities(shared=True, persistent=True)

    async def open(self, context: BackendContext) -> None:
        self._space = context.namespace.fingerprint

    async def close(self) -> None:
        pass

    async def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        return [(self._space, key) in self._store.values for key in keys]

    async def load(self, keys: Sequence[ChunkKey], into: Sequence[memoryview]) -> list[int]:
        sizes = []
        for key, buffer in zip(keys, into, strict=True):
            value = self._store.values.get((self._space, key))
            if value is not None and len(value) <= buffer.nbytes:
                buffer[: len(value)] = value
            sizes.append(MISS if value is None else len(value))
        return sizes

    async def store(
        self, keys: Sequence[ChunkKey], sources: Sequence[memoryview]
    ) -> list[StoreOutcome]:
        while not self._store.may_store.is_set():
            await asyncio.sleep(0)
        for key, source in zip(keys, sources, strict=True):
            self._store.values[self._space, key] = bytes(source)
        return [StoreOutcome.STORED] * len(keys)

    async def delete(self, keys: Sequence[ChunkKey]) -> int:
        self._store.deleted += keys
        return sum(self._store.values.pop((self._space, key), None) is not None for key in keys)


class Odd(Serde):
    """Turns every bit over; its calls can be replaced."""

    def __init__(self, wire_id: int = 1234) -> None:
        self._wire_id = wire_id
        self.on_encode: Callable[[], object] = lambda: None
        self.on_decode: Callable[[], object] = lambda: None
        self.on_limit: Callable[[], object] = lambda: None
        self.answers: int | None = None

    @property
    def wire_id(self) -> int:
        return self._wire_id

    def max_encoded_bytes(self, group: LayerGroup, tokens: int) -> int:
        self.on_limit()
        return group.chunk_bytes(tokens)

    def encode(self, chunk: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> int:
        self.on_encode()
        into[: chunk.nbytes] = bytes(chunk).translate(_TURNED)
        return chunk.nbytes if self.answers is None else self.answers

    def decode(self, encoded: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> None:
        self.on_decode()
        into[:] = bytes(encoded).translate(_TURNED)


_TURNED = bytes(255 - i for i in range(256))


def raising(error: BaseException) -> Callable[[], object]:
    def call() -> object:
        raise error

    return call


class Rig:
    """Caches over stores and serdes that a test has in its hands."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stores = {"one": Store(), "two": Store()}
        self.serdes = {"odd": Odd(), "other": Odd(1235)}
        stores, serdes = self.stores, self.serdes

        class Plugged:
            @staticmethod
            @hookimpl
            def lmcache_storage_backends() -> list[StorageBackendDescriptor]:
                return [
                    StorageBackendDescriptor(
                        name=name,
                        summary=name,
                        config=NoOptions,
                        create=lambda _, store=store: Remembers(store),
                    )
                    for name, store in stores.items()
                ]

            @staticmethod
            @hookimpl
            def lmcache_serdes() -> list[SerdeDescriptor]:
                return [
                    SerdeDescriptor(
                        name=name,
                        summary=name,
                        lossless=True,
                        config=NoOptions,
                        create=lambda _, serde=serde: serde,
                    )
                    for name, serde in serdes.items()
                ]

        info = folder / "mover_parts-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mover-parts\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[lmcache.plugins]\nmover_parts = mover_parts\n")
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.setitem(sys.modules, "mover_parts", Plugged)  # type: ignore[arg-type]
        self.plugins = Plugins()

    def open(self, *tiers: str, slots: int = 8, keep: bool = False) -> Cache:
        """A cache with ``tiers``, each ``STORE`` or ``STORE:SERDE``."""
        assignments = [
            f"chunk_size={CHUNK}",
            f"max_local_cpu_size={slots * SLOT / 2**30 + 1e-9}",
            f"local_cpu={str(keep).lower()}",
        ]
        for tier in tiers:
            name, _, serde = tier.partition(":")
            assignments += [
                f"backends.{name}.type={name}",
                f"backends.{name}.serde={serde or 'raw'}",
            ]
        config = load_config(self.plugins, environ={}, assignments=assignments)
        return Cache.open(model="m", layout=LAYOUT, config=config, plugins=self.plugins)


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(tmp_path, monkeypatch)


@contextmanager
def at_rest(cache: Cache, slots: int = 8) -> Iterator[Cache]:
    """``cache``, and afterwards nobody has a slot of it."""
    with cache:
        yield cache
        assert cache.flush(WAIT_S)
        eventually(lambda: cache._mover.leases == 0)
        cache.lookup(prompt(999))  # takes the last report in
        assert cache._planner.pending == 0
        # Every slot can be had: as many chunks go in as there are.
        assert cache.store(*content(slots, 998)) == slots * CHUNK
        assert cache.flush(WAIT_S)


def eventually(holds: Callable[[], bool]) -> None:
    for _ in range(int(WAIT_S * 100)):
        if holds():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it didn't become true")


def prompt(seed: int, chunks: int = 2) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(50000) for _ in range(chunks * CHUNK)]


def content(chunks: int, seed: int) -> tuple[list[int], bytearray]:
    kv = bytearray(random.Random(-seed).randbytes(GROUP.chunk_bytes(chunks * CHUNK)))
    return prompt(seed, chunks), kv


def loaded(cache: Cache, tokens: list[int]) -> tuple[int, bytearray]:
    into = bytearray(GROUP.chunk_bytes(len(tokens)))
    return cache.load(tokens, into), into


def counted(cache: Cache, name: str) -> dict[tuple[str, ...], float]:
    """A counter's series by the values of their labels."""
    found = cache.counters.snapshot()
    return {tuple(v for _, v in labels): n for (one, labels), n in found.items() if one == name}


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
        eventually(lambda: cache._mover.leases == 0)
        cache.lookup(prompt(3))
        assert cache.store(*content(2, 2)) == 2 * CHUNK
        rig.stores["one"].may_store.set()


# -- serdes that fail ----------------------------------------------------------------------

ERRORS = [ValueError("bad"), MemoryError(), SystemExit(1), KeyboardInterrupt(), StopIteration()]


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


def altered(data: memoryview, where: int = 0) -> None:
    data[where] ^= 1


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
        assert len(rig.stores["one"].deleted) == 2  # proven damage


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


class Engine(CanonicalBuffer):
    """A buffer whose answers can be replaced."""

    def __init__(self, kv: bytearray, tokens: int) -> None:
        super().__init__(kv, GROUP, tokens)
        self.sums: Callable[[list[bytes]], object] = lambda sums: sums
        self.positions: Callable[[list[int]], object] = lambda bad: bad

    def gather_checked(  # type: ignore[override]
        self,
        spans: Sequence[BlockSpan],
        into: Sequence[memoryview],
        layers: range | None = None,
    ) -> object:
        return self.sums(super().gather_checked(spans, into, layers))

    def scatter_checked(  # type: ignore[override]
        self,
        sources: Sequence[memoryview],
        spans: Sequence[BlockSpan],
        layers: range | None,
        expected: Sequence[bytes],
    ) -> object:
        return self.positions(super().scatter_checked(sources, spans, layers, expected))


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
