"""Transfer channels with one typical mistake each. The kit must catch every one of them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from lmcache_core.aio.daemon_pool import DaemonPool
from lmcache_core.contracts.blocking_channel import Stop
from lmcache_core.contracts.transfer import (
    Note,
    Peer,
    PeerDescriptor,
    Range,
    TransferChannelDescriptor,
    TransferContext,
)
from lmcache_core.errors import BackendUnavailable
from lmcache_core.transfer_tcp.channel import TcpChannel, TcpPeer
from lmcache_core.transfer_tcp.config import TcpChannelConfig

Ranges = Sequence[Range]


class Correct(TcpChannel):
    """No mistake: proves that what is caught below is the mistake and not the base class."""


class TakesOneOffsetForBoth(TcpChannel):
    async def read(self, peer: Peer, ranges: Ranges) -> None:
        await super().read(peer, [Range(a, a, n) for a, _, n in ranges])


class SwapsOffsetsOfWrites(TcpChannel):
    async def write(self, peer: Peer, ranges: Ranges, note: bytes = b"") -> None:
        await super().write(peer, [Range(b, a, n) for a, b, n in ranges], note)


class MovesTheFirstHundred(TcpChannel):
    """Forgets that a batch may be longer than one request."""

    async def read(self, peer: Peer, ranges: Ranges) -> None:
        await super().read(peer, ranges[:100])


class RoundsUp(TcpChannel):
    """Moves whole words."""

    async def write(self, peer: Peer, ranges: Ranges, note: bytes = b"") -> None:
        end = min(self.context.region.nbytes, peer.region_bytes)
        words = [
            Range(a, b, min(n + -n % 8, end - a, end - b)) if n > 0 else Range(a, b, n)
            for a, b, n in ranges
        ]
        await super().write(peer, words, note)


class MovesBeforeItChecks(TcpChannel):
    async def read(self, peer: Peer, ranges: Ranges) -> None:
        for one in ranges:
            await super().read(peer, [one])


class ClampsRanges(TcpChannel):
    """Makes the best of a range that isn't inside."""

    async def write(self, peer: Peer, ranges: Ranges, note: bytes = b"") -> None:
        end = min(self.context.region.nbytes, peer.region_bytes)
        inside = [
            Range(max(a, 0), max(b, 0), max(0, min(n, end - a, end - b))) for a, b, n in ranges
        ]
        await super().write(peer, [one for one in inside if max(one[:2]) <= end], note)


class OpenForWriting(TcpChannel):
    """Ignores what its user said."""

    async def open(self, context: TransferContext) -> None:
        await super().open(replace(context, writable=True))


class NoteFirst(TcpChannel):
    async def write(self, peer: Peer, ranges: Ranges, note: bytes = b"") -> None:
        await super().write(peer, [], note)
        await super().write(peer, ranges)


class NoteTwice(TcpChannel):
    async def write(self, peer: Peer, ranges: Ranges, note: bytes = b"") -> None:
        await super().write(peer, ranges, note)
        if ranges and note:
            await super().write(peer, [], note)


class CutsNotes(TcpChannel):
    """Has a buffer of 4 KiB for them."""

    async def write(self, peer: Peer, ranges: Ranges, note: bytes = b"") -> None:
        await super().write(peer, ranges, note[:4096])


class NotesFromItsThread(TcpChannel):
    def hand_over(self, note: Note) -> Any:
        if self.context.on_note is not None:
            self.context.on_note(note)
        return super().hand_over(replace(note, data=b"again"))


class AnonymousNotes(TcpChannel):
    def hand_over(self, note: Note) -> Any:
        return super().hand_over(replace(note, sender=""))


class OneNameForAll(TcpChannel):
    def __init__(self, config: TcpChannelConfig) -> None:
        super().__init__(config)
        self.name = "node"


