"""One bound for a folder: whose chunks go, what is said, and what many processes do together."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcache_backend_lm.folders import ForeignNamespace
from lmcache_core.builtin import filesystem_room
from lmcache_core.builtin.filesystem import FilesystemBackend, FilesystemConfig
from lmcache_core.builtin.filesystem_io import NOTE_USE_AFTER_S
from lmcache_core.builtin.filesystem_manifest import NAME, described, read
from lmcache_core.chunks.keys import CacheNamespace, ChunkKey
from lmcache_core.contracts.storage import MISS, BackendContext, StoreOutcome
from lmcache_core.testing.storage import LAYOUT, keys, value

KIB = 1024
GIB = 1 << 30
Open = Callable[..., FilesystemBackend]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Opens the backend of a model; sizes in bytes."""
    backends: list[FilesystemBackend] = []

    def open_one(model: str, max_bytes: int | None = None, **options: Any) -> FilesystemBackend:
        if max_bytes is not None:
            options["max_size_gib"] = max_bytes / GIB
        config = FilesystemConfig(**{"path": tmp_path, "min_free_gib": 0, **options})
        backend = FilesystemBackend(config)
        backend.open_blocking(BackendContext("disk", CacheNamespace(model, LAYOUT)))
        backends.append(backend)
        return backend

    yield open_one
    for backend in backends:
        backend.close_blocking()


def store(backend: FilesystemBackend, names: list[ChunkKey], nbytes: int = KIB) -> int:
    """Store a value for each name, one after the other; answer how many were stored."""
    outcomes = [backend.store_blocking([n], [memoryview(value(1, nbytes))])[0] for n in names]
    return outcomes.count(StoreOutcome.STORED)


def held(backend: FilesystemBackend, names: list[ChunkKey]) -> list[int]:
    """Positions of those that are there."""
    return [i for i, hit in enumerate(backend.contains_blocking(names)) if hit]


def total(top: Path) -> int:
    """Bytes of all chunk files."""
    size = 0
    for folder, _, names in os.walk(top):
        for name in names:
            if len(name) == 32:
                try:
                    size += os.stat(f"{folder}/{name}").st_size
                except FileNotFoundError:
                    continue
    return size


def space(tmp_path: Path, model: str) -> Path:
    return tmp_path / CacheNamespace(model, LAYOUT).fingerprint


def last_used(tmp_path: Path, model: str, ago_s: float) -> None:
    then = time.time() - ago_s
    os.utime(space(tmp_path, model) / NAME, (then, then))


# -- who goes ------------------------------------------------------------------------------


