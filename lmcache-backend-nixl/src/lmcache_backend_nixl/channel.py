"""The ``nixl`` transfer channel: host memory of two processes, over UCX.

One agent for all peers; a descriptor's body is the region's address (8 bytes, little-endian) and
the agent's metadata, which NIXL takes apart itself. Nothing of a peer's is unpickled.

Knows regions, ranges and descriptors. NIXL itself is `ucx`'s business.
"""

from __future__ import annotations

import mmap
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from lmcache_backend_nixl.agent import address_of
from lmcache_backend_nixl.config import PAGE_BYTES, NixlChannelConfig
from lmcache_backend_nixl.ucx import Pace, UcxAgent
from lmcache_core import (
    BackendRejected,
    BackendUnavailable,
    BlockingChannel,
    Note,
    Peer,
    PeerDescriptor,
    Range,
    Stop,
    TransferCapabilities,
    TransferContext,
)

if TYPE_CHECKING:
    from lmcache_backend_nixl.ucx import Places

_ADDRESS: Final = struct.Struct("<Q")
_LONGEST_PAUSE_S: Final = 0.001
"""Between two looks for notes and at peers' doings: NIXL has nothing to wait on."""


@dataclass(frozen=True, eq=False)
class NixlPeer(Peer):
    """A peer, and where its region lies in its own memory."""

    address: int


class NixlChannel(BlockingChannel):
    """NIXL with UCX between two regions; see `TransferChannel`."""

    kind: ClassVar[str] = "nixl"

    def __init__(self, config: NixlChannelConfig) -> None:
        super().__init__()
        self._config = config
        self._agent: UcxAgent | None = None
        self._scratch: mmap.mmap | None = None
        self._known: dict[str, int] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._listener: threading.Thread | None = None

    @property
    def capabilities(self) -> TransferCapabilities:
        # UCX asks nobody who he is; and without RDMA hardware no owner checks an address.
        return TransferCapabilities(protected=False, max_concurrency=self._config.calls)

    def open_blocking(self, context: TransferContext, stop: Stop) -> bytes:  # noqa: ARG002
        region = context.region
        agent = self._agent = UcxAgent(self.name, self._config.plugin_params())
        agent.register(region.address, region.nbytes)
        metadata = agent.metadata()
        self._scratch = mmap.mmap(-1, PAGE_BYTES)
        agent.register(address_of(memoryview(self._scratch)), PAGE_BYTES)  # not in the metadata
        self._listener = threading.Thread(
            target=self._listen, args=(agent,), name=f"lmcache-{context.name}-notes", daemon=True
        )
        self._listener.start()
        return _ADDRESS.pack(region.address) + metadata

    def connect_blocking(self, descriptor: PeerDescriptor, stop: Stop) -> NixlPeer:
        if len(descriptor.body) <= _ADDRESS.size:
            raise BackendRejected(f"the descriptor of peer {descriptor.name} has no metadata")
        if descriptor.name == self.name:
            raise BackendRejected("a nixl channel doesn't connect to itself: NIXL can't")
        (address,) = _ADDRESS.unpack_from(descriptor.body)
        peer = NixlPeer(
            descriptor.name, descriptor.region_bytes, descriptor.writable, address=address
        )
        self._add(descriptor.name, descriptor.body[_ADDRESS.size :])
        try:
            self._greet(peer, stop)
        except BaseException:
            self._remove(descriptor.name)
            raise
        return peer

    def read_blocking(self, peer: NixlPeer, ranges: Sequence[Range], stop: Stop) -> None:  # noqa: ARG002
        # A transfer can't be stopped, so a call that is cancelled waits for it like any other.
        ours, theirs = self._places(peer, ranges)
        self._opened_agent().move("READ", peer.name, ours, theirs)

    def write_blocking(
        self,
        peer: NixlPeer,
        ranges: Sequence[Range],
        note: bytes,
        stop: Stop,  # noqa: ARG002
    ) -> None:
        ours, theirs = self._places(peer, ranges)
        if len(ours):
            self._opened_agent().move("WRITE", peer.name, ours, theirs, note)
        else:
            self._opened_agent().notify(peer.name, note)

    def disconnect_blocking(self, peer: NixlPeer) -> None:
        self._remove(peer.name)

    def interrupt_blocking(self) -> None:
        self._closing.set()
        if self._agent is not None:
            self._agent.end()

    def close_blocking(self) -> None:
        if self._listener is not None:
            self._listener.join()
        if self._scratch is not None:
            self._scratch.close()

    # -- peers -----------------------------------------------------------------------------

    def _add(self, name: str, metadata: bytes) -> None:
        """Make a peer known to NIXL, which knows each by its name, once.

        Raises:
            BackendRejected: the metadata is no use.
        """
        agent = self._opened_agent()
        with self._lock:
            if not self._known.get(name):
                said = agent.add(metadata)
                if said != name:
                    agent.remove(said)
                    raise BackendRejected(f"the descriptor of peer {name} is that of {said}")
            self._known[name] = self._known.get(name, 0) + 1

    def _remove(self, name: str) -> None:
        with self._lock:
            self._known[name] -= 1
            if not self._known[name]:
                del self._known[name]
                self._opened_agent().remove(name)

    def _greet(self, peer: NixlPeer, stop: Stop) -> None:
        """Read a byte, since UCX connects when something moves; into memory of our own.

        Raises:
            BackendUnavailable: the peer is gone, or hangs.
        """
        if not peer.region_bytes or self._scratch is None:
            return
        until = time.monotonic() + self._config.connect_timeout_s
        ours = _rows([(address_of(memoryview(self._scratch)), 1)])
        answered = self._opened_agent().move(
            "READ",
            peer.name,
            ours,
            _rows([(peer.address, 1)]),
            give_up=lambda: stop.requested or time.monotonic() > until,
        )
        if not answered:
            raise BackendUnavailable(
                f"peer {peer.name}: no sign of life within {self._config.connect_timeout_s:g} s"
            )

    def _places(self, peer: NixlPeer, ranges: Sequence[Range]) -> tuple[Places, Places]:
        ours, theirs = self.context.region.address, peer.address
        moving = [one for one in ranges if one.nbytes]
        return (
            _rows([(ours + local, nbytes) for local, _, nbytes in moving]),
            _rows([(theirs + remote, nbytes) for _, remote, nbytes in moving]),
        )

    def _opened_agent(self) -> UcxAgent:
        if self._agent is None:
            raise BackendUnavailable("the nixl channel isn't open")
        return self._agent

    # -- the listener's thread -------------------------------------------------------------

    def _listen(self, agent: UcxAgent) -> None:
        pace = Pace(_LONGEST_PAUSE_S)
        while not self._closing.wait(pace.pause_s()):
            pace.begin()
            try:
                came = agent.notes()
            except BackendUnavailable:
                return  # it has ended, and calls say so
            taken = [self.hand_over(Note(sender, data)) for sender, data in came]
            while taken and not self._closing.is_set():  # so that notes don't pile up in core
                if taken[-1].done():
                    break
                self._closing.wait(_LONGEST_PAUSE_S)


def _rows(places: Sequence[tuple[int, int]]) -> Places:
    import numpy as np

    rows = np.zeros((len(places), 3), dtype=np.uint64)
    if places:
        rows[:, :2] = np.array(places, dtype=np.uint64)
    return rows
