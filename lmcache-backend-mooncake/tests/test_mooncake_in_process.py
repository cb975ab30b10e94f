"""The mooncake backend keeps the contract with ``isolated: false``, without a metadata server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from mooncake_master import Cluster

from lmcache_backend_mooncake.backend import MooncakeBackend
from lmcache_core.testing.storage import MakeBackend, StorageBackendTests


@pytest.fixture(scope="module")
def peer_to_peer() -> Iterator[Cluster]:
    yield from Cluster.running("P2PHANDSHAKE")


class TestInProcess(StorageBackendTests):
    @pytest.fixture
    def make_backend(self, peer_to_peer: Cluster) -> MakeBackend:
        peer_to_peer.holder.forget_everything()
        return lambda: MooncakeBackend(peer_to_peer.config)
