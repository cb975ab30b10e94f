"""The server's memory and index: nothing is lost, given out twice or torn."""

from __future__ import annotations

import ctypes
import gc
import io
import mmap
import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from queue import Empty
from typing import TYPE_CHECKING, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_backend_lm import protocol
from lmcache_backend_lm.arena import Arena, Extents
from lmcache_backend_lm.config import LmConfig
from lmcache_backend_lm.incoming import Incoming
from lmcache_backend_lm.line import Line
from lmcache_backend_lm.protocol import MAX_EXTENTS, Op, ProtocolError
from lmcache_backend_lm.service import Epochs, Regions
from lmcache_backend_lm.shared import SharedMemory, Staging
from lmcache_backend_lm.values import Value, Values
from lmcache_core.chunks.keys import ChunkKey
from lmcache_core.contracts.storage import StoreOutcome
from lmcache_core.errors import ConfigError, LeaseError
from lmcache_core.metrics import Counters

if TYPE_CHECKING:
    from lmcache_backend_lm.mapping import ReadOnlyMapping
    from lmcache_core.aio.stream import Stream

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
    assert extents.allocate(2 * PAGE, runs=1) is None
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
    with values.hold() as filling:
        value = filling.reserve(SPACE, key(number), nbytes)
        if not isinstance(value, Value):
            return value
        fill(arena, value, number)
        (outcome,) = filling.commit()
        return outcome


def fill(arena: Arena, value: Value, number: int) -> None:
    for view in arena.views(value.parts, value.nbytes):
        view[:] = bytes([number]) * len(view)


def test_nothing_is_seen_before_it_is_complete(values: Values, arena: Arena) -> None:
    with values.hold() as filling:
        assert isinstance(filling.reserve(SPACE, key(1), PAGE), Value)
        assert values.contains(SPACE, [key(1)]) == [False]
    # Its client died.
    assert arena.extents.free_bytes == arena.capacity
    assert put(values, arena, 1, PAGE) is StoreOutcome.STORED


def test_the_least_recently_used_goes_first(values: Values, arena: Arena) -> None:
    for number in range(4):
        put(values, arena, number, 4 * PAGE)
    values.acquire(SPACE, [key(0)], [4 * PAGE]).release()
    put(values, arena, 9, 4 * PAGE)
    found = values.contains(SPACE, [key(n) for n in (0, 1, 2, 3, 9)])
    assert found == [True, False, True, True, True]


def test_what_is_being_read_stays(values: Values, arena: Arena) -> None:
    for number in range(4):
        put(values, arena, number, 4 * PAGE)
    reading = values.acquire(SPACE, [key(0)], [4 * PAGE])
    (leased,) = reading.values
    assert leased is not None
    assert put(values, arena, 5, 12 * PAGE) is StoreOutcome.STORED
    assert put(values, arena, 6, 16 * PAGE) is StoreOutcome.NOT_ADMITTED
    values.delete(SPACE, [key(0)])
    assert put(values, arena, 7, 16 * PAGE) is StoreOutcome.NOT_ADMITTED
    assert all(view == bytes(len(view)) for view in arena.views(leased.parts, 4 * PAGE))
    reading.release()
    assert put(values, arena, 8, 16 * PAGE) is StoreOutcome.STORED


def test_a_value_of_another_length_is_replaced(values: Values, arena: Arena) -> None:
    put(values, arena, 1, PAGE)
    assert put(values, arena, 1, PAGE) is StoreOutcome.ALREADY_PRESENT
    assert put(values, arena, 1, PAGE + 1) is StoreOutcome.STORED
    assert values.usage(SPACE) == (1, PAGE + 1)


def test_two_writers_of_one_key(values: Values, arena: Arena) -> None:
    with values.hold() as first, values.hold() as second:
        assert isinstance(first.reserve(SPACE, key(1), PAGE), Value)
        assert isinstance(second.reserve(SPACE, key(1), PAGE), Value)
        assert second.commit() == [StoreOutcome.STORED]
        assert first.commit() == [StoreOutcome.ALREADY_PRESENT]
    values.clear(SPACE)
    assert arena.extents.free_bytes == arena.capacity


def test_empty_and_too_long_values_are_not_admitted(values: Values) -> None:
    with values.hold() as filling:
        for nbytes in (0, 1 << 40):
            assert filling.reserve(SPACE, key(1), nbytes) is StoreOutcome.NOT_ADMITTED


# -- who holds what ------------------------------------------------------------------------


def test_what_one_holds_is_given_back_once(values: Values, arena: Arena) -> None:
    put(values, arena, 1, PAGE)
    first, second = (values.acquire(SPACE, [key(1), key(2)], [PAGE, PAGE]) for _ in range(2))
    (value, nothing) = first.values
    assert value is not None
    assert nothing is None
    assert values.totals()["server_leases"] == 2
    first.release()
    with pytest.raises(LeaseError, match="server values"):
        first.release()
    assert value.leases == 1
    second.release()
    assert value.leases == 0
    assert values.totals()["server_leases"] == 0


