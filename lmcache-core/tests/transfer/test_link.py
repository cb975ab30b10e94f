"""Opening a channel by name, and calls to peers that end by their deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from lmcache_core.contracts.transfer import (
    Peer,
    Range,
    TransferCapabilities,
    TransferChannel,
    TransferContext,
)
from lmcache_core.errors import (
    BackendRejected,
    BackendTimeout,
    BackendUnavailable,
    ConfigError,
    UnknownPluginError,
)
from lmcache_core.memory.host_memory import OwnedRegion, allocate_region
from lmcache_core.metrics import Counters
from lmcache_core.plugins.manager import Plugins
from lmcache_core.tiers.peers import Link, open_channel


@pytest.fixture
def region() -> OwnedRegion:
    return allocate_region(1 << 16)


class Scripted(TransferChannel):
    """Does what ``calls`` says, one entry a call."""

    capabilities = TransferCapabilities(protected=True)
    descriptor = b"me"

    def __init__(self, *calls: Callable[[], object]) -> None:
        self.calls = list(calls)
        self.notes: list[bytes] = []

    async def open(self, context: TransferContext) -> None: ...

    async def connect(self, descriptor: bytes) -> Peer:
        await self._next()
        return Peer("other", 1 << 16, True)

    async def read(self, peer: Peer, ranges: Sequence[Range]) -> None:
        await self._next()

    async def write(self, peer: Peer, ranges: Sequence[Range], note: bytes = b"") -> None:
        self.notes.append(note)
        await self._next()

    async def disconnect(self, peer: Peer) -> None: ...

    async def close(self) -> None: ...

    async def _next(self) -> None:
        outcome = self.calls.pop(0)()
        if isinstance(outcome, asyncio.Event):
            await outcome.wait()


def nothing() -> None: ...


def unavailable() -> None:
    raise BackendUnavailable("gone")


def rejected() -> None:
    raise BackendRejected("no")


def test_a_channel_is_opened_by_its_name(region: OwnedRegion) -> None:
    async def move() -> bytes:
        context = TransferContext("here", region.region, writable=True)
        here = await open_channel(Plugins(environ={}), "tcp", {}, context)
        link = await Link.to(here, here.descriptor, counters=Counters())
        region.region.view[:5] = b"bytes"
        assert (await link.read([Range(100, 0, 5)])).ok
        assert (await link.write([Range(0, 200, 5)])).ok
        assert (await link.close()).ok
        await here.close()
        return bytes(region.region.view[100:105]) + bytes(region.region.view[200:205])

    assert asyncio.run(move()) == b"bytesbytes"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prot": 1}, "prot"),
        ({"port": "many"}, "port"),
        ({"host": "::"}, "advertise"),
        ({"tls_key": "key.pem"}, "tls_cert"),
    ],
    ids=str,
)
def test_wrong_options_are_named(
    region: OwnedRegion, options: dict[str, object], said: str
) -> None:
    context = TransferContext("here", region.region)
    with pytest.raises(ConfigError, match=f"transfer channel 'tcp': .*{said}"):
        asyncio.run(open_channel(Plugins(environ={}), "tcp", options, context))


def test_an_unknown_channel_is_an_error_with_what_there_is(region: OwnedRegion) -> None:
    context = TransferContext("here", region.region)
    with pytest.raises(UnknownPluginError, match=r"installed: .*tcp"):
        asyncio.run(open_channel(Plugins(environ={}), "no-such", {}, context))


def test_lmcache_plugins_lists_it() -> None:
    provided = [what for record in Plugins(environ={}).records for what in record.provides]
    assert "transfer channel tcp" in provided


def link(channel: TransferChannel, deadline_s: float = 30.0) -> Link:
    return Link(channel, Peer("other", 1 << 16, True), deadline_s=deadline_s, counters=Counters())


def test_a_read_is_tried_again_and_a_write_with_a_note_is_not() -> None:
    async def calls() -> tuple[bool, bool, bool, list[bytes]]:
        channel = Scripted(unavailable, nothing, unavailable, nothing, unavailable)
        one = link(channel)
        return (
            (await one.read([])).ok,
            (await one.write([])).ok,
            (await one.write([], b"once")).ok,
            channel.notes,
        )

    assert asyncio.run(calls()) == (True, True, False, [b"", b"", b"once"])


def test_a_refusal_is_an_answer() -> None:
    answer = asyncio.run(link(Scripted(rejected)).read([]))
    assert isinstance(answer.error, BackendRejected)


def test_a_late_call_is_cancelled_and_says_when_memory_is_free() -> None:
    async def call() -> None:
        never = asyncio.Event()
        answer = await link(Scripted(lambda: never), deadline_s=0.01).read([])
        assert isinstance(answer.error, BackendTimeout)
        assert answer.unsettled is not None
        await asyncio.wait([answer.unsettled])  # the channel ended it, since it was cancelled
        assert answer.unsettled.cancelled()

    asyncio.run(call())


def test_connecting_ends_by_its_deadline() -> None:
    async def call() -> None:
        never = asyncio.Event()
        with pytest.raises(BackendTimeout):
            await Link.to(Scripted(lambda: never), b"", deadline_s=0.01, counters=Counters())
        with pytest.raises(BackendUnavailable):
            await Link.to(Scripted(unavailable), b"", counters=Counters())

    asyncio.run(call())
