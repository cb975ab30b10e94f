"""The disk tier: what survives, what goes, and what the user is told."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from pydantic import ValidationError

from lmcache_core.builtin.filesystem import FilesystemBackend, FilesystemConfig, config_from_url
from lmcache_core.builtin.filesystem_io import ABANDONED_AFTER_S, ChunkFiles
from lmcache_core.chunks.keys import CacheNamespace, ChunkKey
from lmcache_core.contracts.storage import MISS, BackendContext, StoreOutcome
from lmcache_core.errors import BackendRejected, BackendTimeout, BackendUnavailable
from lmcache_core.testing.loop import Loop
from lmcache_core.testing.storage import LAYOUT, keys, value

T = TypeVar("T")
Open = Callable[..., FilesystemBackend]
NAMESPACE = CacheNamespace("model", LAYOUT)
KIB = 1024
GIB = 1 << 30


@pytest.fixture
def run() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def opened(tmp_path: Path, run: Loop) -> Iterator[Open]:
    """Opens a backend on one folder; sizes in bytes."""
    backends: list[FilesystemBackend] = []

    def open_one(
        max_bytes: int | None = None,
        *,
        lookup_only: bool = False,
        path: Path = tmp_path / "kv",
        **options: Any,
    ) -> FilesystemBackend:
        if max_bytes is not None:
            options["max_size_gib"] = max_bytes / GIB
        backend = FilesystemBackend(
            FilesystemConfig(**{"path": path, "min_free_gib": 0, **options})
        )
        run(backend.open(BackendContext("disk", NAMESPACE, lookup_only=lookup_only)))
        backends.append(backend)
        return backend

    yield open_one
    for backend in backends:
        run(backend.close())


def store(run: Loop, backend: FilesystemBackend, key: ChunkKey, data: bytearray) -> StoreOutcome:
    (outcome,) = run(backend.store([key], [memoryview(data)]))
    return outcome


def load(run: Loop, backend: FilesystemBackend, key: ChunkKey, room: int) -> bytes | None:
    into = bytearray(room)
    (size,) = run(backend.load([key], [memoryview(into)]))
    return None if size == MISS else bytes(into[:size])


def place(tmp_path: Path, key: ChunkKey) -> Path:
    return tmp_path / "kv" / NAMESPACE.fingerprint / key.hex()[:2] / key.hex()


def files(folder: Path) -> list[Path]:
    """All but what the backend notes for itself."""
    own = (".usage", ".writers", "manifest.json")
    return sorted(
        path for path in folder.rglob("*") if path.is_file() and not set(path.parts) & set(own)
    )


# -- names and options ---------------------------------------------------------------------


def test_one_file_a_chunk(opened: Open, run: Loop, tmp_path: Path) -> None:
    backend, (key,) = opened(), keys(1)
    store(run, backend, key, value(1))
    assert files(tmp_path) == [place(tmp_path, key)]
    assert place(tmp_path, key).read_bytes() == value(1)


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("fs:///data/kv", {"path": "/data/kv"}),
        ("fs://host:0/data/kv", {"path": "/data/kv"}),
        ("file:///data/kv", {"path": "/data/kv"}),
        ("file://localhost/data/kv", {"path": "/data/kv"}),
        ("fs:///data/my%20kv", {"path": "/data/my kv"}),
        ("fs:///d?fsync=true&max_size_gib=2", {"path": "/d", "fsync": "true", "max_size_gib": "2"}),
    ],
)
def test_urls(url: str, options: dict[str, str]) -> None:
    assert config_from_url(url) == options
    assert FilesystemConfig(**options).path == Path(options["path"])


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("fs://", "no folder in it; write fs:///PATH"),
        ("fs://host:80/", "no folder in it"),
        ("file://data/kv", "did you mean file:///data/kv"),
        ("fs:///d?fsync", "bad query field"),
    ],
)
def test_urls_that_name_no_folder(url: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        config_from_url(url)


@pytest.mark.parametrize(
    "options", [{}, {"path": "/d", "size": 1}, {"path": "/d", "max_size_gib": 0}]
)
def test_options_that_are_wrong(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        FilesystemConfig(**options)


# -- what the user must act on -------------------------------------------------------------


@pytest.mark.parametrize("lookup_only", [False, True])
def test_path_is_a_file(opened: Open, tmp_path: Path, lookup_only: bool) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(BackendRejected, match=rf"{path}.*set `path` to another one"):
        opened(path=path, lookup_only=lookup_only)


def test_path_below_a_file(opened: Open, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendRejected, match=r"Not a directory; make it a folder"):
        opened(path=tmp_path / "file" / "kv")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.EACCES, BackendRejected),
        (errno.EROFS, BackendRejected),
        (errno.EIO, BackendUnavailable),
        (errno.ETIMEDOUT, BackendTimeout),
    ],
)
def test_a_folder_that_cannot_be_written(
    opened: Open, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[Exception], tmp_path: Path
) -> None:
    def probe(self: ChunkFiles, folder: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(ChunkFiles, "probe", probe)
    with pytest.raises(kind, match=rf"can't use {tmp_path}/kv: {os.strerror(code)}; make it"):
        opened()


def test_a_full_disk_can_still_be_read(
    opened: Open, run: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(run, opened(), keys(1)[0], value(1))

    def probe(self: ChunkFiles, folder: Path) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(ChunkFiles, "probe", probe)
    assert load(run, opened(), keys(1)[0], KIB * 4) == value(1)


def test_lookup_only_changes_nothing(opened: Open, run: Loop, tmp_path: Path) -> None:
    asking = opened(lookup_only=True)
    assert not (tmp_path / "kv").exists()
    assert run(asking.contains(keys(1))) == [False]
    store(run, opened(), keys(1)[0], value(1))
    left = place(tmp_path, keys(1)[0]).with_name(f".{'00' * 16}.host.1.t-0.tmp")
    left.write_bytes(b"x")
    os.utime(left, (0, 0))
    again = opened(64, lookup_only=True)
    assert run(again.contains(keys(2))) == [True, False]
    assert left.exists()


# -- starting again ------------------------------------------------------------------------


def test_the_index_is_rebuilt(opened: Open, run: Loop) -> None:
    first = opened()
    for i, key in enumerate(keys(3)):
        store(run, first, key, value(i))
    run(first.close())
    second = opened()
    assert second.usage() == (3, 3 * len(value(0)))
    assert load(run, second, keys(3)[2], 4 * KIB) == value(2)


def test_the_bound_holds_for_what_was_found(opened: Open, run: Loop, tmp_path: Path) -> None:
    first = opened()
    for age, key in enumerate(keys(4)):
        store(run, first, key, value(age, KIB))
        os.utime(place(tmp_path, key), (1000 - age, 1000 - age))
    run(first.close())
    second = opened(2 * KIB)
    assert second.usage() == (2, 2 * KIB)
    assert run(second.contains(keys(4))) == [True, True, False, False]


def test_strange_files_are_left_alone(opened: Open, run: Loop, tmp_path: Path) -> None:
    store(run, opened(), keys(1)[0], value(1))
    folder = place(tmp_path, keys(1)[0]).parent
    strange = [folder / "README", folder / "zz", folder.parent / "notes", folder / ("ab" * 16)]
    for path in strange:
        path.write_text("mine")
    (folder / ("00" * 17)).mkdir()
    assert opened().usage()[0] == 1
    assert run(opened().clear()) == 1
    assert files(tmp_path) == sorted(strange)


def test_empty_files_are_no_chunks(opened: Open, run: Loop, tmp_path: Path) -> None:
    """Nobody removes one whose name may be another writer's by then; a chunk takes its place."""
    opened()
    path = place(tmp_path, keys(1)[0])
    path.parent.mkdir()
    path.touch()
    backend = opened()
    assert backend.usage() == (0, 0)
    assert run(backend.contains(keys(1))) == [False]
    store(run, backend, keys(1)[0], value(1))
    assert load(run, opened(), keys(1)[0], 4 * KIB) == value(1)