def test_chunks_of_a_namespace_that_nobody_uses_give_way(
    opened: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = opened("old", 10 * KIB)
    assert store(old, keys(10)) == 10
    old.close_blocking()
    new = opened("new", 10 * KIB)
    caplog.set_level(logging.INFO)
    assert store(new, keys(10, 1)) == 10
    assert held(new, keys(10, 1)) == list(range(10))
    assert total(tmp_path) == 10 * KIB
    said = [record.getMessage() for record in caplog.records if "least recently" in record.message]
    assert len(said) == 1
    assert "model old, 16 tokens a chunk" in said[0]
    new.close_blocking()
    assert f"removed 10 chunks of other namespaces, {10 * KIB} bytes" in caplog.text


def test_the_oldest_file_of_another_namespace_goes_first(opened: Open, tmp_path: Path) -> None:
    old = opened("old", 10 * KIB)
    store(old, keys(10))
    for age, key in enumerate(keys(10)):
        os.utime(space(tmp_path, "old") / key.hex()[:2] / key.hex(), (1000 - age, 1000 - age))
    old.close_blocking()
    store(opened("new", 10 * KIB), keys(4, 1))
    assert held(old, keys(10)) == [0, 1, 2, 3, 4, 5]


def test_of_those_that_nobody_uses_the_least_recently_used_one_goes_first(
    opened: Open, tmp_path: Path
) -> None:
    closed = {}
    for model in ("one", "two"):
        closed[model] = opened(model, 10 * KIB)
        store(closed[model], keys(5))
        closed[model].close_blocking()
    last_used(tmp_path, "one", 50)
    last_used(tmp_path, "two", 100)
    store(opened("new", 10 * KIB), keys(7, 1))
    assert len(held(closed["one"], keys(5))) == 3
    assert held(closed["two"], keys(5)) == []
    assert not (space(tmp_path, "two")).exists() or read(space(tmp_path, "two")) is not None


def test_an_empty_namespace_that_nobody_uses_leaves_no_folder(opened: Open, tmp_path: Path) -> None:
    old = opened("old", 4 * KIB)
    store(old, keys(4))
    old.close_blocking()
    new = opened("new", 4 * KIB)
    store(new, keys(8, 1))
    assert not space(tmp_path, "old").exists()
    again = opened("old", 4 * KIB)
    assert read(space(tmp_path, "old")) is not None
    assert store(again, keys(1)) == 1


def test_an_open_namespace_that_is_idle_gives_way(opened: Open, tmp_path: Path) -> None:
    """It lives, but neither reads nor writes."""
    idle, busy = opened("idle", 10 * KIB), opened("busy", 10 * KIB)
    store(idle, keys(5))
    store(busy, keys(5, 1))
    last_used(tmp_path, "idle", filesystem_room.IN_USE_S + 1)
    store(busy, keys(3, 2))
    # One more than three may go: what `idle` wrote last counts as written and as set aside.
    assert len(held(idle, keys(5))) in (1, 2)
    assert held(busy, keys(5, 1)) == list(range(5))


def test_of_those_in_use_the_largest_gives_way(opened: Open, tmp_path: Path) -> None:
    """A namespace that comes later gets its part, and nobody is emptied."""
    large, late = opened("large", 12 * KIB), opened("late", 12 * KIB)
    assert store(large, keys(12)) == 12
    assert store(late, keys(30, 1)) == 30
    assert len(held(large, keys(12))) in (5, 6)
    assert len(held(late, keys(30, 1))) in (5, 6)
    assert store(large, keys(3, 2)) == 3
    assert 11 * KIB <= total(tmp_path) <= 12 * KIB


def test_processes_of_one_namespace_find_each_others_files(opened: Open, tmp_path: Path) -> None:
    """Room is made of what the other wrote, the least recently used first."""
    first, second = opened("m", 10 * KIB), opened("m", 10 * KIB)
    assert store(first, keys(10)) == 10
    assert store(second, keys(6, 1)) == 6
    assert held(second, keys(10)) in ([6, 7, 8, 9], [7, 8, 9])
    assert held(second, keys(6, 1)) == list(range(6))
    assert 9 * KIB <= total(tmp_path) <= 10 * KIB


def test_a_smaller_bound_is_kept_from_the_start(opened: Open, tmp_path: Path) -> None:
    for model in ("one", "two"):
        backend = opened(model)
        store(backend, keys(5))
        backend.close_blocking()
    opened("three", 4 * KIB)
    assert total(tmp_path) == 4 * KIB


def test_min_free_is_kept_at_the_cost_of_others(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk full of another model's chunks takes new ones."""
    monkeypatch.setattr(
        "lmcache_core.builtin.filesystem.free_bytes", lambda path: 10 * KIB - total(tmp_path)
    )
    old = opened("old", min_free_gib=2 * KIB / GIB)
    assert store(old, keys(8)) == 8
    old.close_blocking()
    new = opened("new", min_free_gib=2 * KIB / GIB)
    assert store(new, keys(12, 1)) == 12
    assert held(new, keys(12, 1)) == list(range(4, 12))
    assert held(old, keys(8)) == []


def test_a_chunk_that_is_refused_is_said_once(
    opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    backend = opened("m", 2 * KIB)
    assert store(backend, keys(3), 3 * KIB) == 0
    assert caplog.text.count("is more than max_size_gib") == 1
    caplog.set_level(logging.INFO)
    backend.close_blocking()
    assert "refused 3 for lack of room" in caplog.text


def test_a_lost_ledger_costs_a_count(opened: Open, tmp_path: Path) -> None:
    """Others' files are counted again, in the middle of a store."""
    opened("old", 10 * KIB)
    store(opened("old", 10 * KIB), keys(5))
    backend = opened("m", 10 * KIB)
    store(backend, keys(2, 1))
    (tmp_path / ".usage").write_bytes(b"{}")
    store(backend, keys(10, 2))
    assert total(tmp_path) <= 10 * KIB


def test_what_is_removed_is_room_for_others(opened: Open, tmp_path: Path) -> None:
    one, two = opened("one", 10 * KIB), opened("two", 10 * KIB)
    store(two, keys(4))
    store(one, keys(6))
    assert one._clear() == 6
    assert store(two, keys(6, 1)) == 6
    assert held(two, keys(4)) == [0, 1, 2, 3]
    assert two._delete(keys(3)) == 3
    assert store(two, keys(3, 2)) == 3
    assert held(two, keys(4)) == [3]
    assert total(tmp_path) == 10 * KIB


def test_reading_renews_a_files_time(opened: Open, tmp_path: Path) -> None:
    """Others, and the next process, know by it what is used; a fresh one isn't touched."""
    backend = opened("m")
    store(backend, keys(2))
    places = [space(tmp_path, "m") / key.hex()[:2] / key.hex() for key in keys(2)]
    now = time.time()
    os.utime(places[0], (now - NOTE_USE_AFTER_S - 60,) * 2)
    os.utime(places[1], (now - NOTE_USE_AFTER_S + 60,) * 2)
    into = [memoryview(bytearray(KIB)) for _ in range(2)]
    assert backend.load_blocking(keys(2), into) == [KIB, KIB]
    assert [os.stat(one).st_mtime > now - 30 for one in places] == [True, False]


# -- processes -----------------------------------------------------------------------------

WRITER = """
import fcntl, os, sys
from lmcache_core.builtin.filesystem import *
from lmcache_core.chunks.keys import CacheNamespace
from lmcache_core.testing.storage import LAYOUT, keys, value
from test_filesystem_room import total

top, model, seed, kill_at = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
bound = 64 * 1024
config = FilesystemConfig(path=top, min_free_gib=0, max_size_gib=bound / 2**30)
backend = FilesystemBackend(config)
backend.open_blocking(BackendContext("disk", CacheNamespace(model, LAYOUT)))
replace, done = os.replace, 0

def counted(source, target):
    global done
    done += 1
    if done == kill_at:
        os.kill(os.getpid(), 9)
    replace(source, target)

os.replace = counted
names, stored = keys(200, seed), 0
for name in names:
    (outcome,) = backend.store_blocking([name], [memoryview(value(1, 1024))])
    stored += outcome is StoreOutcome.STORED
    if done % 10:
        continue
    # With the ledger locked: a walk is no snapshot while others remove and write.
    ledger = os.open(top + "/.usage", os.O_RDWR)
    fcntl.flock(ledger, fcntl.LOCK_EX)
    held = total(top)
    os.close(ledger)
    assert held <= bound, held
backend.close_blocking()
print(stored)
"""


def writers(top: Path, plans: list[tuple[str, int]]) -> list[tuple[int, str]]:
    """Run a process for each plan, a model and when it is killed; their statuses and output."""
    here = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, *sys.path])}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(top), model, str(seed), str(kill_at)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for seed, (model, kill_at) in enumerate(plans)
    ]
    output = [process.communicate(timeout=120)[0] for process in running]
    return [(process.returncode, out) for process, out in zip(running, output, strict=True)]


