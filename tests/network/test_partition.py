"""The network between a cache and its store breaks, and is mended: misses for a while, no more."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from netns import ADDRESS, Host, another_host
from system_packages import need

from lmcache_core import Cache, DType, KVLayout, Plugins, full_attention, load_config

CHUNK, CHUNKS, PORT = 64, 12, 7411
GROUP = full_attention(layers=8, heads=8, head_size=128, dtype=DType.BF16)  # 2 MiB a chunk
LAYOUT = KVLayout(CHUNK, (GROUP,))
DEADLINE_S, LOOKUP_S = 1.5, 0.5
PATIENCE_S = 2.0
"""How much later than its deadline a call may come back on a busy machine."""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")

Start = Callable[[Host, Path], "subprocess.Popen[bytes]"]


def lm(host: Host, folder: Path) -> subprocess.Popen[bytes]:
    code = "import sys; from lmcache_core.cli import main; sys.exit(main(sys.argv[1:]))"
    server = [sys.executable, "-c", code, "server", ADDRESS, str(PORT), "--memory-gib", "0.5"]
    return host.start(server, folder / "server.log")


def redis(host: Host, folder: Path) -> subprocess.Popen[bytes]:
    need("redis-server")
    server = ["redis-server", "--port", str(PORT), "--bind", ADDRESS, "--protected-mode", "no"]
    return host.start([*server, "--save", "", "--dir", str(folder)], folder / "server.log")


STORES: dict[str, tuple[str, Start]] = {"lm": ("lm", lm), "redis": ("redis", redis)}


@contextmanager
def cache_of(scheme: str) -> Iterator[Cache]:
    """Nothing stays in host memory: what is loaded came over the network."""
    config = load_config(
        Plugins(),
        environ={},
        assignments=[
            f"chunk_size={CHUNK}",
            "max_local_cpu_size=0.2",
            "local_cpu=false",
            f"remote_url={scheme}://{ADDRESS}:{PORT}",
            f"blocking_timeout_secs={DEADLINE_S}",
            f"lookup_timeout_ms={LOOKUP_S * 1000:.0f}",
        ],
    )
    with Cache.open(model="m", layout=LAYOUT, config=config) as cache:
        yield cache


def wait_for_port() -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            socket.create_connection((ADDRESS, PORT), timeout=1).close()
            return
        time.sleep(0.1)
    raise TimeoutError("the server didn't start")


@pytest.mark.parametrize("store", STORES)
def test_a_partition(store: str, tmp_path: Path) -> None:
    need("ip")
    scheme, start = STORES[store]
    prompt = list(range(CHUNK * CHUNKS))
    stored = bytearray(random.Random(0).randbytes(GROUP.chunk_bytes(len(prompt))))
    plane = len(prompt) * GROUP.layer_token_bytes // 2

    def right(loaded: bytearray, tokens: int) -> bool:
        part = tokens * GROUP.layer_token_bytes // 2
        begins = range(0, len(stored), plane)
        return all(loaded[b : b + part] == stored[b : b + part] for b in begins)

    def load(cache: Cache) -> int:
        """In time, and right as far as it says."""
        loaded = bytearray(len(stored))
        began = time.monotonic()
        tokens = cache.load(prompt, loaded)
        took = time.monotonic() - began
        assert took < DEADLINE_S + LOOKUP_S + PATIENCE_S, f"a load took {took:.1f} s"
        assert right(loaded, tokens)
        return tokens

    def load_until(cache: Cache, enough: int) -> None:
        until = time.monotonic() + 60
        while load(cache) < enough:
            assert time.monotonic() < until, "the cache didn't recover"
            time.sleep(0.2)

    with another_host() as host:
        start(host, tmp_path)
        wait_for_port()
        with cache_of(scheme) as cache:
            cache.store(prompt, stored)
            assert cache.flush()
            load_until(cache, len(prompt))
            # Cut while values are on their way.
            timer = threading.Timer(0.01, host.cut)
            timer.start()
            load(cache)
            timer.join()
            assert load(cache) == 0
            began = time.monotonic()
            assert cache.lookup(prompt) == 0
            cache.store([7, *prompt], bytearray(GROUP.chunk_bytes(len(prompt) + 1)))
            assert time.monotonic() - began < LOOKUP_S + 2 * PATIENCE_S
            failures = sum(
                value
                for (name, _), value in cache.counters.snapshot().items()
                if name in ("backend_timeouts", "backend_errors")
            )
            assert failures > 0
            host.mend()
            load_until(cache, len(prompt))