def test_temporary_files_of_the_dead_are_swept(opened: Open, run: Loop, tmp_path: Path) -> None:
    backend, (key,) = opened(), keys(1)
    store(run, backend, key, value(1))
    folder = place(tmp_path, key).parent
    alive = backend._files._temporary(folder / key.hex())
    dead = _finished_pid()
    host = alive.name.split(".")[2]
    names = {
        alive.name: True,
        f".{key.hex()}.{host}.{dead}.aa-1.tmp": False,
        f".{key.hex()}.{host}.99999999999999999999.aa-1.tmp": False,
        f".manifest.json.{host}.{dead}.aa-1.tmp": False,
        f".{key.hex()}.0ther.{dead}.aa-1.tmp": True,
        ".rubbish.tmp": True,
    }
    for name in names:
        (folder / name).write_bytes(b"half")
    old = [f".{key.hex()}.{host}.{os.getpid()}.aa-2.tmp", f".{key.hex()}.0ther.1.aa-1.tmp"]
    before = time.time() - ABANDONED_AFTER_S - 60
    for name in old:
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, (before, before))
    opened()
    left = {path.name for path in files(folder)} - {key.hex()}
    assert left == {name for name, stays in names.items() if stays}


def _finished_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


KILLED = """
import asyncio, os, sys
from lmcache_core.builtin import filesystem_io
from lmcache_core.builtin.filesystem import *
from lmcache_core.chunks.keys import CacheNamespace
from lmcache_core.testing.storage import LAYOUT, keys, value

async def main():
    backend = FilesystemBackend(FilesystemConfig(path=sys.argv[1], min_free_gib=0))
    await backend.open(BackendContext("disk", CacheNamespace("model", LAYOUT)))
    await backend.store(keys(1), [memoryview(value(1))])
    real = os.pwrite
    def half(fd, data, offset):
        real(fd, data[: len(data) // 2], offset)
        os.kill(os.getpid(), 9)
    os.pwrite = half
    await backend.store(keys(2)[1:], [memoryview(value(2))])

asyncio.run(main())
"""