def test_processes_keep_the_bound_together(tmp_path: Path) -> None:
    """Each looks at the whole folder after every tenth of its stores."""
    done = writers(tmp_path, [("one", 0), ("one", 0), ("two", 0), ("three", 0)])
    assert [status for status, _ in done] == [0] * 4
    assert all(int(out) > 150 for _, out in done)
    assert total(tmp_path) > 32 * KIB


def test_killed_processes_leave_the_bound_and_the_room(opened: Open, tmp_path: Path) -> None:
    plans = [("one", 30), ("two", 70), ("two", 0)]
    assert sorted(status for status, _ in writers(tmp_path, plans)) == [-9, -9, 0]
    assert total(tmp_path) <= 64 * KIB
    backend = opened("one", 64 * KIB)
    assert store(backend, keys(64, 9)) == 64
    assert len(held(backend, keys(64, 9))) == 64
    assert total(tmp_path) == 64 * KIB


# -- the manifest --------------------------------------------------------------------------


def test_a_manifest_says_what_the_chunks_are_of(opened: Open, tmp_path: Path) -> None:
    namespace = CacheNamespace("f00d", LAYOUT, salt="hidden", label="org/m")
    namespace = namespace.placed("frame=3;serde=raw")
    backend = FilesystemBackend(FilesystemConfig(path=tmp_path, min_free_gib=0))
    backend.open_blocking(BackendContext("disk", namespace))
    backend.close_blocking()
    folder = tmp_path / namespace.fingerprint
    said = json.loads((folder / NAME).read_text())
    assert (said["model"], said["label"]) == ("f00d", "org/m")
    assert said["place"] == "frame=3;serde=raw"
    assert said["fingerprint"] == namespace.fingerprint
    assert said["layout"]["tokens_per_chunk"] == 16
    assert said["layout"]["groups"][0]["dtype"] == "BF16"
    assert (said["salted"], "hidden" in (folder / NAME).read_text()) == (True, False)
    assert os.stat(folder / NAME).st_mode & 0o777 == 0o600
    assert described(folder) == "model f00d (org/m), 16 tokens a chunk, frame=3;serde=raw"


def test_a_server_knows_a_fingerprint_only(tmp_path: Path) -> None:
    backend = FilesystemBackend(FilesystemConfig(path=tmp_path, min_free_gib=0))
    backend.open_blocking(BackendContext("lmcache_server", ForeignNamespace("ab" * 8)))
    backend.close_blocking()
    assert described(tmp_path / ("ab" * 8)).startswith("clients of lmcache_server")


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"\xff\x00", b"[1]", b'"x"', b"[" * 60_000, b'{"model": 7, "layout": 1}']
)
def test_a_damaged_manifest_costs_a_line(
    opened: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    backend = opened("m")
    store(backend, keys(1))
    backend.close_blocking()
    good = read(space(tmp_path, "m"))
    (space(tmp_path, "m") / NAME).write_bytes(damage)
    assert described(space(tmp_path, "m"))
    again = opened("m")
    into = memoryview(bytearray(KIB))
    assert again.load_blocking(keys(1), [into]) != [MISS]
    assert read(space(tmp_path, "m")) == good
    assert caplog.text.count("was damaged") <= 1


def test_what_a_manifest_says_cannot_change_a_terminal(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(json.dumps({"model": "a\x1b[31mb\n", "place": "\r"}))
    assert described(tmp_path).isprintable()
