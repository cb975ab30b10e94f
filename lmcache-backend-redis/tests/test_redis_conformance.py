"""The redis backend keeps the contract, in every form that it supports, on real servers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis_servers import (
    Replicated,
    Server,
    certificate,
    cluster,
    replicated,
    running,
    valkey_binary,
)

from lmcache_backend_redis.backend import RedisBackend
from lmcache_backend_redis.config import RedisConfig
from lmcache_core.testing.storage import MakeBackend, StorageBackendTests


def maker(url: str, **options: object) -> MakeBackend:
    config = RedisConfig.model_validate({"url": url, **options})
    return lambda: RedisBackend(config)


def documented_rights() -> list[str]:
    """What README.md says that a user must be allowed; the commands of a cluster aside."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (rights,) = re.findall(r"`(\+get [^`]*)`", text)
    return str(rights).split()


class TestOneServer(StorageBackendTests):
    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
        server = Server(tmp_path_factory.mktemp("redis"))
        with running(server):
            yield server

    @pytest.fixture
    def empty(self, server: Server) -> Server:
        with server.client() as client:
            client.flushall()
        return server

    @pytest.fixture
    def make_backend(self, empty: Server) -> MakeBackend:
        return maker(empty.url)


class TestOnThreads(TestOneServer):
    """Where short calls too are made by a thread."""

    @pytest.fixture
    def make_backend(self, empty: Server, monkeypatch: pytest.MonkeyPatch) -> MakeBackend:
        monkeypatch.setattr("lmcache_backend_redis.backend.ON_LOOP_BYTES", -1)
        return maker(empty.url)


class TestSmallPieces(TestOneServer):
    """All but the shortest values are cut."""

    @pytest.fixture
    def make_backend(self, empty: Server) -> MakeBackend:
        return maker(empty.url, piece_bytes=64 << 10, ttl_s=600)


class TestUnixSocket(TestOneServer):
    @pytest.fixture
    def make_backend(self, empty: Server) -> MakeBackend:
        return maker(f"unix://{empty.unix_socket}", database=3)


class TestPassword(TestOneServer):
    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
        user = ["--user", "cache", "on", ">p@ss:/word", "~lmcache:*", *documented_rights()]
        server = Server(tmp_path_factory.mktemp("redis"), arguments=user)
        with running(server):
            yield server

    @pytest.fixture
    def make_backend(self, empty: Server) -> MakeBackend:
        return maker(f"redis://cache:p%40ss%3A%2Fword@127.0.0.1:{empty.port}/2")


class TestTLS(TestOneServer):
    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
        folder = tmp_path_factory.mktemp("tls")
        certificate_file, key_file = certificate(folder)
        server = Server(folder)
        server.arguments = ["--port", "0", "--tls-port", str(server.port)]
        server.arguments += ["--tls-cert-file", str(certificate_file)]
        server.arguments += ["--tls-key-file", str(key_file)]
        server.arguments += ["--tls-ca-cert-file", str(certificate_file)]
        server.client_options = {
            "ssl": True,
            "ssl_ca_certs": str(certificate_file),
            "ssl_certfile": str(certificate_file),
            "ssl_keyfile": str(key_file),
        }
        with running(server):
            yield server

    @pytest.fixture
    def make_backend(self, empty: Server) -> MakeBackend:
        files = empty.folder / "server.crt", empty.folder / "server.key"
        return maker(
            f"rediss://127.0.0.1:{empty.port}",
            tls_ca_file=files[0],
            tls_cert_file=files[0],
            tls_key_file=files[1],
        )


class TestValkey(TestOneServer):
    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
        server = Server(tmp_path_factory.mktemp("valkey"), binary=valkey_binary())
        with running(server):
            yield server

    @pytest.fixture
    def make_backend(self, empty: Server) -> MakeBackend:
        return maker(f"valkey://127.0.0.1:{empty.port}")


class TestSentinel(StorageBackendTests):
    @pytest.fixture(scope="class")
    @classmethod
    def servers(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicated]:
        with replicated(tmp_path_factory.mktemp("sentinel")) as servers:
            yield servers

    @pytest.fixture
    def make_backend(self, servers: Replicated) -> MakeBackend:
        with servers.primary.client() as client:
            client.flushall()
        return maker(servers.url)


class TestCluster(StorageBackendTests):
    @pytest.fixture(scope="class")
    @classmethod
    def nodes(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
        with cluster(tmp_path_factory.mktemp("cluster")) as nodes:
            yield nodes

    @pytest.fixture
    def make_backend(self, nodes: list[Server]) -> MakeBackend:
        for node in nodes:
            with node.client() as client:
                client.flushall()
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in nodes)
        return maker(f"redis-cluster://{hosts}")


def test_the_tests_have_a_folder(tmp_path: Path) -> None:
    """Unix sockets have short names: a temporary folder that is too deep shows here, not there."""
    assert len(str(tmp_path / "redis.sock")) < 100
