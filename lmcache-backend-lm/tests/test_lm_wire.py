"""Values that come in small parts: both ends of ``lm://`` get all of them, and wait for no more."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from lmcache_backend_lm.wire import Wire
from lmcache_core.aio.pieces import last_first, next_of, take_out
from lmcache_core.aio.stream import WAKE_BYTES, PlainStream

KIB = 1 << 10
SIZES = [
    [WAKE_BYTES - 1],
    [2 * WAKE_BYTES - 1],
    [2 * WAKE_BYTES],
    [3 * WAKE_BYTES + 5, 7],
    [5, 0, 2 * WAKE_BYTES + 1, WAKE_BYTES],
    [8 * KIB] * 300,
]


@contextmanager
def _pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    with near, far:
        yield near, far


@contextmanager
def _trickling(far: socket.socket, content: bytes, part: int) -> Iterator[None]:
    """Another thread sends ``content`` in parts, and nothing behind it."""

    def send() -> None:
        with contextlib.suppress(OSError):
            for start in range(0, len(content), part):
                far.sendall(content[start : start + part])

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        thread.join(10.0)


def _threshold(sock: socket.socket) -> int:
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT)


@pytest.mark.parametrize("part", [40 * KIB + 1, 64 << 20])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"{len(sizes)}x{sizes[0]}")
def test_a_client_receives_all_views(sizes: list[int], part: int) -> None:
    content = os.urandom(sum(sizes))
    views = [memoryview(bytearray(size)) for size in sizes]
    with _pair() as (near, far), _trickling(far, content, part):
        stream = PlainStream(near)
        left = last_first(views)
        while left:
            got = stream.receive(next_of(left))
            assert got
            take_out(left, got)
        assert _threshold(near) == 1
    assert b"".join(views) == content


@pytest.mark.parametrize("part", [40 * KIB + 1, 64 << 20])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"{len(sizes)}x{sizes[0]}")
def test_a_server_receives_all_views(sizes: list[int], part: int) -> None:
    content = os.urandom(sum(sizes))
    views = [memoryview(bytearray(size)) for size in sizes]

    async def receive(near: socket.socket) -> None:
        with closing(Wire(near)) as wire:
            await asyncio.wait_for(wire.read(*views), 30.0)
            assert _threshold(near) == 1

    with _pair() as (near, far), _trickling(far, content, part):
        asyncio.run(receive(near))
    assert b"".join(views) == content


def test_an_end_half_way_is_an_end() -> None:
    views = [memoryview(bytearray(2 * WAKE_BYTES)) for _ in range(2)]

    async def receive(near: socket.socket) -> None:
        with closing(Wire(near)) as wire:
            await asyncio.wait_for(wire.read(*views), 30.0)

    with _pair() as (near, far):
        far.sendall(bytes(100))
        far.shutdown(socket.SHUT_WR)
        with pytest.raises(EOFError):
            asyncio.run(receive(near))


def test_a_cancelled_read_leaves_no_threshold() -> None:
    views = [memoryview(bytearray(4 * WAKE_BYTES))]

    async def receive(near: socket.socket) -> None:
        with closing(Wire(near)) as wire:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(wire.read(*views), 0.05)
            assert _threshold(near) == 1

    with _pair() as (near, _):
        asyncio.run(receive(near))
