"""The public API, as an own application uses it, on the real tiers."""

from __future__ import annotations

import gc
import random
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel, ConfigDict

from lmcache_core import (
    Cache,
    ConfigError,
    DType,
    KVLayout,
    Paged,
    Plugins,
    full_attention,
    hookimpl,
    load_config,
)
from lmcache_core.cache.mover import Mover
from lmcache_core.config import Config
from lmcache_core.contracts.connector import EngineConnectorDescriptor
from lmcache_core.contracts.paged import CanonicalBuffer

CHUNK = 16
GROUP = full_attention(layers=3, heads=2, head_size=8, dtype=DType.BF16)
LAYOUT = KVLayout(CHUNK, (GROUP,))


def config(*assignments: str) -> Config:
    return load_config(
        Plugins(),
        environ={},
        assignments=[f"chunk_size={CHUNK}", "max_local_cpu_size=0.01", *assignments],
    )


def tokens(count: int, seed: int = 0) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(50_000) for _ in range(count)]


def kv(count: int, seed: int = 1) -> bytearray:
    return bytearray(random.Random(seed).randbytes(GROUP.chunk_bytes(count)))


def rows(buffer: bytearray, count: int, upto: int) -> list[bytes]:
    """For each layer and plane, the bytes of the first ``upto`` of ``count`` tokens."""
    row = GROUP.layer_token_bytes // 2
    planes = len(GROUP.layers) * 2
    return [bytes(buffer[i * count * row : (i * count + upto) * row]) for i in range(planes)]


