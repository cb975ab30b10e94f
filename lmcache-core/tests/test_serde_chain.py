"""Serdes joined by ``+``."""

from __future__ import annotations

import zlib

import pytest

from lmcache_core.builtin.raw import RawSerde
from lmcache_core.chunks.layout import DType, LayerGroup, full_attention
from lmcache_core.contracts.serde import Serde, SerdeFacts
from lmcache_core.testing.serde import MakeSerde, SerdeTests, decode, encode, ordinary
from lmcache_core.tiers.serde_chain import ChainedSerde, chain_serdes

GROUP = full_attention(layers=2, heads=2, head_size=16, dtype=DType.BF16)


class Deflate(Serde):
    """Any bytes, shorter. Remembers what it was told."""

    def __init__(
        self, facts: SerdeFacts | None = None, key: bytes = b"", start: int | None = None
    ) -> None:
        self.facts, self.key, self.start = facts, key, start

    @property
    def wire_id(self) -> int:
        return 1000

    def bound(self, facts: SerdeFacts) -> Serde:
        return Deflate(facts, self.key)

    def for_chunk(self, key: bytes, start: int | None) -> Serde:
        return Deflate(self.facts, key, start)

    def max_encoded_bytes(self, group: LayerGroup, tokens: int) -> int:
        return group.chunk_bytes(tokens) + 64 + group.chunk_bytes(tokens) // 64

    def encode(self, chunk: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> int:
        packed = zlib.compress(chunk, 1)
        into[: len(packed)] = packed
        return len(packed)

    def decode(self, encoded: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> None:
        engine = zlib.decompressobj()
        try:
            found = engine.decompress(encoded, into.nbytes + 1)
        except zlib.error as error:
            raise ValueError(str(error)) from None
        if len(found) != into.nbytes or not engine.eof or engine.unused_data:
            raise ValueError(f"{len(found)} bytes, not {into.nbytes}")
        into[:] = found


class TestChain(SerdeTests):
    @pytest.fixture
    def make_serde(self) -> MakeSerde:
        return lambda: chain_serdes([Deflate(), RawSerde(), Deflate()])


def test_one_serde_is_itself() -> None:
    only = RawSerde()
    assert chain_serdes([only]) is only


@pytest.mark.parametrize("count", [0, 9])
def test_lengths_that_cannot_be(count: int) -> None:
    with pytest.raises(ValueError, match="1 to 8"):
        chain_serdes([RawSerde()] * count)


def test_each_is_told() -> None:
    facts = SerdeFacts("0123456789abcdef")
    chained = chain_serdes([Deflate(), Deflate()]).bound(facts).for_chunk(b"key", 256)
    assert isinstance(chained, ChainedSerde)
    told = [(one.facts, one.key, one.start) for one in chained._serdes]  # type: ignore[attr-defined]
    assert told == [(facts, b"key", 256)] * 2


def test_other_serdes_in_the_same_number_are_refused() -> None:
    encoded = encode(chain_serdes([Deflate(), RawSerde()]), ordinary(GROUP, 4), GROUP, 4)
    with pytest.raises(ValueError, match="other serdes"):
        decode(chain_serdes([RawSerde(), Deflate()]), encoded, GROUP, 4)
