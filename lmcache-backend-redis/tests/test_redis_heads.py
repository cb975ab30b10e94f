"""Heads that announce more than there can be: nothing is listed or asked for because of them."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Sequence

import pytest

from lmcache_backend_redis.blocking import BlockingWire, at_once
from lmcache_backend_redis.commands import discard, intact
from lmcache_backend_redis.layout import HEAD, MAX_VALUE_BYTES, MIN_PIECE_BYTES, Head
from lmcache_backend_redis.loading import Load
from lmcache_core.errors import BackendUnavailable

MOST = 1 << 20
LARGEST = MOST // MIN_PIECE_BYTES
ANNOUNCED = Head(MAX_VALUE_BYTES, MIN_PIECE_BYTES, b"nonce..7").pack()
"""131,072 pieces."""
FITS = Head(MOST, MIN_PIECE_BYTES, b"nonce..7").pack()


class Peer:
    """A socket that says what it was given and keeps what it is told."""

    def __init__(self, text: bytes) -> None:
        self._left = memoryview(text)
        self.sent = bytearray()

    def settimeout(self, timeout: float | None, /) -> None:
        """Nothing here waits."""

    def setsockopt(self, level: int, option: int, value: bytes, /) -> None:
        """Nor is it sent in any special way."""

    def recv_into(self, buffer: memoryview, nbytes: int = 0, flags: int = 0, /) -> int:
        count = min(buffer.nbytes, len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count

    def send(self, data: memoryview, /) -> int:
        return self.sendmsg([data])

    def sendmsg(self, buffers: Sequence[memoryview], /) -> int:
        self.sent += b"".join(buffers)
        return sum(map(len, buffers))


def bulk(head: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(head), head)


def taken(head: bytes) -> bytes:
    """What a server answers to a head that is read and removed at once."""
    return b"+OK\r\n+QUEUED\r\n+QUEUED\r\n*2\r\n" + bulk(head) + b":1\r\n"


def wire(text: bytes) -> tuple[BlockingWire, Peer]:
    peer = Peer(text)
    return BlockingWire(peer, "peer", idle_s=1.0, until=time.monotonic() + 60), peer


def test_a_head_is_one_up_to_what_there_is_room_for() -> None:
    assert Head.unpack(FITS, MOST) is not None
    assert Head.unpack(FITS, MOST - 1) is None
    assert Head.unpack(ANNOUNCED, MOST) is None


def test_a_store_takes_a_head_that_announces_too_much_away_and_asks_for_no_piece() -> None:
    line, peer = wire(bulk(ANNOUNCED) + b":%d\r\n" % HEAD.size + taken(ANNOUNCED))
    tracemalloc.start()
    assert at_once(intact(line, [b"x"], MOST)) == [False]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    assert peer.sent.count(b"STRLEN") == 1, "of the head itself"
    assert peer.sent.count(b"UNLINK") == 1
    assert b"x:" not in peer.sent, "no piece has been named"


def test_a_store_asks_for_each_piece_of_a_head_that_fits() -> None:
    text = bulk(FITS) + b":%d\r\n" % HEAD.size + b":%d\r\n" % MIN_PIECE_BYTES * LARGEST
    line, peer = wire(text)
    assert at_once(intact(line, [b"x"], MOST)) == [True]
    assert peer.sent.count(b"STRLEN") == 1 + LARGEST


def test_a_delete_names_no_piece_of_a_head_that_announces_too_much() -> None:
    line, peer = wire(taken(ANNOUNCED))
    assert at_once(discard(line, [b"x"], MOST)) == 1
    assert peer.sent.count(b"UNLINK") == 1
    line, peer = wire(taken(FITS) + b":1\r\n" * LARGEST)
    assert at_once(discard(line, [b"x"], MOST)) == 1
    assert peer.sent.count(b"UNLINK") == 1 + LARGEST


@pytest.mark.parametrize("head", [ANNOUNCED, FITS], ids=["too much", "more than room"])
def test_a_load_asks_for_the_pieces_that_its_buffer_has_room_for(head: bytes) -> None:
    into, sizes = memoryview(bytearray(MOST // 2)), [7]
    line, peer = wire(bulk(head))
    at_once(Load(line, MIN_PIECE_BYTES).run([0], [b"x"], [into], sizes))
    assert sizes == [7], "a miss, as it was before"
    assert peer.sent.count(b"GET") == 1
    line, peer = wire(bulk(FITS))
    with pytest.raises(BackendUnavailable):  # the pieces don't come
        at_once(Load(line, MIN_PIECE_BYTES).run([0], [b"x"], [memoryview(bytearray(MOST))], sizes))
    assert 1 < peer.sent.count(b"GET") <= 1 + LARGEST
