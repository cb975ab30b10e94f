"""The mooncake backend keeps the contract, in this process and in one of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from mooncake_master import MIB, Holder, Master

from lmcache_backend_mooncake.backend import MooncakeBackend
from lmcache_backend_mooncake.config import MooncakeConfig
from lmcache_core.isolation.backend import IsolatedBackend
from lmcache_core.metrics import Counters
from lmcache_core.testing.storage import MakeBackend, StorageBackendTests


@dataclass(frozen=True)
class Cluster:
    """A master, and somebody who gives memory: ours needn't, which makes their end quicker."""

    config: MooncakeConfig
    holder: Holder

    @classmethod
    def running(cls, metadata: str | None) -> Iterator[Cluster]:
        with Master() as master:
            holder = Holder(master, 96 * MIB, metadata)
            options = {"metadata_server": metadata} if metadata else {}
            yield cls(master.config(global_segment_size=0, **options), holder)
            holder.kill()


@pytest.fixture(scope="module")
def with_metadata_server() -> Iterator[Cluster]:
    yield from Cluster.running(None)


@pytest.fixture(scope="module")
def peer_to_peer() -> Iterator[Cluster]:
    yield from Cluster.running("P2PHANDSHAKE")


class TestIsolated(StorageBackendTests):
    """As it runs by default."""

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


class TestInProcess(StorageBackendTests):
    """With ``isolated: false``, and without a metadata server."""

    @pytest.fixture
    def make_backend(self, peer_to_peer: Cluster) -> MakeBackend:
        peer_to_peer.holder.forget_everything()
        return lambda: MooncakeBackend(peer_to_peer.config)
