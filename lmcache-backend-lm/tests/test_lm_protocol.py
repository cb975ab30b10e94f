"""Whatever bytes come, both parsers answer with a message or a `ProtocolError`, within bounds.

    python lmcache-backend-lm/tests/test_lm_protocol.py 100000 10000000

runs so many cases that hypothesis makes up, and so many changes of valid messages.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import random
import struct
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmcache_backend_lm import greeting, inventory, protocol
from lmcache_backend_lm.greeting import Welcome
from lmcache_backend_lm.inventory import Purged, Stock
from lmcache_backend_lm.proof import PROOF_BYTES, Side, Transcript
from lmcache_backend_lm.protocol import HEADER_BYTES, MISSING, Op, ProtocolError, Status
from lmcache_core.chunks.keys import CacheNamespace, ChunkKey
from lmcache_core.testing.storage import LAYOUT

CASES = 300
FACTS: dict[str, int | str] = {"version": "0.1.0", "server_values": 5}
TWO = (Stock("00" * 8, 3, 4096, 0, "a/model\nidentity\n256 tokens"), Stock("ab" * 8, 0, 0, 7, ""))
COUNT = st.one_of(st.integers(0, 5), st.sampled_from([protocol.MAX_KEYS, 1 << 20]))
SIZE = st.one_of(st.integers(0, 99), st.just(MISSING), st.integers(0, MISSING))
KEYS = st.lists(st.binary(min_size=1, max_size=64), unique=True, max_size=8)


def numbers_or_noise() -> st.SearchStrategy[bytes]:
    small = st.sampled_from([0, 1, 2, 16, 64, 255, 4096, 1 << 31, 1 << 40, MISSING])
    words = st.lists(st.one_of(small, st.integers(0, MISSING)), max_size=10)
    packed = words.map(lambda values: struct.pack(f"<{len(values)}Q", *values))
    mixed = st.lists(
        st.one_of(small.map(lambda n: struct.pack("<I", n & 0xFFFFFFFF)), st.binary(max_size=9)),
        max_size=12,
    )
    return st.one_of(st.binary(max_size=200), packed, mixed.map(b"".join))


def damaged(good: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Messages with a bit or a byte wrong, cut short or too long."""

    def damage(args: tuple[bytes, int, int, int]) -> bytes:
        data, at, byte, kind = args
        if not data or kind == 0:
            return data
        at %= len(data)
        if kind == 1:
            return data[:at]
        if kind == 2:
            return data + bytes([byte])
        return data[:at] + bytes([byte]) + data[at + 1 :]

    numbers = st.integers(0, 1 << 16), st.integers(0, 255), st.integers(0, 3)
    return st.tuples(good, *numbers).map(damage)


HEADERS = st.builds(
    lambda op, status, count, request, meta, payload: protocol.header(
        op, request, count=count, meta=meta, payload=payload, status=status
    ),
    st.sampled_from(Op),
    st.sampled_from(Status),
    st.integers(0, (1 << 32) - 1),
    st.integers(0, MISSING),
    st.integers(0, (1 << 32) - 1),
    st.integers(0, MISSING),
)
HELLOS = st.builds(
    lambda nonce, proves, version: greeting.hello(
        "0123456789abcdef", nonce, proves=proves, version=version
    ),
    st.binary(max_size=32),
    st.booleans(),
    st.integers(0, 4),
)
WELCOMES = st.builds(
    lambda instance, shares, longest, path: greeting.welcome(
        Welcome(instance, shares, longest, (1, 2), path)
    ),
    st.binary(min_size=16, max_size=16),
    st.booleans(),
    st.integers(0, MISSING),
    st.text(st.characters(min_codepoint=1, max_codepoint=0x2FF), max_size=40),
)
EXTENTS = st.lists(st.tuples(st.integers(0, 4096), st.integers(0, 4096)), max_size=4)

TEXTS = st.text(st.characters(min_codepoint=1, max_codepoint=0x2FF), max_size=80)
STOCKS = st.lists(
    st.builds(Stock, st.from_regex(r"[0-9a-f]{16}", fullmatch=True), *([SIZE] * 3), TEXTS),
    max_size=4,
)

EXACT = st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES)

