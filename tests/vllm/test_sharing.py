"""Two real vLLM engines and one store: what the first computes, the second finds.

With the deployment guide's configuration files, unchanged: stores listen on the guide's ports.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from engine_host import Engine, EngineHost
from pair import (
    PROMPTS,
    asked,
    lmcache_server,
    prompt,
    shared,
    two_engines,
    two_servers,
    until_shared,
)
from redis_servers import Replicated, Server, cluster, running, until

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]

ROOT = Path(__file__).parents[2]
CHECK = ROOT / "deploy" / "compose" / "check.py"
FRESH = 4
LM_SERVER = 'chunk_size: 256\nremote_url: "lm://localhost:65432"\nremote_serde: "naive"\n'
REDIS = 'chunk_size: 256\nremote_url: "redis://localhost:6379"\nremote_serde: "naive"\n'
SENTINEL = """chunk_size: 256
# 连接到 Sentinel 集群
remote_url: "redis-sentinel://localhost:26379,localhost:26380,localhost:26381"
remote_serde: "naive"
"""


# -- our own server --------------------------------------------------------------------------------


@pytest.mark.xdist_group("guide's ports")
def test_lmcache_server(
    host: EngineHost, tiny: Path, tmp_path: Path, uncached: dict[int, list[int]]
) -> None:
    """Shares; killed and restarted empty, serving goes on, and then sharing too."""

    def stored() -> int:
        return int(pair[0].metric("vllm:lmcache_tier_store_chunks_total"))

    with two_servers(host, tiny, tmp_path, LM_SERVER) as pair:
        with lmcache_server(tmp_path) as process:
            until_shared(
                pair, range(FRESH, 10), uncached, stored
            )  # it starts at the same time as the first request
            checked = subprocess.run(
                [sys.executable, str(CHECK), pair[0].url, pair[1].url, "--words", "200"],
                stdout=subprocess.PIPE,
                text=True,
                check=False,
            )
            assert checked.returncode == 0, checked.stdout
            process.kill()
        for seed in (0, 1):
            for server in pair:
                assert server.complete(prompt(seed)).token_ids == uncached[seed]
        with lmcache_server(tmp_path):
            until_shared((pair[1], pair[0]), range(10, PROMPTS), uncached, stored)


# -- Redis -----------------------------------------------------------------------------------------


def keys_of(*servers: Server) -> int:
    total = 0
    for server in servers:
        with server.client() as client:
            total += int(client.dbsize())
    return total


@pytest.mark.xdist_group("guide's ports")
def test_redis(
    host: EngineHost, tiny: Path, tmp_path: Path, uncached: dict[int, list[int]]
) -> None:
    server = Server(tmp_path / "redis", port=6379)
    with running(server), two_engines(host, tiny, tmp_path, REDIS) as pair:
        assert shared(pair, 0, uncached, lambda: keys_of(server))


def test_redis_cluster(
    host: EngineHost, tiny: Path, tmp_path: Path, uncached: dict[int, list[int]]
) -> None:
    with cluster(tmp_path / "cluster") as nodes:
        config = f'chunk_size: 256\nremote_url: "redis-cluster://127.0.0.1:{nodes[0].port}"\n'
        with two_engines(host, tiny, tmp_path, config) as pair:
            assert shared(pair, 0, uncached, lambda: keys_of(*nodes))


@contextmanager
def guides_sentinels(folder: Path) -> Iterator[Replicated]:
    """Section 4.2.3: a primary, a replica and three Sentinels on the guide's ports."""
    primary = Server(folder / "primary", port=6379)
    replica = Server(folder / "replica", port=6380, arguments=["--replicaof", "127.0.0.1 6379"])
    text = (
        "sentinel monitor mymaster 127.0.0.1 6379 1\n"
        "sentinel down-after-milliseconds mymaster 1000\n"
        "sentinel failover-timeout mymaster 10000\n"
        "sentinel parallel-syncs mymaster 1\n"
    )
    sentinels = [
        Server(folder / f"s{port}", port=port, sentinel=text) for port in range(26379, 26382)
    ]
    with running(primary, replica):
        with replica.client() as client:
            until(lambda: client.info("replication")["master_link_status"] == "up", "the replica")
        with running(*sentinels):
            topology = Replicated(primary, replica, sentinels)
            until(lambda: topology.primary_port() == 6379, "the Sentinels")
            time.sleep(2)  # they find each other and the replica by messages every two seconds
            yield topology


@pytest.mark.xdist_group("guide's ports")
def test_redis_sentinel(
    host: EngineHost, tiny: Path, tmp_path: Path, uncached: dict[int, list[int]]
) -> None:
    """The primary is killed between requests and during them: misses for a moment, nothing else."""
    with (
        guides_sentinels(tmp_path) as topology,
        two_engines(host, tiny, tmp_path, SENTINEL) as pair,
        ThreadPoolExecutor(2) as threads,
    ):
        assert shared(pair, 0, uncached, lambda: keys_of(topology.primary))

        def ask(engine: Engine) -> list[list[int]]:
            return [asked(engine, seed).tokens for seed in range(1, FRESH)]

        answers = [threads.submit(ask, engine) for engine in pair]
        topology.primary.kill()
        for answer in answers:
            assert answer.result() == [uncached[seed] for seed in range(1, FRESH)]
        until(lambda: topology.primary_port() == 6380, "the failover")
        until_shared(pair, range(FRESH, PROMPTS), uncached, lambda: keys_of(topology.replica))
