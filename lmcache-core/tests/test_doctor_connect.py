"""``lmcache doctor --connect``: what works is one line a tier, and what doesn't says what to do."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import pytest
from lm_server import RunningServer

from lmcache_core import Cache, DType, KVLayout, Plugins, full_attention, load_config
from lmcache_core.cli import connect, main

MakeDistribution = Callable[..., str]
Run = Callable[..., tuple[int, list[str]]]

SMALL = ("--set", "max_local_cpu_size=0.01", "--set", "chunk_size=16")
SHAPE = ("--layers", "2", "--heads", "2", "--head-size", "64")
STORED = r"namespace [0-9a-f]{16}, "
STORED += r"opened in \d+\.\d ms, 0\.0 MiB stored in \d+\.\d ms, loaded in \d+\.\d ms, deleted in"

BROKEN = """
from lmcache_core.builtin.memory import MemoryBackend, MemoryConfig
from lmcache_core.contracts.storage import MISS, BackendCapabilities, StoreOutcome
from lmcache_core.contracts.serde import Serde

class Forgets(MemoryBackend):
    async def load(self, keys, into):
        return [MISS for _ in keys]

class Damages(MemoryBackend):
    async def load(self, keys, into):
        sizes = await super().load(keys, into)
        into[0][-1] ^= 1
        return sizes

class Refuses(MemoryBackend):
    async def store(self, keys, sources):
        return [StoreOutcome.NOT_ADMITTED for _ in keys]

class Keeps(MemoryBackend):
    delete = None

class Nonsense(MemoryBackend):
    async def store(self, keys, sources):
        return None

class Raises(MemoryBackend):
    async def open(self, context):
        raise ZeroDivisionError("over and out")

class Hangs(MemoryBackend):
    async def store(self, keys, sources):
        import asyncio
        await asyncio.sleep(3600)

