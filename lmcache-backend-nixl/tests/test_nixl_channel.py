"""The ``nixl`` channel keeps the transfer contract, with real agents.

Always isolated, as it is by default.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from dataclasses import replace

import pytest
from open_ports import documented, open_ports
from pydantic import ValidationError

from lmcache_backend_nixl.config import NixlChannelConfig
from lmcache_core.contracts.transfer import PeerDescriptor, TransferChannel, TransferContext
from lmcache_core.errors import BackendRejected
from lmcache_core.memory.host_memory import allocate_region
from lmcache_core.plugins.manager import Plugins
from lmcache_core.testing.transfer import TransferChannelTests
from lmcache_core.testing.transfer_processes import BetweenProcesses
from lmcache_core.tiers.peers import open_channel

LOOPBACK = {"devices": "lo"}
OVER_TCP = {**LOOPBACK, "transport": "tcp"}


class TestUcx(TransferChannelTests):
    """Whatever UCX chooses: shared memory and its kin, on one machine."""

    channel = "nixl"
    options = LOOPBACK


class TestUcxOverTcp(BetweenProcesses):
    """As between machines."""

    channel = "nixl"
    options = OVER_TCP
    process_bytes = 16 << 20  # slow where two cores are shared


async def opened(options: dict[str, object]) -> TransferChannel:
    context = TransferContext("one", allocate_region(1 << 16, shared=True).region)
    return await open_channel(Plugins(environ={}), "nixl", options, context)


@pytest.mark.parametrize("options", [{"transport": "tcp"}, OVER_TCP], ids=str)
def test_it_listens_where_the_security_page_says(options: dict[str, object]) -> None:
    """On the network whatever ``devices`` says, for NIXL itself."""

    async def run() -> Counter[tuple[str, str]]:
        before = open_ports(os.getpid())
        channel = await opened(options)
        try:
            return open_ports(os.getpid()) - before
        finally:
            await channel.close()

    found = asyncio.run(run())
    assert set(found) - {("TCP", "this machine")} == documented("`nixl` channel")


@pytest.mark.parametrize("transport", ["shm", "sysv", "self"])
def test_a_transport_that_cannot_tell_of_a_dead_peer_is_refused(transport: str) -> None:
    with pytest.raises(ValidationError, match="can't tell when a peer dies"):
        NixlChannelConfig(transport=transport)


@pytest.mark.parametrize(
    "params", [{"devices": "lo", "transport": "nope"}, {"params": {"num_workers": "x"}}], ids=str
)
def test_what_ucx_refuses_is_named(params: dict[str, object]) -> None:
    with pytest.raises(BackendRejected, match=r"can't start its plugin UCX.*UCX_TLS"):
        asyncio.run(opened(params))


def test_metadata_that_is_anothers_or_nonsense_is_refused() -> None:
    async def connect() -> None:
        here, *others = [await opened(OVER_TCP) for _ in range(3)]
        one, two = (PeerDescriptor.decode(other.descriptor, "nixl") for other in others)
        own = PeerDescriptor.decode(here.descriptor, "nixl")
        bad = [own, replace(one, body=two.body), replace(one, body=one.body[:8])]
        bad.append(replace(one, body=one.body[:8] + b"\x80\x05" + bytes(200)))  # a pickle's start
        for descriptor in bad:
            with pytest.raises(BackendRejected):
                await here.connect(descriptor.encode())
        await here.connect(others[0].descriptor)
        for channel in (here, *others):
            await channel.close()

    asyncio.run(connect())
