"""The contract between lmcache-core and a transfer channel.

A channel moves bytes straight between the host memory of two processes: for instances that read
each other's chunks, and for prefill in one process and decoding in another. Knows what a channel
owes and what core guarantees. Holds no policy: who talks to whom, what lies where, deadlines and
retries are core's business (`lmcache_core.tiers.peers`).

    channel.open(context)            one process, on its region
    channel.descriptor               bytes; whoever coordinates the two hands them to the other
    channel.connect(descriptor)      the other process, which has a channel on its own region
    channel.read(peer, ranges)       from the peer's region into ours
    channel.write(peer, ranges, …)   from ours into the peer's
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, NamedTuple

import xxhash
from pydantic import BaseModel

from lmcache_core.contracts.storage import HostRegion
from lmcache_core.errors import BackendRejected

MAX_NOTE_BYTES: Final = 64 << 10
MAX_DESCRIPTOR_BYTES: Final = 64 << 10
MAX_NAME_BYTES: Final = 128


class Range(NamedTuple):
    """Bytes that lie at one offset of our region and at another one of the peer's."""

    local: int
    remote: int
    nbytes: int


@dataclass(frozen=True)
class Note:
    """A short message that came with a write, or alone."""

    sender: str
    """The name in the sender's descriptor: what it says of itself."""
    data: bytes


@dataclass(frozen=True)
class TransferCapabilities:
    """Facts about a channel that core plans with."""

    protected: bool
    """The region is out of reach of whoever lacks the descriptor, and its owner checks every range.
    ``False``: both are left to the network and to honest peers."""
    max_concurrency: int = 4
    """More calls at a time to one peer gain nothing."""


@dataclass(frozen=True)
class TransferContext:
    """What core gives a channel when it opens it."""

    name: str
    """For messages and threads."""
    region: HostRegion
    """The memory that moves: peers read from it, and it is what we read into and write from."""
    writable: bool = False
    """Peers may also write into the region."""
    on_note: Callable[[Note], None] | None = None
    """Called on the event loop, once for each note. ``None``: notes are dropped."""


@dataclass(frozen=True, eq=False)
class Peer:
    """The other end, once connected; valid until `TransferChannel.disconnect`. Channels derive."""

    name: str
    """As in `Note.sender`."""
    region_bytes: int
    writable: bool


@dataclass(frozen=True)
class PeerDescriptor:
    """How to reach a region: the envelope that all channels' descriptors have.

    Whoever has it may read the region, and write to it if it is ``writable``: hand it on over
    something trusted only, and believe one only from there.

    Encoded: ``LMPD``, version 1 (2 bytes), flags (2; 1: writable), region's length (8), lengths of
    channel, name (2 each) and body (4), these three, and the xxh3-64 of all before it (8); integers
    little-endian, texts UTF-8.
    """

    channel: str
    """Name of the kind of channel."""
    name: str
    """Of this one; no other has it."""
    region_bytes: int
    writable: bool
    body: bytes
    """The channel's own."""

    def encode(self) -> bytes:
        """The descriptor as bytes.

        Raises:
            BackendRejected: it would be longer than `MAX_DESCRIPTOR_BYTES`.
        """
        channel, name = self.channel.encode(), self.name.encode()
        head = _HEAD.pack(
            _MAGIC,
            _VERSION,
            _WRITABLE if self.writable else 0,
            self.region_bytes,
            len(channel),
            len(name),
            len(self.body),
        )
        text = head + channel + name + self.body
        if len(text) + _SUM_BYTES > MAX_DESCRIPTOR_BYTES:
            raise BackendRejected(
                f"the descriptor of a {self.channel} channel has {len(text)} bytes; "
                f"{MAX_DESCRIPTOR_BYTES} is the most"
            )
        return text + xxhash.xxh3_64_digest(text)

    @classmethod
    def decode(cls, data: bytes, channel: str) -> PeerDescriptor:
        """What `encode` made, for a channel of the kind ``channel``.

        Raises:
            BackendRejected: it is damaged, of another version, or another kind of channel's.
        """
        text, checksum = data[:-_SUM_BYTES], data[-_SUM_BYTES:]
        if not _HEAD.size <= len(text) < MAX_DESCRIPTOR_BYTES or not text.startswith(_MAGIC):
            raise BackendRejected(f"{len(data)} bytes that aren't a peer's descriptor")
        _, version, flags, region_bytes, *lengths = _HEAD.unpack_from(text)
        if version != _VERSION:
            raise BackendRejected(
                f"a peer's descriptor has version {version}, this is lmcache-core with version "
                f"{_VERSION}; run the same release on both sides"
            )
        if len(text) != _HEAD.size + sum(lengths) or xxhash.xxh3_64_digest(text) != checksum:
            raise BackendRejected("a peer's descriptor is damaged: its checksum is another")
        ends = [_HEAD.size + sum(lengths[:count]) for count in range(4)]
        parts = [text[start:end] for start, end in pairwise(ends)]
        kind = parts[0].decode(errors="replace")
        if kind != channel:
            raise BackendRejected(
                f"the peer has a {kind!r} channel, this one is {channel!r}: configure the same"
            )
        if len(parts[1]) > MAX_NAME_BYTES:
            raise BackendRejected(f"a peer's name of {len(parts[1])} bytes is too long")
        return cls(
            kind,
            parts[1].decode(errors="replace"),
            region_bytes,
            bool(flags & _WRITABLE),
            parts[2],
        )