class Halves(Serde):
    # Keeps the more significant byte of each element.
    wire_id = 60001
    def max_encoded_bytes(self, group, tokens):
        return group.chunk_bytes(tokens) // 2
    def encode(self, chunk, into, group, tokens):
        into[: chunk.nbytes // 2] = bytes(chunk)[1::2]
        return chunk.nbytes // 2
    def decode(self, encoded, into, group, tokens):
        both = bytearray(into.nbytes)
        both[1::2] = bytes(encoded)
        into[:] = both

@hookimpl
def lmcache_serdes():
    make = lambda config: Halves()
    return [SerdeDescriptor(
        name="halves", summary="a toy", lossless=False, config=NoOptions, create=make
    )]

class NoOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

def no_client(config):
    import a_client_that_nobody_has

@hookimpl
def lmcache_storage_backends():
    kinds = [Forgets, Damages, Refuses, Keeps, Nonsense, Raises, Hangs]
    found = [
        StorageBackendDescriptor(
            name=kind.__name__.lower(), summary="a toy", config=MemoryConfig, create=kind
        )
        for kind in kinds
    ]
    return [*found, StorageBackendDescriptor(
        name="clientless", summary="a toy", config=MemoryConfig, create=no_client
    )]
"""


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("LMCACHE_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str]) -> Run:
    """Status, and the lines about tiers."""

    def run(*argv: str) -> tuple[int, list[str]]:
        status = main(["doctor", "--connect", *SMALL, *argv])
        lines = capsys.readouterr().out.splitlines()
        return status, [line for line in lines if re.match(r"\w+ +(backends\.\w+ \(|--conn)", line)]

    return run


@pytest.fixture
def start() -> Iterator[Callable[..., RunningServer]]:
    with ExitStack() as stack:

        def start_one(*options: str, **more: str) -> RunningServer:
            running = RunningServer("--memory-gib", "0.01", *options, **more)
            stack.callback(running.stop)
            return running

        yield start_one


def files(folder: Path) -> set[Path]:
    """Chunk files, and nothing else, below ``folder``."""
    return {path for path in folder.rglob("*") if path.is_file() and path.parent.name in path.name}


# -- tiers that work -------------------------------------------------------------------------


def test_each_tier_has_a_line_with_times(
    doctor: Run, start: Callable[..., RunningServer], tmp_path: Path
) -> None:
    server = start()
    status, lines = doctor(
        *SHAPE,
        *("--set", f"remote_url={server.url}"),
        *("--set", "backends.files.type=filesystem", "--set", f"backends.files.path={tmp_path}"),
        *("--set", "backends.apart.type=memory", "--set", "backends.apart.isolated=true"),
    )
    assert status == 0, lines
    assert len(lines) == 3
    assert all(re.search(STORED, line) and line.startswith("ok ") for line in lines), lines
    assert files(tmp_path) == set()


def test_nobody_elses_chunks_are_touched(
    doctor: Run, start: Callable[..., RunningServer], tmp_path: Path
) -> None:
    server = start()
    options = [
        "chunk_size=16",
        "max_local_cpu_size=0.01",
        f"remote_url={server.url}",
        "backends.files.type=filesystem",
        f"backends.files.path={tmp_path}",
    ]
    config = load_config(Plugins(environ={}), environ={}, assignments=options)
    group = full_attention(layers=2, heads=2, head_size=64, dtype=DType.BF16)
    kv = bytearray(os.urandom(group.chunk_bytes(32)))
    layout = KVLayout(16, (group,))
    with Cache.open(model="m", layout=layout, config=config) as cache:
        assert cache.store(list(range(32)), kv) == 32
        assert cache.flush()
    before = files(tmp_path)
    assert len(before) == 2
    sets = [part for option in options for part in ("--set", option)]
    status, lines = doctor(*SHAPE, *sets)
    assert status == 0, lines
    assert files(tmp_path) == before
    with Cache.open(model="m", layout=layout, config=config) as cache:
        assert cache.lookup(list(range(32))) == 32


def test_a_chunk_is_as_large_as_the_options_say(doctor: Run) -> None:
    # 16 tokens of 32 layers, 2 planes, 8 heads, 128 elements and 2 bytes are 2 MiB.
    status, (line,) = doctor("--set", "backends.near.type=memory")
    assert status == 0
    assert "2.0 MiB stored" in line
    status, (line,) = doctor("--set", "backends.near.type=memory", "--dtype", "f32")
    assert "4.0 MiB stored" in line


def test_times_are_what_the_clock_says() -> None:
    ticks = count()
    config = load_config(
        Plugins(environ={}),
        environ={},
        assignments=["chunk_size=16", "backends.near.type=memory"],
    )
    layout = KVLayout(16, (full_attention(layers=1, heads=1, head_size=8, dtype=DType.F16),))
    clock = lambda: next(ticks) * 0.25  # noqa: E731
    (finding,) = connect.findings(layout, config, Plugins(environ={}), clock=clock)
    assert finding.severity == "ok"
    assert finding.text.count("in 250.0 ms") == 4


def test_without_tiers_there_is_nothing_to_try(doctor: Run) -> None:
    status, (line,) = doctor()
    assert status == 0
    assert line.startswith("warn")


def test_a_serde_that_loses_bits_is_no_failure(doctor: Run, distribution: MakeDistribution) -> None:
    distribution("lmcache-toys", BROKEN)
    options = ("--set", "backends.near.type=memory", "--set", "backends.near.serde=halves")
    status, (line,) = doctor(*options)
    assert status == 0, line
    assert "1.0 MiB stored" in line


# -- what is wrong ---------------------------------------------------------------------------


def failure(answer: tuple[int, list[str]]) -> str:
    status, (line,) = answer
    assert status == 1, line
    assert line.startswith("FAIL  backends.")
    return line


def test_a_token_that_is_missing(doctor: Run, start: Callable[..., RunningServer]) -> None:
    server = start(LMCACHE_SERVER_TOKEN="a secret")
    line = failure(doctor(*SHAPE, "--set", f"remote_url={server.url}"))
    assert "a token is needed; set token_file to the server's" in line


def test_a_server_that_does_not_answer(doctor: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    line = failure(doctor(*SHAPE, "--set", f"remote_url=lm://127.0.0.1:{port}"))
    assert "is lmcache_server running there?" in line
    assert "start its server, or correct its address" in line


def test_a_limit_below_the_chunk(doctor: Run, start: Callable[..., RunningServer]) -> None:
    server = start()
    line = failure(doctor("--set", f"remote_url={server.url}", "--layers", "200"))
    assert re.search(r"takes values of \d+ bytes at the most, and a chunk has \d+", line)
    assert "lower chunk_size" in line


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("clientless", "a_client_that_nobody_has'. Install what it needs: pip install"),
        ("forgets", "doesn't have the chunk of .* that it has just stored"),
        ("damages", "gives back something else than was stored"),
        ("refuses", "didn't keep a chunk of .* it is full"),
        ("nonsense", r"didn't keep a chunk of .* \(None\)"),
        ("raises", "ZeroDivisionError: over and out; correct its options or report this"),
        ("hangs", "store took longer than 0.5 s"),
    ],
)
def test_what_is_wrong_is_said_with_a_remedy(
    doctor: Run, distribution: MakeDistribution, kind: str, said: str
) -> None:
    distribution("lmcache-toys", BROKEN)
    line = failure(
        doctor(
            *SHAPE,
            *("--set", f"backends.it.type={kind}", "--set", "backends.it.deadline_s=0.5"),
        )
    )
    assert re.search(said, line), line


def test_one_that_fails_keeps_no_other_from_being_tried(
    doctor: Run, distribution: MakeDistribution
) -> None:
    distribution("lmcache-toys", BROKEN)
    status, lines = doctor(
        *SHAPE, "--set", "backends.a.type=raises", "--set", "backends.b.type=memory"
    )
    assert status == 1
    assert [line[:4] for line in lines] == ["FAIL", "ok  "]


def test_one_that_cannot_delete_is_a_warning(doctor: Run, distribution: MakeDistribution) -> None:
    distribution("lmcache-toys", BROKEN)
    status, (line,) = doctor(*SHAPE, "--set", "backends.it.type=keeps")
    assert status == 0
    assert line.startswith("warn")
    assert "the chunk stays until the store evicts it" in line


@pytest.mark.parametrize("option", [*SHAPE[::2], "--dtype"])
def test_options_without_effect_are_refused(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    value = "BF16" if option == "--dtype" else "1"
    assert main(["doctor", *SMALL, option, value]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{option} has no effect without --connect" in captured.err


def test_a_shape_that_makes_no_sense(doctor: Run) -> None:
    status, (line,) = doctor("--set", "backends.near.type=memory", "--layers", "0")
    assert status == 1
    assert "correct --layers" in line
