"""Files are named by their contents, and hashed once."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lmcache_core.chunks import digests as module
from lmcache_core.chunks.digests import PIECE_BYTES, FileDigests
from lmcache_core.errors import UnnamedError

LATER = 4e9
"""A clock by which every file has been left alone for long."""


def _digest(content: bytes) -> str:
    """The definition, plainly."""
    state = hashlib.sha256(b"lmcache-file-1" + len(content).to_bytes(8, "little"))
    for start in range(0, len(content), PIECE_BYTES):
        state.update(hashlib.sha256(content[start : start + PIECE_BYTES]).digest())
    return state.hexdigest()


@pytest.fixture
def kept(tmp_path: Path) -> FileDigests:
    return FileDigests(tmp_path / "kept", clock=lambda: LATER)


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


def test_golden(tmp_path: Path, kept: FileDigests) -> None:
    """Names on disk and in stores are made of these: they don't change."""
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "abc").write_bytes(b"abc")
    assert kept.of([tmp_path / "empty", tmp_path / "abc"]).digests == (
        "a4548586c45f14bce54fe7774e60f8a67a832b7af2bb4ce0cf2c93c997c6ac2a",
        "75b3be0df5873e5337584d8ef63aa2126b54db15558e0f1ae50de612e3055e0b",
    )


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1])
def test_every_byte_counts(tmp_path: Path, kept: FileDigests, size: int) -> None:
    content = bytearray(os.urandom(size))
    file = tmp_path / "file"
    file.write_bytes(content)
    assert kept.of([file]).digests == (_digest(bytes(content)),)
    if size:
        content[-1] ^= 1
        file.write_bytes(content)
        assert kept.of([file]).digests == (_digest(bytes(content)),)


def test_nothing_is_hashed_twice(tmp_path: Path, kept: FileDigests) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 1000)
    first = kept.of([file])
    assert (first.hashed_bytes, first.kept) == (1000, True)
    again = FileDigests(tmp_path / "kept", clock=lambda: LATER).of([file])
    assert (again.hashed_bytes, again.total_bytes) == (0, 1000)
    assert again.digests == first.digests
    link = tmp_path / "link"
    link.symlink_to(file)
    assert kept.of([link]).hashed_bytes == 0, "a link is the file that it leads to"


def test_a_change_in_place_is_seen(tmp_path: Path, kept: FileDigests) -> None:
    """Same name, inode, length and time of modification: the time of change tells."""
    file = tmp_path / "file"
    file.write_bytes(b"one")
    first = kept.of([file])
    before = file.stat()
    while file.stat().st_ctime_ns == before.st_ctime_ns:
        with file.open("r+b") as opened:
            opened.write(b"two")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert kept.of([file]).digests != first.digests


def test_what_may_change_within_the_clocks_tick_is_not_kept(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"one")
    written = file.stat().st_ctime_ns / 1e9
    early = FileDigests(tmp_path / "kept", clock=lambda: written + 0.01)
    assert not early.of([file]).kept
    assert _entries(tmp_path / "kept") == []
    assert FileDigests(tmp_path / "kept", clock=lambda: written + 3).of([file]).kept


@pytest.mark.parametrize("damage", [b"", b"garbage", None, "other"])
def test_a_damaged_entry_is_ignored(
    tmp_path: Path, kept: FileDigests, damage: bytes | str | None
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"one")
    right = kept.of([file]).digests
    (entry,) = _entries(tmp_path / "kept")
    if damage == "other":  # a whole entry, of another file
        (tmp_path / "two").write_bytes(b"two")
        kept.of([tmp_path / "two"])
        (other,) = set(_entries(tmp_path / "kept")) - {entry}
        entry.write_bytes(other.read_bytes())
    elif damage is None:
        text = entry.read_text()
        entry.write_text(("0" if text[0] != "0" else "1") + text[1:])
    else:
        entry.write_bytes(damage)
    again = kept.of([file])
    assert again.digests == right
    assert again.hashed_bytes == 3


def test_without_a_place_to_keep_them(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    (tmp_path / "no folder").write_bytes(b"")
    nowhere = FileDigests(tmp_path / "no folder" / "kept", clock=lambda: LATER)
    found = nowhere.of([tmp_path / "file"])
    assert found.digests == (_digest(b"abc"),)
    assert not found.kept


def test_several_at_once_hash_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes while another hashes waits for what that one keeps."""
    file = tmp_path / "file"
    file.write_bytes(b"x" * 1000)
    hashing, go_on = threading.Event(), threading.Event()
    plain = module._piece
    calls: list[int] = []

    def slow(file: Path, start: int) -> bytes:
        calls.append(start)
        hashing.set()
        assert go_on.wait(30)
        return plain(file, start)

    monkeypatch.setattr(module, "_piece", slow)
    found: list[module.Digested] = []

    def digest() -> None:
        found.append(FileDigests(tmp_path / "kept", clock=lambda: LATER).of([file]))

    threads = [threading.Thread(target=digest) for _ in range(3)]
    threads[0].start()
    assert hashing.wait(30)
    for thread in threads[1:]:
        thread.start()
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert len(calls) == 1
    assert len({one.digests for one in found}) == 1
    assert sorted(one.hashed_bytes for one in found) == [0, 0, 1000]


def test_a_process_that_died_hashing_stops_nobody(tmp_path: Path, kept: FileDigests) -> None:
    """The kernel gives its lock back; what it was about to keep isn't visible."""
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    program = (
        "import os, pathlib, sys\n"
        "from lmcache_core.chunks import digests\n"
        "digests._piece = lambda file, start: os._exit(7)\n"
        "digests.FileDigests(pathlib.Path(sys.argv[1])).of([pathlib.Path(sys.argv[2])])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "kept"), str(file)], check=False
    )
    assert done.returncode == 7
    assert kept.of([file]).digests == (_digest(b"abc"),)


def test_locks_that_do_not_work(
    tmp_path: Path, kept: FileDigests, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / "file").write_bytes(b"abc")
    assert kept.of([tmp_path / "file"]).kept


def test_a_file_that_changes_while_it_is_read(
    tmp_path: Path, kept: FileDigests, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 1000)
    plain = module._piece

    def meanwhile(path: Path, start: int) -> bytes:
        digest = plain(path, start)
        file.write_bytes(b"y" * 1001)
        return digest

    monkeypatch.setattr(module, "_piece", meanwhile)
    with pytest.raises(UnnamedError, match="changes while it is read"):
        kept.of([file])
    assert _entries(tmp_path / "kept") == []


def test_a_file_that_is_gone(tmp_path: Path, kept: FileDigests) -> None:
    with pytest.raises(UnnamedError, match="No such file"):
        kept.of([tmp_path / "gone"])


def test_old_ones_are_forgotten(
    tmp_path: Path, kept: FileDigests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_KEPT", 10)
    for number in range(40):
        file = tmp_path / f"file{number}"
        file.write_bytes(b"%d" % number)
        kept.of([file])
    assert len(_entries(tmp_path / "kept")) <= 12
    assert kept.of([file]).hashed_bytes == 0
