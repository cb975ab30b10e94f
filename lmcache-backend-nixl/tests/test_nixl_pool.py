"""A pool follows its index and those of others, and no slot is handed out while one names it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmcache_backend_nixl.index import Entry, Index
from lmcache_backend_nixl.pool import Others, Pool, index_file
from lmcache_backend_nixl.slots import Shape
from lmcache_core.chunks.keys import ChunkKey
from lmcache_core.errors import BackendUnavailable

SLOT = 4096
SHAPE = Shape(SLOT, 2, 1)
KEY, OTHER, THIRD = (ChunkKey(bytes([letter]) * 16) for letter in b"kot")


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    made = Pool(tmp_path, 2, SHAPE, flags=0)
    yield made
    made.close(keep=False)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Pool]:
    """Another process's; a lock doesn't know that it isn't one."""
    made = Pool(tmp_path, 2, SHAPE, flags=0)
    yield made
    made.close(keep=False)


def published(pool: Pool, *keys: ChunkKey) -> list[Entry | None]:
    slots = [slot for slot in pool.reserve([(key, SLOT) for key in keys]) if slot is not None]
    assert len(slots) == len(keys)
    assert all(pool.publish([(slot, key, SLOT) for slot, key in zip(slots, keys, strict=True)]))
    return pool.find(keys)


def test_what_one_pool_publishes_every_pool_finds(pool: Pool, other: Pool, tmp_path: Path) -> None:
    (entry,) = published(pool, KEY)
    assert entry is not None
    assert pool.find([OTHER, KEY]) == other.find([OTHER, KEY]) == [None, entry]
    lookups = Others(tmp_path)
    assert lookups.find([KEY]) == [entry]
    lookups.close()


def test_of_two_values_with_a_name_the_first_stays(pool: Pool) -> None:
    slots = pool.reserve([(KEY, SLOT), (KEY, SLOT)])
    assert None not in slots
    first, second = (slot or 0 for slot in slots)
    assert pool.publish([(first, KEY, SLOT)]) == [True]
    assert pool.publish([(second, KEY, SLOT)]) == [False]
    assert pool.usage() == (1, SLOT)
    assert pool.reserve([(OTHER, SLOT)]) == [second]


def test_what_was_asked_for_goes_last(pool: Pool) -> None:
    published(pool, KEY)
    published(pool, OTHER)
    assert None not in pool.find([KEY])
    published(pool, THIRD)
    assert [entry is None for entry in pool.find([KEY, OTHER, THIRD])] == [False, True, False]


def test_the_end_of_a_prefix_goes_first(pool: Pool) -> None:
    published(pool, KEY, OTHER)
    published(pool, THIRD)
    assert [entry is None for entry in pool.find([KEY, OTHER])] == [False, True]


def test_what_does_not_fit_gets_no_slot(pool: Pool) -> None:
    assert pool.reserve([(KEY, SLOT + 1), (KEY, 0), (ChunkKey(b"k" * 33), 1)]) == [None] * 3
    slots = pool.reserve([(KEY, 1), (OTHER, 1), (THIRD, 1)])
    assert slots == [0, 1, None]
    pool.give_back(slots)
    assert len([slot for slot in pool.reserve([(KEY, 1), (OTHER, 1)]) if slot is not None]) == 2


def test_another_value_in_a_slot_is_noticed(pool: Pool, other: Pool) -> None:
    (old, _) = published(pool, KEY, OTHER)
    assert old is not None
    assert other.find([KEY]) == [old]
    assert pool.still(KEY, old)
    assert other.still(KEY, old)
    pool.find([OTHER])
    published(pool, THIRD)
    assert not pool.still(KEY, old)
    assert not other.still(KEY, old)
    (new,) = published(pool, KEY)
    assert new != old
    assert not pool.still(KEY, old)
    assert not other.still(KEY, old)


def test_whoever_deletes_deletes_everywhere(pool: Pool, other: Pool) -> None:
    published(pool, KEY)
    published(other, OTHER)
    assert other.delete([KEY, OTHER, THIRD]) == 2
    assert pool.find([KEY, OTHER]) == other.find([KEY, OTHER]) == [None, None]
    assert pool.usage() == other.usage() == (0, 0)
    published(pool, KEY, OTHER)
    published(other, THIRD)
    assert other.delete(None) == 3
    assert pool.find([KEY, OTHER, THIRD]) == [None] * 3
    assert pool.usage() == (0, 0)
    published(pool, KEY, OTHER)  # both slots are free


def test_a_slow_deleter_brings_nothing_back(pool: Pool, other: Pool, tmp_path: Path) -> None:
    """One that found an older value in the slot, and says so only after the newer one's end."""
    (old, _) = published(pool, KEY, OTHER)
    pool.find([OTHER])
    (new,) = published(pool, THIRD)
    assert old is not None
    assert new is not None
    assert old.slot == new.slot
    assert other.delete([THIRD]) == 1
    assert pool.find([THIRD]) == [None]  # from here on the slot may be written to
    slow = Index(index_file(tmp_path, pool.name), pool.name)
    slow.withdraw([old])
    slow.close()
    assert other.find([KEY, THIRD]) == [None, None]


def test_a_pool_that_comes_and_goes_is_noticed(pool: Pool, tmp_path: Path) -> None:
    old = time.time() - 10
    os.utime(tmp_path, (old, old))
    assert pool.find([KEY]) == [None]
    late = Pool(tmp_path, 2, SHAPE, flags=0)
    (entry,) = published(late, KEY)
    assert pool.find([KEY]) == [entry]
    late.close(keep=False)
    assert pool.find([KEY]) == [None]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_pool_that_was_left_is_read_and_then_taken_over(pool: Pool, tmp_path: Path) -> None:
    late = Pool(tmp_path, 2, SHAPE, flags=0)
    (entry,) = published(late, KEY)
    late.close(keep=True)
    assert pool.find([KEY]) == [entry]
    heir = Pool(tmp_path, 2, SHAPE, flags=0)
    assert heir.name == late.name
    assert heir.find([KEY]) == [entry]
    heir.close(keep=False)


def test_a_pool_that_somebody_removed_is_an_error(tmp_path: Path) -> None:
    pool = Pool(tmp_path, 2, SHAPE, flags=0)
    index_file(tmp_path, pool.name).unlink()
    with pytest.raises(BackendUnavailable, match=r"somebody removed .*pool-.*index.*lmcache clear"):
        pool.find([KEY])
    pool.close(keep=False)


def test_a_pool_that_can_not_grow_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = Pool(tmp_path, 2, SHAPE, flags=0)
    published(pool, KEY)
    pool.close(keep=True)
    with pytest.raises(Exception, match="nixl_pool_size"):
        Pool(tmp_path, 1 << 40, SHAPE, flags=0)
    again = Pool(tmp_path, 2, SHAPE, flags=0)
    assert again.usage() == (1, SLOT)
    again.close(keep=False)
