"""What a pool holds follows the links, and no slot is handed out while one leads to it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lmcache_backend_nixl.pool import Entry, Links, Pool
from lmcache_core.keys import ChunkKey

SLOT = 4096
KEY, OTHER = ChunkKey(b"k" * 16), ChunkKey(b"o" * 16)


@pytest.fixture
def links(tmp_path: Path) -> Links:
    made = Links(tmp_path)
    made.make_folders()
    return made


@pytest.fixture
def pool(links: Links) -> Pool:
    return Pool(links, 1, SLOT, flags=0)


def published(pool: Pool, key: ChunkKey) -> Entry:
    entry = pool.reserve(SLOT)
    assert entry is not None
    assert pool.publish(key, entry)
    return entry


def test_a_link_reads_as_it_was_written(links: Links, pool: Pool) -> None:
    entry = published(pool, KEY)
    assert links.read(KEY) == entry == Entry.parse(entry.text)
    assert pool.entries([OTHER, KEY]) == [None, entry]
    pool.close(keep=False)


def test_an_entry_that_is_there_stays(links: Links, pool: Pool) -> None:
    entry = published(pool, KEY)
    other = Entry.of("0" * 16, 1, 0, SLOT)
    assert not links.publish(KEY, other)
    assert links.read(KEY) == entry
    pool.close(keep=False)


def test_what_was_asked_for_goes_last(links: Links) -> None:
    pool = Pool(links, 2, SLOT, flags=0)
    published(pool, KEY)
    published(pool, OTHER)
    assert None not in pool.entries([KEY])
    published(pool, ChunkKey(b"n" * 16))
    assert [links.read(key) is None for key in (KEY, OTHER)] == [False, True]
    pool.close(keep=False)


def test_what_has_its_link_is_not_forgotten(links: Links, pool: Pool) -> None:
    entry = published(pool, KEY)
    pool.forget(KEY)  # as somebody does who looked before it was published
    assert pool.usage() == (1, SLOT)
    assert pool.still(KEY, entry)
    links.remove(KEY)
    pool.forget(KEY)
    assert pool.usage() == (0, 0)
    assert not pool.still(KEY, entry)
    pool.close(keep=False)


def test_another_value_in_a_slot_is_noticed(links: Links, pool: Pool) -> None:
    old = published(pool, KEY)
    new = published(pool, OTHER)
    assert new.offset == old.offset
    assert not pool.still(KEY, old)
    links.remove(OTHER)
    assert pool.still(OTHER, new)  # its slot is its own until it is forgotten
    pool.forget(OTHER)
    assert published(pool, KEY) != old
    assert not pool.still(KEY, old)
    pool.close(keep=False)


def test_what_is_no_link_of_ours_is_no_entry(links: Links, pool: Pool, tmp_path: Path) -> None:
    place = tmp_path / "chunks" / KEY.hex()
    assert links.text(KEY) is None
    place.write_text("")
    assert links.text(KEY) == ""
    assert links.read(KEY) is None
    place.unlink()
    os.symlink("nowhere", place)
    assert links.text(KEY) == "nowhere"
    assert pool.entries([KEY]) == [None]
    entry = published(pool, KEY)  # it doesn't stand in the way of one
    assert links.read(KEY) == entry
    pool.close(keep=False)
