"""The process of one isolated transfer channel: makes it, calls it as asked, answers.

    python -m lmcache_core.isolation.channel_child NAME CONTROL_FD PARENT_PID

As `child`, which see; the region is the same memory here, at another address.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from dataclasses import asdict
from typing import Any

from lmcache_core.contracts.transfer import Note, Peer, Range, TransferChannel, TransferContext
from lmcache_core.errors import BackendUnavailable, LMCacheError
from lmcache_core.isolation.child import (
    Service,
    attached,
    log_to_stderr,
    options_of,
    plugins_here,
    private_bytes,
    serve,
)
from lmcache_core.isolation.wire import Message
from lmcache_core.plugins.creation import NotCreated, created_channel


class ChannelService(Service):
    """Answers requests about one channel."""

    def __init__(self, control: socket.socket) -> None:
        super().__init__(control)
        self._transfer: TransferChannel | None = None
        self._peers: dict[int, Peer] = {}
        self._calls: dict[int, asyncio.Task[Any]] = {}
        self._notes: list[Note] = []
        self._came = asyncio.Event()

    async def _do(self, request: Message) -> Any:
        what = request["do"]
        if what == "open_channel":
            return await self._open_channel(request)
        if what == "ping":
            return private_bytes()
        if what == "cancel":
            task = self._calls.get(request["call"])
            return task is not None and task.cancel()
        channel = self._transfer
        if channel is None:
            raise BackendUnavailable("the channel isn't open")
        task = asyncio.current_task()
        if task is not None:
            self._calls[request["call"]] = task
        try:
            return await self._on(channel, what, request)
        finally:
            self._calls.pop(request["call"], None)

    async def _on(self, channel: TransferChannel, what: str, request: Message) -> Any:
        if what == "notes":
            return await self._noted()
        if what == "close":
            await channel.close()
            return None
        if what == "connect":
            peer = await channel.connect(bytes.fromhex(request["descriptor"]))
            self._peers[request["call"]] = peer
            return [request["call"], peer.name, peer.region_bytes, peer.writable]
        peer = self._peers[request["peer"]]
        if what == "disconnect":
            del self._peers[request["peer"]]
            await channel.disconnect(peer)
            return None
        ranges = [Range(*one) for one in request["ranges"]]
        if what == "read":
            await channel.read(peer, ranges)
        else:
            await channel.write(peer, ranges, bytes.fromhex(request["note"]))
        return None

    async def _open_channel(self, request: Message) -> dict[str, Any]:
        sys.path[:] = request["sys_path"]
        log_to_stderr(request["log_level"])
        region = attached(*request["memory"])
        where = request["where"]
        try:
            descriptor = plugins_here().transfer_channel(request["type"])
            config = options_of(descriptor.config, request["options"], where)
            channel = created_channel(descriptor, config, where)
        except LMCacheError as error:
            raise NotCreated(error) from error
        await channel.open(
            TransferContext(request["name"], region, request["writable"], self._note)
        )
        self._transfer = channel
        return {
            "descriptor": channel.descriptor.hex(),
            "capabilities": asdict(channel.capabilities),
        }

    def _note(self, note: Note) -> None:
        self._notes.append(note)
        self._came.set()

    async def _noted(self) -> list[tuple[str, str]]:
        """Notes since the last time; waits for one."""
        await self._came.wait()
        self._came.clear()
        notes, self._notes = self._notes, []
        return [(note.sender, note.data.hex()) for note in notes]


if __name__ == "__main__":
    serve(ChannelService)