def test_a_writer_that_is_killed(opened: Open, run: Loop, tmp_path: Path) -> None:
    code = [sys.executable, "-c", KILLED, str(tmp_path / "kv")]
    assert subprocess.run(code, timeout=60, check=False).returncode == -9
    assert len(files(tmp_path)) == 2
    backend = opened()
    assert run(backend.contains(keys(2))) == [True, False]
    assert load(run, backend, keys(1)[0], 4 * KIB) == value(1)
    assert load(run, backend, keys(2)[1], 4 * KIB) is None
    assert files(tmp_path) == [place(tmp_path, keys(1)[0])]


# -- room ----------------------------------------------------------------------------------


def test_the_least_recently_used_goes(opened: Open, run: Loop) -> None:
    backend, (a, b, c, d) = opened(3 * KIB), keys(4)
    for key in (a, b, c):
        store(run, backend, key, value(1, KIB))
    load(run, backend, a, KIB)
    assert store(run, backend, d, value(2, KIB)) is StoreOutcome.STORED
    assert run(backend.contains([a, b, c, d])) == [True, False, True, True]
    assert backend.usage() == (3, 3 * KIB)


def test_a_value_above_the_bound(opened: Open, run: Loop) -> None:
    backend = opened(2 * KIB)
    store(run, backend, keys(1)[0], value(1, KIB))
    assert store(run, backend, keys(2)[1], value(2, 2 * KIB + 1)) is StoreOutcome.NOT_ADMITTED
    assert run(backend.contains(keys(2))) == [True, False]


def test_concurrent_writers_keep_the_bound_together(
    opened: Open, run: Loop, tmp_path: Path
) -> None:
    backend = opened(10 * KIB)

    async def many() -> None:
        await asyncio.gather(
            *(backend.store([key], [memoryview(value(1, KIB))]) for key in keys(64))
        )

    run(many())
    chunks, held = backend.usage()
    assert held <= 10 * KIB
    assert sum(path.stat().st_size for path in files(tmp_path)) == held == chunks * KIB