class BelievesDescriptors(TcpChannel):
    """Reads what it needs and looks at nothing else."""

    async def connect(self, descriptor: bytes) -> Peer:
        with suppress(Exception):
            found = PeerDescriptor.decode(self.descriptor, "tcp")
            start = self.descriptor.index(found.body)
            body = descriptor[start : start + len(found.body)]
            descriptor = replace(found, name="any", body=body).encode()
        return await super().connect(descriptor)


class AsksForNoSecret(TcpChannel):
    """Whoever finds the port is let in."""

    def open_blocking(self, context: TransferContext, stop: Stop) -> bytes:
        body = super().open_blocking(context, stop)
        assert self._owner is not None
        self._owner._secret = bytes(32)
        return body

    def connect_blocking(self, descriptor: PeerDescriptor, stop: Stop) -> TcpPeer:
        body = descriptor.body[:3] + bytes(32) + descriptor.body[35:]
        return super().connect_blocking(replace(descriptor, body=body), stop)


class StaysOpen(TcpChannel):
    """Forgets the listener."""

    def close_blocking(self) -> None:
        for peer in list(self._peers):
            self.disconnect_blocking(peer)


class SwallowsDeath(TcpChannel):
    async def write(self, peer: Peer, ranges: Ranges, note: bytes = b"") -> None:
        with suppress(BackendUnavailable):
            await super().write(peer, ranges, note)


class WaitsForTheDead(TcpChannel):
    """Tries again for ever."""

    async def read(self, peer: Peer, ranges: Ranges) -> None:
        while self._control is not None:
            with suppress(BackendUnavailable):
                return await super().read(peer, ranges)
            await asyncio.sleep(0.01)
        raise BackendUnavailable("closed")


class OneThreadForAll(TcpChannel):
    """Peers wait for each other."""

    async def open(self, context: TransferContext) -> None:
        await super().open(context)
        self._shared = DaemonPool(1, "shared")

    def _pool(self, peer: Peer) -> DaemonPool:
        super()._pool(peer)
        return self._shared

    async def close(self) -> None:
        await super().close()
        self._shared.shutdown()


class EndsBeforeItsThread(TcpChannel):
    """A cancelled call is over at once; its thread isn't."""

    async def read(self, peer: Peer, ranges: Ranges) -> None:
        reading = asyncio.ensure_future(super().read(peer, ranges))
        reading.add_done_callback(lambda one: one.cancelled() or one.exception())
        await asyncio.shield(reading)


class Sleeps(TcpChannel):
    async def read(self, peer: Peer, ranges: Ranges) -> None:
        time.sleep(0.0001)
        await super().read(peer, ranges)


class MixesCalls(TcpChannel):
    """Keeps the batch that it is working on in itself."""

    async def read(self, peer: Peer, ranges: Ranges) -> None:
        self.ranges = ranges
        await asyncio.sleep(0)
        await super().read(peer, self.ranges)


class LeaksThread(TcpChannel):
    async def open(self, context: TransferContext) -> None:
        self.stop = threading.Event()
        # Ends by itself long after the test, and never keeps the test process alive.
        threading.Thread(target=self.stop.wait, args=(60,), daemon=True, name="leak").start()
        await super().open(context)


class KeepsAView(TcpChannel):
    async def open(self, context: TransferContext) -> None:
        self.view = context.region.view[:1]
        await super().open(context)


class ClosesOnlyOnce(TcpChannel):
    closed = False

    async def close(self) -> None:
        if self.closed:
            raise RuntimeError("already closed")
        self.closed = True
        await super().close()


class ForgetsToDisconnect(TcpChannel):
    async def disconnect(self, peer: Peer) -> None:
        pass


def __getattr__(name: str) -> TransferChannelDescriptor:
    """``described_X`` is the descriptor of X; the kit's other processes import it."""
    kind = globals().get(name.removeprefix("described_"))
    if kind is None or not name.startswith("described_"):
        raise AttributeError(name)
    return TransferChannelDescriptor(
        name="tcp", summary="broken", config=TcpChannelConfig, create=kind
    )
