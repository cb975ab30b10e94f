"""Wrong tokens are bounded for each address, in constant memory, and counted."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from pathlib import Path

import pytest

from lmcache_backend_lm import greeting, protocol
from lmcache_backend_lm.arena import LEASE_BYTES, Arena
from lmcache_backend_lm.config import LmConfig
from lmcache_backend_lm.guesses import BURST, EVERY_S, MAX_ADDRESSES, Guesses
from lmcache_backend_lm.proof import Side, Transcript
from lmcache_backend_lm.protocol import HEADER_BYTES, Op, Status
from lmcache_backend_lm.service import Epochs, Regions, Service
from lmcache_backend_lm.session import SCRATCH_BYTES, Session
from lmcache_backend_lm.values import Values
from lmcache_backend_lm.wire import Wire
from lmcache_core.metrics import Counters


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_so_many_at_once_then_one_after_the_other() -> None:
    clock = Clock()
    guesses = Guesses(clock)
    for _ in range(BURST):
        assert guesses.wait_s("10.0.0.1") == 0
        guesses.wrong("10.0.0.1")
    assert guesses.wait_s("10.0.0.1") == pytest.approx(EVERY_S)
    assert guesses.wait_s("10.0.0.2") == 0
    clock.now += EVERY_S
    assert guesses.wait_s("10.0.0.1") == 0
    guesses.wrong("10.0.0.1")
    assert guesses.wait_s("10.0.0.1") == pytest.approx(EVERY_S)
    clock.now += 1000 * EVERY_S
    for _ in range(BURST - 1):  # no more than at the beginning
        guesses.wrong("10.0.0.1")
    assert guesses.wait_s("10.0.0.1") == 0
    guesses.wrong("10.0.0.1")
    assert guesses.wait_s("10.0.0.1") > 0


def test_a_host_with_many_addresses_is_one() -> None:
    guesses = Guesses(Clock())
    for last in range(BURST):
        guesses.wrong(f"2001:db8::{last:x}")
    assert guesses.wait_s("2001:db8::ffff") > 0
    assert guesses.wait_s("2001:db8:0:1::") == 0
    for _ in range(BURST):
        guesses.wrong("::ffff:10.0.0.1")
        guesses.wrong("fe80::1%eth0")
        guesses.wrong("")  # a Unix socket's client
    assert guesses.wait_s("10.0.0.1") > 0
    assert guesses.wait_s("fe80::2") > 0
    assert guesses.wait_s("") > 0


def test_memory_is_constant() -> None:
    guesses = Guesses(Clock())
    for number in range(3 * MAX_ADDRESSES):
        guesses.wrong(f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}")
    assert len(guesses) == MAX_ADDRESSES


def service(token: bytes, clock: Clock) -> Service:
    counters = Counters()
    arena = Arena(1 << 20)
    return Service(
        arena,
        Values(arena, counters),
        counters,
        Epochs(arena, LEASE_BYTES, counters),
        Regions(counters),
        instance=bytes(16),
        token=token,
        max_value_bytes=arena.capacity,
        guesses=Guesses(clock),
    )


async def greeted(service: Service, token: bytes, address: str) -> Status:
    """How a client with ``token`` is received."""
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    session = Session(service, Wire(ours), f"{address}:1", memoryview(bytearray(SCRATCH_BYTES)))
    serving = loop.create_task(session.run())
    theirs.setblocking(False)

    async def receive(nbytes: int) -> bytes:
        data = b""
        while len(data) < nbytes:
            data += await loop.sock_recv(theirs, nbytes - len(data))
        return data

    async def ask(op: Op, meta: bytes) -> tuple[Status, bytes]:
        await loop.sock_sendall(theirs, protocol.header(op, 0, meta=len(meta)) + meta)
        head = protocol.parse_header(await receive(HEADER_BYTES))
        return head.status, await receive(head.meta)

    hello = greeting.hello("0" * 16, os.urandom(32), proves=True)
    _, challenge = await ask(Op.HELLO, hello)
    spoken = Transcript(hello, challenge, b"unix")
    status, _ = await ask(Op.PROVE, spoken.proof(token, Side.CLIENT))
    theirs.close()
    await serving
    return status


def test_a_server_looks_at_no_more_proofs_from_there() -> None:
    clock = Clock()
    serving = service(b"right", clock)

    async def told(token: bytes, address: str = "10.0.0.1") -> Status:
        return await greeted(serving, token, address)

    async def run() -> None:
        for _ in range(BURST):
            assert await told(b"wrong") is Status.DENIED
        assert await told(b"wrong") is Status.BUSY
        assert await told(b"right") is Status.BUSY  # who guesses learns nothing either
        assert await told(b"right", "10.0.0.2") is Status.OK
        clock.now += EVERY_S
        assert await told(b"right") is Status.OK
        assert await told(b"right") is Status.OK
        assert await told(b"wrong") is Status.DENIED
        assert await told(b"wrong") is Status.BUSY

    asyncio.run(run())
    counted = {name: n for (name, labels), n in serving.counters.snapshot().items() if not labels}
    assert counted["server_wrong_tokens"] == BURST + 1
    assert counted["server_guesses_refused"] == 3
    serving.epochs.close()
    serving.arena.close()


# -- where a token lies --------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "lines"), [(0o644, 1), (0o604, 1), (0o640, 0), (0o600, 0)])
def test_a_token_file_that_everybody_can_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, lines: int
) -> None:
    file = tmp_path / "token"
    file.write_text("secret words")
    file.chmod(mode)
    with caplog.at_level(logging.WARNING):
        LmConfig(token_file=file)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == lines
    for line in said:
        assert f"token_file {file} can be read by every user" in line
        assert "chmod 600" in line
        assert "secret words" not in line
