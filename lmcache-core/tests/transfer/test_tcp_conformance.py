"""The ``tcp`` channel keeps the transfer contract."""

from __future__ import annotations

from lmcache_core.testing.transfer import TransferChannelTests


class TestTcp(TransferChannelTests):
    channel = "tcp"


class TestTcpOneCall(TransferChannelTests):
    channel = "tcp"
    options = {"calls": 1, "host": "localhost"}  # noqa: RUF012 - never changed


class TestTcpIsolated(TransferChannelTests):
    """What runs in another process keeps the contract, too."""

    channel = "tcp"
    isolated = True
