"""Two real servers with one configuration, and whether the second finds what the first computes;
and our own store."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from server import VllmServer

ENGINE = Path(sys.executable)
PROMPTS = 24
"""So many have known answers."""
CHUNK = 256
ARGUMENTS = [
    "--enforce-eager",
    *("--max-model-len", "2048", "--block-size", "32", "--dtype", "float32"),
    "--no-enable-prefix-caching",
    *(
        "--kv-transfer-config",
        '{"kv_connector":"LMCacheConnectorV1", "kv_role":"kv_both"}',
    ),
]

Pair = tuple[VllmServer, VllmServer]


def prompt(seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(10, 500) for _ in range(3 * CHUNK + 17)]


@contextmanager
def two_servers(model: Path, folder: Path, config: str, **environ: str) -> Iterator[Pair]:
    """Started side by side, with one configuration file."""
    file = folder / "lmcache.yaml"
    file.write_text(config)
    variables = {
        "LMCACHE_CONFIG_FILE": str(file),
        "LMCACHE_MAX_LOCAL_CPU_SIZE": "0.2",
        **environ,
    }
    pair = tuple(
        VllmServer(ENGINE, model, folder / f"vllm{i}.log", ARGUMENTS, variables) for i in range(2)
    )
    with ExitStack() as stack, ThreadPoolExecutor(2) as threads:
        for server in pair:
            stack.callback(server.stop)
        list(threads.map(VllmServer.start, pair))
        yield pair[0], pair[1]


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


def shared(
    pair: Pair,
    seed: int,
    uncached: dict[int, list[int]],
    stored: Callable[[], int],
    hit: int = 3 * CHUNK,
) -> bool:
    """Whether the second server finds what the first computes. Its tokens are right in any case."""
    first = pair[0].complete(prompt(seed))
    assert first.token_ids == uncached[seed]
    assert first.cached_tokens == 0
    settled(stored)
    second = pair[1].complete(prompt(seed))
    assert second.token_ids == uncached[seed]
    return second.cached_tokens == hit


def until_shared(
    pair: Pair,
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
