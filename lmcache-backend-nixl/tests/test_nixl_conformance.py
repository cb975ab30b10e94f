"""The nixl backend keeps the contract, with real agents, files and an S3 server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from nixl_servers import S3, s3_server

from lmcache_backend_nixl.config import NixlConfig
from lmcache_backend_nixl.files import NixlFileBackend
from lmcache_backend_nixl.objects import NixlObjectBackend
from lmcache_core.testing.storage import MakeBackend, StorageBackendTests


class TestPosix(StorageBackendTests):
    options: dict[str, object] = {}  # noqa: RUF012 - a subclass's, never changed

    @pytest.fixture
    def make_backend(self, tmp_path: Path) -> Iterator[MakeBackend]:
        config = NixlConfig.model_validate(
            {"backend": "POSIX", "path": tmp_path, "pool_size": 256, **self.options}
        )
        yield lambda: NixlFileBackend(config)
        shutil.rmtree(tmp_path)  # pools take their room at once, and pytest keeps folders


class TestPosixDirect(TestPosix):
    options = {"direct_io": True, "fsync": True}  # noqa: RUF012


class TestPosixThatForgets(TestPosix):
    options = {"persist": False, "buffer_bytes": 64 << 20}  # noqa: RUF012


class TestObjects(StorageBackendTests):
    @pytest.fixture(scope="class")
    @classmethod
    def server(cls) -> Iterator[S3]:
        with s3_server() as server:
            yield server

    @pytest.fixture
    def make_backend(self, server: S3) -> MakeBackend:
        server.empty()
        config = NixlConfig.model_validate({"backend": "OBJ", "backend_params": server.params()})
        return lambda: NixlObjectBackend(config)
