"""A state machine of the server's values: who holds what, whatever fails in between.

`LMCACHE_TEST_STEPS` is how many steps are tried in all; a test suite tries a thousand. The seed
of a run is printed, and `LMCACHE_TEST_SEED` repeats it.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lmcache_backend_lm.arena import Arena, whole_pages
from lmcache_backend_lm.values import Held, Value, Values
from lmcache_core.chunks.keys import ChunkKey
from lmcache_core.contracts.storage import StoreOutcome
from lmcache_core.errors import LeaseError
from lmcache_core.metrics import Counters

STEPS = int(os.environ.get("LMCACHE_TEST_STEPS", "1000"))
SEED = int(os.environ.get("LMCACHE_TEST_SEED") or random.randrange(1 << 32))
LENGTH = 50

PAGE = 4096
PAGES = 12
SPACES = ("0" * 16, "1" * 16)

spaces = st.sampled_from((SPACES[0], SPACES[0], SPACES[0], SPACES[1]))
names = st.integers(0, 3).map(lambda n: ChunkKey(bytes([n]) * 16))
sizes = st.sampled_from([PAGE - 1, 3 * PAGE + 5, *(n * PAGE for n in (2, 4, 5, PAGES, 99))])
places = st.integers(0, 99)


@dataclass
class Request:
    """One that holds something. ``fills``: its values aren't complete yet."""

    held: Held
    fills: bool
    contents: dict[Value, int] = field(default_factory=dict)
    """The byte that each of its values consists of, from when that was written."""
    over: bool = False


