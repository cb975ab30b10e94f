"""``lmcache_server`` as one expects a server: its options, its start, SIGHUP and what it counts."""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import ssl
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path

import pytest
from lm_server import RunningServer, certificate

from lmcache_backend_lm import command, greeting, protocol
from lmcache_backend_lm.backend import LmBackend
from lmcache_backend_lm.command import main
from lmcache_backend_lm.config import LmConfig
from lmcache_backend_lm.credentials import Credentials
from lmcache_backend_lm.listening import listen_unix
from lmcache_backend_lm.protocol import HEADER_BYTES, Op
from lmcache_core import ConfigError
from lmcache_core.aio.tls import server_context
from lmcache_core.chunks.keys import CacheNamespace
from lmcache_core.contracts.storage import BackendContext, StoreOutcome
from lmcache_core.errors import BackendRejected
from lmcache_core.testing.loop import Loop
from lmcache_core.testing.storage import LAYOUT, keys, value, views

NAMESPACE = CacheNamespace("command", LAYOUT)
WAIT_S = 20.0


@pytest.fixture
def run() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def start() -> Iterator[Callable[..., RunningServer]]:
    with ExitStack() as stack:

        def start_one(*options: str, **more: str) -> RunningServer:
            running = RunningServer("--memory-gib", "0.01", *options, **more)
            stack.callback(running.stop)
            return running

        yield start_one


def eventually(true: Callable[[], bool]) -> None:
    until = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