@pytest.fixture(params=["memory only", "disk behind", "disk only"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cache]:
    disk = [f"local_disk={tmp_path}"]
    options = {
        "memory only": [],
        "disk behind": disk,
        "disk only": [*disk, "local_cpu=false"],
    }[request.param]
    with Cache.open(model="m", layout=LAYOUT, config=config(*options)) as opened:
        yield opened


def test_load_gives_back_what_was_stored(cache: Cache) -> None:
    prompt, stored = tokens(70), kv(70)
    assert cache.store(prompt, stored) == 64
    cache.flush()
    assert cache.lookup(prompt) == 64
    loaded = bytearray(len(stored))
    assert cache.load(prompt, loaded) == 64
    assert rows(loaded, 70, 64) == rows(stored, 70, 64)


def test_what_lies_beyond_the_hit_is_unchanged(cache: Cache) -> None:
    prompt = tokens(70)
    cache.store(prompt, kv(70))
    cache.flush()
    before = kv(70, seed=9)
    loaded = bytearray(before)
    other = prompt[:40] + tokens(30, seed=5)
    assert cache.load(other, loaded) == 32
    row = GROUP.layer_token_bytes // 2
    for plane in range(6):
        start = (plane * 70 + 32) * row
        assert loaded[start : (plane + 1) * 70 * row] == before[start : (plane + 1) * 70 * row]


def test_a_serde_learns_where_chunks_lie(tmp_path: Path, distribution: Callable[..., str]) -> None:
    """What is encoded, and what the model is; decoding is told nothing of places."""
    module = distribution(
        "toy-serde",
        """
from dataclasses import dataclass
from lmcache_core.builtin.raw import RawSerde

TOLD = []

@dataclass
class Telling(RawSerde):
    facts: object = None
    start: object = None
    in_place = False
    wire_id = 1000

    def bound(self, facts):
        return Telling(facts)

    def for_chunk(self, key, start):
        return Telling(self.facts, start)

    def encode(self, *args):
        TOLD.append((self.facts.weights, self.start))
        return super().encode(*args)

    def decode(self, *args):
        TOLD.append(self.start)
        super().decode(*args)

@hookimpl
def lmcache_serdes():
    return [SerdeDescriptor(name="telling", summary="", lossless=True, config=Options,
                            create=lambda options: Telling())]
""",
    )
    options = config(f"local_disk={tmp_path}", "local_cpu=false", "serde=telling")
    prompt, stored, loaded = tokens(70), kv(70), kv(70, seed=9)
    with Cache.open(model="m", layout=LAYOUT, config=options, weights="w") as cache:
        cache.store(prompt, stored)
        cache.flush()
        told = sys.modules[module].TOLD
        assert told == [("w", start) for start in (0, 16, 32, 48)]
        told.clear()
        assert cache.load(prompt, loaded) == 64
        assert told == [None] * 4
    assert rows(loaded, 70, 64) == rows(stored, 70, 64)


def test_storing_again_stores_only_what_is_new() -> None:
    with Cache.open(model="m", layout=LAYOUT, config=config()) as cache:
        prompt = tokens(96)
        assert cache.store(prompt[:48], kv(48)) == 48
        assert cache.store(prompt, kv(96)) == 48
        assert cache.store(prompt, kv(96)) == 0


def test_an_empty_prompt_is_no_error() -> None:
    nothing = np.zeros((3, 2, 0, 2, 8), dtype=np.uint16)
    with Cache.open(model="m", layout=LAYOUT, config=config()) as cache:
        assert cache.store([], nothing) == cache.load([], nothing) == cache.lookup([]) == 0


def test_a_session_grows_turn_by_turn(cache: Cache) -> None:
    prompt, stored = tokens(70), kv(70)
    session = cache.session(salt="tenant-a")
    session.append(prompt[:40])
    assert cache.store(session, kv(40)) == 32
    session.append(prompt[40:])
    assert len(session) == 70
    cache.flush()
    assert cache.lookup(session) == 32
    assert cache.store(session, stored) >= 32
    cache.flush()
    assert cache.lookup(session) == cache.lookup(prompt, salt="tenant-a") == 64
    assert cache.lookup(prompt) == 0
    loaded = bytearray(len(stored))
    assert cache.load(session, loaded) == 64
    assert rows(loaded, 70, 64)[0][-1:] == rows(stored, 70, 64)[0][-1:]
    with pytest.raises(ValueError, match="a session has its own"):
        cache.lookup(session, salt="tenant-b")


def test_a_session_hashes_each_token_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with Cache.open(model="m", layout=LAYOUT, config=config()) as cache:
        hashed: list[int] = []
        session = cache.session()
        index = session.hasher._index
        monkeypatch.setattr(session.hasher, "_index", _Counting(index, hashed))
        session.append(tokens(320))
        cache.store(session, kv(320))
        assert sum(hashed) == 320
        session.append(tokens(32, seed=7))
        assert cache.lookup(session) == 320
        assert sum(hashed) == 336, "one more chunk, which misses"


class _Counting:
    """An index that notes how many tokens it is asked to digest."""

    def __init__(self, index: object, hashed: list[int]) -> None:
        self._index, self._hashed = index, hashed

    def __getattr__(self, name: str) -> object:
        return getattr(self._index, name)

    def match(self, parent: bytes, fresh: bytes, *rest: object) -> object:
        self._hashed.append(len(fresh) // 4)
        return self._index.match(parent, fresh, *rest)  # type: ignore[attr-defined]

    def digests(self, parent: bytes, fresh: bytes, *rest: object) -> object:
        self._hashed.append(len(fresh) // 4)
        return self._index.digests(parent, fresh, *rest)  # type: ignore[attr-defined]


def test_damaged_host_memory_is_a_miss() -> None:
    with Cache.open(model="m", layout=LAYOUT, config=config()) as cache:
        prompt, stored = tokens(80), kv(80)
        cache.store(prompt, stored)
        slot = cache._running.planner.index.find(cache._keys(prompt, "")[2])
        cache._running.arena.slot(slot)[200] ^= 1
        loaded = bytearray(len(stored))
        assert cache.load(prompt, loaded) == 32
        assert rows(loaded, 80, 32) == rows(stored, 80, 32)
        assert cache.lookup(prompt) == 32, "neither it nor what continues it is offered again"
        assert count(cache, "load_failures", reason="checksum") == 1
        assert cache.store(prompt, stored) == 48
        assert cache.load(prompt, loaded) == 80
        assert loaded == stored
        assert count(cache, "load_tokens") == 32 + 80


def count(cache: Cache, name: str, **labels: str) -> float:
    return sum(
        value
        for (series, found), value in cache.counters.snapshot().items()
        if series == name and labels.items() <= dict(found).items()
    )


def at_once(threads: int, call: Callable[[int], object]) -> list[object]:
    """What ``threads`` threads answer that begin together."""
    start = threading.Barrier(threads)

    def run(number: int) -> object:
        start.wait()
        return call(number)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(run, range(threads)))


def test_what_many_store_at_once_is_copied_once() -> None:
    with Cache.open(model="m", layout=LAYOUT, config=config()) as cache:
        prompt, stored = tokens(320), kv(320)
        answers = at_once(8, lambda _: cache.store(prompt, stored))
        assert sum(answers) == 320  # type: ignore[arg-type]
        assert count(cache, "store_chunks") == 20
        loaded = bytearray(len(stored))
        assert cache.load(prompt, loaded) == 320
        assert count(cache, "load_tokens") == 320
        assert loaded == stored


def test_what_many_load_at_once_is_fetched_once(tmp_path: Path) -> None:
    disk = f"local_disk={tmp_path}"
    with Cache.open(model="m", layout=LAYOUT, config=config(disk)) as cache:
        prompt, stored = tokens(320), kv(320)
        cache.store(prompt, stored)
        cache.flush()
        with cache._news:
            cache._running.settle()
            cache._running.planner.clear()

        def load(_: int) -> bytearray:
            loaded = bytearray(len(stored))
            assert cache.load(prompt, loaded) == 320
            return loaded

        assert all(loaded == stored for loaded in at_once(8, load))
        assert count(cache, "load_chunks", tier="local_disk") == 20


def test_salts_do_not_mix(cache: Cache) -> None:
    prompt = tokens(32)
    cache.store(prompt, kv(32), salt="tenant-a")
    cache.flush()
    assert cache.lookup(prompt, salt="tenant-b") == 0
    assert cache.lookup(prompt) == 0
    assert cache.lookup(prompt, salt="tenant-a") == 32


def test_disk_survives_the_process(tmp_path: Path) -> None:
    prompt, stored = tokens(64), kv(64)
    with Cache.open(model="m", layout=LAYOUT, config=config(f"local_disk={tmp_path}")) as cache:
        cache.store(prompt, stored)
    with Cache.open(model="m", layout=LAYOUT, config=config(f"local_disk={tmp_path}")) as cache:
        loaded = bytearray(len(stored))
        assert cache.load(prompt, loaded) == 64
        assert loaded == stored


@pytest.mark.parametrize("other", [{"model": "n"}, {"rank": 1, "ranks": 2}])
def test_another_model_or_rank_finds_nothing(tmp_path: Path, other: dict[str, object]) -> None:
    prompt = tokens(64)
    options = config(f"local_disk={tmp_path}")
    with Cache.open(model="m", layout=LAYOUT, config=options) as cache:
        cache.store(prompt, kv(64))
    arguments = {"model": "m", **other}
    with Cache.open(layout=LAYOUT, config=options, **arguments) as cache:  # type: ignore[arg-type]
        assert cache.lookup(prompt) == 0


def damage(kind: str, path: Path) -> None:
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "longer":
        path.write_bytes(content + b"x")
    elif kind == "header":
        content[20] ^= 1
        path.write_bytes(content)
    else:
        content[-1] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("kind", ["truncated", "empty", "longer", "header", "payload"])
def test_a_damaged_chunk_file_is_a_miss_and_a_counter(tmp_path: Path, kind: str) -> None:
    prompt, stored = tokens(64), kv(64)
    options = config(f"local_disk={tmp_path}")
    with Cache.open(model="m", layout=LAYOUT, config=options) as cache:
        cache.store(prompt, stored)
    files = sorted(tmp_path.glob("*/??/*"))
    assert len(files) == 4
    for file in files:
        damage(kind, file)
    with Cache.open(model="m", layout=LAYOUT, config=options) as cache:
        loaded = bytearray(len(stored))
        assert cache.load(prompt, loaded) == 0
        assert loaded == bytearray(len(stored))
        failures = {
            dict(labels)["reason"]
            for (name, labels), _ in cache.counters.snapshot().items()
            if name == "load_failures"
        }
        assert failures or cache.lookup(prompt) == 0


@pytest.mark.parametrize("kind", ["truncated", "header", "payload"])
def test_a_damaged_chunk_is_replaced_when_it_is_stored_again(tmp_path: Path, kind: str) -> None:
    prompt, stored = tokens(64), kv(64)
    options = config(f"local_disk={tmp_path}")
    with Cache.open(model="m", layout=LAYOUT, config=options) as cache:
        cache.store(prompt, stored)
    for file in tmp_path.glob("*/??/*"):
        damage(kind, file)
    with Cache.open(model="m", layout=LAYOUT, config=options) as cache:
        assert cache.load(prompt, bytearray(len(stored))) == 0
        cache.store(prompt, stored)
    with Cache.open(model="m", layout=LAYOUT, config=options) as cache:
        assert cache.load(prompt, bytearray(len(stored))) == 64


def test_swapped_chunk_files_are_misses(tmp_path: Path) -> None:
    """A file that holds a valid chunk under another chunk's name."""
    prompt, stored = tokens(32), kv(32)
    options = config(f"local_disk={tmp_path}")
    with Cache.open(model="m", layout=LAYOUT, config=options) as cache:
        cache.store(prompt, stored)
    one, two = sorted(tmp_path.glob("*/??/*"))
    first, second = one.read_bytes(), two.read_bytes()
    with Cache.open(model="m", layout=LAYOUT, config=options) as cache:
        one.write_bytes(second)
        two.write_bytes(first)
        assert cache.load(prompt, bytearray(len(stored))) == 0
        counters = cache.counters.snapshot()
        assert counters[("frame_rejected", (("reason", "key"),))] >= 1


def test_prefetch_brings_a_prefix_into_memory(tmp_path: Path) -> None:
    prompt, stored = tokens(64), kv(64)
    options = config(f"local_disk={tmp_path}")
    with Cache.open(model="m", layout=LAYOUT, config=options) as cache:
        cache.store(prompt, stored)
    with Cache.open(model="m", layout=LAYOUT, config=options) as cache:
        assert cache.prefetch(prompt).result(timeout=30) == 64
        for file in tmp_path.glob("*/??/*"):
            file.unlink()
        loaded = bytearray(len(stored))
        assert cache.load(prompt, loaded) == 64
        assert loaded == stored


def test_pinned_prefixes_are_not_evicted() -> None:
    with Cache.open(model="m", layout=LAYOUT, config=config()) as cache:
        prompt = tokens(64)
        cache.store(prompt, kv(64))
        assert cache.pin(prompt) == 64
        for seed in range(2, 40):
            cache.store(tokens(640, seed), kv(640))
        assert cache.lookup(prompt) == 64
        assert cache.unpin(prompt) == 64
        for seed in range(50, 90):
            cache.store(tokens(640, seed), kv(640))
        assert cache.lookup(prompt) == 0


def test_clear_forgets_everything(cache: Cache) -> None:
    prompt = tokens(64)
    cache.store(prompt, kv(64))
    cache.clear()
    assert cache.lookup(prompt) == 0
    assert cache.load(prompt, kv(64)) == 0


def test_closed_it_gives_its_memory_back(tmp_path: Path) -> None:
    cache = Cache.open(model="m", layout=LAYOUT, config=config(f"local_disk={tmp_path}"))
    cache.store(tokens(64), kv(64))
    cache.prefetch(tokens(64)).result()
    memory = weakref.ref(cache._running.arena)
    cache.close()
    cache.close()
    gc.collect()
    assert memory() is None


CALLS: dict[str, Callable[[Cache], object]] = {
    "lookup": lambda cache: cache.lookup(tokens(64)),
    "store": lambda cache: cache.store(tokens(64), kv(64)),
    "load": lambda cache: cache.load(tokens(64), kv(64)),
    "prefetch": lambda cache: cache.prefetch(tokens(64)),
    "pin": lambda cache: cache.pin(tokens(64)),
    "unpin": lambda cache: cache.unpin(tokens(64)),
    "clear": lambda cache: cache.clear(),
    "uncleared": lambda cache: cache.uncleared,
    "flush": lambda cache: cache.flush(),
    "session": lambda cache: cache.session(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_closed_it_refuses_every_call(cache: Cache, call: Callable[[Cache], object]) -> None:
    cache.close()
    with pytest.raises(RuntimeError, match="the cache is closed"):
        call(cache)


def test_every_call_is_in_the_table() -> None:
    public = {name for name in vars(Cache) if not name.startswith("_")}
    assert public == CALLS.keys() | {"open", "close"}


def test_a_load_that_is_under_way_ends_as_it_would(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt, stored, into = tokens(64), kv(64), bytearray(GROUP.chunk_bytes(64))
    cache = Cache.open(model="m", layout=LAYOUT, config=config())
    cache.store(prompt, stored)
    load = Mover.load

    def closed_first(*args: Any, **options: Any) -> object:
        cache.close()
        return load(*args, **options)

    monkeypatch.setattr(Mover, "load", closed_first)
    assert cache.load(prompt, into) == 64
    assert into == stored


def test_wrong_sizes_are_refused(cache: Cache) -> None:
    with pytest.raises(ValueError, match="C-contiguous buffer of"):
        cache.store(tokens(64), kv(63))
    with pytest.raises(ValueError, match="C-contiguous buffer of"):
        cache.load(tokens(64), kv(65))


def test_a_layout_of_another_chunk_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="chunk_size is 16"):
        Cache.open(model="m", layout=KVLayout(32, (GROUP,)), config=config())


def test_many_threads_and_a_full_arena() -> None:
    """Overlapping prefixes, more of them than fit: whatever loads is right."""
    prompts = [tokens(160, seed) for seed in range(12)]
    for i in range(1, 12):
        prompts[i][: 16 * i] = prompts[0][: 16 * i]
    contents: dict[bytes, bytearray] = {}

    def content(prompt: list[int]) -> bytearray:
        # A token's KV depends on the prefix only, as in a model.
        row, buffer = GROUP.layer_token_bytes // 2, bytearray(GROUP.chunk_bytes(160))
        for plane in range(6):
            for position in range(160):
                dice = random.Random(f"{plane} {prompt[: position + 1]}")
                start = (plane * 160 + position) * row
                buffer[start : start + row] = dice.randbytes(row)
        return buffer

    for prompt in prompts:
        contents[repr(prompt).encode()] = content(prompt)
    wrong: list[str] = []
    loads = [0]
    options = config("max_local_cpu_size=0.0002")  # 13 slots for some 100 chunks
    with Cache.open(model="m", layout=LAYOUT, config=options) as cache:

        def work(seed: int) -> None:
            dice = random.Random(seed)
            for _ in range(60):
                prompt = dice.choice(prompts)
                stored = contents[repr(prompt).encode()]
                if dice.random() < 0.5:
                    cache.store(prompt, stored)
                    continue
                into = bytearray(len(stored))
                hit = cache.load(prompt, into)
                loads[0] += bool(hit)
                if rows(into, 160, hit) != rows(stored, 160, hit):
                    wrong.append(f"{hit} tokens")

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
        assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    assert loads[0] > 0


class OwnEngine:
    """A plugin whose engine is one buffer."""

    buffer = bytearray(GROUP.chunk_bytes(64))

    @staticmethod
    @hookimpl
    def lmcache_engine_connectors() -> list[EngineConnectorDescriptor]:
        class Options(BaseModel):
            model_config = ConfigDict(extra="forbid")

        return [
            EngineConnectorDescriptor(
                name="own",
                summary="for this test",
                config=Options,
                create=lambda _: CanonicalBuffer(OwnEngine.buffer, GROUP, 64),
            ),
            EngineConnectorDescriptor(name="theirs", summary="no create", config=Options),
        ]


@pytest.fixture
def own_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed distribution that provides `OwnEngine`."""
    info = tmp_path / "own_engine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-engine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lmcache.plugins]\nown_engine = own_engine\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "own_engine", OwnEngine)  # type: ignore[misc]


@pytest.mark.usefixtures("own_engine")
def test_the_configured_engine_connector_is_used() -> None:
    OwnEngine.buffer[:] = kv(64)
    with Cache.open(model="m", layout=LAYOUT, config=config("engine_connector=own")) as cache:
        assert cache.engine is not None
        prompt = tokens(64)
        assert cache.store(prompt, Paged(cache.engine, [0], 64)) == 64
        loaded = bytearray(len(OwnEngine.buffer))
        assert cache.load(prompt, loaded) == 64
        assert loaded == OwnEngine.buffer


@pytest.mark.usefixtures("own_engine")
def test_an_engine_connector_that_cannot_be_created_here_is_refused() -> None:
    with pytest.raises(ConfigError, match="only the engine itself"):
        Cache.open(model="m", layout=LAYOUT, config=config("engine_connector=theirs"))
