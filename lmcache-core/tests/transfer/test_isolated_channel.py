"""A channel in a process of its own: what the conformance kit can't see."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable

import pytest

from lmcache_core.contracts.transfer import Range, TransferChannel, TransferContext
from lmcache_core.errors import BackendRejected, BackendUnavailable, ConfigError
from lmcache_core.isolation.channel import IsolatedChannel
from lmcache_core.memory.host_memory import allocate_region
from lmcache_core.plugins.manager import Plugins
from lmcache_core.tiers.peers import open_channel
from lmcache_core.transfer_tcp.config import TcpChannelConfig

NBYTES = 1 << 20


def context(*, shared: bool = True) -> TransferContext:
    return TransferContext("here", allocate_region(NBYTES, shared=shared).region, writable=True)


def isolated(name: str = "tcp") -> IsolatedChannel:
    return IsolatedChannel(name, TcpChannelConfig(), where=f"transfer channel {name!r}")


def with_child(do: Callable[[IsolatedChannel, int], Awaitable[None]]) -> None:
    """Run ``do`` with a channel that is open and the pid of its process, and close it."""

    async def run() -> None:
        channel = isolated()
        await channel.open(context())
        assert channel._child is not None
        assert channel._child.pid is not None
        await do(channel, channel._child.pid)
        await channel.close()

    asyncio.run(run())


async def _until_unavailable(channel: TransferChannel) -> None:
    while True:
        await channel.connect(channel.descriptor)


def test_a_child_that_dies_fails_calls_and_nothing_else() -> None:
    async def die(channel: IsolatedChannel, pid: int) -> None:
        peer = await channel.connect(channel.descriptor)
        calling = asyncio.ensure_future(_until_unavailable(channel))
        await asyncio.sleep(0)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(BackendUnavailable):
            await calling
        with pytest.raises(BackendUnavailable, match="SIGKILL"):
            await channel.read(peer, [Range(0, 8, 8)])
        await channel.disconnect(peer)

    with_child(die)


def test_a_loop_that_ends_without_closing_ends() -> None:
    """What waits for notes is cancelled then, and mustn't wait for the child for ever."""

    async def forget_to_close() -> None:
        await isolated().open(context())

    asyncio.run(forget_to_close())


def test_a_region_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(BackendRejected, match="shared=True"):
        asyncio.run(isolated().open(context(shared=False)))


def test_what_the_child_refuses_is_refused_here() -> None:
    async def open_twice() -> None:
        first = isolated()
        await first.open(context())
        try:
            taken = {"port": int.from_bytes(_port(first.descriptor), "little")}
            await open_channel(Plugins(environ={}), "tcp", taken, context(), isolated=True)
        finally:
            await first.close()

    with pytest.raises(BackendUnavailable, match="can't listen there"):
        asyncio.run(open_twice())
    options = {"tls_cert": "/no/such/file"}
    with pytest.raises(BackendRejected, match="tls_cert"):
        asyncio.run(open_channel(Plugins(environ={}), "tcp", options, context(), isolated=True))
    with pytest.raises(ConfigError, match="port"):
        asyncio.run(open_channel(Plugins(environ={}), "tcp", {"port": -1}, context()))


def _port(descriptor: bytes) -> bytes:
    from lmcache_core.contracts.transfer import PeerDescriptor

    return PeerDescriptor.decode(descriptor, "tcp").body[1:3]