# name → (bytes that arrive, what reads them with a number that the reader chose)
PARSERS: dict[str, tuple[st.SearchStrategy[bytes], Callable[[memoryview, int], Any]]] = {
    "header": (
        st.one_of(EXACT, damaged(HEADERS).filter(lambda d: len(d) == HEADER_BYTES)),
        lambda data, n: protocol.parse_header(data),
    ),
    "hello": (
        st.one_of(damaged(HELLOS), st.binary(max_size=80)),
        lambda data, n: greeting.parse_hello(data),
    ),
    "welcome": (
        st.one_of(damaged(WELCOMES), st.binary(max_size=120)),
        lambda data, n: greeting.parse_welcome(data),
    ),
    "challenge": (
        st.one_of(damaged(st.binary(max_size=32).map(greeting.challenge)), damaged(WELCOMES)),
        lambda data, n: greeting.is_challenge(data),
    ),
    "proof": (st.binary(max_size=40), lambda data, n: greeting.parse_proof(data)),
    "names": (
        st.one_of(damaged(KEYS.map(protocol.names)), st.binary(max_size=300)),
        lambda data, n: protocol.parse_names(data, n),
    ),
    "sizes": (numbers_or_noise(), lambda data, n: protocol.parse_sizes(data, [50] * min(n, 9))),
    "usage": (numbers_or_noise(), lambda data, n: protocol.parse_usage(data)),
    "number": (numbers_or_noise(), lambda data, n: protocol.parse_number(data)),
    "slot": (numbers_or_noise(), lambda data, n: protocol.parse_slot(data, n)),
    "share": (numbers_or_noise(), lambda data, n: greeting.parse_share(data)),
    "shared": (numbers_or_noise(), lambda data, n: greeting.parse_shared(data)),
    "offers": (numbers_or_noise(), lambda data, n: protocol.parse_offers(data, n % 9, 1 << 20)),
    "extents": (
        st.one_of(damaged(EXTENTS.map(protocol.extents)), numbers_or_noise()),
        lambda data, n: protocol.parse_extents(data, [n % 8192] * (n % 3), 4096),
    ),
    "description": (
        st.one_of(damaged(TEXTS.map(str.encode)), st.binary(max_size=600)),
        lambda data, n: inventory.parse_description(data),
    ),
    "after": (st.binary(max_size=17), lambda data, n: inventory.parse_after(data)),
    "page": (
        st.one_of(damaged(STOCKS.map(inventory.page)), st.binary(max_size=200)),
        lambda data, n: inventory.parse_page(data),
    ),
    "status": (
        st.one_of(damaged(st.just(inventory.status(FACTS))), st.binary(max_size=200)),
        lambda data, n: inventory.parse_status(data),
    ),
    "purged": (numbers_or_noise(), lambda data, n: inventory.parse_purged(data)),
}


def parse(name: str, data: bytes, number: int) -> None:
    with contextlib.suppress(ProtocolError):
        PARSERS[name][1](memoryview(data), number)


@pytest.mark.parametrize("name", PARSERS)
def test_any_bytes_are_a_message_or_refused(name: str) -> None:
    @given(PARSERS[name][0], COUNT)
    @settings(max_examples=CASES, deadline=None)
    def run(data: bytes, number: int) -> None:
        parse(name, data, number)

    run()


@given(KEYS)
def test_names_come_back(keys: list[bytes]) -> None:
    chunks = [ChunkKey(key) for key in keys]
    packed = memoryview(protocol.names(chunks) + b"rest")
    found, rest = protocol.parse_names(packed, len(keys))
    assert found == chunks
    assert bytes(rest) == b"rest"


@given(EXTENTS.filter(bool))
def test_extents_come_back(parts: list[tuple[int, int]]) -> None:
    size = sum(length for _, length in parts)
    found = protocol.parse_extents(memoryview(protocol.extents(parts)), [MISSING, size], 8192)
    assert found == [[], parts]


def test_offers_lie_in_the_region() -> None:
    packed = memoryview(protocol.numbers([4096, 100, 0, 4096]))
    assert protocol.parse_offers(packed, 2, 4196) == ([4096, 100], [0, 4096])
    with pytest.raises(ProtocolError, match="100 bytes at 4096 of a region of 4195 bytes"):
        protocol.parse_offers(packed, 2, 4195)


