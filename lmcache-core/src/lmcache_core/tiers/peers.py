"""Opens transfer channels by name, and keeps every call to a peer within its deadline.

Knows channels, peers and `guard`. Knows nothing about what lies in a region, nor about who should
talk to whom.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from lmcache_core.aio.guard import Answer, Guard, contain
from lmcache_core.contracts.transfer import (
    Peer,
    Range,
    TransferChannel,
    TransferChannelDescriptor,
    TransferContext,
)
from lmcache_core.errors import BackendError, BackendTimeout, ConfigError
from lmcache_core.metrics import Counters
from lmcache_core.plugins.creation import created_channel
from lmcache_core.plugins.manager import Plugins


async def open_channel(
    plugins: Plugins,
    name: str,
    options: Mapping[str, Any],
    context: TransferContext,
    *,
    isolated: bool | None = None,
    deadline_s: float = 30.0,
) -> TransferChannel:
    """The channel called ``name`` with ``options``, open on ``context.region``.

    ``isolated``: in a process of its own, which needs a region with an ``fd``; ``None``: as its
    plugin says.

    Raises:
        PluginError: no usable plugin provides it.
        ConfigError: its options are wrong.
        BackendError: it can't be opened; the message says why.
    """
    descriptor = plugins.transfer_channel(name)
    isolated = descriptor.isolated if isolated is None else isolated
    if isolated:
        plugins.check_isolation(descriptor)
    where = _where(descriptor)
    try:
        config = descriptor.config.model_validate(dict(options))
    except ValidationError as error:
        wrong = [
            f"{'.'.join(map(str, one['loc'])) or 'options'}: {one['msg']}"
            for one in error.errors(include_url=False, include_context=False, include_input=False)
        ]
        raise ConfigError(f"{where}: {'; '.join(wrong)}") from None  # it may quote a secret
    channel = make_channel(descriptor, config, isolated=isolated)
    try:
        await asyncio.wait_for(contain(channel.open(context)), deadline_s)
    except asyncio.TimeoutError:
        raise BackendTimeout(f"{where}: open took longer than {deadline_s:g} s") from None
    return channel


def make_channel(
    descriptor: TransferChannelDescriptor, config: BaseModel, *, isolated: bool | None = None
) -> TransferChannel:
    """A channel that isn't open yet, here or in a process of its own; see `open_channel`.

    Raises:
        ConfigError, PluginLoadError: it can't be made.
    """
    where = _where(descriptor)
    if descriptor.isolated if isolated is None else isolated:
        from lmcache_core.isolation.channel import IsolatedChannel

        return IsolatedChannel(descriptor.name, config, where=where)
    return created_channel(descriptor, config, where)


class Link:
    """One peer of a channel behind a guard: every call is answered by its deadline.

    A read is tried again where that may help, a write with a note isn't: the note might come twice.
    A call that missed its deadline is cancelled; its answer's ``unsettled`` is done once its local
    ranges are free. Until then they must not be used for anything else.
    """

    def __init__(
        self, channel: TransferChannel, peer: Peer, *, deadline_s: float, counters: Counters
    ) -> None:
        self.peer = peer
        self._channel = channel
        self._guard = Guard(f"peer {peer.name}", deadline_s=deadline_s, counters=counters)
        self._once = Guard(f"peer {peer.name}", deadline_s=deadline_s, retries=0, counters=counters)
        for guard in (self._guard, self._once):
            guard.max_concurrency = channel.capabilities.max_concurrency

    @classmethod
    async def to(
        cls,
        channel: TransferChannel,
        descriptor: bytes,
        *,
        deadline_s: float = 5.0,
        counters: Counters,
    ) -> Link:
        """Connect to the peer that ``descriptor`` leads to.

        Raises:
            BackendError: nobody is there, or the descriptor isn't one.
        """
        guard = Guard("a peer", deadline_s=deadline_s, counters=counters)
        answer = await guard.once(
            "connect", lambda: channel.connect(descriptor), deadline_s=deadline_s
        )
        if answer.value is None:
            raise (
                answer.error
                if isinstance(answer.error, BackendError)
                else BackendError(f"a peer can't be connected to: {answer.error!r}")
            )
        return cls(channel, answer.value, deadline_s=deadline_s, counters=counters)

    async def read(
        self, ranges: Sequence[Range], *, deadline_s: float | None = None
    ) -> Answer[None]:
        """Fill local ranges from the peer's; see `TransferChannel.read`."""
        return _cancelled(
            await self._guard.call(
                "read",
                lambda: self._channel.read(self.peer, ranges),
                deadline_s=deadline_s,
                owns_buffers=True,
            )
        )

    async def write(
        self, ranges: Sequence[Range], note: bytes = b"", *, deadline_s: float | None = None
    ) -> Answer[None]:
        """Fill the peer's ranges from local ones; see `TransferChannel.write`."""
        guard = self._once if note else self._guard
        return _cancelled(
            await guard.call(
                "write",
                lambda: self._channel.write(self.peer, ranges, note),
                deadline_s=deadline_s,
                owns_buffers=True,
            )
        )

    async def close(self, deadline_s: float = 5.0) -> Answer[None]:
        """Let go of the peer."""
        return await self._once.once(
            "disconnect", lambda: self._channel.disconnect(self.peer), deadline_s=deadline_s
        )


def _where(descriptor: TransferChannelDescriptor) -> str:
    return f"transfer channel {descriptor.name!r}"


def _cancelled(answer: Answer[None]) -> Answer[None]:
    if answer.unsettled is not None:
        answer.unsettled.cancel()
    return answer
