"""Power cuts: what was acknowledged as durable is there, and nothing wrong is served.

A run with ``fsync`` is recorded, and the disk built as each of its system calls could have left it.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from power_cut import Disk, Kept, PowerLog, everything, nothing, some
from promises import framed

from lmcache_core.builtin import filesystem_room
from lmcache_core.builtin.filesystem import FilesystemBackend, FilesystemConfig
from lmcache_core.builtin.filesystem_io import size_of
from lmcache_core.builtin.filesystem_room import UNWRITTEN_S
from lmcache_core.chunks.frame import HEADER_BYTES, may_start, read_header
from lmcache_core.chunks.keys import CacheNamespace, ChunkKey
from lmcache_core.contracts.storage import MISS, BackendContext, StoreOutcome
from lmcache_core.errors import FrameError
from lmcache_core.testing.storage import LAYOUT, keys, value

NAMESPACE = CacheNamespace("model", LAYOUT)
PAYLOAD = 256
FRAME = HEADER_BYTES + PAYLOAD
GIB = 1 << 30


def frame(key: ChunkKey, fill: int, payload: int = PAYLOAD) -> bytearray:
    """What core stores for a chunk."""
    return framed(key, NAMESPACE, value(fill, payload))


def opened(path: Path, *, fsync: bool = True, most: int = 1 << 20) -> FilesystemBackend:
    config = FilesystemConfig(path=path, min_free_gib=0, fsync=fsync, max_size_gib=most / GIB)
    backend = FilesystemBackend(config)
    backend.open_blocking(BackendContext("disk", NAMESPACE))
    return backend


def served(backend: FilesystemBackend, key: ChunkKey, fill: int) -> bool:
    """Whether the chunk is there; damage that core notices is a miss, wrong bytes are a failure."""
    into = bytearray(2 * FRAME)
    (size,) = backend.load_blocking([key], [memoryview(into)])
    if size == MISS:
        return False
    try:
        read_header(memoryview(into)[:size], key=key, fingerprint=NAMESPACE.fingerprint)
    except FrameError:
        return False
    assert into[:size] == frame(key, fill)
    return True


class Run:
    """A recorded run of stores and deletions, with marks of what was acknowledged."""

    def __init__(self, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = top / "new" / "kv"
        self.log = PowerLog(top, monkeypatch)

    def store(
        self, backend: FilesystemBackend, fills: dict[ChunkKey, int], *, durable: bool = True
    ) -> list[StoreOutcome]:
        sources = [memoryview(frame(key, fill)) for key, fill in fills.items()]
        outcomes = backend.store_blocking(list(fills), sources)
        if durable:
            self.log.mark("stored", *fills)
        return outcomes

    def delete(self, backend: FilesystemBackend, names: list[ChunkKey]) -> None:
        self.log.mark("deleting", *names)
        backend._delete(names)
        self.log.mark("deleted", *names)


def promised(log: list[tuple[object, ...]]) -> tuple[set[object], set[object]]:
    """What has to be there after ``log``, and what must not be."""
    there, gone = set[object](), set[object]()
    for operation, *rest in log:
        if operation == "mark":
            what, *names = rest
            there = there | set(names) if what == "stored" else there - set(names)
            gone = gone | set(names) if what == "deleted" else gone - set(names)
    return there, gone


def cuts(log: list[tuple[object, ...]]) -> Iterator[int]:
    """After each system call that changed something."""
    for end in range(1, len(log) + 1):
        if log[end - 1][0] not in ("mark", "open"):
            yield end
    yield len(log)


@pytest.mark.parametrize(
    "kept", [nothing, everything, some(1), some(2)], ids=["nothing", "everything", "1", "2"]
)
def test_what_was_acknowledged_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: Kept
) -> None:
    (tmp_path / "live").mkdir()
    names = keys(7)
    fills = dict(zip(names, range(10, 17), strict=True))

    def of(*which: int) -> dict[ChunkKey, int]:
        return {names[i]: fills[names[i]] for i in which}

    with monkeypatch.context() as patch:
        run = Run(tmp_path / "live", patch)
        backend = opened(run.path)
        run.store(backend, of(0, 1))
        run.store(backend, of(2))
        run.delete(backend, [names[1]])
        backend.close_blocking()
        # One that promises nothing, and then one that finds what it wrote.
        loose = opened(run.path, fsync=False)
        run.store(loose, of(1, 3), durable=False)
        loose.close_blocking()
        backend = opened(run.path)
        assert run.store(backend, of(3)) == [StoreOutcome.ALREADY_PRESENT]
        run.store(backend, of(4, 5))
        run.delete(backend, [names[0]])
        backend.close_blocking()
    log, seen = run.log.log, 0
    # ``names[1]`` was stored again, without a promise.
    again = next(i for i, one in enumerate(log) if one[:2] == ("mark", "deleted")) + 1
    for number, end in enumerate(cuts(log)):
        place = tmp_path / f"cut{number}"
        place.mkdir()
        Disk.after(log[:end]).rebuild(place, kept)
        there, gone = promised(log[:end])
        if end > again:
            gone.discard(names[1])
        backend = opened(place / "new" / "kv", fsync=False)
        found = {key for key in names if served(backend, key, fills[key])}
        assert there <= found, f"after {log[end - 1]}"
        assert not found & gone, f"after {log[end - 1]}"
        # A damaged one can be stored again, whatever lies there.
        outcomes = backend.store_blocking(names, [memoryview(frame(k, fills[k])) for k in names])
        assert StoreOutcome.NOT_ADMITTED not in outcomes
        backend.close_blocking()
        seen += 1
    assert seen > 60


@pytest.mark.parametrize("way", ["delete", "clear"])
def test_what_was_evicted_before_is_forgotten_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """An eviction doesn't wait for the disk; who forgets the chunk afterwards does."""
    (tmp_path / "live").mkdir()
    (tmp_path / "left").mkdir()
    (key,) = keys(1)
    with monkeypatch.context() as patch:
        run = Run(tmp_path / "live", patch)
        backend = opened(run.path)
        run.store(backend, {key: 1})
        backend._room.make_free(1)
        assert not served(backend, key, 1)
        assert (backend._delete([key]) if way == "delete" else backend._clear()) == 0
        log = list(run.log.log)
        backend.close_blocking()
    Disk.after(log).rebuild(tmp_path / "left", nothing)
    backend = opened(tmp_path / "left" / "new" / "kv", fsync=False)
    assert not served(backend, key, 1)
    backend.close_blocking()