def test_a_header_comes_back() -> None:
    packed = protocol.header(Op.STORE, 7, count=3, meta=4, payload=1 << 39)
    assert protocol.parse_header(packed) == (Op.STORE, Status.OK, 3, 7, 4, 1 << 39)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"count": protocol.MAX_KEYS + 1}, "keys in a message"),
        ({"meta": 1 << 31}, "bytes of meta"),
        ({"payload": protocol.MAX_VALUE_BYTES + 1}, "bytes of values"),
    ],
)
def test_absurd_lengths_are_refused(change: dict[str, int], said: str) -> None:
    with pytest.raises(ProtocolError, match=said):
        protocol.parse_header(protocol.header(Op.STORE, 1, **change))


def test_a_hello_and_a_welcome_come_back() -> None:
    for proves in (False, True):
        hello = greeting.hello("0123456789abcdef", bytes(32), proves=proves)
        assert greeting.parse_hello(memoryview(hello)) == ("0123456789abcdef", proves)
    reply = Welcome(bytes(16), True, 1 << 33, (3, 4), "/run/lm.sock", bytes(range(32)))
    packed = memoryview(greeting.welcome(reply))
    assert greeting.parse_welcome(packed) == reply
    assert not greeting.is_challenge(packed)
    assert greeting.is_challenge(memoryview(greeting.challenge(bytes(32))))


def test_what_operators_are_told_comes_back() -> None:
    assert inventory.parse_page(memoryview(inventory.page(TWO))) == list(TWO)
    status = memoryview(inventory.status(FACTS))
    assert inventory.parse_status(status) == {"version": "0.1.0", "server_values": "5"}
    for purged in (Purged(1, 2, 3, 4, more=True), Purged(0, 0, 0, 0, more=False)):
        assert inventory.parse_purged(memoryview(inventory.purged(purged))) == purged
    for space in ("", "ab" * 8):
        assert inventory.parse_after(memoryview(inventory.after(space))) == space


def test_what_operators_are_told_is_these_bytes() -> None:
    words = struct.pack("<QQQ", 3, 4096, 0)
    page = b"\1\0" + b"00" * 8 + words + b"\2\0hi"
    assert inventory.page([Stock("00" * 8, 3, 4096, 0, "hi")]) == page
    assert inventory.purged(Purged(1, 2, 3, 4, more=True)) == struct.pack("<QQQQB", 1, 2, 3, 4, 1)
    assert inventory.status({"a": 1, "b": "c"}) == b"a 1\nb c\n"


def test_a_list_that_is_not_in_order_is_refused() -> None:
    for stocks in (TWO[::-1], TWO[:1] * 2):
        with pytest.raises(ProtocolError, match="comes after"):
            inventory.parse_page(memoryview(inventory.page(stocks)))
    with pytest.raises(ProtocolError, match="at most 128"):
        inventory.parse_page(memoryview(struct.pack("<H", 129)))


@pytest.mark.parametrize("model", ["x" * 5000, "\x1b[31m\nred\r", "\u96ea" * 400, "\ud800"])
def test_any_model_has_a_description(model: str) -> None:
    text = inventory.description_of(CacheNamespace(model, LAYOUT, label="a label"))
    assert len(text.encode()) <= inventory.MAX_DESCRIPTION_BYTES
    assert inventory.parse_description(memoryview(text.encode())) == text
    assert text.startswith("a label\n")


def test_the_greeting_is_these_bytes() -> None:
    """Two builds that say version 3 understand each other."""
    nonce, name = bytes(range(32)), "0123456789abcdef"
    assert greeting.hello(name, nonce, proves=True) == b"\3\0\1\0" + name.encode() + nonce
    assert greeting.challenge(nonce) == b"\3\0\2\0" + nonce
    reply = Welcome(nonce[:16], True, 3, (1, 2), "/s", nonce)
    expected = b"\3\0\1\0" + nonce[:16] + struct.pack("<QQQ", 3, 1, 2) + nonce + b"\2\0/s"
    assert greeting.welcome(reply) == expected


