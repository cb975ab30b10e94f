"""What a folder holds, whoever writes there: the ledger, its lock, and who is alive."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import xxhash

from lmcache_core.builtin.filesystem_io import ChunkFiles
from lmcache_core.builtin.filesystem_ledger import Removal, Space, UsageLedger
from lmcache_core.builtin.filesystem_usage import BLOCKS, LOCK_PATIENCE_S, FolderUsage

A, B = "a" * 16, "b" * 16
KIB = 1024


def usage(top: Path, space: str = A, most: int | None = 100 * KIB, **options: Any) -> FolderUsage:
    return FolderUsage(top, space, ChunkFiles("disk", direct=False, fsync=False), most, **options)


def ledger(top: Path) -> UsageLedger:
    found = UsageLedger.loaded((top / ".usage").read_bytes())
    assert found is not None
    return found


def wrote(one: FolderUsage, nbytes: int) -> None:
    """What a store does that writes ``nbytes``."""
    assert one.reserve(nbytes)
    one.release(nbytes, written=True)


# -- the ledger ----------------------------------------------------------------------------


def test_a_ledger_is_read_as_it_was_written() -> None:
    one = UsageLedger(True, {A: Space(5, 9), B: Space()}, {"0" * 16: (A, 7)})
    assert UsageLedger.loaded(one.dumped()) == one
    assert len(one.dumped()) == 4096
    assert one.total == 12


def test_a_damaged_ledger_is_none_at_all() -> None:
    data = UsageLedger(True, {A: Space(5, 9)}, {"0" * 16: (A, 7)}).dumped()
    seeds = random.Random(1)
    for _ in range(2000):
        damaged = bytearray(data)
        damaged[seeds.randrange(200)] ^= 1 << seeds.randrange(8)
        found = UsageLedger.loaded(bytes(damaged))
        assert found is None or found.dumped() == data  # blanks at the end
    assert all(UsageLedger.loaded(data[:end]) is None for end in range(len(data.rstrip())))


@pytest.mark.parametrize(
    "facts",
    [
        [],
        {},
        {"counted": True, "spaces": [], "writers": {}},
        {"counted": True, "spaces": {A: [1]}, "writers": {"0" * 16: [A, -1]}},
        {"counted": True, "spaces": {A: [1, True]}, "writers": {}},
        {"counted": True, "spaces": {"../etc": [1, 1]}, "writers": {}},
        {"counted": True, "spaces": {}, "writers": {"../../x": [A, 1]}},
        {"counted": True, "spaces": {}, "writers": {"0" * 16: [A]}},
        {"counted": True, "spaces": {}, "writers": {"0" * 16: ["../elsewhere", 1]}},
    ],
)
def test_a_ledger_that_says_something_else(facts: object) -> None:
    text = json.dumps(facts).encode()
    line = text + b"\n" + xxhash.xxh3_64_hexdigest(text).encode() + b"\n"
    assert UsageLedger.loaded(line) is None


# -- writers -------------------------------------------------------------------------------


def test_writers_share_the_bound(tmp_path: Path) -> None:
    one, other = usage(tmp_path, A), usage(tmp_path, B)
    assert one.open()
    one.end_count({}, {}, whole=True)
    assert not other.open()
    assert one.take(60 * KIB) == 0
    wrote(one, 60 * KIB)
    assert other.take(50 * KIB) == 10 * KIB
    assert other.take(40 * KIB) == 0
    wrote(other, 40 * KIB)
    one.close()
    other.close()
    assert {name: space.nbytes for name, space in ledger(tmp_path).spaces.items()} == {
        A: 60 * KIB,
        B: 40 * KIB,
    }
    assert ledger(tmp_path).writers == {}
    assert list((tmp_path / ".writers").iterdir()) == []


def test_a_store_takes_no_file_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, locks, flock = usage(tmp_path, most=1 << 30), list[int](), fcntl.flock
    one.open()

    def counted(fd: int, how: int) -> None:
        locks.append(how)
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", counted)
    for _ in range(1000):
        if not one.reserve(KIB):
            assert one.take(KIB) == 0
            assert one.reserve(KIB)
        one.release(KIB, written=True)
    assert len(locks) == 1  # a block is 16 MiB here


def test_what_all_set_aside_is_a_small_part_of_the_bound(tmp_path: Path) -> None:
    """However many they are: it is room that nobody else has."""
    writers = [usage(tmp_path, f"{i:016x}", most=1 << 20) for i in range(32)]
    for one in writers:
        one.open()
        assert one.take(1) == 0
    assert ledger(tmp_path).total < (1 << 20) // BLOCKS * 5
    for one in writers:
        one.close()


def test_room_of_stores_that_failed_is_room(tmp_path: Path) -> None:
    one = usage(tmp_path)
    one.open()
    assert one.take(100 * KIB) == 0
    assert one.reserve(100 * KIB)
    assert not one.reserve(1)
    one.release(100 * KIB, written=False)
    wrote(one, 100 * KIB)
    assert one.take(1) > 0
    one.removed(30 * KIB)
    assert one.take(30 * KIB) == 0
    wrote(one, 30 * KIB)
    assert one.take(1) > 0


def test_what_was_removed_before_a_count_is_not_taken_off_after_it(tmp_path: Path) -> None:
    """Who counts doesn't see the file any more; the report that it is gone comes later."""
    one, other = usage(tmp_path, A), usage(tmp_path, B)
    one.open()
    other.open()
    count = one.end_count({A: 0, B: 50 * KIB}, {})
    removal = Removal(B, 10 * KIB, count)
    other.end_count({B: 40 * KIB}, other.start_count())
    one.take(0, [removal])
    assert ledger(tmp_path).spaces[B].nbytes == 40 * KIB
    other.removed(10 * KIB)
    one.end_count({B: 30 * KIB}, one.start_count())
    other.take(0)
    assert ledger(tmp_path).spaces[B].nbytes == 30 * KIB


