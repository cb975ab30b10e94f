"""The wire that is awaited on an event loop: waits that end, and memory that is left alone."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from lmcache_backend_redis.looping import LoopWire
from lmcache_backend_redis.resp import ProtocolError
from lmcache_core.errors import BackendTimeout, BackendUnavailable
from lmcache_core.testing.loop import Loop

MIB = 1 << 20


@pytest.fixture
def run() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        yield ours, theirs


Pair = tuple[socket.socket, socket.socket]


def begun(sock: socket.socket, *, idle_s: float = 60.0, left_s: float = 60.0) -> LoopWire:
    wire = LoopWire(sock, "peer", idle_s=idle_s)
    wire.begin(time.monotonic() + left_s)
    return wire


async def say(theirs: socket.socket, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(theirs, data)


def test_a_value_in_parts_lands_in_the_buffer(run: Loop, pair: Pair) -> None:
    value = bytes(range(256)) * (3 * MIB // 256)
    target = bytearray(len(value))

    async def read() -> None:
        wire = begun(pair[0])
        said = asyncio.ensure_future(say(pair[1], b"$%d\r\n%b\r\n:7\r\n" % (len(value), value)))
        assert await wire.bulk_length() == len(value)
        await wire.read_into(memoryview(target))
        await wire.end_bulk()
        assert await wire.reply() == 7
        assert wire.at_rest
        await said
        wire.leave()

    run(read())
    assert target == value


def test_parts_are_sent_whole_to_a_slow_reader(run: Loop, pair: Pair) -> None:
    parts = [bytes([i]) * (MIB + i) for i in range(4)]

    async def exchange() -> bytes:
        wire = begun(pair[0])
        sent = asyncio.ensure_future(wire.send(parts))
        got = bytearray()
        while len(got) < sum(map(len, parts)):
            got += await asyncio.get_running_loop().sock_recv(pair[1], 100_000)
        await sent
        wire.leave()
        return bytes(got)

    assert run(exchange()) == b"".join(parts)


def test_a_silent_server_times_out(run: Loop, pair: Pair) -> None:
    async def read() -> None:
        wire = begun(pair[0], idle_s=0.05)
        await say(pair[1], b"$100\r\nabc")
        with pytest.raises(BackendTimeout, match="silent for"):
            await wire.reply()
        assert wire.broken
        wire.leave()

    run(read())


def test_a_server_that_does_not_read_is_given_up(run: Loop, pair: Pair) -> None:
    async def send() -> None:
        wire = begun(pair[0], idle_s=0.05)
        with pytest.raises(BackendTimeout, match="silent for"):
            await wire.send([bytes(64 * MIB)])
        assert wire.broken
        wire.leave()

    run(send())


def test_a_server_that_dribbles_is_given_up(run: Loop, pair: Pair) -> None:
    async def dribble() -> None:
        await say(pair[1], b"$1000000\r\n")
        while True:
            await say(pair[1], b"x")
            await asyncio.sleep(0.01)

    async def read() -> None:
        wire = begun(pair[0], idle_s=5.0, left_s=0.3)
        dribbling = asyncio.ensure_future(dribble())
        with pytest.raises(BackendTimeout, match="call_timeout_s"):
            await wire.reply()
        dribbling.cancel()
        wire.leave()

    run(read())


def test_a_server_that_never_pauses_is_given_up_and_lets_others_run(run: Loop, pair: Pair) -> None:
    """What the socket's buffer always has more of must not hold the loop."""

    async def flood() -> None:
        while True:
            await say(pair[1], b"$-1\r\n" * 10_000)

    async def read() -> None:
        wire = begun(pair[0], left_s=0.3)
        flooding = asyncio.ensure_future(flood())
        with pytest.raises(BackendTimeout, match="call_timeout_s"):
            await read_for_ever(wire)
        flooding.cancel()
        wire.leave()

    async def read_for_ever(wire: LoopWire) -> None:
        while True:
            await wire.reply()

    run(read())


def test_every_call_has_its_own_time(run: Loop, pair: Pair) -> None:
    """A timer of an earlier call neither ends a later one nor lets it wait for too long."""

    async def calls() -> None:
        wire = begun(pair[0], idle_s=0.2, left_s=60.0)
        for _ in range(5):
            wire.begin(time.monotonic() + 60.0)
            later = asyncio.get_running_loop().call_later(0.1, pair[1].send, b":1\r\n")
            assert await wire.reply() == 1
            later.cancel()
        wire.begin(time.monotonic() + 0.01)
        with pytest.raises(BackendTimeout, match="call_timeout_s"):
            await wire.reply()
        wire.leave()

    run(calls())


def test_the_end(run: Loop, pair: Pair) -> None:
    async def read() -> None:
        wire = begun(pair[0])
        reading = asyncio.ensure_future(wire.reply())
        await asyncio.sleep(0)
        pair[1].close()
        with pytest.raises(BackendUnavailable, match="closed the connection"):
            await reading
        assert not wire.is_quiet()
        wire.leave()

    run(read())


def test_nothing_is_written_after_a_cancellation(run: Loop, pair: Pair) -> None:
    target = bytearray(MIB)

    async def read() -> None:
        wire = begun(pair[0])
        await say(pair[1], b"$%d\r\nabc" % MIB)
        await wire.bulk_length()
        reading = asyncio.ensure_future(wire.read_into(memoryview(target)))
        await asyncio.sleep(0.01)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        before = bytes(target)
        await say(pair[1], b"d" * 1000)
        await asyncio.sleep(0.01)
        assert target == before
        wire.leave()

    run(read())


def test_nothing_is_sent_after_a_cancellation(run: Loop, pair: Pair) -> None:
    async def send() -> None:
        wire = begun(pair[0])
        sending = asyncio.ensure_future(wire.send([bytes(16 * MIB)]))
        await asyncio.sleep(0.01)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert 0 < drained(pair[1]) < 16 * MIB
        await asyncio.sleep(0.01)
        assert drained(pair[1]) == 0
        wire.leave()

    def drained(theirs: socket.socket) -> int:
        count = 0
        with suppress(BlockingIOError):
            while got := theirs.recv(MIB):
                count += len(got)
        return count

    run(send())


def test_an_idle_connection_shows_what_it_is_good_for(run: Loop, pair: Pair) -> None:
    async def idle() -> None:
        wire = begun(pair[0])
        reading = asyncio.ensure_future(wire.reply())
        await asyncio.sleep(0)
        await say(pair[1], b":1\r\n")
        assert await reading == 1
        assert wire.at_rest
        assert wire.is_quiet()
        await say(pair[1], b":2\r\n")
        await asyncio.sleep(0.01)
        assert not wire.is_quiet(), "who speaks unasked isn't to be believed"
        wire.leave()

    run(idle())


def test_more_than_was_asked_for_is_no_rest(run: Loop, pair: Pair) -> None:
    async def read() -> None:
        wire = begun(pair[0])
        await say(pair[1], b":1\r\n:2\r\n")
        assert await wire.reply() == 1
        assert not wire.at_rest
        with pytest.raises(ProtocolError):
            await wire.bulk_length()
        assert wire.broken
        wire.leave()

    run(read())
