"""Real vLLM with Mooncake, NIXL and InfiniStore, and with a client that nobody should use.

With the deployment guide's configuration files, but for sizes, which are this machine's, and for
addresses and folders. Whatever is stored, lost or killed: tokens are those of an engine without us.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import infini_server
import pytest
import unsafe_backend
from engine_host import Engine, EngineHost, arguments
from mooncake_master import Master
from nixl_servers import s3_server
from pair import CHUNK, PROMPTS, prompt, settled, shared, two_servers, until_shared
from server import VllmServer

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]

CHECK = Path(__file__).parents[2] / "deploy" / "compose" / "check.py"
WHOLE_CHUNKS = 3 * CHUNK
ALL_BUT_ONE = WHOLE_CHUNKS + 16
"""With chunks of 16 tokens that may be unfull: the last token is computed in any case."""
PATIENCE_S = 60.0
MIB = 1 << 20

Start = Callable[..., Engine]
Answers = dict[int, list[int]]


@pytest.fixture
def start(host: EngineHost, tiny: Path, tmp_path: Path) -> Start:
    """Starts an engine with the text of a configuration file."""

    def started(
        config: str,
        *,
        role: str = "kv_both",
        environ: Mapping[str, str] | None = None,
        **more: Any,
    ) -> Engine:
        file = tmp_path / f"{time.monotonic_ns()}.yaml"
        file.write_text(config)
        transfer = {"kv_connector": "LMCacheConnectorV1", "kv_role": role}
        variables = {"LMCACHE_CONFIG_FILE": str(file), **(environ or {})}
        name = f"{tmp_path.name}-{file.stem}"
        return host.engine(name, arguments(tiny, kv_transfer_config=transfer), variables, **more)

    return started


def hit(engine: Engine, seed: int, uncached: Answers) -> int:
    """Prompt tokens of a request that come from the cache. Its tokens are right in any case."""
    answer = engine.ask(prompt(seed))
    assert answer.tokens == uncached[seed]
    return answer.cached


def until(asked: Callable[[], bool]) -> None:
    """After a failure: ask until the cache is back."""
    deadline = time.monotonic() + PATIENCE_S
    while not asked():
        assert time.monotonic() < deadline, "hits didn't come back"
        time.sleep(0.1)


def until_hit(engine: Engine, seed: int, uncached: Answers, tokens: int) -> None:
    """Until a prompt is in the cache."""
    until(lambda: hit(engine, seed, uncached) == tokens)


# -- Mooncake --------------------------------------------------------------------------------------

MOONCAKE = """
# LMCache 基础配置
chunk_size: 16 # 用于验证,生产环境建议 256 或以上
save_unfull_chunk: true
local_cpu: False

# Mooncake 连接 URL (指向 Master RPC 端口)
remote_url: "mooncakestore://localhost:50051/"
max_local_cpu_size: 2 # 即使 local_cpu=False 也需配置缓冲大小
numa_mode: null # 多 NUMA/多网卡系统建议设为 auto 以降低长尾延迟
pre_caching_hash_algorithm: sha256_cbor_64bit

# Mooncake 引擎高级配置
extra_config:
  use_exists_sync: true
  save_chunk_meta: False # 启用块元数据优化
  local_hostname: "localhost" # 当前节点标识
  metadata_server: "http://localhost:8080/metadata" # HTTP 元数据服务地址
  protocol: "tcp" # 传输协议: "rdma" 或 "tcp"
  device_name: "" # 留空以自动检测设备
  global_segment_size: 268435456
  master_server_address: "localhost:50051" # Master RPC 地址
  local_buffer_size: 0 # 依赖 LMCache local_cpu 作为缓冲
  mooncake_prefer_local_alloc: true
"""
APPENDIX_2 = """
chunk_size: 16
remote_url: "mooncakestore://localhost:50052/"
remote_serde: "naive"
local_cpu: False
max_local_cpu_size: 2
numa_mode: null
extra_config:
  local_hostname: "localhost"
  metadata_server: "http://localhost:8080/metadata"
  protocol: "tcp"
  device_name: ""
  master_server_address: "localhost:50052"
  global_segment_size: 268435456
  local_buffer_size: 16777216
  transfer_timeout: 1
  save_chunk_meta: False
