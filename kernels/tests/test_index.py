"""The chunk index against a dict."""

from __future__ import annotations

import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lmcache_core.hashing import PrefixHasher
from lmcache_kernels.index import ChunkIndex

READY, STORING = 0, 1
keys = st.integers(0, 39).map(lambda i: random.Random(i).randbytes(16))


class AgainstADict(RuleBasedStateMachine):
    """Room for 32 of 40 keys: full now and then, with long runs to close on erase."""

    def __init__(self) -> None:
        super().__init__()
        self.index = ChunkIndex(32)
        self.model: dict[bytes, tuple[int, int]] = {}

    @rule(key=keys, slot=st.integers(0, 2**29 - 2), state=st.integers(0, 7))
    def insert(self, key: bytes, slot: int, state: int) -> None:
        if key not in self.model and len(self.model) == 32:
            with pytest.raises(ValueError, match="full"):
                self.index.insert(key, slot, state)
            return
        assert self.index.insert(key, slot, state) == (key not in self.model)
        self.model.setdefault(key, (slot, state))

    @rule(key=keys)
    def erase(self, key: bytes) -> None:
        assert self.index.erase(key) == self.model.pop(key, (-1, -1))[0]

    @rule(key=keys, state=st.integers(0, 7))
    def set_state(self, key: bytes, state: int) -> None:
        assert self.index.set_state(key, state) == (key in self.model)
        if key in self.model:
            self.model[key] = (self.model[key][0], state)

    @rule(asked=st.lists(keys, max_size=20), ready=st.integers(0, 7))
    def prefix(self, asked: list[bytes], ready: int) -> None:
        expected: list[int] = []
        for key in asked:
            slot, state = self.model.get(key, (-1, -1))
            if state != ready:
                break
            expected.append(slot)
        for form in (asked, tuple(asked), b"".join(asked)):
            assert self.index.ready_prefix(form, ready) == len(expected)
            assert self.index.ready_slots(form, ready) == expected

    @rule()
    def clear(self) -> None:
        self.index.clear()
        self.model.clear()

    @invariant()
    def same(self) -> None:
        assert len(self.index) == len(self.model)
        for i in range(40):
            key = random.Random(i).randbytes(16)
            slot, state = self.model.get(key, (-1, -1))
            assert (self.index.find(key), self.index.state(key)) == (slot, state)
            assert (key in self.index) == (slot >= 0)


TestAgainstADict = AgainstADict.TestCase
TestAgainstADict.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


def test_match_stops_at_the_first_miss() -> None:
    tokens = list(range(64))
    digests = PrefixHasher(b"root", 8, {2: b"image"}).extend(tokens)
    index = ChunkIndex(8)
    for slot, digest in enumerate(digests[:5]):
        index.insert(digest, slot, READY)
    index.set_state(digests[4], STORING)
    index.insert(digests[6], 6, READY)
    found, hits = index.match(b"root", tokens, 8, {2: b"image"})
    assert hits == 4
    assert found == b"".join(digests[:5])  # the first miss is digested, and nothing after it
    found, hits = index.match(digests[1], tokens[16:], 8, {2: b"image"}, 2)
    assert (found, hits) == (b"".join(digests[2:5]), 2)
    assert index.match(b"other", tokens, 8)[1] == 0
    assert index.match(b"root", tokens[:7], 8) == (b"", 0)


def test_memory_of_a_chunk() -> None:
    assert ChunkIndex(100_000).nbytes / 100_000 < 28


def test_what_cannot_be() -> None:
    index = ChunkIndex(4)
    with pytest.raises(ValueError, match="16 bytes, not 3"):
        index.insert(b"key", 0)
    with pytest.raises(ValueError, match="a slot is"):
        index.insert(bytes(16), -1)
    with pytest.raises(ValueError, match="a slot is"):
        index.insert(bytes(16), 2**29 - 1)
    with pytest.raises(ValueError, match="a state is"):
        index.insert(bytes(16), 0, 8)
    with pytest.raises(ValueError, match="whole number of 16-byte keys"):
        index.ready_prefix(bytes(17))
    for chunks in (0, -1, 2**29):
        with pytest.raises(ValueError, match="room for"):
            ChunkIndex(chunks)


def test_threads() -> None:
    """Readers see a key's prefix or nothing while a writer inserts and erases others."""
    index, start = ChunkIndex(1000), threading.Barrier(3)
    draw = random.Random(9)
    lasting = [draw.randbytes(16) for _ in range(300)]
    passing = [draw.randbytes(16) for _ in range(600)]
    for slot, key in enumerate(lasting):
        index.insert(key, slot, READY)
    joined, done = b"".join(lasting), threading.Event()

    def read() -> int:
        start.wait()
        rounds = 0
        while not done.is_set() or not rounds:
            assert index.ready_prefix(joined) == 300
            rounds += 1
        return rounds

    def write() -> None:
        start.wait()
        try:
            for _ in range(20):
                for slot, key in enumerate(passing):
                    index.insert(key, 1000 + slot, STORING)
                for key in passing:
                    index.erase(key)
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
