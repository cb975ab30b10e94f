"""The mooncake backend keeps the contract in a process of its own, as it runs by default."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from mooncake_master import Cluster

from lmcache_core.isolation.backend import IsolatedBackend
from lmcache_core.metrics import Counters
from lmcache_core.testing.storage import MakeBackend, StorageBackendTests


@pytest.fixture(scope="module")
def with_metadata_server() -> Iterator[Cluster]:
    yield from Cluster.running(None)


class TestIsolated(StorageBackendTests):
    @pytest.fixture
    def make_backend(self, with_metadata_server: Cluster) -> MakeBackend:
        with_metadata_server.holder.forget_everything()
        return lambda: IsolatedBackend(
            "mooncake",
            with_metadata_server.config,
            where="backends.test",
            deadline_s=30.0,
            counters=Counters(),
        )