def test_a_count_adds_what_was_written_meanwhile(tmp_path: Path) -> None:
    one, other = usage(tmp_path), usage(tmp_path)
    one.open()
    other.open()
    marks = one.start_count()
    other.take(10 * KIB)
    wrote(other, 10 * KIB)
    other.close()
    one.end_count({A: 20 * KIB}, marks)
    assert ledger(tmp_path).spaces[A].nbytes == 30 * KIB


KILLED = """
import os, sys
from pathlib import Path
from lmcache_core.builtin.filesystem_io import ChunkFiles
from lmcache_core.builtin.filesystem_usage import FolderUsage
one = FolderUsage(Path(sys.argv[1]), "b" * 16, ChunkFiles("x", direct=False, fsync=False), 102400)
one.open()
one.take(30 * 1024)
os.kill(os.getpid(), 9)
"""


def test_what_a_killed_writer_set_aside_counts_until_it_is_counted(tmp_path: Path) -> None:
    one = usage(tmp_path)
    one.open()
    one.end_count({}, {}, whole=True)
    code = [sys.executable, "-c", KILLED, str(tmp_path)]
    assert subprocess.run(code, timeout=60, check=False).returncode == -9
    assert {found.space: found.alive for found in one.standing()} == {A: True, B: False}
    assert one.take(71 * KIB) == KIB
    one.end_count({B: 0}, one.start_count())
    assert one.take(71 * KIB) == 0
    assert len(list((tmp_path / ".writers").iterdir())) == 1
    one.close()


def test_who_finds_nobody_counts(tmp_path: Path) -> None:
    for whole in (True, True):
        one = usage(tmp_path)
        assert one.open() is whole
        one.end_count({}, {}, whole=True)
        second = usage(tmp_path)
        assert second.open() is False
        second.close()
        one.close()


def test_a_ledger_that_was_lost_is_counted_again(tmp_path: Path) -> None:
    one = usage(tmp_path)
    one.open()
    one.end_count({B: KIB}, {}, whole=True)
    (tmp_path / ".usage").write_bytes(b"nonsense")
    assert one.take(KIB) == 0
    assert one.uncounted
    one.end_count({B: KIB}, {}, whole=True)
    assert not one.uncounted
    assert ledger(tmp_path).spaces[B].nbytes == KIB


def test_a_namespace_retires_when_nobody_writes_there(tmp_path: Path) -> None:
    one, other, cleaned = usage(tmp_path, A), usage(tmp_path, B), list[str]()
    one.open()
    other.open()
    one.retire(B, lambda: cleaned.append("living"))
    other.close()
    one.retire(B, lambda: cleaned.append("gone"))
    assert cleaned == ["gone"]
    assert list(ledger(tmp_path).spaces) == [A]


# -- the lock ------------------------------------------------------------------------------


def test_a_holder_that_does_not_go_on_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    now = [0.0]
    one = usage(
        tmp_path,
        clock=lambda: now[0],
        sleep=lambda seconds: now.__setitem__(0, now[0] + seconds),
    )
    one.open()
    fd = os.open(tmp_path / ".usage", os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(OSError, match="doesn't go on") as caught:
        one.take(KIB)
    assert caught.value.errno == errno.ETIMEDOUT
    assert LOCK_PATIENCE_S < now[0] < 1.1 * LOCK_PATIENCE_S
    os.close(fd)
    assert one.take(KIB) == 0


def test_without_locks_each_process_keeps_to_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    one = usage(tmp_path)
    assert one.open()
    one.end_count({A: 90 * KIB}, {}, whole=True)
    assert one.take(10 * KIB) == 0
    wrote(one, 10 * KIB)
    assert one.take(KIB) >= KIB
    assert caplog.text.count("has no locks") == 1
    one.close()
