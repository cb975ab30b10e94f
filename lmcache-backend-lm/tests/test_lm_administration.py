"""``lmcache status``, ``ls`` and ``purge``: what they ask, what they answer, and whom."""

from __future__ import annotations

import asyncio
import io
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytest
from lm_server import RunningServer, certificate
from lm_service import a_service, close

from lmcache_backend_lm import administration, greeting, holdings, inventory, protocol
from lmcache_backend_lm.backend import LmBackend
from lmcache_backend_lm.call import Call
from lmcache_backend_lm.config import LmConfig
from lmcache_backend_lm.connection import Connection
from lmcache_backend_lm.holdings import Descriptions
from lmcache_backend_lm.inventory import PAGE, Stock
from lmcache_backend_lm.protocol import HEADER_BYTES, Op, Status
from lmcache_core.chunks.keys import CacheNamespace, ChunkKey
from lmcache_core.cli import main
from lmcache_core.contracts.storage import BackendContext, StoreOutcome
from lmcache_core.errors import BackendRejected
from lmcache_core.testing.loop import Loop
from lmcache_core.testing.storage import LAYOUT, VALUE_BYTES, keys, value, views

LLAMA = CacheNamespace("f00d" * 16, LAYOUT, label="meta-llama/Llama-3.1-8B").placed("serde=raw")
QWEN = CacheNamespace("Qwen/Qwen3-8B", LAYOUT)

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("LMCACHE_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def lmcache(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*argv: str) -> tuple[int, str, str]:
        status = main(argv)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def run() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def start() -> Iterator[Callable[..., RunningServer]]:
    with ExitStack() as stack:

        def start_one(*options: str, **more: Any) -> RunningServer:
            running = RunningServer(*options, "--memory-gib", "0.01", **more)
            stack.callback(running.stop)
            return running

        yield start_one


def store(run: Loop, server: RunningServer, space: CacheNamespace, count: int, **more: Any) -> None:
    """Have ``count`` chunks of a namespace on the server."""
    backend = LmBackend(LmConfig.model_validate({"port": server.port, "same_host": False, **more}))
    run(backend.open(BackendContext("remote", space)))
    outcomes = run(backend.store(keys(count), views([value(i) for i in range(count)])))
    assert set(outcomes) == {StoreOutcome.STORED}
    run(backend.close())


def files(folder: Path) -> list[Path]:
    """Chunk files below a folder, and nothing else."""
    found = folder.rglob("*")
    return [path for path in found if path.is_file() and path.parent.name in path.name]


def listed(lmcache: Run, *argv: str) -> dict[str, dict[str, Any]]:
    """What ``lmcache ls`` says, by namespace."""
    status, out, err = lmcache("ls", *argv, "--json")
    assert status == 0, err
    return {one["namespace"]: one for one in json.loads(out)["namespaces"]}


# -- a server with memory --------------------------------------------------------------------


def test_namespaces_are_listed_by_model(
    lmcache: Run, start: Callable[..., RunningServer], run: Loop
) -> None:
    server = start()
    assert listed(lmcache, server.url) == {}
    store(run, server, LLAMA, 3)
    store(run, server, QWEN, 2)
    found = listed(lmcache, server.url)
    assert found[LLAMA.fingerprint] == {
        "namespace": LLAMA.fingerprint,
        "model": "meta-llama/Llama-3.1-8B",
        "identity": "f00d" * 16,
        "written_as": "16 tokens a chunk, serde=raw",
        "memory_chunks": 3,
        "memory_bytes": 3 * VALUE_BYTES,
        "disk_bytes": 0,
    }
    assert found[QWEN.fingerprint]["model"] == "Qwen/Qwen3-8B"
    for model in ("meta-llama/Llama-3.1-8B", "f00df00d", "f00d" * 16):
        assert set(listed(lmcache, server.url, "--model", model)) == {LLAMA.fingerprint}
    start_of = QWEN.fingerprint[:6]
    assert set(listed(lmcache, server.url, "--namespace", start_of)) == {QWEN.fingerprint}
    assert listed(lmcache, server.url, "--model", "meta-llama") == {}
    status, out, _ = lmcache("ls", server.url)
    assert status == 0
    (row,) = [line for line in out.splitlines() if LLAMA.fingerprint in line]
    assert "meta-llama/Llama-3.1-8B" in row


def test_status(lmcache: Run, start: Callable[..., RunningServer], run: Loop) -> None:
    server = start()
    store(run, server, QWEN, 2)
    status, out, _ = lmcache("status", server.url, "--json")
    said = json.loads(out)
    assert status == 0
    assert (said["address"], said["values"], said["namespaces"]) == (server.url, 2, 1)
    assert said["value_bytes"] == 2 * VALUE_BYTES
    assert said["open_connections"] >= 1  # this one
    assert isinstance(said["version"], str)
    assert not any(name.startswith("disk") for name in said)
    assert lmcache("status", server.url)[1].splitlines()[0].split() == ["WHAT", "VALUE"]


def test_purge_says_how_much_went(
    lmcache: Run, start: Callable[..., RunningServer], run: Loop
) -> None:
    server = start()
    store(run, server, LLAMA, 3)
    store(run, server, QWEN, 2)
    status, out, _ = lmcache("purge", server.url, "--model", "Qwen/Qwen3-8B", "--yes", "--json")
    assert status == 0
    assert json.loads(out)["purged"] == [
        {
            "namespace": QWEN.fingerprint,
            "memory_chunks": 2,
            "memory_bytes": 2 * VALUE_BYTES,
            "disk_chunks": 0,
            "disk_bytes": 0,
        }
    ]
    assert set(listed(lmcache, server.url)) == {LLAMA.fingerprint}
    status, out, _ = lmcache("purge", server.url, "--all", "--yes")
    assert status == 0
    assert f"{LLAMA.fingerprint}: 3 chunks, {3 * VALUE_BYTES} bytes, went from memory" in out
    assert listed(lmcache, server.url) == {}
    status, out, _ = lmcache("purge", server.url, "--all", "--yes")
    assert (status, out) == (0, "there was nothing to delete\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("said", "gone"), [("y\n", True), ("n\n", False), ("", False)])
def test_purge_asks_before(
    lmcache: Run,
    start: Callable[..., RunningServer],
    run: Loop,
    monkeypatch: pytest.MonkeyPatch,
    said: str,
    gone: bool,
) -> None:
    server = start()
    store(run, server, QWEN, 1)
    monkeypatch.setattr("sys.stdin", Terminal(said))
    status, _, err = lmcache("purge", server.url, "--namespace", QWEN.fingerprint)
    assert f"Delete 1 namespace of {server.url}? [y/N]" in err
    assert QWEN.fingerprint in err
    assert ("nothing was deleted" in err) is not gone
    assert status == int(not gone)
    assert (listed(lmcache, server.url) == {}) is gone


def test_without_a_terminal_purge_deletes_nothing_unasked(
    lmcache: Run, start: Callable[..., RunningServer], run: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()
    store(run, server, QWEN, 1)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    status, _, err = lmcache("purge", server.url, "--all")
    assert status == 1
    assert "nobody is there to be asked; say --yes" in err
    assert len(listed(lmcache, server.url)) == 1


# -- a server with files ---------------------------------------------------------------------


def test_files_are_listed_and_purged_also_after_a_restart(
    lmcache: Run, start: Callable[..., RunningServer], run: Loop, tmp_path: Path
) -> None:
    folder = tmp_path / "files"
    options = ("localhost", "0", str(folder), "--disk-gib", "1")
    server = start(*options)
    store(run, server, LLAMA, 5)
    store(run, server, QWEN, 1)
    assert server.stop() == 0
    server = start(*options)
    found = listed(lmcache, server.url)
    assert found[LLAMA.fingerprint]["model"] == "meta-llama/Llama-3.1-8B"
    assert found[LLAMA.fingerprint]["memory_chunks"] == 0
    assert found[LLAMA.fingerprint]["disk_bytes"] == 5 * VALUE_BYTES
    status, out, _ = lmcache("status", server.url, "--json")
    said = json.loads(out)
    assert (said["disk_bytes"], said["disk_namespaces"]) == (6 * VALUE_BYTES, 2)
    assert (said["disk_limit_bytes"], said["disk_waiting_bytes"]) == (1 << 30, 0)
    assert said["disk_free_bytes"] > 0
    status, out, err = lmcache("purge", server.url, "--model", "f00df00d", "--yes")
    assert status == 0, err
    assert f"5 chunks, {5 * VALUE_BYTES} bytes, from disk" in out
    assert set(listed(lmcache, server.url)) == {QWEN.fingerprint}
    assert len(files(folder)) == 1


def test_many_files_are_purged_in_parts(run: Loop, tmp_path: Path) -> None:
    service = a_service(1 << 20, tmp_path)
    disk = service.disk
    assert disk is not None

    async def fill() -> None:
        with service.values.hold() as held:
            for key in keys(10):
                held.reserve("ab" * 8, key, 4096)
            held.commit()
        disk.write_behind("ab" * 8, keys(10))
        while await disk.sizes("ab" * 8, keys(10)) != [4096] * 10:
            await asyncio.sleep(0.01)

    async def purge() -> list[tuple[int, int, bool]]:
        parts = [await disk.purge("ab" * 8, 4)]
        while parts[-1][2]:
            parts.append(await disk.purge("ab" * 8, 4))
        return parts

    run(fill())
    assert run(disk.spaces())["ab" * 8] == 10 * 4096
    assert run(purge()) == [(4, 16384, True), (4, 16384, True), (2, 8192, False)]
    assert run(disk.spaces())["ab" * 8] == 0
    assert run(disk.purge("cd" * 8, 4)) == (0, 0, False)
    close(service)


def test_a_disk_bound_holds_for_all_namespaces_together(
    lmcache: Run, start: Callable[..., RunningServer], run: Loop, tmp_path: Path
) -> None:
    bound = 40 * VALUE_BYTES
    server = start("localhost", "0", str(tmp_path), "--disk-gib", str(bound / 2**30))
    for i in range(4):
        store(run, server, CacheNamespace(f"model {i}", LAYOUT), 20)
    assert server.stop() == 0
    sizes = [path.stat().st_size for path in files(tmp_path)]
    assert 0 < sum(sizes) <= bound


# -- pages -----------------------------------------------------------------------------------


def test_a_page_is_bounded_and_in_order(run: Loop) -> None:
    service = a_service(4 << 20)
    spaces = sorted(f"{(i * 0x9E3779B97F4A7C15) % 2**64:016x}" for i in range(PAGE + 3))
    with service.values.hold() as held:
        for space in spaces:
            held.reserve(space, ChunkKey(b"k" * 16), 4096)
        held.commit()
    first = run(holdings.page(service, ""))
    assert [one.space for one in first] == spaces[:PAGE]
    assert first[0] == Stock(spaces[0], 1, 4096, 0, "")
    rest = run(holdings.page(service, first[-1].space))
    assert [one.space for one in rest] == spaces[PAGE:]
    assert len(inventory.page(first)) <= inventory.MAX_PAGE_BYTES
    close(service)


class Told:
    """A connection to a server that lists ``stocks``; ``again``: from the first one each time."""

    def __init__(self, stocks: list[Stock], *, again: bool = False) -> None:
        self.asked = 0
        self._stocks = stocks
        self._again = again

    async def call(self, call: Call) -> Any:
        self.asked += 1
        after = "" if self._again else inventory.parse_after(memoryview(call.meta))
        behind = [one for one in self._stocks if one.space > after][:PAGE]
        return call.parse(memoryview(inventory.page(behind)))


@pytest.mark.parametrize("count", [0, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE])
def test_all_pages_are_asked_for(run: Loop, count: int) -> None:
    stocks = [Stock(f"{i:016x}", 1, 2, 3, "") for i in range(count)]
    told = Told(stocks)
    server = administration._Server(cast("Connection", told))
    assert run(server.stocks()) == stocks
    assert told.asked == count // PAGE + 1


def test_a_server_that_lists_for_ever_is_left(run: Loop) -> None:
    stocks = [Stock(f"{i:016x}", 1, 2, 3, "") for i in range(PAGE)]
    server = administration._Server(cast("Connection", Told(stocks, again=True)))
    with pytest.raises(BackendRejected, match="lists namespaces again"):
        run(server.stocks())


def test_descriptions_are_bounded() -> None:
    descriptions = Descriptions(most=3)
    for i in range(5):
        descriptions.learn(f"{i:016x}", f"model {i}")
    descriptions.learn(f"{2:016x}", "again")
    descriptions.learn(f"{5:016x}", "model 5")
    assert len(descriptions) == 3
    assert descriptions(f"{2:016x}") == "again"
    assert descriptions(f"{3:016x}") == ""


# -- who may ask, and what is wrong ----------------------------------------------------------


def test_an_operator_needs_the_token_and_trusts_the_certificate(
    lmcache: Run, start: Callable[..., RunningServer], tmp_path: Path
) -> None:
    cert, key = certificate(tmp_path)
    token = tmp_path / "token"
    token.write_text("a secret")
    token.chmod(0o600)
    options = ("--tls-cert", str(cert), "--tls-key", str(key))
    server = start(*options, LMCACHE_SERVER_TOKEN="a secret")
    good = (server.url, "--token-file", str(token), "--ca-file", str(cert))
    assert lmcache("status", *good)[0] == 0
    assert listed(lmcache, *good) == {}
    status, _, err = lmcache("purge", server.url, "--ca-file", str(cert), "--all", "--yes")
    assert status == 1
    assert "a token is needed" in err
    token.write_text("another")
    status, _, err = lmcache("ls", *good)
    assert status == 1
    assert "the token is wrong" in err
    status, _, err = lmcache("status", server.url)
    assert status == 1
    assert "certificate isn't trusted" in err


@pytest.mark.parametrize("op", [Op.LIST, Op.STATUS, Op.PURGE, Op.DESCRIBE])
def test_nothing_is_answered_before_the_proof(start: Callable[..., RunningServer], op: Op) -> None:
    server = start(LMCACHE_SERVER_TOKEN="a secret")
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.settimeout(20)
        hello = greeting.hello("0" * 16, bytes(32), proves=True)
        sock.sendall(protocol.header(Op.HELLO, 0, meta=len(hello)) + hello)
        head = protocol.parse_header(sock.recv(HEADER_BYTES, socket.MSG_WAITALL))
        sock.recv(head.meta, socket.MSG_WAITALL)
        sock.sendall(protocol.header(op, 1, meta=16) + b"0" * 16)
        answer = protocol.parse_header(sock.recv(HEADER_BYTES, socket.MSG_WAITALL))
        assert answer.status is Status.MALFORMED
        assert b"isn't a PROVE" in sock.recv(answer.meta, socket.MSG_WAITALL)


@pytest.mark.parametrize(
    ("op", "meta"),
    [
        (Op.LIST, b""),
        (Op.LIST, b"../../etc/passwd"),
        (Op.PURGE, bytes(16)),
        (Op.PURGE, b"../../etc/passwd"),
        (Op.DESCRIBE, b"x" * 600),
        (Op.DESCRIBE, b"\xff"),
        (Op.DESCRIBE, b"a\nb\nc\nd"),
    ],
)
def test_what_makes_no_sense_is_refused(
    start: Callable[..., RunningServer], op: Op, meta: bytes
) -> None:
    server = start()
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.settimeout(20)
        hello = greeting.hello("0" * 16, bytes(32))
        sock.sendall(protocol.header(Op.HELLO, 0, meta=len(hello)) + hello)
        head = protocol.parse_header(sock.recv(HEADER_BYTES, socket.MSG_WAITALL))
        sock.recv(head.meta, socket.MSG_WAITALL)
        sock.sendall(protocol.header(op, 1, meta=len(meta)) + meta)
        answer = protocol.parse_header(sock.recv(HEADER_BYTES, socket.MSG_WAITALL))
    assert answer.status is Status.MALFORMED


def test_the_configuration_says_which_server(
    lmcache: Run,
    start: Callable[..., RunningServer],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    server = start()
    monkeypatch.setenv("LMCACHE_REMOTE_URL", server.url)
    assert lmcache("status")[0] == 0
    monkeypatch.delenv("LMCACHE_REMOTE_URL")
    file = tmp_path / "lmcache.yaml"
    file.write_text(f"remote_url: {server.url}\n")
    assert lmcache("ls", "--file", str(file))[0] == 0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("status",), "no address was given, and the configuration has no lm:// store"),
        (("status", "redis://h:1"), "redis://h:1: it isn't the address of an lmcache_server"),
        (("ls", "lm://h", "--ca-file", "f"), "ca_file has no effect without tls"),
        (("ls", "lm://h", "--file", "f"), "--file f has no effect beside an address"),
        (("purge", "lm://h"), "say what: --model, --namespace or --all"),
        (("purge", "lm://h", "--all", "--model", "m"), "--all has no effect beside"),
        (("status", "lm://127.0.0.1:1"), "is lmcache_server running there?"),
        (("status", "lm+unix:///nobody/is/here"), "is lmcache_server running there?"),
        (("ls", "lm://h", "--token-file", "/not/there"), "can't read token_file /not/there"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes_are_one_line(lmcache: Run, argv: tuple[str, ...], said: str) -> None:
    status, out, err = lmcache(*argv)
    assert (status, out) == (1, "")
    (line,) = [line for line in err.splitlines() if line.startswith("lmcache:")]
    assert said in line


def test_a_namespace_is_named_by_its_start(
    lmcache: Run, start: Callable[..., RunningServer], run: Loop
) -> None:
    server = start()
    store(run, server, QWEN, 1)
    status, _, err = lmcache("ls", server.url, "--namespace", "a")
    assert status == 1
    assert "give at least 4 of its digits" in err
    status, _, err = lmcache("purge", server.url, "--model", "nobody's", "--yes")
    assert status == 1
    assert "has no such namespace" in err


@pytest.mark.parametrize("command", ["status", "ls", "purge"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"lmcache {command}" in capsys.readouterr().out


def test_what_clients_say_cannot_change_a_terminal(
    lmcache: Run, start: Callable[..., RunningServer], run: Loop
) -> None:
    server = start()
    store(run, server, CacheNamespace("a\x1b[31mb\nc", LAYOUT), 1)
    status, out, _ = lmcache("ls", server.url)
    assert status == 0
    assert "a?[31mb?c" in out
    assert "\x1b" not in out
