"""A planner, a mover and two tiers, any part of which fails at any time: right bytes or a miss.

`LMCACHE_TEST_STEPS` is how many steps are tried in all; a test suite tries a few hundred. The seed
is printed by hypothesis when something fails.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from mover_rig import (
    CHUNK,
    ERRORS,
    GROUP,
    WAIT_S,
    Engine,
    Rig,
    altered,
    content,
    eventually,
    loaded,
    raising,
)

from lmcache_core import Paged
from lmcache_core.tiers.sealing import Chunk, Sealer

STEPS_EACH = 25
STEPS = int(os.environ.get("LMCACHE_TEST_STEPS", "300"))
SLOTS = 6
PROMPTS = 4
SERDES = ("odd", "other")
FAILURES = st.sampled_from([*ERRORS, None])


class MoverMachine(RuleBasedStateMachine):
    """Every move may find a part that fails; a load must answer with what was stored, or less."""

    def __init__(self) -> None:
        super().__init__()
        self._patch = pytest.MonkeyPatch()
        self._folder = tempfile.TemporaryDirectory()
        self.rig = Rig(Path(self._folder.name), self._patch)
        self.damage = False
        seal = Sealer.seal
        machine = self

        def sometimes_damaged(self: Sealer, chunk: Chunk, sums: bytes) -> memoryview:
            if machine.damage:
                machine.damage = False
                altered(chunk.payload, 7)
            return seal(self, chunk, sums)

        self._patch.setattr(Sealer, "seal", sometimes_damaged)

    @initialize(keep=st.booleans())
    def open(self, keep: bool) -> None:
        self.cache = self.rig.open("one:odd", "two:other", slots=SLOTS, keep=keep)
        self.keep = keep

    # -- moves -----------------------------------------------------------------------------

    @rule(prompt=st.integers(0, PROMPTS - 1), chunks=st.integers(1, 3))
    def store(self, prompt: int, chunks: int) -> None:
        tokens, kv = self._content(prompt, chunks)
        assert 0 <= self.cache.store(tokens, kv) <= len(tokens)

    @rule(prompt=st.integers(0, PROMPTS - 1), chunks=st.integers(1, 3))
    def load(self, prompt: int, chunks: int) -> None:
        tokens, kv = self._content(prompt, chunks)
        found, into = loaded(self.cache, tokens)
        assert found % CHUNK == 0
        width = len(kv) // 6
        for row in range(6):
            start, size = row * width, found * width // len(tokens)
            assert into[start : start + size] == kv[start : start + size]

    @rule(prompt=st.integers(0, PROMPTS - 1))
    def lookup(self, prompt: int) -> None:
        tokens, _ = self._content(prompt, 3)
        assert 0 <= self.cache.lookup(tokens) <= len(tokens)

    @rule(prompt=st.integers(0, PROMPTS - 1))
    def prefetch(self, prompt: int) -> None:
        tokens, _ = self._content(prompt, 3)
        assert 0 <= self.cache.prefetch(tokens).result(WAIT_S) <= len(tokens)

    @rule()
    def flush(self) -> None:
        assert self.cache.flush(WAIT_S)

    # -- what fails from now on, or no more ------------------------------------------------

    @rule(serde=st.sampled_from(SERDES), error=FAILURES)
    def encode_fails(self, serde: str, error: BaseException | None) -> None:
        self.rig.serdes[serde].on_encode = _call(error)

    @rule(serde=st.sampled_from(SERDES), error=FAILURES)
    def decode_fails(self, serde: str, error: BaseException | None) -> None:
        self.rig.serdes[serde].on_decode = _call(error)

    @rule(serde=st.sampled_from(SERDES), error=FAILURES)
    def limit_fails(self, serde: str, error: BaseException | None) -> None:
        self.rig.serdes[serde].on_limit = _call(error)

    @rule(serde=st.sampled_from(SERDES), answer=st.sampled_from([None, -1, 1 << 40]))
    def encode_answers(self, serde: str, answer: int | None) -> None:
        self.rig.serdes[serde].answers = answer

    @rule()
    def host_memory_changes(self) -> None:
        self.damage = True

    @rule(store=st.sampled_from(["one", "two"]), seed=st.integers(0, 99))
    def a_store_damages(self, store: str, seed: int) -> None:
        values = self.rig.stores[store].values
        draw = random.Random(seed)
        for name in sorted(values)[:3]:
            value = bytearray(values[name])
            value[draw.randrange(len(value))] ^= 1 << draw.randrange(8)
            values[name] = bytes(value)

    @rule(prompt=st.integers(0, PROMPTS - 1), error=st.sampled_from(ERRORS[:3]))
    def gather_fails(self, prompt: int, error: BaseException) -> None:
        tokens, kv = self._content(prompt, 3)
        engine = Engine(kv, len(tokens))
        engine.sums = lambda _: raising(error)()
        assert self.cache.store(tokens, Paged(engine, [0], len(tokens))) == 0

    @rule(prompt=st.integers(0, PROMPTS - 1), error=st.sampled_from(ERRORS[:3]))
    def scatter_fails(self, prompt: int, error: BaseException) -> None:
        tokens, kv = self._content(prompt, 3)
        engine = Engine(bytearray(len(kv)), len(tokens))
        engine.positions = lambda _: raising(error)()
        assert self.cache.load(tokens, Paged(engine, [0], len(tokens))) == 0

    # -- always ----------------------------------------------------------------------------

    @invariant()
    def there_are_never_more_chunks_than_slots(self) -> None:
        if cache := self.__dict__.get("cache"):
            assert cache._running.planner.chunks <= SLOTS

    def teardown(self) -> None:
        try:
            if cache := self.__dict__.get("cache"):
                for serde in self.rig.serdes.values():
                    serde.on_encode = serde.on_decode = serde.on_limit = lambda: None
                    serde.answers = None
                self.damage = False
                assert cache.flush(WAIT_S)
                eventually(lambda: cache._running.mover.leases == 0)
                cache.lookup(content(1, 99)[0])  # takes the last report in
                assert cache._running.planner.pending == 0
                assert cache.store(*content(SLOTS, 98)) == SLOTS * CHUNK  # every slot can be had
                assert cache.flush(WAIT_S)
                assert all(n != "leases_forgotten" for n, _ in cache.counters.snapshot())
                cache.close()
        finally:
            self._patch.undo()
            self._folder.cleanup()

    @staticmethod
    def _content(prompt: int, chunks: int) -> tuple[list[int], bytearray]:
        """A prompt's first chunks, so that prompts of one number are prefixes of each other."""
        tokens, whole = content(3, prompt)
        width, rows = len(whole) // 6, range(6)
        part = width * chunks // 3
        kv = b"".join(whole[row * width : row * width + part] for row in rows)
        assert len(kv) == GROUP.chunk_bytes(chunks * CHUNK)
        return tokens[: chunks * CHUNK], bytearray(kv)


def _call(error: BaseException | None) -> Callable[[], object]:
    return (lambda: None) if error is None else raising(error)


TestMover = MoverMachine.TestCase
TestMover.settings = settings(
    max_examples=max(1, STEPS // STEPS_EACH),
    stateful_step_count=STEPS_EACH,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
