"""The infinistore backend keeps the contract: over TCP and an emulated NIC, isolated and not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from infini_server import DEVICE, Server, emulated_nic

from lmcache_backend_infinistore.config import InfinistoreConfig
from lmcache_core.isolation.backend import IsolatedBackend
from lmcache_core.metrics import Counters
from lmcache_core.testing.storage import MakeBackend, StorageBackendTests


@pytest.fixture(scope="module")
def nic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulated_nic(tmp_path_factory.mktemp("nic"))


@pytest.fixture(scope="module")
def server(nic: Path) -> Iterator[Server]:
    with Server(nic) as one:
        yield one


@pytest.fixture
def empty(server: Server, nic: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    # Only for the processes that this one starts: where backends live.
    monkeypatch.setenv("LD_PRELOAD", str(nic))
    server.empty()
    return server


def isolated(config: InfinistoreConfig) -> MakeBackend:
    def make() -> IsolatedBackend:
        return IsolatedBackend(
            "infinistore", config, where="backends.test", deadline_s=30.0, counters=Counters()
        )

    return make


class TestTcp(StorageBackendTests):
    @pytest.fixture
    def make_backend(self, empty: Server) -> MakeBackend:
        return isolated(empty.config(connection_type="TCP"))


class TestEmulatedNic(StorageBackendTests):
    """No host memory for chunks is shared here: values pass the staging area."""

    @pytest.fixture
    def make_backend(self, empty: Server) -> MakeBackend:
        return isolated(empty.config(device=DEVICE))


class TestSmallPieces(StorageBackendTests):
    @pytest.fixture
    def make_backend(self, empty: Server) -> MakeBackend:
        return isolated(empty.config(piece_bytes=64 << 10, staging_bytes=1 << 20))


class TestInProcess(StorageBackendTests):
    """With ``isolated: false``, over TCP."""

    @pytest.fixture
    def make_backend(self, empty: Server) -> MakeBackend:
        from lmcache_backend_infinistore.backend import InfinistoreBackend

        return lambda: InfinistoreBackend(empty.config(connection_type="TCP"))
