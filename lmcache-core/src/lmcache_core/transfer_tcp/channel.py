"""The ``tcp`` transfer channel: its active end, which reads and writes peers' regions.

A call takes a connection for itself and gives it back; the next call takes it again. A call that is
cancelled cuts its connection off, which is what keeps bytes from coming in afterwards.

Knows connections to peers. What they may do here is `owner`'s business.
"""

from __future__ import annotations

import contextlib
import secrets
import ssl
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from lmcache_core.aio.stream import PlainStream, Stream, TlsStream, dial
from lmcache_core.aio.tls import client_context
from lmcache_core.contracts.blocking_channel import BlockingChannel, Stop
from lmcache_core.contracts.transfer import (
    Peer,
    PeerDescriptor,
    Range,
    TransferCapabilities,
    TransferContext,
)
from lmcache_core.errors import BackendRejected, BackendTimeout, BackendUnavailable
from lmcache_core.transfer_tcp import wire
from lmcache_core.transfer_tcp.config import TcpChannelConfig
from lmcache_core.transfer_tcp.line import Line, pieces
from lmcache_core.transfer_tcp.owner import Owner
from lmcache_core.transfer_tcp.wire import Op, Status, WireError


@dataclass(frozen=True, eq=False)
class TcpPeer(Peer):
    """A peer, and the connections to it that nobody uses at the moment."""

    address: wire.Address
    free: list[Line] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def where(self) -> str:
        return f"peer {self.name} at {self.address.host}:{self.address.port}"


