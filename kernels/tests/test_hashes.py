"""XXH3-64 and BLAKE2b against the libraries that core uses."""

from __future__ import annotations

import hashlib
import random
from array import array

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_core.chunks.hashing import PrefixHasher
from lmcache_kernels import _native
from lmcache_kernels.index import ChunkIndex

DATA = random.Random(1).randbytes(20_000)


@pytest.mark.parametrize("level", _native.simd_levels())
def test_xxh3_of_every_length(level: str) -> None:
    draw = random.Random(2)
    lengths = [*range(2500), *(draw.randrange(2500, len(DATA)) for _ in range(1000))]
    for length in lengths:
        start = draw.randrange(len(DATA) - length)
        part = memoryview(DATA)[start : start + length]
        assert _native.xxh3_64(part, level) == xxhash.xxh3_64_intdigest(part), length


def test_xxh3_refuses_a_level_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="no SIMD level sse9"):
        _native.xxh3_64(b"", "sse9")


def test_blake2b_of_every_length() -> None:
    for length in range(600):
        expected = hashlib.blake2b(DATA[:length], digest_size=16).digest()
        assert _native.blake2b(DATA[:length], 16) == expected, length


@pytest.mark.parametrize("size", [1, 16, 20, 64])
def test_blake2b_of_every_size(size: int) -> None:
    assert _native.blake2b(DATA, size) == hashlib.blake2b(DATA, digest_size=size).digest()


@pytest.mark.parametrize("size", [0, 65])
def test_blake2b_of_no_such_size(size: int) -> None:
    with pytest.raises(ValueError, match="1 to 64 bytes"):
        _native.blake2b(b"", size)


def test_rfc_7693_appendix_a() -> None:
    assert _native.blake2b(b"abc", 64).hex().startswith("ba80a53f981c4d0d6a2797b69f12f6e9")


ids = st.lists(st.integers(0, 2**32 - 1), max_size=70)


@given(
    tokens=ids,
    root=st.binary(min_size=1, max_size=140),
    chunk_tokens=st.integers(1, 20),
    extras=st.dictionaries(st.integers(0, 5), st.binary(max_size=200), max_size=3),
)
@settings(max_examples=200, deadline=None)
def test_the_chain_is_core_s(
    tokens: list[int], root: bytes, chunk_tokens: int, extras: dict[int, bytes]
) -> None:
    digests = PrefixHasher(root, chunk_tokens, extras).extend(tokens)
    packed = array("I", tokens).tobytes()
    for form in (tokens, tuple(tokens), packed, bytearray(packed), memoryview(packed)):
        actual = ChunkIndex.digests(root, form, chunk_tokens, extras)
        assert actual == b"".join(digests)
    # The rest of a chain, from any chunk on.
    for done in range(1, len(digests)):
        rest = ChunkIndex.digests(
            digests[done - 1], tokens[done * chunk_tokens :], chunk_tokens, extras, done
        )
        assert rest == b"".join(digests[done:])


def test_tokens_that_are_not() -> None:
    numpy = pytest.importorskip("numpy")
    expected = ChunkIndex.digests(b"r", [1, 2], 2)
    assert ChunkIndex.digests(b"r", numpy.array([1, 2]), 2) == expected
    for wrong in ([-1, 0], [2**32, 0], [2**70, 0]):
        with pytest.raises(OverflowError):
            ChunkIndex.digests(b"r", wrong, 2)
    with pytest.raises(TypeError):
        ChunkIndex.digests(b"r", [1.0, 2.0], 2)
    with pytest.raises(ValueError, match="32-bit token ids"):
        ChunkIndex.digests(b"r", b"12345", 2)
    with pytest.raises(ValueError, match="0 tokens"):
        ChunkIndex.digests(b"r", [], 0)


def test_a_list_that_shrinks_while_it_is_read() -> None:
    class Wicked:
        def __index__(self) -> int:
            tokens.clear()
            return 0

    # Plain integers at both ends, or core's own code reads it.
    tokens: list[object] = [0, *(Wicked() for _ in range(6)), 0]
    with pytest.raises(IndexError):
        ChunkIndex.digests(b"r", tokens, 8)  # type: ignore[arg-type]
