"""Two real servers or engines with one configuration, and whether the second finds what the first
computes; and our own store."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from engine_host import Answer, Engine, EngineHost, arguments
from server import VllmServer

ENGINE = Path(sys.executable)
PROMPTS = 24
"""So many have known answers."""
CHUNK = 256
TRANSFER = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}
ARGUMENTS = [
    "--enforce-eager",
    *("--max-model-len", "2048", "--block-size", "32", "--dtype", "float32"),
    "--no-enable-prefix-caching",
    *("--kv-transfer-config", json.dumps(TRANSFER)),
]

Servers = tuple[VllmServer, VllmServer]
Engines = tuple[Engine, Engine]


def prompt(seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(10, 500) for _ in range(3 * CHUNK + 17)]


@contextmanager
def two_servers(host: EngineHost, model: Path, folder: Path, config: str) -> Iterator[Servers]:
    """Started side by side, with one configuration file."""
    variables = _configured(folder, config)
    first, second = (
        VllmServer(ENGINE, model, folder / f"vllm{i}.log", ARGUMENTS, variables, launch=host.launch)
        for i in range(2)
    )
    with ExitStack() as stack, ThreadPoolExecutor(2) as threads:
        for server in (first, second):
            stack.callback(server.stop)
        list(threads.map(VllmServer.start, (first, second)))
        yield first, second


@contextmanager
def two_engines(host: EngineHost, model: Path, folder: Path, config: str) -> Iterator[Engines]:
    """Where the API server doesn't matter."""
    variables, settings = _configured(folder, config), arguments(model, kv_transfer_config=TRANSFER)
    with (
        host.engine(f"{folder.name}-0", settings, variables) as first,
        host.engine(f"{folder.name}-1", settings, variables) as second,
    ):
        yield first, second


def _configured(folder: Path, config: str) -> dict[str, str]:
    file = folder / "lmcache.yaml"
    file.write_text(config)
    return {"LMCACHE_CONFIG_FILE": str(file), "LMCACHE_MAX_LOCAL_CPU_SIZE": "0.2"}


@contextmanager
def lmcache_server(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """By the guide's command."""
    program = ENGINE.parent / "lmcache_server"
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            [str(program), "localhost", "65432", "cpu"], stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def settled(stored: Callable[[], int]) -> None:
    """Wait until nothing more comes into a store, ten seconds at the most."""
    deadline = time.monotonic() + 10
    before, since = -1, time.monotonic()
    while time.monotonic() < deadline and time.monotonic() - since < 0.7:
        if (now := stored()) != before:
            before, since = now, time.monotonic()
        time.sleep(0.05)


def asked(of: VllmServer | Engine, seed: int) -> Answer:
    """What comes of a prompt."""
    if isinstance(of, Engine):
        return of.ask(prompt(seed))
    one = of.complete(prompt(seed))
    return Answer(one.token_ids, one.cached_tokens, one.prompt_tokens)


def shared(
    pair: Servers | Engines,
    seed: int,
    uncached: dict[int, list[int]],
    stored: Callable[[], int],
    hit: int = 3 * CHUNK,
) -> bool:
    """Whether the second finds what the first computes. Its tokens are right in any case."""
    first = asked(pair[0], seed)
    assert first.tokens == uncached[seed]
    assert first.cached == 0
    settled(stored)
    second = asked(pair[1], seed)
    assert second.tokens == uncached[seed]
    return second.cached == hit


def until_shared(
    pair: Servers | Engines,
    seeds: range,
    uncached: dict[int, list[int]],
    stored: Callable[[], int],
    hit: int = 3 * CHUNK,
) -> None:
    """After a failure: ask new prompts until one is shared."""
    for seed in seeds:
        if shared(pair, seed, uncached, stored, hit):
            return
        time.sleep(1)
    pytest.fail("sharing didn't come back")