class ValuesMachine(RuleBasedStateMachine):
    """Requests hold, and a model knows what each of them must see."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(PAGES * PAGE)
        self.values = Values(self.arena, Counters())
        self.requests: list[Request] = []
        self.last: dict[tuple[str, ChunkKey, int], int] = {}
        """The byte of the value of a key and length that was stored last."""
        self.written = 0

    def pick(self, place: int, fills: bool) -> Request | None:
        some = [one for one in self.requests if one.fills is fills]
        return some[place % len(some)] if some else None

    def fill(self, value: Value) -> int:
        self.written = self.written % 255 + 1
        for view in self.arena.views(value.parts, value.nbytes):
            view[:] = bytes([self.written]) * len(view)
        return self.written

    # -- moves -----------------------------------------------------------------------------

    @rule()
    def begin_to_store(self) -> None:
        self.requests.append(Request(self.values.hold(), fills=True))

    @rule(place=places, space=spaces, name=names, nbytes=sizes, one_piece=st.booleans())
    def reserve(self, place: int, space: str, name: ChunkKey, nbytes: int, one_piece: bool) -> None:
        if (request := self.pick(place, fills=True)) is None:
            return
        value = request.held.reserve(space, name, nbytes, one_piece=one_piece)
        if isinstance(value, Value):
            request.contents[value] = self.fill(value)
        elif value is StoreOutcome.ALREADY_PRESENT:
            assert self.values.contains(space, [name]) == [True]

    @rule(place=places, space=spaces, name=names, nbytes=sizes, stops=st.integers(0, 3))
    def receive(self, place: int, space: str, name: ChunkKey, nbytes: int, stops: int) -> None:
        """A value that gets its memory as it comes; some stop after so many parts."""
        if (request := self.pick(place, fills=True)) is None:
            return
        held = request.held
        alone = not held.values
        value = held.expect(space, name, nbytes)
        if not isinstance(value, Value):
            return
        assert alone or value.room == nbytes
        while value.room < nbytes:
            before = value.room
            if not stops or not held.grow(value):
                held.discard(value)
                return
            assert before < value.room <= nbytes
            stops -= 1
        request.contents[value] = self.fill(value)

    @rule(space=spaces, name=names, nbytes=sizes)
    def store(self, space: str, name: ChunkKey, nbytes: int) -> None:
        """All of it at once, so that there is always something to read and to evict."""
        read = [value for one in self.requests for value in one.held.values if value]
        read = [value for value in read if value.linked and value.key != name]
        with self.values.hold() as held:
            value = held.reserve(space, name, nbytes)
            assert all(one.linked for one in read)  # nothing that is read is evicted
            if isinstance(value, Value):
                byte = self.fill(value)
                assert held.commit() == [StoreOutcome.STORED]
                self.last[space, name, nbytes] = byte

    @rule(space=spaces, name=names)
    def read(self, space: str, name: ChunkKey) -> None:
        """One of what is there, however long it is."""
        self.acquire(space, [name], PAGES * PAGE)

    @rule(place=places)
    def commit(self, place: int) -> None:
        if (request := self.pick(place, fills=True)) is None:
            return
        waiting = list(request.contents)
        outcomes = request.held.commit()
        assert len(outcomes) == len(waiting)
        for value, outcome in zip(waiting, outcomes, strict=True):
            if outcome is StoreOutcome.STORED:
                self.last[value.space, value.key, value.nbytes] = request.contents[value]
        request.contents = {}
        assert request.held.values == []

    @rule(place=places)
    def drop(self, place: int) -> None:
        if (request := self.pick(place, fills=True)) is not None:
            request.held.drop()
            request.contents = {}

    @rule(space=spaces, some=st.lists(names, unique=True, max_size=4), room=sizes)
    def read_some(self, space: str, some: list[ChunkKey], room: int) -> None:
        self.acquire(space, some, room)

    def acquire(self, space: str, some: list[ChunkKey], room: int) -> None:
        held = self.values.acquire(space, some, [room] * len(some))
        request = Request(held, fills=False)
        for name, value in zip(some, held.values, strict=True):
            if value is not None:
                assert (value.space, value.key) == (space, name)
                assert value.nbytes <= room
                request.contents[value] = self.last[space, name, value.nbytes]
        self.requests.append(request)

    @rule(place=places)
    def hand_on(self, place: int) -> None:
        if (request := self.pick(place, fills=False)) is None:
            return
        other = Request(request.held.handed_on(), fills=False, contents=request.contents)
        request.contents = {}
        self.requests.append(other)

    @rule(place=places, which=places, came=st.lists(st.booleans(), min_size=4, max_size=4))
    def fetch(self, place: int, which: int, came: list[bool]) -> None:
        """What a disk does: memory for what is missing, of which some comes, and is shorter."""
        request = self.pick(place, fills=False)
        if request is None or not request.held.live:
            return
        absent = [i for i, value in enumerate(request.held.values) if value is None]
        space = SPACES[which % 2]
        with self.values.hold() as coming:
            at: list[int] = []
            for i in absent:
                name = ChunkKey(bytes([i + which % 3]) * 16)
                value = coming.reserve(space, name, 2 * PAGE, one_piece=True)
                if isinstance(value, Value):
                    at.append(i)
            mine = [value for value in coming.values if value is not None]
            byte = {value: self.fill(value) for value in mine}
            short = [PAGE + 1 if yes else None for yes, _ in zip(came * 2, mine, strict=False)]
            if which % 5 == 0:  # the disk fails in the middle
                return
            coming.settle(short)
            for value, nbytes in zip(mine, short, strict=True):
                if nbytes is not None:
                    if value.linked:
                        self.last[space, value.key, nbytes] = byte[value]
                    request.contents[value] = byte[value]
            request.held.take_over(coming, at)

    @rule(place=places)
    def release(self, place: int) -> None:
        if self.requests:
            self.end(self.requests.pop(place % len(self.requests)))

    @rule(place=places)
    def fail(self, place: int) -> None:
        """A request ends by an error, wherever it is."""
        if self.requests:
            request = self.requests.pop(place % len(self.requests))
            with pytest.raises(EOFError), request.held:
                raise EOFError
            assert request.held.values == []

    @rule(place=places)
    def release_twice(self, place: int) -> None:
        if self.requests:
            request = self.requests.pop(place % len(self.requests))
            self.end(request)
            with pytest.raises(LeaseError):
                request.held.release()

    @rule(space=spaces, some=st.lists(names, unique=True, max_size=3))
    def delete(self, space: str, some: list[ChunkKey]) -> None:
        there = sum(self.values.contains(space, some))
        assert self.values.delete(space, some) == there
        assert not any(self.values.contains(space, some))

    @rule(space=spaces)
    def clear(self, space: str) -> None:
        held = self.values.usage(space)[0]
        assert self.values.clear(space) == held
        assert self.values.usage(space) == (0, 0)

    @precondition(lambda self: len(self.requests) > 6)
    @rule()
    def let_all_go(self) -> None:
        while self.requests:
            self.end(self.requests.pop())

    def end(self, request: Request) -> None:
        request.held.release()
        assert request.held.values == []

    # -- what holds at any time ------------------------------------------------------------

    @invariant()
    def everybody_sees_what_was_there(self) -> None:
        for request in self.requests:
            for value, byte in request.contents.items():
                seen = b"".join(self.arena.views(value.parts, value.nbytes))
                assert seen == bytes([byte]) * value.nbytes

    @invariant()
    def nothing_is_lost_and_nothing_is_held_twice(self) -> None:
        assert self.values.leases.out == len(self.requests)
        counts: dict[Value, int] = {}
        for request in self.requests:
            for value in request.held.values:
                if value is not None:
                    counts[value] = counts.get(value, 0) + 1
        linked = set(self.values._used)
        for value in linked | counts.keys():
            assert value.leases == counts.get(value, 0)
            assert value.linked is (value in linked)
        parts = sorted(part for value in linked | counts.keys() for part in value.parts)
        used = sum(length for _, length in parts)
        assert self.arena.extents.free_bytes + used == self.arena.capacity
        assert all(a + n <= b for (a, n), (b, _) in pairwise(parts))
        totals = self.values.totals()
        assert totals["server_values"] == len(linked)
        assert totals["server_value_bytes"] == sum(value.nbytes for value in linked)
        assert all(sum(n for _, n in v.parts) >= whole_pages(v.nbytes) for v in linked)

    def teardown(self) -> None:
        for request in self.requests:
            self.end(request)
        for space in SPACES:
            self.values.clear(space)
        assert self.values.leases.out == 0
        assert self.values.totals()["server_unsent_bytes"] == 0
        assert self.arena.extents.free_bytes == self.arena.capacity
        self.arena.close()


def test_values() -> None:
    from hypothesis.stateful import run_state_machine_as_test

    print(f"seed {SEED}, {STEPS} steps")
    run_state_machine_as_test(
        seed(SEED)(ValuesMachine),
        settings=settings(
            max_examples=max(1, STEPS // LENGTH),
            stateful_step_count=LENGTH,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
