"""The protocol's reader, on replies that are right, damaged, cut and hostile.

``RESP_FUZZ_CASES=1000000 pytest test_resp.py -k fuzz`` runs it for long.
"""

from __future__ import annotations

import os
import random
import socket
import threading
import time
import tracemalloc
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmcache_backend_redis.blocking import BlockingWire, at_once
from lmcache_backend_redis.resp import (
    MAX_LINE,
    MAX_SMALL_BULK,
    ProtocolError,
    Reply,
    ReplyError,
    command,
    commands,
)
from lmcache_core.errors import BackendError, BackendTimeout, BackendUnavailable

CASES = int(os.environ.get("RESP_FUZZ_CASES", "3000"))


class Scripted:
    """A socket that says what it was given, in portions, and then is closed."""

    def __init__(self, text: bytes, portions: Sequence[int] = ()) -> None:
        self._left = memoryview(text)
        self._portions = list(portions)
        self.sent = bytearray()

    def settimeout(self, timeout: float | None, /) -> None:
        pass

    def setsockopt(self, level: int, option: int, value: bytes, /) -> None:
        pass

    def recv_into(self, buffer: memoryview, nbytes: int = 0, flags: int = 0, /) -> int:
        assert buffer.nbytes, "a read of nothing can't be told from the end"
        portion = self._portions.pop(0) if self._portions else len(self._left)
        count = min(buffer.nbytes, len(self._left), max(1, portion))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def send(self, data: memoryview, /) -> int:
        return self.sendmsg([data])

    def sendmsg(self, buffers: Sequence[memoryview], /) -> int:
        count = max(1, sum(map(len, buffers)) // 2)
        self.sent += b"".join(buffers)[:count]
        return count


def wire(text: bytes, portions: Sequence[int] = ()) -> BlockingWire:
    return BlockingWire(Scripted(text, portions), "peer", idle_s=1.0, until=time.monotonic() + 60)


def encoded(reply: Reply) -> bytes:
    """A reply as a server writes it."""
    if reply is None:
        return b"$-1\r\n"
    if isinstance(reply, ReplyError):
        return b"-%b\r\n" % str(reply).encode()
    if isinstance(reply, int):
        return b":%d\r\n" % reply
    if isinstance(reply, bytes):
        return b"$%d\r\n%b\r\n" % (len(reply), reply)
    return b"*%d\r\n%b" % (len(reply), b"".join(map(encoded, reply)))


LEAVES = st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1), st.binary(max_size=300))
REPLIES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4), max_leaves=12).filter(
    lambda reply: depth(reply) <= 4
)
PORTIONS = st.lists(st.integers(1, 70), max_size=30)


def depth(reply: Reply) -> int:
    return 1 + max(map(depth, reply), default=0) if isinstance(reply, list) else 0


@given(st.lists(REPLIES, max_size=5), PORTIONS)
def test_replies_in_any_portions(replies: list[Reply], portions: list[int]) -> None:
    reader = wire(b"".join(map(encoded, replies)), portions)
    assert [at_once(reader.reply()) for _ in replies] == replies
    assert not reader.broken


@given(st.lists(st.integers(-9, 10**12), min_size=1, max_size=300), PORTIONS)
def test_many_integers(numbers: list[int], portions: list[int]) -> None:
    reader = wire(b"".join(map(encoded, numbers)) + b"+END\r\n", portions)
    assert at_once(reader.integers(len(numbers))) == numbers
    assert at_once(reader.reply()) == b"END"


@given(st.binary(max_size=5000), st.binary(max_size=5000), PORTIONS)
def test_bulk_replies_land_in_the_buffer(one: bytes, two: bytes, portions: list[int]) -> None:
    reader = wire(encoded(one) + encoded(two) + encoded(None), portions)
    for value in (one, two):
        assert at_once(reader.bulk_length()) == len(value)
        target = bytearray(len(value))
        at_once(reader.read_into(memoryview(target)))
        at_once(reader.end_bulk())
        assert target == value
    assert at_once(reader.bulk_length()) is None


