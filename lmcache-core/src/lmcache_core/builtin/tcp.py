"""Registers the ``tcp`` transfer channel. Its code is imported on use."""

from __future__ import annotations

from lmcache_core.contracts.hookspecs import hookimpl
from lmcache_core.contracts.transfer import TransferChannel, TransferChannelDescriptor
from lmcache_core.transfer_tcp.config import TcpChannelConfig


def _create(config: TcpChannelConfig) -> TransferChannel:
    from lmcache_core.transfer_tcp.channel import TcpChannel

    return TcpChannel(config)


@hookimpl
def lmcache_transfer_channels() -> list[TransferChannelDescriptor]:
    return [
        TransferChannelDescriptor(
            name="tcp",
            summary="sockets, on any network",
            config=TcpChannelConfig,
            create=_create,
        )
    ]