def test_a_proof_holds_for_one_side_of_one_connection() -> None:
    name, nonces = "0123456789abcdef", (bytes(32), bytes([1]) * 32)
    spoken = {
        Transcript(hello, greeting.challenge(theirs), binding)
        for ours in nonces
        for hello in (
            greeting.hello(name, ours, proves=True),
            greeting.hello(name, ours, proves=True, version=4),
            greeting.hello("f" * 16, ours, proves=True),
        )
        for theirs in nonces
        for binding in (b"tcp", b"unix", b"tls" + bytes(48), b"tls" + bytes([1]) * 48)
    }
    proofs = {one.proof(token, side) for one in spoken for token in (b"t", b"u") for side in Side}
    assert len(proofs) == len(spoken) * 4 == 2 * 3 * 2 * 4 * 4
    assert {len(proof) for proof in proofs} == {PROOF_BYTES}
    one = next(iter(spoken))
    assert one.proves(one.proof(b"t", Side.CLIENT), b"t", Side.CLIENT)
    assert not one.proves(one.proof(b"t", Side.CLIENT), b"t", Side.SERVER)
    assert not one.proves(b"", b"t", Side.CLIENT)
    known = Transcript(b"hello", b"challenge", b"tcp").proof(b"token", Side.SERVER)
    text = b"lmcache lm:// serverhellochallengetcp"
    assert known == hmac.new(b"token", text, hashlib.sha256).digest()


def test_a_namespace_cannot_name_another_folder() -> None:
    with pytest.raises(ProtocolError, match="no namespace"):
        greeting.parse_hello(memoryview(greeting.hello("../../etc/passwd", bytes(32))))


def _fuzz(name: str, cases: int) -> int:
    done = 0

    @given(PARSERS[name][0], COUNT)
    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def run(data: bytes, number: int) -> None:
        nonlocal done
        done += 1
        parse(name, data, number)

    run()
    return done


SEEDS: dict[str, list[bytes]] = {
    "header": [protocol.header(op, 7, count=3, meta=64, payload=4096) for op in Op],
    "hello": [greeting.hello("0123456789abcdef", bytes(32), proves=one) for one in (False, True)],
    "challenge": [greeting.challenge(bytes(range(32)))],
    "proof": [bytes(range(32))],
    "welcome": [
        greeting.welcome(Welcome(bytes(16), True, 1 << 33, (3, 4), path)) for path in ("", "/run/s")
    ],
    "names": [protocol.names([ChunkKey(bytes([i]) * 16) for i in range(n)]) for n in (0, 1, 5)],
    "sizes": [protocol.numbers([50, MISSING, 3])],
    "usage": [protocol.usage(1, 2) + b"rest"],
    "number": [protocol.number(5)],
    "slot": [protocol.slot(1)],
    "share": [greeting.share(8 << 20, 1 << 20, size) for size in (0, 1 << 34)],
    "shared": [greeting.shared(1 << 30, 64)],
    "offers": [protocol.numbers([4096, 100, 0, 4096])],
    "description": [TWO[0].description.encode(), b""],
    "after": [inventory.after(""), inventory.after("ab" * 8)],
    "page": [inventory.page(TWO), inventory.page([])],
    "status": [inventory.status(FACTS)],
    "purged": [inventory.purged(Purged(1, 2, 3, 4, more=True))],
    "extents": [protocol.extents([(0, 4000), (4000, 96)]), protocol.extents([(0, 4096)]) * 2],
}


def _mutate(name: str, cases: int, dice: random.Random) -> None:
    """Parse valid messages with a few bytes changed, cut off or added."""
    for _ in range(cases):
        data = bytearray(dice.choice(SEEDS[name]))
        for _ in range(dice.randrange(4)):
            if data:
                data[dice.randrange(len(data))] = dice.choice((0, 1, 127, 255, dice.randrange(256)))
        kind = dice.randrange(8)
        if name != "header" and kind == 0:
            del data[dice.randrange(len(data) + 1) :]
        elif name != "header" and kind == 1:
            data += dice.randbytes(dice.randrange(20))
        parse(name, bytes(data), dice.choice((0, 1, 2, 3, 5, 4096, 1 << 20)))


def _main(cases: int, mutations: int) -> None:
    """``cases`` that hypothesis makes up, ``mutations`` of valid messages, over all parsers."""
    total = 0
    dice = random.Random(0)
    for name in PARSERS:
        _mutate(name, mutations // len(PARSERS) + 1, dice)
        done = _fuzz(name, cases // len(PARSERS) + 1) + mutations // len(PARSERS) + 1
        total += done
        print(f"{name:10} {done:9} cases", flush=True)
    print(f"{'all':10} {total:9} cases, each a message or refused")


if __name__ == "__main__":
    _main(*map(int, sys.argv[1:3]))
