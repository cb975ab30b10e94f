"""System calls of the disk tier: pieces, order, alignment."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmcache_core.builtin.filesystem_io import ChunkFiles
from lmcache_core.contracts.storage import MISS
from lmcache_core.testing.storage import value

SIZES = [1, 4095, 4096, 4097, 3 * 4096, (1 << 20) + 1, (2 << 20) + 4095]


def chunk_files(*, direct: bool = False, fsync: bool = False) -> ChunkFiles:
    return ChunkFiles("disk", direct=direct, fsync=fsync)


def aligned(nbytes: int, shift: int = 0, spare: int = 0) -> memoryview:
    """A buffer that begins ``shift`` bytes after a page and has ``spare`` bytes too many."""
    view = memoryview(mmap.mmap(-1, nbytes + shift + spare))
    return view[shift : shift + nbytes + spare]


def test_short_writes_and_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:7], at))
    monkeypatch.setattr(os, "preadv", lambda fd, bufs, at: preadv(fd, [bufs[0][:5]], at))
    files, path, into = chunk_files(), tmp_path / "chunk", bytearray(1000)
    files.write(path, memoryview(value(1, 1000)))
    assert files.read(path, memoryview(into)) == 1000
    assert into == value(1, 1000)


def test_a_write_that_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: 0)
    with pytest.raises(OSError, match="took no bytes"):
        chunk_files().write(tmp_path / "chunk", memoryview(b"abc"))
    assert list(tmp_path.iterdir()) == []


def test_a_value_longer_than_the_buffer(tmp_path: Path) -> None:
    files, path = chunk_files(), tmp_path / "chunk"
    files.write(path, memoryview(value(1, 101)))
    assert files.read(path, memoryview(bytearray(100))) == MISS
    assert files.read(tmp_path / "absent", memoryview(bytearray(100))) == MISS
    assert files.read(tmp_path, memoryview(bytearray(100))) == MISS


def test_fsync_before_and_after_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes, then the name: in the other order a power cut leaves a name without bytes."""
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(fd: int) -> None:
        order.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    def record_replace(source: Path, target: Path) -> None:
        order.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    files, folder = chunk_files(fsync=True), tmp_path / "a" / "b"
    files.make_folder(folder)
    assert order == [str(tmp_path), str(tmp_path / "a")]  # the folders' own names
    files.write(folder / "chunk", memoryview(b"abc"))
    assert order[2].endswith(".tmp")
    assert order[3:] == ["rename", str(folder)]
    order.clear()
    files.write(folder / "other", memoryview(b"abc"))
    assert order[1:] == ["rename", str(folder)]
    order.clear()
    again = chunk_files(fsync=True)  # whoever made the folders may not have come to sync them
    again.settle_all(folder)
    assert order[:2] == [str(tmp_path / "a"), str(tmp_path)]


def test_a_folder_that_is_made_again_is_synced_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, folder, synced = chunk_files(fsync=True), tmp_path / "a", list[str]()
    files.make_folder(folder)
    folder.rmdir()
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    files.make_folder(folder)
    assert synced == [str(tmp_path)]


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
@pytest.mark.parametrize("shared", [False, True])
def test_modes_follow_the_folder_and_not_the_umask(
    tmp_path: Path, umask: int, shared: bool
) -> None:
    """For this user only, unless the folder gives its group all that is new in it."""
    top = tmp_path / "top"
    top.mkdir()
    top.chmod(0o2770 if shared else 0o755)
    old = os.umask(umask)
    try:
        files = chunk_files()
        files.follow(top)
        files.make_folder(top / "a" / "b")
        files.write(top / "a" / "b" / "chunk", memoryview(b"abc"))
    finally:
        os.umask(old)
    modes = [stat.S_IMODE(os.stat(top / one).st_mode) for one in ("", "a", "a/b", "a/b/chunk")]
    folder = 0o2770 if shared else 0o700
    assert modes == [0o2770 if shared else 0o755, folder, folder, 0o660 if shared else 0o600]


def test_no_fsync_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    monkeypatch.setattr(os, "fsync", called.append)
    chunk_files().write(tmp_path / "chunk", memoryview(b"abc"))
    assert called == []


@pytest.mark.parametrize("nbytes", SIZES)
def test_direct_io_with_any_alignment(tmp_path: Path, nbytes: int) -> None:
    """Aligned, padded, unaligned and read-only buffers; the file is as long as the value."""
    files, path, data = chunk_files(direct=True), tmp_path / "chunk", value(1, nbytes)
    for source in (aligned(nbytes), aligned(nbytes, shift=1), memoryview(bytes(data))):
        if not source.readonly:
            source[:] = data
        files.write(path, source)
        assert path.read_bytes() == data
        for into in (aligned(nbytes), aligned(nbytes, spare=4096), aligned(nbytes, shift=1)):
            assert files.read(path, into) == nbytes
            assert into[:nbytes] == data


def test_direct_io_with_short_transfers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:4096], at))
    monkeypatch.setattr(os, "preadv", lambda fd, bufs, at: min(preadv(fd, bufs, at), 1000))
    files, path, source = chunk_files(direct=True), tmp_path / "chunk", aligned(10_000)
    source[:] = value(1, 10_000)
    files.write(path, source)
    assert path.read_bytes() == value(1, 10_000)
    into = aligned(10_000)
    assert files.read(path, into) == 10_000
    assert into == value(1, 10_000)


def _flags_of(call: str) -> Callable[..., int]:
    if call == "open":
        return lambda path, flags, mode=0: flags
    return lambda fd, *rest: fcntl.fcntl(fd, fcntl.F_GETFL)


@pytest.mark.parametrize("refuses", ["open", "pwrite", "preadv"])
def test_a_file_system_without_direct_io(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    refuses: str,
) -> None:
    """One notice, and the page cache instead."""
    real, flags = getattr(os, refuses), _flags_of(refuses)

    def refuse(*args: Any) -> Any:
        if flags(*args) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(*args)

    monkeypatch.setattr(os, refuses, refuse)
    files, into = chunk_files(direct=True), bytearray(5000)
    for i in range(3):
        files.write(tmp_path / f"{i}", memoryview(value(i, 5000)))
        assert files.read(tmp_path / f"{i}", memoryview(into)) == 5000
        assert into == value(i, 5000)
    assert caplog.text.count("direct_io is ignored") == 1