"""


@pytest.mark.xdist_group("port 8080")
def test_mooncake(host: EngineHost, tiny: Path, tmp_path: Path, uncached: Answers) -> None:
    """Two servers, one cluster; the master is killed during requests, and comes back empty."""
    with (
        Master(ports=(50051, 8080, 9003)) as master,
        two_servers(host, tiny, tmp_path, MOONCAKE) as pair,
        ThreadPoolExecutor(2) as threads,
    ):
        assert shared(pair, 0, uncached, master.keys, ALL_BUT_ONE)
        again = pair[0].complete(prompt(0))
        assert again.token_ids == uncached[0]
        assert again.cached_tokens == ALL_BUT_ONE, "and the first finds what it stored itself"
        checked = subprocess.run(
            [sys.executable, str(CHECK), pair[0].url, pair[1].url, "--words", "200"],
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        assert checked.returncode == 0, checked.stdout

        def ask(server: VllmServer) -> list[list[int]]:
            return [server.complete(prompt(seed)).token_ids for seed in range(4)]

        answers = [threads.submit(ask, server) for server in pair]
        master.kill()
        for answer in answers:
            assert answer.result() == [uncached[seed] for seed in range(4)]
        master.start()
        until_shared(pair, range(4, PROMPTS), uncached, master.keys, ALL_BUT_ONE)


@pytest.mark.xdist_group("port 8080")
def test_mooncake_between_producer_and_consumer(start: Start, uncached: Answers) -> None:
    """Appendix 2's two files, which differ in a name: one engine prefills, the other decodes."""
    with (
        Master(ports=(50052, 8080, 9004)) as master,
        start(APPENDIX_2, role="kv_producer") as prefiller,
        start(APPENDIX_2, role="kv_consumer") as decoder,
    ):
        assert hit(prefiller, 0, uncached) == 0
        settled(master.keys)
        assert master.keys() == (WHOLE_CHUNKS + 16) // 16
        assert hit(decoder, 0, uncached) == WHOLE_CHUNKS + 16
        assert hit(decoder, 1, uncached) == 0
        settled(master.keys)
        assert master.keys() == (WHOLE_CHUNKS + 16) // 16, "a consumer stores nothing"


# -- NIXL ------------------------------------------------------------------------------------------

NIXL = """
chunk_size: 256
nixl_buffer_size: 67108864
nixl_buffer_device: cpu
extra_config:
  enable_nixl_storage: true
  nixl_backend: {backend}
  nixl_pool_size: 64
  nixl_path: {path}
"""
SMALL = {"LMCACHE_MAX_LOCAL_CPU_SIZE": "0.2"}
"""The guide's files for NIXL leave it at LMCache's default, 5 GiB."""


@pytest.mark.parametrize("direct", [False, True], ids=["buffered", "direct"])
def test_nixl_posix_over_a_restart(
    start: Start, tmp_path: Path, uncached: Answers, direct: bool
) -> None:
    config = NIXL.format(backend="POSIX", path=tmp_path / "cache")
    if direct:
        config += "  use_direct_io: True\n"
    with start(config, environ=SMALL) as engine:
        for seed in range(3):
            assert hit(engine, seed, uncached) == 0
    with start(config, environ=SMALL) as engine:
        for seed in range(3):
            assert hit(engine, seed, uncached) == WHOLE_CHUNKS
        assert hit(engine, 3, uncached) == 0
        assert engine.metric("lmcache_load_chunks", tier="nixl") == 9


def test_nixl_obj(start: Start, tmp_path: Path, uncached: Answers) -> None:
    """Two engines, one bucket; and a third that starts when they are gone."""
    with s3_server() as s3:
        config = NIXL.format(backend="OBJ", path="/mnt/nixl/cache/") + "  nixl_backend_params:\n"
        config += "".join(f'    {name}: "{value}"\n' for name, value in s3.params().items())
        with start(config, environ=SMALL) as first:
            assert hit(first, 0, uncached) == 0
            with start(config, environ=SMALL) as second:
                until_hit(second, 0, uncached, WHOLE_CHUNKS)
                assert hit(second, 1, uncached) == 0
        with start(config, environ=SMALL) as third:
            for seed in range(2):
                assert hit(third, seed, uncached) == WHOLE_CHUNKS
            assert third.metric("lmcache_load_chunks", tier="nixl") == 6


# -- InfiniStore -----------------------------------------------------------------------------------

INFINISTORE = """
chunk_size: 256
# 格式: infinistore://<server_ip>:<port>/?device=<local_rdma_device>
remote_url: "infinistore://127.0.0.1:12345/?device=mlx5_1"
remote_serde: "naive"
local_cpu: False
max_local_cpu_size: 0.2
"""
OVER = {
    "emulated NIC": INFINISTORE,
    "TCP": INFINISTORE.replace("device=mlx5_1", "connection_type=TCP"),
}


