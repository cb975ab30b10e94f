"""The ``lm`` backend keeps the storage contract against a real server, on every way to it."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from lm_server import RunningServer

from lmcache_backend_lm.backend import LmBackend
from lmcache_backend_lm.config import LmConfig
from lmcache_core.chunks.keys import CacheNamespace, ChunkKey
from lmcache_core.contracts.storage import BackendContext, StoreOutcome
from lmcache_core.memory.host_memory import allocate_region
from lmcache_core.testing.storage import LAYOUT, MakeBackend, StorageBackendTests

REGION_BYTES = 96 << 20
"""More than any test stores at one time."""


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    running = RunningServer("--memory-gib", "0.25")
    yield running
    assert running.stop() == 0


class _OneServer(StorageBackendTests):
    @pytest.fixture
    def namespace(self) -> CacheNamespace:
        return CacheNamespace(model=f"conformance {uuid.uuid4()}", layout=LAYOUT)

    @pytest.fixture(autouse=True)
    def _empty(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Some tests make namespaces of their own by name; the server outlives a test."""
        salt = str(uuid.uuid4())

        def fingerprint(self: CacheNamespace) -> str:
            return hashlib.sha256((self.model + salt).encode()).hexdigest()[:16]

        monkeypatch.setattr(CacheNamespace, "fingerprint", property(fingerprint))


class TestTcp(_OneServer):
    @pytest.fixture
    def make_backend(self, server: RunningServer) -> MakeBackend:
        return lambda: LmBackend(LmConfig(port=server.port, same_host=False))


class TestUnixWithSharedMemory(_OneServer):
    @pytest.fixture
    def make_backend(self, server: RunningServer) -> MakeBackend:
        return lambda: LmBackend(LmConfig(path=server.unix))


class TestUnixWithoutSharedMemory(_OneServer):
    @pytest.fixture
    def make_backend(self, server: RunningServer) -> MakeBackend:
        return lambda: LmBackend(LmConfig(path=server.unix, same_host=False))


class _FromRegion(LmBackend):
    """Stores as core does, from a region that the server can map; the kit has buffers anywhere."""

    async def open(self, context: BackendContext) -> None:
        self._owned = allocate_region(REGION_BYTES, shared=True)
        self._next = 0
        await super().open(replace(context, region=self._owned.region))

    async def store(
        self, keys: Sequence[ChunkKey], sources: Sequence[memoryview]
    ) -> list[StoreOutcome]:
        region = self._owned.region
        placed = []
        for source in sources:
            if self._next + source.nbytes > region.nbytes:
                self._next = 0
            placed.append(region.view[self._next : self._next + source.nbytes])
            placed[-1][:] = source
            self._next += source.nbytes
        return await super().store(keys, placed)

    async def close(self) -> None:
        await super().close()
        self._owned.close()


class TestUnixFromARegion(_OneServer):
    @pytest.fixture
    def make_backend(self, server: RunningServer) -> MakeBackend:
        return lambda: _FromRegion(LmConfig(path=server.unix))


class TestWithDisk(StorageBackendTests):
    @pytest.fixture
    def make_backend(self, tmp_path: Path) -> Iterator[MakeBackend]:
        server = RunningServer("localhost", "0", str(tmp_path), "--memory-gib", "0.25")
        yield lambda: LmBackend(LmConfig(port=server.port))
        assert server.stop() == 0