def test_a_folder_that_somebody_deleted_has_nothing_to_forget(tmp_path: Path) -> None:
    (key,) = keys(1)
    backend = opened(tmp_path / "kv")
    backend.store_blocking([key], [memoryview(frame(key, 1))])
    shutil.rmtree(tmp_path / "kv" / NAMESPACE.fingerprint)
    assert backend._delete([key]) == 0
    assert backend._clear() == 0
    backend.close_blocking()


def test_the_model_of_a_power_cut_loses_what_was_not_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without fsync nothing is left of a run, or names without bytes."""
    (tmp_path / "live").mkdir()
    with monkeypatch.context() as patch:
        run = Run(tmp_path / "live", patch)
        backend = opened(run.path, fsync=False)
        run.store(backend, dict.fromkeys(keys(2), 1))
        backend.close_blocking()
    for name, kept in (("least", nothing), ("most", everything)):
        (tmp_path / name).mkdir()
        Disk.after(run.log.log).rebuild(tmp_path / name, kept)
    assert list((tmp_path / "least").iterdir()) == []
    path = tmp_path / "most" / "new" / "kv"
    left = [path / NAMESPACE.fingerprint / key.hex()[:2] / key.hex() for key in keys(2)]
    assert [one.read_bytes() for one in left] == [bytes(FRAME)] * 2
    backend = opened(path)
    assert not any(map(size_of, left))
    # Nor does what comes later pass for the chunk when it is stored again.
    left[0].write_bytes(bytes(FRAME))
    assert not served(backend, keys(1)[0], 1)
    outcomes = run.store(backend, dict.fromkeys(keys(2), 1))
    assert outcomes == [StoreOutcome.STORED] * 2
    assert all(served(backend, key, 1) for key in keys(2))
    backend.close_blocking()


def test_damaged_files_of_the_last_minute_are_removed_at_the_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = keys(6)
    backend = opened(tmp_path)
    for key in names:
        backend.store_blocking([key], [memoryview(frame(key, 1))])
    backend.close_blocking()
    paths = [tmp_path / NAMESPACE.fingerprint / key.hex()[:2] / key.hex() for key in names]
    paths[0].write_bytes(bytes(FRAME))
    paths[1].write_bytes(frame(names[1], 1)[: FRAME // 2])
    paths[2].write_bytes(frame(names[1], 1))  # another chunk's
    paths[3].write_bytes(bytes(FRAME))
    then = time.time() - 2 * UNWRITTEN_S
    os.utime(paths[3], (then, then))
    paths[4].write_bytes(value(1, FRAME))  # no frame at all: not ours to judge
    again = opened(tmp_path)
    assert [size_of(one) > 0 for one in paths] == [False, False, False, True, True, True]
    assert again.usage() == (3, 3 * FRAME)
    assert caplog.text.count("removed damaged files") == 1
    assert [served(again, key, 1) for key in names] == [False] * 5 + [True]
    again.close_blocking()


def test_a_file_that_is_replaced_while_another_writer_opens_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was found there isn't what is looked at then."""
    (key,), longer = keys(1), frame(keys(1)[0], 2, 2 * PAYLOAD)
    backend = opened(tmp_path)
    backend.store_blocking([key], [memoryview(frame(key, 1))])
    scan = filesystem_room.scan

    def slow(*arguments: Any) -> list[tuple[int, ChunkKey, int]]:
        found = list(scan(*arguments))
        if found:
            backend.store_blocking([key], [memoryview(longer)])
        return found

    monkeypatch.setattr(filesystem_room, "scan", slow)
    other = opened(tmp_path)
    into = bytearray(len(longer))
    assert other.load_blocking([key], [memoryview(into)]) == [len(longer)]
    assert into == longer
    for one in (other, backend):
        one.close_blocking()