@pytest.fixture(scope="module")
def nic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return infini_server.emulated_nic(tmp_path_factory.mktemp("nic"))


def until_keys_vanish_in_time(
    engine: Engine, server: infini_server.Server, seed: int, uncached: Answers
) -> None:
    """Until keys were there when they were looked for, and gone when they were to be read.

    Each try empties the server a little later after a request if that found nothing, and a little
    earlier if it found all: so tries gather around the moment between the two.
    """
    deadline = time.monotonic() + 2 * PATIENCE_S
    delay_s = 0.005

    def forget(after_s: float) -> None:
        time.sleep(after_s)
        server.empty()

    with ThreadPoolExecutor(1) as threads:
        while not engine.metric("lmcache_load_failures"):
            assert time.monotonic() < deadline, f"no key vanished in time; at {delay_s:.4f} s"
            until_hit(engine, seed, uncached, WHOLE_CHUNKS)
            forgetting = threads.submit(forget, delay_s)
            found = hit(engine, seed, uncached)
            forgetting.result()
            delay_s *= 0.9 if found == WHOLE_CHUNKS else 1.12


@pytest.mark.xdist_group("port 12345")
@pytest.mark.parametrize("link", OVER)
def test_infinistore(start: Start, nic: Path, uncached: Answers, link: str) -> None:
    """Keys vanish between check and read, the server is killed during requests, and comes back."""
    server = infini_server.Server(nic)
    server.port = 12345
    with server, start(OVER[link], environ={"LD_PRELOAD": str(nic)}) as engine:
        assert hit(engine, 0, uncached) == 0
        settled(server.chunks)
        assert hit(engine, 0, uncached) == WHOLE_CHUNKS

        until_keys_vanish_in_time(engine, server, 0, uncached)
        until_hit(engine, 0, uncached, WHOLE_CHUNKS)

        with ThreadPoolExecutor(1) as threads:
            hits = threads.submit(lambda: [hit(engine, seed, uncached) for seed in range(12)])
            server.kill()
            assert 0 in hits.result()
        server.start()
        until_hit(engine, 0, uncached, WHOLE_CHUNKS)


# -- a client that crashes, hangs and leaks --------------------------------------------------------

REQUESTS = 1000
BAD = """
chunk_size: 16
local_cpu: false
max_local_cpu_size: 0.05
backends:
  bad: {{path: {path}, mode: all, deadline_s: 2, isolated_memory_gib: 0.08}}
"""


def short(number: int) -> list[int]:
    """A prompt of two chunks and a token; every second one is that of nine requests before."""
    draw = random.Random(number - 9 if number % 2 and number > 8 else number)
    return [draw.randrange(10, 500) for _ in range(33)]


@pytest.fixture
def bad_client(tmp_path: Path) -> str:
    """The folder in which a distribution with the bad client is installed."""
    site = tmp_path / "site"
    info = site / "lmcache_backend_bad-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lmcache-backend-bad\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[lmcache.plugins]\nbad = bad_client\n")
    (site / "bad_client.py").write_text(Path(unsafe_backend.__file__).read_text())
    return str(site)


@pytest.mark.long
def test_a_thousand_requests_around_a_bad_client(
    start: Start, host: EngineHost, tmp_path: Path, tiny: Path, bad_client: str
) -> None:
    """Its 100th call is a segmentation fault, its 200th never returns, each takes 128 KiB."""
    prompts = [short(number) for number in range(2 * REQUESTS)]
    with host.engine("uncached-short", arguments(tiny)) as engine:
        expected = [one.tokens for one in engine.ask_all(prompts, max_tokens=1)]
    values = tmp_path / "values"
    values.mkdir()
    quiet = {"LMCACHE_LOG_LEVEL": "WARNING"}
    with start(BAD.format(path=values), environ=quiet, path=[bad_client]) as engine:
        hits = 0

        def restarted(reason: str) -> float:
            return engine.metric("lmcache_isolated_restarts", reason=reason)

        def served(number: int) -> bool:
            answer = engine.ask(prompts[number], max_tokens=1)
            assert answer.tokens == expected[number]
            return answer.cached == 32

        def works(number: int) -> bool:
            served(number)
            return not engine.metric("lmcache_breaker_open")

        for number in range(REQUESTS):
            if served(number):
                hits += 1
            elif number % 2:  # or the rest would all be asked while the client has a rest
                until(lambda number=number: works(number))
        assert hits > REQUESTS // 3
        assert restarted("died") == 1
        assert restarted("hung") == 1
        for number in range(REQUESTS, 2 * REQUESTS):
            if restarted("memory"):
                break
            served(number)
        assert restarted("memory")
