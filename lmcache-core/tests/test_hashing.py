"""Digests name prefixes: equal prefixes have equal digests everywhere, others don't."""

from __future__ import annotations

import os
import subprocess
import sys
from array import array
from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_core.chunks.hashing import PrefixHasher, request_root, token_bytes
from lmcache_core.chunks.keys import DIGEST_BYTES

ROOT = b"\x11" * 8
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)
GOLDEN = [
    "12e04dfaf4831c2ab66b6264be744136",
    "cfd3984f35c1559473a01b671a2bdb21",
    "3940b089f6d52eb88fb20b940cd806a8",
]
GOLDEN_TAIL = "2ddefc6175a70f7bf557cbead141073e"
few = settings(max_examples=60, deadline=None)


def digests(tokens: list[int], chunk: int = 4, **options: object) -> list[bytes]:
    return list(PrefixHasher(ROOT, chunk, **options).extend(tokens))  # type: ignore[arg-type]


def test_the_chain_is_what_it_says() -> None:
    first = blake2b(ROOT + token_bytes([1, 2]), digest_size=16).digest()
    second = blake2b(first + token_bytes([3, 4]), digest_size=16).digest()
    assert digests([1, 2, 3, 4, 5], chunk=2) == [first, second]


def test_golden_vector() -> None:
    """Two machines, two releases: the names of stored chunks don't change."""
    assert [digest.hex() for digest in digests(list(range(12)))] == GOLDEN
    assert PrefixHasher(ROOT, 4).tail([7, 8]) == bytes.fromhex(GOLDEN_TAIL)


@given(TOKENS, st.integers(1, 5))
@few
def test_one_digest_for_each_full_chunk(tokens: list[int], chunk: int) -> None:
    actual = digests(tokens, chunk)
    assert len(actual) == len(tokens) // chunk
    assert all(len(digest) == DIGEST_BYTES for digest in actual)
    assert len(set(actual)) == len(actual)


@given(TOKENS, TOKENS, TOKENS, st.integers(1, 5))
@few
def test_a_digest_names_the_whole_prefix(
    prefix: list[int], one: list[int], two: list[int], chunk: int
) -> None:
    left, right = prefix + one, prefix + two
    for i, (a, b) in enumerate(zip(digests(left, chunk), digests(right, chunk), strict=False)):
        end = (i + 1) * chunk
        assert (a == b) == (left[:end] == right[:end])


@given(TOKENS, st.lists(st.integers(0, 40), max_size=5), st.integers(1, 5))
@few
def test_growing_equals_one_shot(tokens: list[int], cuts: list[int], chunk: int) -> None:
    hasher = PrefixHasher(ROOT, chunk)
    for cut in sorted(cuts):
        grown = hasher.extend(tokens[:cut])
        assert grown == digests(tokens[:cut], chunk)
        assert hasher.tokens == len(grown) * chunk
    assert hasher.extend(tokens) == digests(tokens, chunk)


@given(TOKENS, st.integers(0, 40))
@few
def test_growing_with_bytes_equals_growing_with_ids(tokens: list[int], cut: int) -> None:
    hasher = PrefixHasher(ROOT, 3)
    hasher.extend(token_bytes(tokens[:cut]))
    assert hasher.extend(token_bytes(tokens)) == digests(tokens, 3)
    assert hasher.tail(token_bytes(tokens)) == hasher.tail(tokens)


@given(TOKENS, st.integers(1, 5))
@few
def test_a_tail_is_never_a_full_chunk(tokens: list[int], chunk: int) -> None:
    hasher = PrefixHasher(ROOT, chunk)
    full = list(hasher.extend(tokens))
    tail, rest = hasher.tail(tokens), tokens[len(full) * chunk :]
    assert (tail is None) == (not rest)
    if tail is not None:
        assert tail not in full
        # The same tokens from the same parent as a full chunk of a smaller chunk size.
        shorter = PrefixHasher(full[-1] if full else ROOT, len(rest))
        assert tail != shorter.extend(rest)[0]


def test_tails_of_different_lengths_differ() -> None:
    hasher = PrefixHasher(ROOT, 8)
    tails = {hasher.tail([0] * count) for count in range(1, 8)}
    assert len(tails) == 7


def test_tail_before_extend_is_no_tail() -> None:
    assert PrefixHasher(ROOT, 4).tail([1, 2, 3, 4, 5]) is None


def test_extras_change_their_chunk_and_all_after_it() -> None:
    tokens = list(range(12))
    plain, image = digests(tokens), digests(tokens, extras={1: b"image"})
    assert plain[0] == image[0]
    assert plain[1] != image[1]
    assert plain[2] != image[2]
    assert digests(tokens, extras={1: b"other"})[1] not in (plain[1], image[1])


def test_extras_of_the_tail() -> None:
    tokens = list(range(6))
    tails = set()
    for extras in ({}, {1: b"image"}, {2: b"image"}):
        hasher = PrefixHasher(ROOT, 4, extras)
        hasher.extend(tokens)
        tails.add(hasher.tail(tokens))
    assert len(tails) == 2  # chunk 1 is the tail; there is no chunk 2


def test_request_roots() -> None:
    assert request_root(ROOT) == ROOT
    roots = [
        request_root(ROOT, *facts)
        for facts in [("salt=a",), ("salt=b",), ("salt=a", "lora=x"), ("lora=x", "salt=a")]
    ]
    assert len({ROOT, *roots}) == 5
    assert request_root(ROOT, "ab", "c") != request_root(ROOT, "a", "bc")
    assert request_root(b"\x22" * 8, "salt=a") != roots[0]


@pytest.mark.parametrize("token", [-1, 2**32])
def test_ids_that_do_not_fit(token: int) -> None:
    with pytest.raises(OverflowError):
        token_bytes([token])


def test_bytes_that_are_no_tokens() -> None:
    with pytest.raises(ValueError, match="5 bytes aren't a whole number"):
        token_bytes(b"12345")


def test_tokens_are_little_endian() -> None:
    assert token_bytes([1, 0x01020304]) == b"\1\0\0\0\4\3\2\1"
    assert token_bytes(memoryview(b"\1\0\0\0")) == b"\1\0\0\0"
    assert token_bytes(array("I", [1])) == b"\1\0\0\0"


def test_nothing_depends_on_the_hash_seed() -> None:
    code = (
        "from lmcache_core.chunks.hashing import *; from lmcache_core.chunks.keys import *;"
        "from lmcache_core.chunks.layout import *;"
        "g = LayerGroup((0, 1), AttentionKind.FULL, 2, 2, 8, DType.BF16);"
        "n = CacheNamespace('model', KVLayout(4, (g,)), salt='s');"
        "h = PrefixHasher(request_root(n.root, 'lora=x'), 4, {0: b'image'});"
        "print(n.fingerprint, *(d.hex() for d in h.extend(list(range(8)))))"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "random")
    }
    assert len(printed) == 1