class TcpChannel(BlockingChannel):
    """Sockets between two regions; see `TransferChannel`."""

    kind: ClassVar[str] = "tcp"

    def __init__(self, config: TcpChannelConfig) -> None:
        super().__init__()
        self._config = config
        self._owner: Owner | None = None
        self._peers: set[TcpPeer] = set()

    @property
    def capabilities(self) -> TransferCapabilities:
        return TransferCapabilities(protected=True, max_concurrency=self._config.calls)

    def open_blocking(self, context: TransferContext, stop: Stop) -> bytes:  # noqa: ARG002
        self._owner = Owner(
            self._config,
            context.region,
            writable=context.writable,
            hand_over=self.hand_over,
            name=f"lmcache-{context.name}",
        )
        return self._owner.address.encode()

    def connect_blocking(self, descriptor: PeerDescriptor, stop: Stop) -> TcpPeer:
        try:
            address = wire.Address.decode(descriptor.body)
        except WireError as error:
            raise BackendRejected(f"the descriptor of peer {descriptor.name}: {error}") from error
        peer = TcpPeer(
            descriptor.name, descriptor.region_bytes, descriptor.writable, address=address
        )
        with self._line(peer, stop):
            self._peers.add(peer)
        return peer

    def read_blocking(self, peer: TcpPeer, ranges: Sequence[Range], stop: Stop) -> None:
        region = self.context.region.view
        for part in _parts(ranges):
            into = pieces(region, [(local, nbytes) for local, _, nbytes in part])
            with self._line(peer, stop) as line:
                line.send([_request(Op.READ, part)])
                self._check(peer, line)
                line.fill(into)

    def write_blocking(
        self, peer: TcpPeer, ranges: Sequence[Range], note: bytes, stop: Stop
    ) -> None:
        region = self.context.region.view
        parts = _parts(ranges) or [[]]
        for number, part in enumerate(parts, 1):
            source = pieces(region, [(local, nbytes) for local, _, nbytes in part])
            with self._line(peer, stop) as line:
                said = note if number == len(parts) else b""
                line.send([_request(Op.WRITE, part, said), *source])
                self._check(peer, line)

    def disconnect_blocking(self, peer: TcpPeer) -> None:
        self._peers.discard(peer)
        peer.left.set()
        with peer.lock:
            free, peer.free[:] = list(peer.free), []
        for line in free:
            line.close()

    def close_blocking(self) -> None:
        for peer in list(self._peers):
            self.disconnect_blocking(peer)
        if self._owner is not None:
            self._owner.close()

    # -- connections -----------------------------------------------------------------------

    @contextlib.contextmanager
    def _line(self, peer: TcpPeer, stop: Stop) -> Iterator[Line]:
        """A connection of the caller's own; it is kept if all went well.

        Raises:
            BackendUnavailable, BackendTimeout, BackendRejected: what went wrong, in a sentence.
        """
        line: Line | None = None
        try:
            line = self._free(peer) or self._dial(peer, stop)
            with stop.calls(line.shutdown):
                yield line
            with peer.lock:
                if not peer.left.is_set():
                    peer.free.append(line)
                    line = None
        except EOFError:
            why = "the call was given up" if stop.requested else "the peer closed the connection"
            raise BackendUnavailable(f"{peer.where}: {why}") from None
        except WireError as error:
            raise BackendUnavailable(
                f"{peer.where}: {error}; something else listens there by now"
            ) from error
        except ssl.SSLCertVerificationError as error:
            raise BackendRejected(
                f"{peer.where}: its certificate isn't trusted: {error.verify_message}; set ca_file"
            ) from error
        except OSError as error:
            raise BackendUnavailable(f"{peer.where}: {error.strerror or error}") from error
        finally:
            if line is not None:
                line.close()

    def _free(self, peer: TcpPeer) -> Line | None:
        while not peer.left.is_set():
            with peer.lock:
                line = peer.free.pop() if peer.free else None
            if line is None:
                return None
            if line.idle():
                return line
            line.close()
        raise EOFError

    def _dial(self, peer: TcpPeer, stop: Stop) -> Line:
        config, address = self._config, peer.address
        context = client_context(config.ca_file) if address.tls else None
        sock = dial(address.host, address.port, config.connect_timeout_s)
        stream: Stream
        if context is None:
            stream = PlainStream(sock)
        else:
            stream = TlsStream(sock, context, address.host, config.connect_timeout_s)
        line = Line(stream, peer.where, config.connect_timeout_s)
        try:
            with stop.calls(line.shutdown):
                self._greet(peer, line)
        except BaseException:
            line.close()
            raise
        line.stall_timeout_s = config.stall_timeout_s
        return line

    def _greet(self, peer: TcpPeer, line: Line) -> None:
        secret, name = peer.address.secret, self.name.encode()
        data = memoryview(bytearray(wire.GREETING.size))
        line.fill([data])
        theirs, ours = wire.parse_greeting(data), secrets.token_bytes(wire.NONCE_BYTES)
        proof = wire.prove(secret, b"client", theirs, ours, name)
        line.send([memoryview(wire.hello(name, ours, proof))])
        data = memoryview(bytearray(wire.WELCOME.size))
        line.fill([data])
        status, said = wire.WELCOME.unpack(data)
        right = wire.prove(secret, b"owner", theirs, ours, name)
        if status != Status.OK or not wire.proves(said, right):
            # Whoever made the descriptor would have known us, and proved itself.
            raise BackendUnavailable(
                f"{peer.where}: another one listens there by now, or the descriptor is forged"
            )

    def _check(self, peer: TcpPeer, line: Line) -> None:
        status = memoryview(bytearray(wire.STATUS_BYTES))
        try:
            line.fill([status], patient=False)
        except BackendTimeout as error:
            raise BackendTimeout(f"{error}; {peer.where} hangs") from None
        if status[0] == Status.OUTSIDE:
            raise BackendRejected(f"{peer.where} refuses a range, or to be written to")
        if status[0] != Status.OK:
            raise WireError(f"it answered {status[0]}")


def _parts(ranges: Sequence[Range]) -> list[Sequence[Range]]:
    """What is moved by one request each."""
    return [
        ranges[start : start + wire.MAX_RANGES] for start in range(0, len(ranges), wire.MAX_RANGES)
    ]


def _request(op: Op, part: Sequence[Range], note: bytes = b"") -> memoryview:
    places = [(remote, nbytes) for _, remote, nbytes in part]
    return memoryview(wire.request(op, places, sum(one.nbytes for one in part), note))