def test_min_free_is_kept_by_evicting(
    opened: Open, run: Loop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    disk = 10 * KIB

    def free(path: Path) -> int:
        return disk - sum(one.stat().st_size for one in files(tmp_path))

    monkeypatch.setattr("lmcache_core.builtin.filesystem.free_bytes", free)
    backend = opened(min_free_gib=6 * KIB / GIB)
    for key in keys(6):
        assert store(run, backend, key, value(1, KIB)) is StoreOutcome.STORED
    assert run(backend.contains(keys(6))) == [False, False, True, True, True, True]


def test_min_free_when_others_fill_the_disk(
    opened: Open, run: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What can't be had by giving up everything isn't paid for with everything."""
    backend = opened(min_free_gib=1)
    store(run, backend, keys(1)[0], value(1))
    monkeypatch.setattr("lmcache_core.builtin.filesystem.free_bytes", lambda path: KIB)
    assert store(run, backend, keys(2)[1], value(1)) is StoreOutcome.NOT_ADMITTED
    assert run(backend.contains(keys(2))) == [True, False]


class FullDisk:
    """`os.pwrite` on a disk that takes ``room`` bytes more, unless files are deleted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int, code: int) -> None:
        self.room, self.code = room, code
        self._pwrite, self._unlink = os.pwrite, os.unlink
        monkeypatch.setattr(os, "pwrite", self.pwrite)
        monkeypatch.setattr(os, "unlink", self.unlink)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        if not self.room and os.fstat(fd).st_size <= offset:
            raise OSError(self.code, os.strerror(self.code))
        there = max(0, os.fstat(fd).st_size - offset)
        size = min(there + self.room, len(data))
        self.room -= max(0, size - there)
        return self._pwrite(fd, data[:size], offset)

    def unlink(self, path: Any) -> None:
        size = os.stat(path).st_size
        self._unlink(path)
        self.room += size


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_makes_room_once(
    opened: Open, run: Loop, monkeypatch: pytest.MonkeyPatch, code: int, tmp_path: Path
) -> None:
    backend = opened()
    FullDisk(monkeypatch, 5 * KIB // 2, code)
    outcomes = [store(run, backend, key, value(i, KIB)) for i, key in enumerate(keys(4))]
    assert outcomes == [StoreOutcome.STORED] * 4
    assert run(backend.contains(keys(4))) == [False, False, True, True]
    assert len(files(tmp_path)) == 2
    assert load(run, backend, keys(4)[3], KIB) == value(3, KIB)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_no_error(
    opened: Open, run: Loop, monkeypatch: pytest.MonkeyPatch, code: int, tmp_path: Path
) -> None:
    backend = opened()
    FullDisk(monkeypatch, KIB, code)
    assert store(run, backend, keys(1)[0], value(1, 2 * KIB)) is StoreOutcome.NOT_ADMITTED
    assert files(tmp_path) == []
    assert backend.usage() == (0, 0)


# -- damage --------------------------------------------------------------------------------


def test_a_file_that_somebody_deleted(opened: Open, run: Loop, tmp_path: Path) -> None:
    backend, (key,) = opened(), keys(1)
    store(run, backend, key, value(1))
    place(tmp_path, key).unlink()
    assert run(backend.contains([key])) == [False]
    assert load(run, backend, key, 4 * KIB) is None
    assert backend.usage() == (0, 0)
    assert store(run, backend, key, value(1)) is StoreOutcome.STORED


def test_a_folder_that_somebody_deleted(opened: Open, run: Loop, tmp_path: Path) -> None:
    backend, (key,) = opened(), keys(1)
    store(run, backend, key, value(1))
    shutil.rmtree(tmp_path / "kv")
    assert run(backend.contains([key])) == [False]
    assert store(run, backend, key, value(1)) is StoreOutcome.STORED
    assert load(run, backend, key, 4 * KIB) == value(1)


def test_a_file_that_is_empty_or_something_else(opened: Open, run: Loop, tmp_path: Path) -> None:
    backend, (a, b) = opened(), keys(2)
    for key in (a, b):
        store(run, backend, key, value(1))
        place(tmp_path, key).unlink()
    place(tmp_path, a).touch()
    place(tmp_path, b).mkdir()
    assert run(backend.contains([a, b])) == [False, False]
    assert [load(run, backend, key, 4 * KIB) for key in (a, b)] == [None, None]


def test_a_torn_file_is_replaced(opened: Open, run: Loop, tmp_path: Path) -> None:
    backend, (key,) = opened(), keys(1)
    store(run, backend, key, value(1))
    os.truncate(place(tmp_path, key), 100)
    assert store(run, backend, key, value(1)) is StoreOutcome.STORED
    assert load(run, backend, key, 4 * KIB) == value(1)
    assert backend.usage() == (1, len(value(1)))


def test_a_file_that_shrinks_while_it_is_read(
    opened: Open, run: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, (key,), real = opened(), keys(1), os.preadv
    store(run, backend, key, value(1))

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        os.truncate(place(tmp_path, key), 10)
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    assert load(run, backend, key, 4 * KIB) is None


def test_a_file_that_is_replaced_while_it_is_read(
    opened: Open, run: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes are all of the old file, whatever has the name by now."""
    backend, (key,), real = opened(), keys(1), os.preadv
    store(run, backend, key, value(1))

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        fresh = tmp_path / "fresh"
        fresh.write_bytes(value(2))
        fresh.replace(place(tmp_path, key))
        return real(fd, [buffers[0][:100]], offset)  # and reads come in pieces

    monkeypatch.setattr(os, "preadv", preadv)
    assert load(run, backend, key, 4 * KIB) == value(1)


@pytest.mark.parametrize("call", ["pwrite", "replace"])
def test_a_failing_disk_is_an_error_and_leaves_nothing(
    opened: Open, run: Loop, monkeypatch: pytest.MonkeyPatch, call: str, tmp_path: Path
) -> None:
    backend = opened()

    def fail(*args: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(BackendUnavailable, match=r"can't write to .*: Input/output error"):
        store(run, backend, keys(1)[0], value(1))
    assert files(tmp_path) == []
    assert run(backend.contains(keys(1))) == [False]
    monkeypatch.undo()
    assert store(run, backend, keys(1)[0], value(1)) is StoreOutcome.STORED


def test_a_failing_read_is_an_error(
    opened: Open, run: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = opened()
    store(run, backend, keys(1)[0], value(1))

    def fail(*args: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(BackendUnavailable, match=r"can't read from .*: Input/output error"):
        load(run, backend, keys(1)[0], 4 * KIB)


def test_an_empty_value_is_not_kept(opened: Open, run: Loop) -> None:
    backend = opened()
    assert store(run, backend, keys(1)[0], bytearray()) is StoreOutcome.NOT_ADMITTED
    assert run(backend.contains(keys(1))) == [False]


# -- processes that share a folder ---------------------------------------------------------

SHARING = """
import asyncio, sys
from lmcache_core.builtin.filesystem import *
from lmcache_core.chunks.keys import CacheNamespace
from lmcache_core.testing.storage import LAYOUT, keys, value

async def main():
    config = FilesystemConfig(path=sys.argv[1], min_free_gib=0, max_size_gib=2**16 / 2**30)
    backend = FilesystemBackend(config)
    await backend.open(BackendContext("disk", CacheNamespace("model", LAYOUT)))
    hits = 0
    for round_ in range(25):
        names, sources = keys(8, round_ % 5), [value(i, 8192) for i in range(8)]
        await backend.store(names, [memoryview(one) for one in sources])
        into = [bytearray(8192) for _ in names]
        sizes = await backend.load(names, [memoryview(one) for one in into])
        for size, expected, actual in zip(sizes, sources, into):
            hits += size == 8192
            assert size == MISS or (size == 8192 and actual == expected), "wrong bytes"
    await backend.close()
    print(hits)

asyncio.run(main())
"""


def test_processes_that_store_load_and_evict_the_same_chunks(tmp_path: Path) -> None:
    code = [sys.executable, "-c", SHARING, str(tmp_path)]
    processes = [subprocess.Popen(code, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    hits = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert all(int(count) for count in hits)
    assert not [path for path in files(tmp_path) if path.name.endswith(".tmp")]
