"""A pool's index says what its owner wrote, at once, to everybody, and nothing else."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lmcache_backend_nixl import index as module
from lmcache_backend_nixl.index import Entry, Index, OwnIndex
from lmcache_backend_nixl.slots import Shape
from lmcache_core.chunks.keys import ChunkKey

SLOT = 4096
SHAPE = Shape(SLOT, 1, 1)
KEY, OTHER = ChunkKey(b"k" * 16), ChunkKey(b"o" * 18)
RECORD = 64


class Owner(OwnIndex):
    """One that has recovered."""

    def __init__(
        self, path: Path, pool: str, fd: int, slots: int, shape: Shape, there: int
    ) -> None:
        super().__init__(path, pool, fd)
        self.found = self.recover(slots, shape, there)


Own = Callable[..., Owner]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pool-0.index"


@pytest.fixture
def own(path: Path) -> Own:
    def make(slots: int = 4, shape: Shape = SHAPE, there: int = 1000) -> Owner:
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        return Owner(path, "pool", fd, slots, shape, there)

    return make


@pytest.fixture
def reader(path: Path, own: Own) -> Iterator[Index]:
    own().close()
    index = Index(path, "pool")
    yield index
    index.close()


def test_what_is_published_is_read_at_once(own: Own, reader: Index) -> None:
    owner = own()
    (first,) = owner.publish([(2, KEY, 100)])
    reader.refresh()
    assert reader.entries == {KEY: first}
    assert first[:5] == ("pool", 2, ((0, 2 * SLOT),), 1, 100)
    owner.publish([(0, OTHER, SLOT)])
    owner.empty([2])
    reader.refresh()
    assert reader.entries.keys() == {OTHER}
    owner.close()


def test_values_are_told_apart_even_if_the_clock_stands_still(
    own: Own, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.time, "time_ns", lambda: 5)
    owner = own()
    one, two = owner.publish([(0, KEY, 1), (1, OTHER, 1)])
    owner.close()
    again = own()
    (three,) = again.publish([(0, KEY, 1)])
    assert one.nonce < two.nonce < three.nonce
    again.close()


def test_a_restart_finds_the_oldest_first(own: Own) -> None:
    owner = own()
    owner.publish([(3, KEY, 7)])
    owner.publish([(1, OTHER, 8)])
    owner.close()
    again = own()
    assert [(key, entry.slot) for key, entry in again.found.items()] == [(KEY, 3), (OTHER, 1)]
    again.close()


def test_fewer_slots_keep_what_fits_and_other_slots_nothing(own: Own, reader: Index) -> None:
    owner = own()
    owner.publish([(3, KEY, 7), (1, OTHER, 8)])
    owner.close()
    fewer = own(slots=2)
    assert fewer.found.keys() == {OTHER}
    reader.refresh()
    assert reader.entries == fewer.found
    fewer.close()
    more = own(slots=100)
    assert more.found.keys() == {OTHER}
    more.close()
    longer = own(shape=Shape(2 * SLOT, 1, 1))
    assert not longer.found
    (entry,) = longer.publish([(1, KEY, 2 * SLOT)])
    reader.refresh()
    assert reader.entries == {KEY: entry}
    assert entry.places == ((0, 2 * SLOT),)
    longer.close()
    cut = own(shape=Shape(2 * SLOT, 2, 2))
    assert not cut.found
    (entry,) = cut.publish([(3, KEY, 2 * SLOT)])
    assert (entry.places, entry.files) == (((0, 3 * SLOT), (1, 3 * SLOT)), 2)
    cut.close()
    shorter = own(shape=Shape(2 * SLOT, 2, 2), there=3)
    assert not shorter.found
    shorter.close()


def test_a_pool_that_goes_away_is_empty(own: Own, reader: Index) -> None:
    owner = own()
    owner.publish([(0, KEY, 1)])
    reader.refresh()
    assert reader.entries
    owner.vanish()
    owner.close()
    reader.refresh()
    assert not reader.entries


def test_somebody_else_withdraws_a_value_and_no_later_one(own: Own, reader: Index) -> None:
    owner = own()
    (old, kept) = owner.publish([(0, KEY, 1), (1, OTHER, 1)])
    held = {KEY: old, OTHER: kept}
    assert owner.withdrawn(held.items()) == []
    reader.refresh()
    reader.withdraw([old])
    assert owner.withdrawn(held.items()) == [KEY]
    assert owner.withdrawn(held.items()) == []
    reader.refresh()
    assert reader.entries == {OTHER: kept}
    (new,) = owner.publish([(0, KEY, 1)])
    reader.withdraw([old])  # who was slow
    assert owner.withdrawn([(KEY, new)]) == []
    reader.refresh()
    assert reader.entries == {KEY: new, OTHER: kept}
    owner.close()


def test_what_was_withdrawn_while_nobody_had_the_pool_stays_away(own: Own, reader: Index) -> None:
    owner = own()
    entries = owner.publish([(0, KEY, 1), (1, OTHER, 1)])
    owner.close()
    reader.refresh()
    reader.withdraw(entries[:1])
    again = own()
    assert again.found.keys() == {OTHER}
    again.close()


def test_a_key_that_is_there_twice_is_there_once_after_a_restart(own: Own, reader: Index) -> None:
    """As after an error in the middle of `publish`, which leaves the slot out of use."""
    owner = own()
    owner.publish([(0, KEY, 1)])
    owner.publish([(2, KEY, 1)])
    owner.close()
    again = own()
    assert len(again.found) == 1
    again.empty([entry.slot for entry in again.found.values()])
    reader.refresh()
    assert reader.entries == {}
    again.close()


@pytest.mark.parametrize("at", range(RECORD - 8))
def test_half_a_record_is_none(own: Own, reader: Index, at: int) -> None:
    """Each byte of it counts, but for `withdrawn`."""
    owner = own()
    owner.publish([(1, KEY, 100)])
    content = bytearray(reader.path.read_bytes())
    content[2 * RECORD + at] ^= 0x40
    reader.path.write_bytes(content)
    reader.refresh()
    assert reader.entries == {}
    owner.close()
    again = own()
    assert again.found == {}
    again.close()


def test_nonsense_is_nothing(own: Own, reader: Index) -> None:
    """Random bytes, short files, lengths that no slot has: never an error, never an entry."""
    chance = random.Random(0)
    owner = own()
    owner.publish([(1, KEY, 100)])
    owner.close()
    good = reader.path.read_bytes()
    for round_ in range(2000):
        content = bytearray(good)
        for _ in range(chance.randint(1, 8)):
            content[chance.randrange(RECORD, len(content))] = chance.randrange(256)
        content[32:40] = struct.pack("<Q", round_ + 1)
        reader.path.write_bytes(content[: chance.randint(0, len(content))])
        reader.refresh()
        assert all(0 < entry.nbytes <= SLOT for entry in reader.entries.values())
    reader.path.write_bytes(b"")
    reader.refresh()
    assert reader.entries == {}


def test_a_thousand_changes_leave_a_reader_with_the_same(own: Own) -> None:
    """What a reader has pieced together from differences is what one who starts now reads."""
    chance = random.Random(1)
    owner = own(slots=300)
    there: dict[int, tuple[ChunkKey, Entry]] = {}
    follower = Index(owner.path, "pool")
    for _ in range(1000):
        slot = chance.randrange(300)
        if slot in there:
            owner.empty([slot])
            del there[slot]
        else:
            key = ChunkKey(chance.randbytes(16))
            (entry,) = owner.publish([(slot, key, chance.randint(1, SLOT))])
            there[slot] = key, entry
        if chance.random() < 0.3:
            follower.refresh()
            assert follower.entries == dict(there.values())
    fresh = Index(owner.path, "pool")
    fresh.refresh()
    assert fresh.entries == dict(there.values())
    for index in (follower, fresh):
        index.close()
    owner.close()


WRITER = """
import os, sys
from pathlib import Path
from lmcache_backend_nixl.index import OwnIndex
from lmcache_backend_nixl.slots import Shape
from lmcache_core.chunks.keys import ChunkKey
owner = OwnIndex(Path(sys.argv[1]), "pool", os.open(sys.argv[1], os.O_RDWR | os.O_CREAT))
owner.recover(8, Shape(4096, 1, 1), 8)
data = open(sys.argv[2], "r+b", buffering=0)
number = 0
print("ready", flush=True)
while True:
    number += 1
    slot = number % 8
    owner.empty([slot])
    data.seek(slot * 8)
    data.write(number.to_bytes(8, "little"))
    owner.publish([(slot, ChunkKey(number.to_bytes(16, "little")), 8)])
"""


def test_what_stands_the_same_before_and_after_is_what_was_read(path: Path, tmp_path: Path) -> None:
    """A process overwrites eight slots as fast as it can; another one never reads a wrong value."""
    data = tmp_path / "data"
    data.write_bytes(bytes(64))
    command = [sys.executable, "-c", WRITER, path, data]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        index, fd = Index(path, "pool"), os.open(data, os.O_RDONLY)
        read = overtaken = 0
        wrong: list[tuple[ChunkKey, bytes]] = []
        while read < 500:
            index.refresh()
            for key, entry in list(index.entries.items()):
                if (read + overtaken) % 20 == 0:
                    time.sleep(0.001)  # on a busy machine nothing happens in between otherwise
                value = os.pread(fd, 8, entry.slot * 8)
                index.refresh()
                if index.entries.get(key) != entry:
                    overtaken += 1
                    continue
                read += 1
                if value != key[:8]:
                    wrong.append((key, value))
        writer.kill()
    index.close()
    os.close(fd)
    assert not wrong
    assert overtaken, "nothing was ever overwritten while it was read"