@given(st.lists(st.binary(max_size=2000), max_size=600))
def test_parts_are_sent_whole(parts: list[bytes]) -> None:
    peer = Scripted(b"")
    at_once(BlockingWire(peer, "peer", idle_s=1.0, until=time.monotonic() + 60).send(parts))
    assert bytes(peer.sent) == b"".join(parts)


@pytest.mark.parametrize("portions", [[], [1] * 40, [3, 9]])
def test_what_was_expected_is_read_and_nothing_else(portions: list[int]) -> None:
    reader = wire(b"+OK\r\n+OK\r\n:1\r\n$-1\r\n+OK\r\n", portions)
    assert at_once(reader.came(b"+OK\r\n+OK\r\n"))
    assert not at_once(reader.came(b":1\r\n+OK\r\n"))
    assert at_once(reader.reply()) == 1
    assert at_once(reader.reply()) is None
    assert at_once(reader.came(b"+OK\r\n"))
    assert at_once(reader.came(b""))
    with pytest.raises(BackendUnavailable, match="closed"):
        at_once(reader.came(b"+OK\r\n"))


def test_too_much_to_expect_is_read_one_by_one() -> None:
    many = b"+OK\r\n" * 10_000
    reader = wire(many)
    assert not at_once(reader.came(many))
    assert [at_once(reader.reply()) for _ in range(10_000)] == [b"OK"] * 10_000


def test_commands() -> None:
    assert command(b"GET", b"key") == b"*2\r\n$3\r\nGET\r\n$3\r\nkey\r\n"
    assert commands(b"GET", [b"a", b"bc"]) == command(b"GET", b"a") + command(b"GET", b"bc")
    assert commands(b"GET", []) == b""


@pytest.mark.parametrize(
    "text",
    [
        b"HTTP/1.1 400 Bad Request\r\n",
        b"\r\n",
        b"$\r\n",
        b"$x\r\n",
        b"$-2\r\n",
        b"$1_0\r\n",
        b"$%d\r\n" % (MAX_SMALL_BULK + 1),
        b"$99999999999999999999\r\n",
        b"$3\r\nabcd\r\n",
        b":1.5\r\n",
        b":\xb2\r\n",
        b"*1048577\r\n",
        b"*1048576\r\n*1048576\r\n",
        b"*1\r\n" * 6,
        b"_\r\n",
        b"x" * (2 * MAX_LINE),
    ],
)
def test_nonsense_is_refused(text: bytes) -> None:
    reader = wire(text)
    with pytest.raises(ProtocolError):
        at_once(reader.reply())
    assert reader.broken


def test_an_error_reply_where_bytes_were_expected() -> None:
    reader = wire(b"-LOADING Redis is loading\r\n")
    with pytest.raises(ReplyError, match="LOADING") as caught:
        at_once(reader.bulk_length())
    assert caught.value.code == "LOADING"
    assert reader.broken, "whoever pipelined more must not go on reading"


def test_the_end_in_the_middle() -> None:
    reader = wire(b"$10\r\nabc")
    with pytest.raises(BackendUnavailable, match="closed the connection"):
        at_once(reader.reply())
    assert reader.broken


def test_a_long_line_is_no_bulk_reply_but_is_read() -> None:
    assert at_once(wire(b"+" + b"x" * 40_000 + b"\r\n").reply()) == b"x" * 40_000


def _scripts() -> st.SearchStrategy[bytes]:
    """Bytes that get far: pieces of right replies, some damaged, in any order."""
    fragments = st.one_of(
        st.sampled_from(
            [
                b"\r\n",
                b"\r",
                b"\n",
                b"$",
                b"*",
                b":",
                b"+OK\r\n",
                b"-ERR x\r\n",
                b"$-1\r\n",
                b"*-1\r\n",
            ]
        ),
        st.integers(-3, 2**70).map(lambda n: b"%d" % n),
        st.integers(0, 2**31).map(lambda n: b"$%d\r\n" % n),
        st.integers(0, 2**31).map(lambda n: b"*%d\r\n" % n),
        REPLIES.map(encoded),
        st.binary(max_size=40),
    )
    return st.lists(fragments, max_size=12).map(b"".join)


