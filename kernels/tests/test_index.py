"""The native index and eviction orders against core's own."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lmcache_core.chunks.chunk_index import NONE, ChunkState, DictIndex
from lmcache_core.chunks.hashing import PrefixHasher
from lmcache_core.chunks.keys import ChunkKey
from lmcache_core.contracts import eviction
from lmcache_kernels import index as native
from lmcache_kernels.index import ChunkIndex

SLOTS = 24
KEYS = [ChunkKey(random.Random(i).randbytes(16)) for i in range(32)]
STATES = [ChunkState.STORING, ChunkState.FETCHING, ChunkState.READY]
keys = st.sampled_from(KEYS)
slots = st.integers(0, SLOTS - 1)


def answer(call: Callable[[], object]) -> object:
    """What a call answers, or what it says is wrong."""
    try:
        return call()
    except (ValueError, LookupError) as error:
        return type(error), error.args


class IndexMachine(RuleBasedStateMachine):
    """More keys than slots; few slots, so that runs in the table are long and closed often."""

    def __init__(self) -> None:
        super().__init__()
        self.native = ChunkIndex(SLOTS)
        self.model = DictIndex(SLOTS)

    def both(self, call: Callable[[DictIndex | ChunkIndex], object]) -> object:
        expected = answer(lambda: call(self.model))
        assert answer(lambda: call(self.native)) == expected
        return expected

    @rule(key=keys, slot=slots, parent=st.integers(-1, SLOTS - 1), state=st.sampled_from(STATES))
    def insert(self, key: ChunkKey, slot: int, parent: int, state: ChunkState) -> None:
        self.both(lambda index: index.insert(key, slot, NONE if parent == slot else parent, state))

    @rule(slot=slots)
    def remove(self, slot: int) -> None:
        self.both(lambda index: index.remove(slot))

    @rule(slot=slots, state=st.sampled_from(STATES))
    def set_state(self, slot: int, state: ChunkState) -> None:
        self.both(lambda index: index.set_state(slot, state))

    @rule(slot=slots)
    def tree(self, slot: int) -> None:
        self.both(lambda index: index.leaf(slot))
        below = self.both(lambda index: sorted(index.descendants(slot)))
        for order in (self.model.descendants(slot), self.native.descendants(slot)):
            assert sorted(order) == below
            for one in order:
                assert not set(self.model.descendants(one)) & set(order[order.index(one) :])

    @rule(asked=st.lists(keys, max_size=20))
    def prefix(self, asked: list[ChunkKey]) -> None:
        expected = self.model.ready_slots(asked)
        for form in (asked, tuple(asked), b"".join(asked)):
            assert self.native.ready_slots(form) == expected

    @invariant()
    def same(self) -> None:
        assert len(self.native) == len(self.model)
        for key in KEYS:
            assert self.native.find(key) == self.model.find(key)
        for slot in range(SLOTS):
            self.both(lambda index, slot=slot: (index.key(slot), index.state(slot)))  # type: ignore[misc]


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


@pytest.mark.parametrize("kind", [DictIndex, ChunkIndex])
def test_match_stops_at_the_first_miss(kind: Callable[[int], DictIndex | ChunkIndex]) -> None:
    tokens, extras = list(range(64)), {2: b"image"}
    digests = PrefixHasher(b"root", 8, extras).extend(tokens)
    index = kind(8)
    for slot, digest in enumerate(digests[:5]):
        index.insert(digest, slot, slot - 1, ChunkState.READY)
    index.set_state(4, ChunkState.STORING)
    index.insert(digests[6], 6, NONE, ChunkState.READY)
    found, slots = index.match(b"root", tokens, 8, extras)
    assert slots == [0, 1, 2, 3]
    assert found == b"".join(digests[:5])  # the first miss is digested, and nothing after it
    found, slots = index.match(digests[1], tokens[16:], 8, extras, 2)
    assert (found, slots) == (b"".join(digests[2:5]), [2, 3])
    assert index.match(b"other", tokens, 8)[1] == []
    assert index.match(b"root", tokens[:7], 8) == (b"", [])


@pytest.mark.parametrize("kind", [DictIndex, ChunkIndex])
def test_a_hasher_finds_and_digests_no_further(
    kind: Callable[[int], DictIndex | ChunkIndex],
) -> None:
    tokens = list(range(100))
    digests = PrefixHasher(b"root", 8).extend(tokens)
    index = kind(8)
    hasher = PrefixHasher(b"root", 8, index=index)
    assert hasher.find(tokens) == []
    assert hasher.digests == digests[:1]
    for slot, digest in enumerate(digests[:5]):
        index.insert(digest, slot, slot - 1, ChunkState.READY)
    assert hasher.find(tokens[:20]) == [0, 1]
    assert hasher.find(tokens) == [0, 1, 2, 3, 4]
    assert hasher.digests == digests[:6]
    index.remove(2)
    assert hasher.find(tokens) == [0, 1]
    assert hasher.extend(tokens) == digests
    assert hasher.fork(4).find(tokens) == [0, 1]


def test_memory_of_a_slot() -> None:
    assert ChunkIndex(100_000).nbytes / 100_000 < 43


def test_what_cannot_be() -> None:
    index = ChunkIndex(4)
    with pytest.raises(ValueError, match="16 bytes, not 3"):
        index.insert(b"key", 0, NONE, 3)
    for slot in (-1, 4, 2**40):
        with pytest.raises(IndexError, match="there are 4"):
            index.insert(bytes(16), slot, NONE, 3)
        with pytest.raises(IndexError, match="there are 4"):
            index.state(slot)
    with pytest.raises(IndexError, match="there are 4"):
        index.insert(bytes(16), 0, 4, 3)
    for state in (0, 8, -1):
        with pytest.raises(ValueError, match="a state is"):
            index.insert(bytes(16), 0, NONE, state)
    with pytest.raises(ValueError, match="whole number of 16-byte keys"):
        index.ready_slots(bytes(17))
    for count in (0, -1, 2**29):
        with pytest.raises(ValueError, match="an index has"):
            ChunkIndex(count)


def test_threads() -> None:
    """Readers see a key's prefix or nothing while a writer inserts and removes others."""
    index, start = ChunkIndex(1000), threading.Barrier(3)
    draw = random.Random(9)
    lasting = [ChunkKey(draw.randbytes(16)) for _ in range(300)]
    passing = [ChunkKey(draw.randbytes(16)) for _ in range(600)]
    for slot, key in enumerate(lasting):
        index.insert(key, slot, slot - 1, ChunkState.READY)
    joined, done = b"".join(lasting), threading.Event()

    def read() -> int:
        start.wait()
        rounds = 0
        while not done.is_set() or not rounds:
            assert index.ready_slots(joined) == list(range(300))
            rounds += 1
        return rounds

    def write() -> None:
        start.wait()
        try:
            for _ in range(20):
                for slot, key in enumerate(passing, 300):
                    index.insert(key, slot, 299, ChunkState.STORING)
                for slot in range(300, 900):
                    index.remove(slot)
        finally:
            done.set()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(3) as pool:
            results = [pool.submit(read), pool.submit(read), pool.submit(write)]
            for result in results:
                result.result()
    finally:
        sys.setswitchinterval(interval)
    assert len(index) == 300


class OrderMachine(RuleBasedStateMachine):
    """Each native policy does what core's does."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = [
            (eviction.LRU(), native.LRU()),
            (eviction.FIFO(), native.FIFO()),
            (eviction.MRU(), native.MRU()),
        ]

    def all(self, call: Callable[[eviction.OrderedPolicy], object]) -> None:
        for model, own in self.pairs:
            assert answer(lambda own=own: call(own)) == answer(lambda model=model: call(model))  # type: ignore[misc]

    @rule(slot=st.integers(0, 9))
    def added(self, slot: int) -> None:
        self.all(lambda policy: policy.added(slot))

    @rule(slot=st.integers(0, 9))
    def removed(self, slot: int) -> None:
        self.all(lambda policy: policy.removed(slot))

    @rule(slots=st.lists(st.integers(0, 9), max_size=5))
    def touched(self, slots: list[int]) -> None:
        self.all(lambda policy: policy.touched(slots))

    @rule()
    def clear(self) -> None:
        self.all(lambda policy: policy.clear())

    @invariant()
    def same(self) -> None:
        self.all(lambda policy: list(policy.victims()))


TestOrderMachine = OrderMachine.TestCase
TestOrderMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
