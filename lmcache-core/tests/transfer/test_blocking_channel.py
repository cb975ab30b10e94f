"""What every channel of a blocking client has from its base class."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from lmcache_core.contracts.transfer import TransferContext
from lmcache_core.memory.host_memory import share
from lmcache_core.transfer_tcp.channel import TcpChannel
from lmcache_core.transfer_tcp.config import TcpChannelConfig

WAIT_S = 30.0


class Slow(TcpChannel):
    """Closes when it is told to."""

    def __init__(self) -> None:
        super().__init__(TcpChannelConfig())
        self.go_on = threading.Event()

    def slow(self, call: Callable[[], None]) -> None:
        assert self.go_on.wait(WAIT_S)
        call()

    def interrupt_blocking(self) -> None:
        self.slow(super().interrupt_blocking)


class SlowAtTheEnd(Slow):
    def interrupt_blocking(self) -> None:
        TcpChannel.interrupt_blocking(self)

    def close_blocking(self) -> None:
        self.slow(super().close_blocking)


@pytest.mark.parametrize("kind", [Slow, SlowAtTheEnd])
def test_a_close_that_is_cancelled_ends_its_threads(kind: type[Slow]) -> None:
    """At its deadline, whichever step it waits for."""
    before = set(threading.enumerate())

    async def close_for_a_while() -> None:
        channel, other = kind(), TcpChannel(TcpChannelConfig())
        await channel.open(TransferContext("test", share(4096)))
        await other.open(TransferContext("other", share(4096)))
        await channel.connect(other.descriptor)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(channel.close(), 0.05)
        channel.go_on.set()
        await other.close()

    asyncio.run(close_for_a_while())
    for thread in set(threading.enumerate()) - before:
        thread.join(WAIT_S)
        assert not thread.is_alive(), thread.name