HOW = ["reply", "bulk", "integers"]


def consume(text: bytes, portions: Sequence[int], how: str) -> None:
    """Read until it fails, which it must: with an error of ours and a connection marked broken."""
    reader = wire(text, portions)
    with pytest.raises((BackendError, ReplyError)):
        read_for_ever(reader, how)
    assert reader.broken


def read_for_ever(reader: BlockingWire, how: str) -> None:
    """Each round reads a line at least, and a script is finite."""
    target = memoryview(bytearray(64))
    while True:
        if how == "reply":
            if isinstance(reply := at_once(reader.reply()), ReplyError):
                raise reply
        elif how == "integers":
            at_once(reader.integers(3))
        elif (length := at_once(reader.bulk_length())) is not None:
            if length <= target.nbytes:
                at_once(reader.read_into(target[:length]))
            else:
                at_once(reader.skip(length))
            at_once(reader.end_bulk())


@settings(
    max_examples=500,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(_scripts(), PORTIONS, st.sampled_from(HOW))
def test_fuzz(text: bytes, portions: list[int], how: str) -> None:
    consume(text, portions, how)


def test_fuzz_at_random() -> None:
    """As above from a plain generator, which is a hundred times faster; peak memory is bounded."""
    chance = random.Random(CASES)
    fragments = [b"\r\n", b"\r", b"\n", b"$", b"*", b":", b"+OK\r\n", b"-ERR x\r\n", b"$-1\r\n"]
    fragments += [b"*-1\r\n", b"-", b"$5\r\nhello\r\n", b":12\r\n", b"*2\r\n:1\r\n$1\r\nx\r\n"]
    tracemalloc.start()
    try:
        for _ in range(CASES):
            parts = chance.choices(fragments, k=chance.randint(0, 9))
            for _ in range(chance.randint(0, 3)):
                kind = chance.choice([b"$%d\r\n", b"*%d\r\n", b":%d\r\n", b"%d"])
                number = chance.choice(
                    [chance.randint(-3, 70), chance.getrandbits(chance.randint(1, 70))]
                )
                parts.insert(chance.randint(0, len(parts)), kind % number)
            text = bytearray(b"".join(parts))
            for _ in range(chance.choice([0, 0, 1, 3])):
                if text:
                    text[chance.randrange(len(text))] = chance.getrandbits(8)
            portions = [chance.randint(1, 30) for _ in range(chance.randint(0, 20))]
            consume(bytes(text), portions, chance.choice(HOW))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20


def test_a_length_is_not_believed_before_the_bytes_come() -> None:
    reader = wire(b"*1048576\r\n" + b"$1048576\r\nabc")
    tracemalloc.start()
    with pytest.raises(BackendUnavailable):
        at_once(reader.reply())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20


# -- time, on real sockets -----------------------------------------------------------------


def test_a_silent_server_times_out() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        reader = BlockingWire(ours, "peer", idle_s=0.05, until=time.monotonic() + 60)
        theirs.sendall(b"$100\r\nabc")
        with pytest.raises(BackendTimeout, match="silent for"):
            at_once(reader.reply())
        assert reader.broken


def test_a_server_that_dribbles_is_given_up() -> None:
    ours, theirs = socket.socketpair()
    stop = threading.Event()

    def dribble() -> None:
        theirs.sendall(b"$1000000\r\n")
        while not stop.wait(0.01):
            theirs.sendall(b"x")

    thread = threading.Thread(target=dribble)
    with ours, theirs:
        thread.start()
        reader = BlockingWire(ours, "peer", idle_s=5, until=time.monotonic() + 0.3)
        try:
            with pytest.raises(BackendTimeout, match="call_timeout_s"):
                at_once(reader.reply())
        finally:
            stop.set()
            thread.join()


def test_a_server_that_does_not_read_is_given_up() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        writer = BlockingWire(ours, "peer", idle_s=0.05, until=time.monotonic() + 60)
        with pytest.raises(BackendTimeout):
            at_once(writer.send([bytes(64 << 20)]))
        assert writer.broken
