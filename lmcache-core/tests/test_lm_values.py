"""The server's memory and index: nothing is lost, given out twice or torn."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_core.errors import ConfigError
from lmcache_core.keys import ChunkKey
from lmcache_core.lm.arena import Arena, Extents
from lmcache_core.lm.protocol import MAX_EXTENTS
from lmcache_core.lm.values import Value, Values
from lmcache_core.metrics import Counters
from lmcache_core.storage import StoreOutcome

PAGE = 4096
SPACE = "0" * 16


def key(number: int) -> ChunkKey:
    return ChunkKey(number.to_bytes(16, "little"))


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("take"), st.integers(1, 20 * PAGE)),
            st.tuples(st.just("give"), st.integers(0, 50)),
        ),
        max_size=120,
    )
)
@settings(max_examples=200, deadline=None)
def test_extents_never_overlap_and_nothing_is_lost(steps: list[tuple[str, int]]) -> None:
    total = 64 * PAGE
    extents = Extents(PAGE, PAGE + total)
    held: list[list[tuple[int, int]]] = []
    for what, number in steps:
        if what == "take":
            free = extents.free_bytes
            parts = extents.allocate(number)
            if parts is None:
                assert -(-number // PAGE) * PAGE > free
            else:
                assert len(parts) <= MAX_EXTENTS
                held.append(parts)
        elif held:
            extents.release(held.pop(number % len(held)))
        used = sorted(part for parts in held for part in parts)
        assert all(a + n <= b for (a, n), (b, _) in pairwise(used))
        assert all(a >= PAGE and a + n <= PAGE + total for a, n in used)
        assert extents.free_bytes == total - sum(n for _, n in used)
    for parts in held:
        extents.release(parts)
    assert extents.allocate(total) == [(PAGE, total)]  # all in one piece again


def test_a_value_in_one_piece_is_one_or_none() -> None:
    extents = Extents(0, 4 * PAGE)
    pages = [extents.allocate(PAGE) for _ in range(4)]
    extents.release(pages[0] or [])
    extents.release(pages[2] or [])
    assert extents.allocate(2 * PAGE, one_piece=True) is None
    assert len(extents.allocate(2 * PAGE) or []) == 2


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena(16 * PAGE)
    yield made
    made.close()


@pytest.fixture
def values(arena: Arena) -> Values:
    return Values(arena, Counters())


def put(values: Values, arena: Arena, number: int, nbytes: int) -> StoreOutcome:
    value = values.reserve(SPACE, key(number), nbytes)
    if not isinstance(value, Value):
        return value
    for view in arena.views(value.parts, nbytes):
        view[:] = bytes([number]) * len(view)
    return values.commit(value)


def test_nothing_is_seen_before_it_is_complete(values: Values, arena: Arena) -> None:
    value = values.reserve(SPACE, key(1), PAGE)
    assert isinstance(value, Value)
    assert values.contains(SPACE, [key(1)]) == [False]
    values.release([value])  # its client died
    assert arena.extents.free_bytes == arena.capacity
    assert put(values, arena, 1, PAGE) is StoreOutcome.STORED


def test_the_least_recently_used_goes_first(values: Values, arena: Arena) -> None:
    for number in range(4):
        put(values, arena, number, 4 * PAGE)
    values.release(values.acquire(SPACE, [key(0)], [4 * PAGE]))
    put(values, arena, 9, 4 * PAGE)
    found = values.contains(SPACE, [key(n) for n in (0, 1, 2, 3, 9)])
    assert found == [True, False, True, True, True]


def test_what_is_being_read_stays(values: Values, arena: Arena) -> None:
    for number in range(4):
        put(values, arena, number, 4 * PAGE)
    (leased,) = values.acquire(SPACE, [key(0)], [4 * PAGE])
    assert leased is not None
    assert put(values, arena, 5, 12 * PAGE) is StoreOutcome.STORED
    assert put(values, arena, 6, 16 * PAGE) is StoreOutcome.NOT_ADMITTED
    values.delete(SPACE, [key(0)])
    assert put(values, arena, 7, 16 * PAGE) is StoreOutcome.NOT_ADMITTED
    assert all(view == bytes(len(view)) for view in arena.views(leased.parts, 4 * PAGE))
    values.release([leased])
    assert put(values, arena, 8, 16 * PAGE) is StoreOutcome.STORED


def test_a_value_of_another_length_is_replaced(values: Values, arena: Arena) -> None:
    put(values, arena, 1, PAGE)
    assert put(values, arena, 1, PAGE) is StoreOutcome.ALREADY_PRESENT
    assert put(values, arena, 1, PAGE + 1) is StoreOutcome.STORED
    assert values.usage(SPACE) == (1, PAGE + 1)


def test_two_writers_of_one_key(values: Values, arena: Arena) -> None:
    first, second = (values.reserve(SPACE, key(1), PAGE) for _ in range(2))
    assert isinstance(first, Value)
    assert isinstance(second, Value)
    assert values.commit(second) is StoreOutcome.STORED
    assert values.commit(first) is StoreOutcome.ALREADY_PRESENT
    values.clear(SPACE)
    assert arena.extents.free_bytes == arena.capacity


def test_empty_and_too_long_values_are_not_admitted(values: Values, arena: Arena) -> None:
    for nbytes in (0, arena.capacity + 1):
        assert values.reserve(SPACE, key(1), nbytes) is StoreOutcome.NOT_ADMITTED


def test_others_can_read_the_arena_and_not_write_it(arena: Arena) -> None:
    assert arena.reader is not None
    with mmap.mmap(arena.reader, arena.nbytes, prot=mmap.PROT_READ) as mapping:
        arena.view[-1:] = b"!"
        assert mapping[-1:] == b"!"
    with pytest.raises(PermissionError):
        mmap.mmap(arena.reader, arena.nbytes)


def test_more_memory_than_there_is() -> None:
    with pytest.raises(ConfigError, match="--memory-gib"):
        Arena(1 << 60)