def test_what_was_handed_on_outlives_the_request(values: Values, arena: Arena) -> None:
    put(values, arena, 1, 4 * PAGE)
    with values.acquire(SPACE, [key(1)], [4 * PAGE]) as request:
        lent = request.handed_on()
        assert not request.values
    (value,) = lent.values  # is its connection's to give back
    assert value is not None
    assert value.leases == 1
    assert put(values, arena, 2, 16 * PAGE) is StoreOutcome.NOT_ADMITTED
    lent.release()
    assert value.leases == 0
    assert put(values, arena, 2, 16 * PAGE) is StoreOutcome.STORED


def test_what_was_read_from_a_file_is_held_where_it_was_missing(
    values: Values, arena: Arena
) -> None:
    put(values, arena, 1, PAGE)
    names = [key(1), key(2), key(3)]
    with values.acquire(SPACE, names, [PAGE] * 3) as found:
        with values.hold() as coming:
            for name in names[1:]:
                value = coming.reserve(SPACE, name, 3 * PAGE, one_piece=True)
                assert isinstance(value, Value)
                fill(arena, value, 7)
            coming.settle([None, PAGE + 1])
            assert coming.values[0] is None
            found.take_over(coming, [1, 2])
        assert [value and value.nbytes for value in found.values] == [PAGE, None, PAGE + 1]
        assert [value.leases for value in found.values if value] == [1, 1]
    assert values.contains(SPACE, names) == [True, False, True]
    assert arena.capacity - arena.extents.free_bytes == 3 * PAGE


def test_what_nobody_gives_back_is_reported_and_stays(
    values: Values, arena: Arena, caplog: pytest.LogCaptureFixture
) -> None:
    put(values, arena, 1, PAGE)
    values.acquire(SPACE, [key(1)], [PAGE])
    gc.collect()
    assert "The lease of server values was forgotten" in caplog.text
    assert values.totals()["server_leases"] == 1
    assert put(values, arena, 2, 16 * PAGE) is StoreOutcome.NOT_ADMITTED


# -- what clients share --------------------------------------------------------------------


def test_an_epoch_is_one_client_s_at_a_time(arena: Arena) -> None:
    epochs = Epochs(arena, 16, Counters())
    first, second = epochs.take(), epochs.take()
    assert first is not None
    assert second is not None
    assert (first.offset, second.offset) in ((0, 8), (8, 0))
    assert epochs.take() is None
    before = first.number
    first.release()
    assert first.number != before  # whoever reads on is told
    with pytest.raises(LeaseError):
        first.release()
    again = epochs.take()
    assert again is not None
    assert again.offset == first.offset
    assert epochs.take() is None
    again.release()
    second.release()
    assert epochs.leases.out == 0
    epochs.close()


def test_a_region_is_mapped_for_as_long_as_one_uses_it() -> None:
    regions = Regions(Counters())
    fd = os.memfd_create("region")
    try:
        os.ftruncate(fd, PAGE)
        first, second = (regions.attach(fd, PAGE) for _ in range(2))
        assert first.address == second.address
        with pytest.raises(OSError, match="less than"):
            regions.attach(fd, 2 * PAGE)
        first.release()
        with pytest.raises(LeaseError):
            first.release()
        assert os.pread(fd, 1, 0) == ctypes.string_at(second.address, 1)
        second.release()
        assert regions.leases.out == 0
        regions.attach(fd, PAGE).release()
    finally:
        os.close(fd)


def test_what_nobody_wrote_is_not_there_and_is_not_touched() -> None:
    fd = os.memfd_create("region")
    try:
        os.ftruncate(fd, 64 * PAGE)
        os.pwrite(fd, bytes(2 * PAGE), 8 * PAGE)
        os.pwrite(fd, b"x", 20 * PAGE)
        before = os.fstat(fd).st_blocks
        regions = Regions(Counters())
        region = regions.attach(fd, 64 * PAGE)
        holds = region.backing.holds
        assert holds(8 * PAGE, 2 * PAGE)
        assert holds(8 * PAGE + 5, PAGE)
        assert holds(8 * PAGE, 1)
        assert holds(20 * PAGE, PAGE)
        assert holds(0, 0)
        assert not holds(0, 1)
        assert not holds(7 * PAGE, 2 * PAGE)
        assert not holds(8 * PAGE, 3 * PAGE)
        assert not holds(0, 64 * PAGE)
        assert not holds(63 * PAGE, PAGE)
        assert os.fstat(fd).st_blocks == before
        region.release()
    finally:
        os.close(fd)


def test_a_slot_that_is_acknowledged_twice_ends_the_connection() -> None:
    """It would soon hold two pieces at once."""
    staging = Staging()
    line = Line(LmConfig(), lambda: False)
    said = protocol.slot(0) * 2
    stream = io.BytesIO(said)

    class Said:
        same_host = True

        def receive(self, views: Sequence[memoryview]) -> int:
            return stream.readinto(views[0])

    line.use(cast("Stream", Said()))
    shared = SharedMemory(cast("ReadOnlyMapping", None), 0, staging, None)
    incoming = Incoming(line, shared, lambda _: (), lambda _: None)
    ack = protocol.parse_header(protocol.header(Op.ACK, 1, meta=4))
    assert staging.take(0) == 0
    incoming.acknowledged(ack)
    with pytest.raises(ProtocolError, match="slot 0 is acknowledged"):
        incoming.acknowledged(ack)
    assert [staging.take(0) for _ in range(staging.slots)] == [*range(1, staging.slots), 0]
    with pytest.raises(Empty):
        staging.take(0)
    staging.close()


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
