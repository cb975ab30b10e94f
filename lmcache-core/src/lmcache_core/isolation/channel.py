"""The engine's side of an isolated transfer channel: an ordinary `TransferChannel`.

A child that dies isn't followed by another one: peers have the descriptor of the first, which
nobody can answer for any more. Calls fail then, memory is at rest, and whoever opened the channel
opens a new one.

Knows what is asked of the child. What a child is is `process`' business.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel

from lmcache_core.contracts.transfer import (
    Note,
    Peer,
    Range,
    TransferCapabilities,
    TransferChannel,
    TransferContext,
    check_call,
)
from lmcache_core.errors import BackendError, BackendRejected, BackendUnavailable
from lmcache_core.isolation.process import Child
from lmcache_core.isolation.wire import options_to_plain
from lmcache_core.plugins.creation import NotCreated

logger = logging.getLogger(__name__)

_OPEN_PATIENCE_S: Final = 120.0
_CLOSE_PATIENCE_S: Final = 10.0
_UNBOUNDED_S: Final = 1e8
"""Whoever awaits a call bounds it; and a child that runs nothing any more is found by pings."""


@dataclass(frozen=True, eq=False)
class IsolatedPeer(Peer):
    """A peer, by the number that the child knows it by."""

    number: int


class IsolatedChannel(TransferChannel):
    """Stands for a channel of the kind ``kind`` that lives in a child process.

    Its region has to be shareable (`HostRegion.fd`), so that nothing is copied.
    """

    def __init__(self, kind: str, options: BaseModel, *, where: str) -> None:
        self._kind = kind
        self._options = options
        self._where = where
        self._context: TransferContext | None = None
        self._capabilities: TransferCapabilities | None = None
        self._descriptor = b""
        self._child: Child | None = None
        self._numbers = itertools.count(1)
        self._gone: set[int] = set()
        self._receiving: asyncio.Task[None] | None = None

    @property
    def capabilities(self) -> TransferCapabilities:
        if self._capabilities is None:
            raise BackendUnavailable(f"{self._where} isn't open")
        return self._capabilities

    @property
    def descriptor(self) -> bytes:
        return self._descriptor

    async def open(self, context: TransferContext) -> None:
        region = context.region
        if region.fd is None:
            raise BackendRejected(
                f"{self._where} runs in a process of its own, and its region can't be shared with "
                "it: allocate it with shared=True, or set isolated to false"
            )
        self._context = context
        self._child = child = Child(context.name, module="channel_child")
        try:
            await child.start([region.fd])
            opened = await self._ask(
                "open_channel",
                _OPEN_PATIENCE_S,
                sys_path=sys.path,
                log_level=logging.getLogger().getEffectiveLevel(),
                memory=[region.fd, region.nbytes],
                where=self._where,
                type=self._kind,
                options=options_to_plain(self._options),
                name=context.name,
                writable=context.writable,
            )
        except NotCreated as error:
            await self.close()
            raise error.problem from error
        except BaseException:
            await self.close()
            raise
        self._descriptor = bytes.fromhex(opened["descriptor"])
        self._capabilities = TransferCapabilities(**opened["capabilities"])
        child.watch()
        self._receiving = asyncio.get_running_loop().create_task(self._receive(context))

    async def connect(self, descriptor: bytes) -> Peer:
        number, name, region_bytes, writable = await self._ask(
            "connect", descriptor=descriptor.hex()
        )
        return IsolatedPeer(name, region_bytes, writable, number=number)

    async def read(self, peer: Peer, ranges: Sequence[Range]) -> None:
        number = self._number(peer)
        if check_call(peer, ranges, self._local_bytes(), writes=False):
            await self._ask("read", peer=number, ranges=ranges)

    async def write(self, peer: Peer, ranges: Sequence[Range], note: bytes = b"") -> None:
        number = self._number(peer)
        if check_call(peer, ranges, self._local_bytes(), writes=True, note=note) or note:
            await self._ask("write", peer=number, ranges=ranges, note=note.hex())

    async def disconnect(self, peer: Peer) -> None:
        if isinstance(peer, IsolatedPeer) and peer.number not in self._gone:
            self._gone.add(peer.number)
            if self._child is not None and self._child.alive:
                await self._ask("disconnect", peer=peer.number)

    async def close(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        if child.alive:
            with suppress(BackendError):
                await child.ask("close", _CLOSE_PATIENCE_S, call=next(self._numbers))
        child.kill("closed")
        await child.gone
        if self._receiving is not None:
            await asyncio.wait([self._receiving])
        child.join()
        self._context = None

    async def _receive(self, context: TransferContext) -> None:
        """Hand over notes until the child is gone."""
        try:
            while True:
                for sender, data in await self._ask("notes"):
                    if context.on_note is not None:
                        context.on_note(Note(sender, bytes.fromhex(data)))
        except BackendUnavailable as error:
            if self._child is not None:
                logger.warning("%s: no more notes come: %s", context.name, error)

    async def _ask(self, what: str, patience_s: float = _UNBOUNDED_S, **facts: Any) -> Any:
        """Call the child; ends when it has answered or is dead, cancelled or not."""
        child = self._child
        if child is None:
            raise BackendUnavailable(f"{self._where} isn't open")
        call = next(self._numbers)
        future = child.ask(what, patience_s, call=call, **facts)
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            with suppress(BackendUnavailable):
                child.ask("cancel", _CLOSE_PATIENCE_S, call=call)
            while not future.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([future])
            future.exception()
            raise
        return future.result()

    def _local_bytes(self) -> int:
        if self._context is None:
            raise BackendUnavailable(f"{self._where} isn't open")
        return self._context.region.nbytes

    def _number(self, peer: Peer) -> int:
        if not isinstance(peer, IsolatedPeer) or peer.number in self._gone:
            raise BackendUnavailable(f"{peer.name}: the peer isn't connected")
        return peer.number