@pytest.mark.parametrize("fsync", [False, True])
def test_a_file_that_was_there_is_looked_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fsync: bool
) -> None:
    (key,) = keys(1)
    backend = opened(tmp_path, fsync=False)
    backend.store_blocking([key], [memoryview(frame(key, 1))])
    backend.close_blocking()
    backend = opened(tmp_path, fsync=fsync)
    run = PowerLog(tmp_path, monkeypatch)
    present = [StoreOutcome.ALREADY_PRESENT]
    assert backend.store_blocking([key], [memoryview(frame(key, 1))]) == present
    syncs = [one for one in run.log if one[0] == "sync"]
    assert len(syncs) == (3 if fsync else 0)  # it, its folder, and that one's name
    before = len(run.log)
    assert backend.store_blocking([key], [memoryview(frame(key, 1))]) == present
    assert len(run.log) == before
    backend.close_blocking()


def test_a_header_says_whether_a_file_may_be_good() -> None:
    (key, other), good = keys(2), bytes(frame(keys(1)[0], 1))
    assert may_start(good[:HEADER_BYTES], key=key, nbytes=FRAME)
    assert not may_start(good[:HEADER_BYTES], key=other, nbytes=FRAME)
    assert not may_start(good[:HEADER_BYTES], key=key, nbytes=FRAME - 1)
    assert not may_start(good[: HEADER_BYTES - 1], key=key, nbytes=FRAME)
    assert not may_start(bytes(HEADER_BYTES), key=key, nbytes=FRAME)
    newer = good[:8] + b"\xff" + good[9:]
    assert may_start(newer[:HEADER_BYTES], key=key, nbytes=FRAME)  # not known to be bad
    for place in np.random.default_rng(1).integers(10, HEADER_BYTES, 200):
        damaged = bytearray(good[:HEADER_BYTES])
        damaged[place] ^= 1
        assert not may_start(bytes(damaged), key=key, nbytes=FRAME)
