"""Each byte of each slot has a place of its own, inside the files."""

from __future__ import annotations

import itertools

import pytest

from lmcache_backend_nixl.slots import Shape, cut

PAGE = 4096
MIB = 1 << 20


@pytest.mark.parametrize("longest", [1, PAGE, PAGE + 1, 2 * MIB + 128, 8 * MIB, 32 * MIB + 128])
@pytest.mark.parametrize("slots", [1, 2, 5, 64])
def test_slots_neither_overlap_nor_leave_room(longest: int, slots: int) -> None:
    shape = Shape.for_values(longest)
    assert longest <= shape.slot_bytes < longest + 2 * PAGE
    assert shape.slot_bytes % (shape.parts * PAGE) == 0
    ranges = sorted(
        (file, offset, offset + shape.slot_bytes // shape.parts)
        for slot in range(slots)
        for file, offset in shape.places(slot)
    )
    assert len(ranges) == slots * shape.parts
    for (file, _, end), (next_file, start, _) in itertools.pairwise(ranges):
        assert file < next_file or end <= start
    each = shape.bytes_in_each(slots)
    assert max(end for *_, end in ranges) <= each
    assert shape.files * each < (slots + shape.files) * shape.slot_bytes
    assert slots <= shape.slots_in(each) < slots + shape.files
    assert shape.slots_in(each - 1) < slots


@pytest.mark.parametrize("nbytes", [1, PAGE, PAGE + 1, 3 * PAGE, 32 * MIB + 128])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_are_all_of_a_value(nbytes: int, parts: int) -> None:
    edges = cut(nbytes, parts)
    assert len(edges) == parts
    assert edges[0][0] == 0
    assert edges[-1][1] == nbytes
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(edges))
    assert all(start % PAGE == 0 or start == nbytes for start, _ in edges)
    assert max(end - start for start, end in edges) < nbytes // parts + PAGE + 1


def test_a_part_fits_its_part_of_the_slot() -> None:
    shape = Shape.for_values(9 * MIB + 5)
    for nbytes in (1, PAGE, 5 * MIB + 1, shape.slot_bytes - 1, shape.slot_bytes):
        assert max(end - start for start, end in cut(nbytes, shape.parts)) <= (
            shape.slot_bytes // shape.parts
        )