def counted(url: str, name: str) -> float:
    """The sum of a metric's series."""
    text = urllib.request.urlopen(url, timeout=WAIT_S).read().decode()
    lines = [line for line in text.splitlines() if line.startswith(f"lmcache_{name}")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def opened(run: Loop, **options: object) -> LmBackend:
    backend = LmBackend(LmConfig.model_validate({"same_host": False, **options}))
    run(backend.open(BackendContext("remote", NAMESPACE)))
    return backend


def process(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "from lmcache_backend_lm.command import main; exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *argv],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **environment},
    )


# -- options ---------------------------------------------------------------------------------


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert f"lmcache-backend-lm {metadata.version('lmcache-backend-lm')}" in said
    assert f"lmcache-core {metadata.version('lmcache-core')}" in said
    assert f"lm:// version {protocol.VERSION}" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("count", ["0", "-1"])
def test_no_threads_are_refused(count: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([f"--threads={count}"])
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"--threads: {count}: nothing would be served; at least 1, or leave it out" in last


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--disk-gib", "5"), "--disk-gib 5 has no effect without a disk tier; name its folder"),
        (("--metrics-host", "::1"), "--metrics-host ::1 has no effect without --metrics-port"),
        (("--metrics-token-file", "f"), "--metrics-token-file f has no effect without --metrics-"),
        (("--metrics-tls",), "--metrics-tls has no effect without --metrics-port; set that"),
        (("--tls-key", "key.pem"), "--tls-key is set without --tls-cert"),
        (("--unix", ""), "--unix '' is no path; write a path, or none"),
        (("--max-connections", "0"), "--max-connections 0: this process may have"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_options_without_effect_are_refused(
    options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["localhost", "0", "--memory-gib", "0.01", *options]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"lmcache_server: {said}")
    assert captured.err.count("\n") == 1


# -- a start that fails ----------------------------------------------------------------------


def test_a_start_that_fails_leaves_no_socket(tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = process(
            "localhost", "0", "--memory-gib", "0.01", "--unix", str(path), "--metrics-port", port
        )
    assert done.returncode == 1, done.stderr
    assert f"--metrics-port {port}" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_socket_that_cannot_be_listened_on_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deaf(socket.socket):
        def listen(self, *_: int) -> None:
            raise OSError("no")

    monkeypatch.setattr(socket, "socket", Deaf)
    path = tmp_path / "server.sock"
    with pytest.raises(OSError, match="no"):
        listen_unix(path)
    assert not path.exists()


def test_a_server_that_stops_removes_its_socket(
    start: Callable[..., RunningServer], tmp_path: Path
) -> None:
    path = tmp_path / "server.sock"
    server = start("--unix", str(path))
    assert path.is_socket()
    assert server.stop() == 0
    assert not path.exists()


# -- SIGHUP ----------------------------------------------------------------------------------


def hang_up(server: RunningServer, said: str, times: int = 1) -> None:
    """Let it read its files again, and wait for what it says of that."""
    server.process.send_signal(signal.SIGHUP)
    eventually(lambda: server.text.count(said) >= times)


def test_a_new_token_holds_for_new_connections(
    start: Callable[..., RunningServer], run: Loop, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text("the first")
    file.chmod(0o600)
    server = start("--token-file", str(file), "--unix", "none")
    before = opened(run, port=server.port, token="the first")
    assert run(before.store(keys(1), views([value(0)]))) == [StoreOutcome.STORED]
    file.write_text("the second")
    hang_up(server, "read again: --token-file")
    assert run(before.contains(keys(1))) == [True]  # its connections stay
    after = opened(run, port=server.port, token="the second")
    assert run(after.contains(keys(1))) == [True]
    with pytest.raises(BackendRejected, match="the token is wrong"):
        opened(run, port=server.port, token="the first")
    run(after.close())
    run(before.close())


def test_a_client_takes_the_new_token_when_it_connects_again(
    start: Callable[..., RunningServer], run: Loop, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text("the first")
    file.chmod(0o600)
    server = start("--token-file", str(file), "--unix", "none")
    backend = opened(run, port=server.port, token_file=file)
    file.write_text("the second")
    hang_up(server, "read again: --token-file")
    for connection in backend._connections.values():
        connection.end()
    assert run(backend.contains(keys(1))) == [False]
    run(backend.close())


def test_what_cannot_be_read_is_one_line_and_the_old_stays(
    start: Callable[..., RunningServer], run: Loop, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text("the first")
    file.chmod(0o600)
    cert, key = certificate(tmp_path)
    server = start("--token-file", str(file), "--tls-cert", str(cert), "--tls-key", str(key))
    (tmp_path / "ca.pem").write_bytes(cert.read_bytes())
    for broken, content in ((file, ""), (cert, "no certificate")):
        kept = broken.read_text()
        broken.write_text(content)
        lines = len(server.lines)
        hang_up(server, "what was read before stays in effect", 1 + (broken is cert))
        assert len(server.lines) == lines + 1
        broken.write_text(kept)
    ca_file = tmp_path / "ca.pem"
    backend = opened(run, port=server.port, tls=True, ca_file=ca_file, token="the first")
    run(backend.close())


def shown(port: int) -> bytes:
    """The certificate that the server shows."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as sock,
        context.wrap_socket(sock) as encrypted,
    ):
        found = encrypted.getpeercert(binary_form=True)
    assert found
    return found


def test_a_new_certificate_is_shown_to_new_connections(
    start: Callable[..., RunningServer], run: Loop, tmp_path: Path
) -> None:
    (tmp_path / "new").mkdir()
    cert, key = certificate(tmp_path)
    options = ("--metrics-port", "0", "--metrics-tls")
    server = start("--tls-cert", str(cert), "--tls-key", str(key), *options)
    metrics = int(server.metrics.split(":")[2].split("/")[0])
    first = tmp_path / "first.pem"
    first.write_bytes(cert.read_bytes())
    before = opened(run, port=server.port, tls=True, ca_file=first)
    old = shown(server.port)
    for made, place in zip(certificate(tmp_path / "new"), (cert, key), strict=True):
        place.write_bytes(made.read_bytes())
    hang_up(server, "read again: --tls-cert")
    assert run(before.contains(keys(1))) == [False]
    new = ssl.PEM_cert_to_DER_cert(cert.read_text())
    assert new != old
    assert shown(server.port) == shown(metrics) == new
    after = opened(run, port=server.port, tls=True, ca_file=cert)
    for backend in (before, after):
        run(backend.close())


def test_the_token_of_metrics_changes(start: Callable[..., RunningServer], tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("the first")
    file.chmod(0o600)
    server = start("--metrics-port", "0", "--metrics-token-file", str(file))

    def status(token: str) -> int:
        header = {"Authorization": f"Bearer {token}"}
        request = urllib.request.Request(server.metrics, headers=header)
        try:
            with urllib.request.urlopen(request, timeout=WAIT_S) as reply:
                return int(reply.status)
        except urllib.error.HTTPError as error:
            with error:
                return error.code

    assert (status("the first"), status("the second")) == (200, 401)
    file.write_text("the second")
    hang_up(server, "read again: --metrics-token-file")
    assert (status("the first"), status("the second")) == (401, 200)


def test_without_files_there_is_nothing_to_read(start: Callable[..., RunningServer]) -> None:
    server = start()
    hang_up(server, "read again: nothing")
    assert server.stop() == 0


def test_a_token_never_becomes_none(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("secret")
    file.chmod(0o600)
    credentials = Credentials(token_file=file)
    for content in ("", "\n", "x" * 5000):
        file.write_text(content)
        assert not credentials.reload()
        assert credentials.token == b"secret"
    file.unlink()
    assert not credentials.reload()
    assert credentials.token == b"secret"


def test_a_key_with_a_pass_phrase_asks_nobody(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    locked = tmp_path / "locked.pem"
    command = ["openssl", "pkcs8", "-topk8", "-passout", "pass:secret", "-in", key, "-out", locked]
    subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(OSError, match="has a pass phrase"):
        server_context(cert, locked)
    with pytest.raises(ConfigError, match="has a pass phrase"):
        Credentials(tls_cert=cert, tls_key=locked)


# -- connections that break ------------------------------------------------------------------


def hello(port: int) -> socket.socket:
    """A client that was greeted."""
    sock = socket.create_connection(("127.0.0.1", port))
    sock.settimeout(WAIT_S)
    meta = greeting.hello("0" * 16, bytes(32))
    sock.sendall(protocol.header(Op.HELLO, 0, meta=len(meta)) + meta)
    head = protocol.parse_header(sock.recv(HEADER_BYTES, socket.MSG_WAITALL))
    sock.recv(head.meta, socket.MSG_WAITALL)
    return sock


def test_only_connections_that_break_are_counted(
    start: Callable[..., RunningServer], run: Loop
) -> None:
    server = start("--metrics-port", "0", "--unix", "none")

    def gone() -> bool:
        return counted(server.metrics, "server_open_connections") == 0

    backend = opened(run, port=server.port)  # leaves as one does
    run(backend.store(keys(3), views([value(i) for i in range(3)])))
    run(backend.close())
    hello(server.port).close()
    socket.create_connection(("127.0.0.1", server.port)).close()  # somebody looks who is there
    eventually(gone)
    assert counted(server.metrics, "server_broken_connections_total") == 0
    half = hello(server.port)  # in the middle of a message
    half.sendall(protocol.header(Op.USAGE, 1)[:10])
    half.close()
    eventually(lambda: counted(server.metrics, "server_broken_connections_total") == 1)
    reset = hello(server.port)
    reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    reset.close()
    eventually(lambda: counted(server.metrics, "server_broken_connections_total") == 2)
    eventually(gone)


def test_who_speaks_no_tls_breaks_nothing(
    start: Callable[..., RunningServer], tmp_path: Path
) -> None:
    cert, key = certificate(tmp_path)
    server = start("--tls-cert", str(cert), "--tls-key", str(key), "--metrics-port", "0")
    with socket.create_connection(("127.0.0.1", server.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
        eventually(lambda: counted(server.metrics, "server_refused_total") == 1)
    assert "no TLS connection" in server.text
    assert counted(server.metrics, "server_broken_connections_total") == 0


# -- the page --------------------------------------------------------------------------------


def test_the_page_has_all_metrics() -> None:
    root = Path(__file__).parents[1]
    sources = "".join(path.read_text() for path in (root / "src").rglob("*.py"))
    found = set(re.findall(r'add\(\s*"((?:server|evicted)_[a-z_]+)"', sources))
    found |= set(re.findall(r'"(server_[a-z_]+)":', sources))
    found |= set(re.findall(r'found\["(server_[a-z_]+)"\]', sources))
    assert len(found) > 25
    page = (root.parent / "docs" / "lm-server.md").read_text()
    rows = "".join(line for line in page.splitlines() if line.startswith("| `"))
    assert sorted(name for name in found if f"`{name}`" not in rows) == []


def test_the_page_has_all_options() -> None:
    parser = argparse.ArgumentParser()
    command._add_options(parser)
    page = (Path(__file__).parents[2] / "docs" / "lm-server.md").read_text()
    options = [name for action in parser._actions for name in action.option_strings]
    assert [name for name in options if name.startswith("--") and name not in page] == ["--help"]
