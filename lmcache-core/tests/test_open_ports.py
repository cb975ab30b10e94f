"""Whatever listens is in the table of docs/security.md, and only for those who stand there."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from lm_server import RunningServer, certificate
from open_ports import documented, open_ports

from lmcache_backend_lm.server import Server, ServerOptions
from lmcache_core import Cache, ConfigError, DType, KVLayout, Plugins, full_attention, load_config
from lmcache_core.contracts.transfer import TransferContext
from lmcache_core.memory.host_memory import allocate_region
from lmcache_core.tiers.peers import open_channel

EVERYWHERE = "0.0.0.0"  # noqa: S104
GROUP = full_attention(layers=1, heads=1, head_size=8, dtype=DType.BF16)
SERVER, METRICS = "`lmcache_server`", "`lmcache_server --metrics-port`"


@pytest.fixture
def start() -> Iterator[Callable[..., RunningServer]]:
    with ExitStack() as stack:

        def start_one(*options: str, **more: str) -> RunningServer:
            running = RunningServer("--memory-gib", "0.01", *options, **more)
            stack.callback(running.stop)
            return running

        yield start_one


def here() -> Counter[tuple[str, str]]:
    return open_ports(os.getpid())


def test_the_scan_sees_what_listens_and_for_whom(tmp_path: Path) -> None:
    before = here()
    with ExitStack() as stack:
        for address in ("127.0.0.1", EVERYWHERE):
            stack.enter_context(socket.create_server((address, 0)))
        one = stack.enter_context(socket.create_server(("::1", 0), family=socket.AF_INET6))
        stack.enter_context(socket.create_connection(one.getsockname()[:2]))
        for name, mode in (("private", 0o600), ("public", 0o666)):
            unix = stack.enter_context(socket.socket(socket.AF_UNIX))
            unix.bind(str(tmp_path / name))
            (tmp_path / name).chmod(mode)
            unix.listen()
        assert here() - before == {
            ("TCP", "this machine"): 2,
            ("TCP", "the network"): 1,
            ("Unix", "this user"): 1,
            ("Unix", "this machine"): 1,
        }


def test_a_server_listens_where_the_table_says(start: Callable[..., RunningServer]) -> None:
    alone = open_ports(start().process.pid)
    assert set(alone) == documented(SERVER)
    assert alone["Unix", "this user"] == 1
    with_metrics = open_ports(start("--metrics-port", "0").process.pid)
    assert set(with_metrics - alone) == documented(METRICS)


def test_a_channel_listens_where_the_table_says() -> None:
    async def run() -> set[tuple[str, str]]:
        before = here()
        context = TransferContext("owner", allocate_region(1 << 16).region)
        channel = await open_channel(Plugins(environ={}), "tcp", {}, context)
        try:
            return set(here() - before)
        finally:
            await channel.close()

    assert asyncio.run(run()) == documented("`tcp` channel")


def test_an_engine_listens_nowhere(start: Callable[..., RunningServer], tmp_path: Path) -> None:
    url = start().url
    before = here()
    options = [
        "chunk_size=16",
        "max_local_cpu_size=0.01",
        f"remote_url={url}",
        "backends.files.type=filesystem",
        f"backends.files.path={tmp_path}",
        "backends.files.isolated=true",
    ]
    config = load_config(Plugins(environ={}), environ={}, assignments=options)
    layout = KVLayout(16, (GROUP,))
    with Cache.open(model="m", layout=layout, config=config) as cache:
        cache.store(list(range(32)), bytearray(GROUP.chunk_bytes(32)))
        assert cache.flush()
        found = set(here() - before)
    assert found == documented("isolated backend") | documented("engine with `lm://`")


@pytest.mark.parametrize(
    ("options", "token", "lines"),
    [
        ((), "", 0),
        ((EVERYWHERE, "0"), "", 1),
        ((EVERYWHERE, "0"), "secret", 0),
        (("--metrics-port", "0", "--metrics-host", EVERYWHERE), "", 1),
    ],
    ids=str,
)
def test_what_is_open_to_the_network_is_one_line(
    start: Callable[..., RunningServer], options: tuple[str, ...], token: str, lines: int
) -> None:
    first = options if options[:1] == (EVERYWHERE,) else ()
    running = RunningServer(
        *first, "--memory-gib", "0.01", *options[len(first) :], LMCACHE_SERVER_TOKEN=token
    )
    try:
        found = open_ports(running.process.pid)
        assert (("TCP", "the network") in found) == bool(options)
        with socket.create_connection(("127.0.0.1", running.port)):
            pass
    finally:
        assert running.stop() == 0
    said = [line for line in running.lines if "reachable from other machines" in line]
    assert len(said) == lines


# -- metrics ---------------------------------------------------------------------------------


def fetched(url: str, token: str = "", ca: Path | None = None) -> tuple[int, str]:
    request = urllib.request.Request(url)
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    context = None if ca is None else ssl.create_default_context(cafile=str(ca))
    try:
        with urllib.request.urlopen(request, timeout=20, context=context) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_numbers_are_for_who_has_the_token(
    start: Callable[..., RunningServer], tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text("a secret\n")
    file.chmod(0o600)
    server = start("--metrics-port", "0", "--metrics-token-file", str(file))
    health = server.metrics.replace("/metrics", "/health")
    for token in ("", "another", "a secre", "a secret\u00e9"):
        status, text = fetched(server.metrics, token)
        assert status == 401
        assert "lmcache" not in text
        assert fetched(health, token) == (200, '{"status": "ok"}')
    status, text = fetched(server.metrics, "a secret")
    assert status == 200
    assert "lmcache_server_values" in text
    assert "server_values" in fetched(health, "a secret")[1]


def test_metrics_over_tls(start: Callable[..., RunningServer], tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    options = ("--tls-cert", str(cert), "--tls-key", str(key), "--metrics-port", "0")
    server = start(*options, "--metrics-tls")
    assert server.metrics.startswith("https://")
    url = server.metrics.replace("127.0.0.1", "localhost")
    with socket.create_connection(("127.0.0.1", int(url.split(":")[2].split("/")[0]))) as silent:
        assert fetched(url, ca=cert)[0] == 200  # who says nothing holds nobody up
        silent.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert b"lmcache_server" not in silent.recv(4096)
    assert "Traceback" not in server.text


def test_tls_for_metrics_needs_a_certificate() -> None:
    with pytest.raises(ConfigError, match="--metrics-tls is set without --tls-cert"):
        Server(ServerOptions(metrics_port=0, metrics_tls=True))