_MAGIC: Final = b"LMPD"
_VERSION: Final = 1
_WRITABLE: Final = 1
_SUM_BYTES: Final = 8
_HEAD: Final = struct.Struct("<4sHHQHHI")


class TransferChannel(ABC):
    """Moves bytes between this process's region and its peers'.

    What core guarantees:

    * ``open`` comes first and once, ``close`` last; every call comes from one event loop. Calls may
      overlap.
    * The region outlives the channel. Until a call has ended, nobody else uses what it reads into,
      nor changes what it writes from; ranges that a call moves into don't overlap.
    * Whoever awaits a call bounds it, and cancels it at its deadline. Nobody else retries, counts
      or logs.

    What a channel owes:

    * When ``read`` returns, the bytes of all ranges are in the local region; when ``write``
      returns, they are in the peer's. No other byte is touched. After any other end, the content of
      the ranges that were moved into is undefined.
    * A range that isn't inside both regions, and a write to a region that isn't writable, is a
      ``BackendRejected``, and nothing of its call moves.
    * A note is handed over after the bytes of its write are visible, once if the write returned, at
      most once if it didn't, and in the order of writes that were awaited one after another.
    * A call that is cancelled ends when nothing moves into or out of its local ranges any more, and
      not before, however long that takes. ``close`` ends it in any case.
    * A peer that ended, or a descriptor of one, is a ``BackendUnavailable`` at once, and never
      somebody else. A peer that hangs or lags costs calls to other peers nothing.
    * A descriptor is plain data with a version: nothing in it is executed or unpickled. One that is
      damaged, foreign or forged is a ``BackendRejected`` or ``BackendUnavailable``.
    * Where ``capabilities.protected``, nobody without the descriptor gets a byte in or out, the
      owner checks ranges itself, and rubbish on its port harms no one.
    * The event loop is never blocked; use `BlockingChannel` for a client that blocks.
    * After ``close`` nobody reads or writes the region, calls under way have failed with
      ``BackendUnavailable``, and no thread and no view of the region is left.
    """

    @property
    @abstractmethod
    def capabilities(self) -> TransferCapabilities:
        """Facts that core plans with; constant."""

    @property
    @abstractmethod
    def descriptor(self) -> bytes:
        """How peers reach this channel: an encoded `PeerDescriptor`. Constant after ``open``."""

    @abstractmethod
    async def open(self, context: TransferContext) -> None:
        """Make the region reachable. Called once, before any other method.

        Raises:
            BackendRejected: the options or the region are refused.
            BackendUnavailable: the address or device can't be had now.
        """

    @abstractmethod
    async def connect(self, descriptor: bytes) -> Peer:
        """The peer that ``descriptor`` leads to; it answered.

        Raises:
            BackendRejected: the descriptor isn't one, or the peer refuses it.
            BackendUnavailable: nobody is there any more.
        """

    @abstractmethod
    async def read(self, peer: Peer, ranges: Sequence[Range]) -> None:
        """Fill local ranges from the peer's.

        Raises:
            BackendRejected: see above.
            BackendUnavailable: the peer is gone.
        """

    @abstractmethod
    async def write(self, peer: Peer, ranges: Sequence[Range], note: bytes = b"") -> None:
        """Fill the peer's ranges from local ones, then hand it ``note`` unless that is empty.

        Without ranges, the note goes alone, also to a peer that isn't writable.

        Raises:
            BackendRejected: see above; or the note is longer than `MAX_NOTE_BYTES`.
            BackendUnavailable: the peer is gone.
        """

    @abstractmethod
    async def disconnect(self, peer: Peer) -> None:
        """Let go of a peer; calls to it fail. Idempotent."""

    @abstractmethod
    async def close(self) -> None:
        """End what is under way and let go of everything. Idempotent."""


@dataclass(frozen=True, kw_only=True)
class TransferChannelDescriptor:
    """What a plugin says about a channel before anything heavy is imported."""

    name: str
    """What a configuration calls it, and `PeerDescriptor.channel`."""
    summary: str
    config: type[BaseModel]
    """Its options; ``extra="forbid"``."""
    create: Callable[[Any], TransferChannel]
    """Makes the channel from a validated ``config``. Imports the client library."""
    isolated: bool = False
    """Its client library may crash or hang: unless the user says otherwise, run it in a process of
    its own, which maps the same region. ``create`` is then called there."""


def check_call(
    peer: Peer, ranges: Sequence[Range], local_bytes: int, *, writes: bool, note: bytes = b""
) -> int:
    """Refuse what the contract refuses; answer how many bytes ``ranges`` have. For channels.

    Raises:
        BackendRejected: the message names the first range, or what else is wrong.
    """
    if len(note) > MAX_NOTE_BYTES:
        raise BackendRejected(f"a note of {len(note)} bytes; {MAX_NOTE_BYTES} is the most")
    if writes and ranges and not peer.writable:
        raise BackendRejected(f"{peer.name}: its region is open for reading only")
    total, remote_bytes = 0, peer.region_bytes
    for one in ranges:
        local, remote, nbytes = one
        if min(one) < 0 or local + nbytes > local_bytes or remote + nbytes > remote_bytes:
            raise BackendRejected(
                f"{peer.name}: {one} isn't inside both regions, of {local_bytes} bytes here and "
                f"{remote_bytes} there"
            )
        total += nbytes
    return total
