"""The deployment guide's commands against real servers: hits, log lines, kills, restarts."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from engine_host import EngineHost, arguments
from pair import TRANSFER
from server import ServerError, VllmServer

pytestmark = pytest.mark.vllm

ENGINE = Path(sys.executable)
FLAG = ["--kv-transfer-config", '{"kv_connector":"LMCacheConnectorV1", "kv_role":"kv_both"}']
COMMON = [
    "--enforce-eager",
    "--max-model-len",
    "2048",
    "--no-enable-prefix-caching",
    "--dtype",
    "float32",
    "--block-size",
    "32",
]
FIRST = (
    "Qwen3 is the latest generation of large language models in Qwen series, offering a "
    "comprehensive suite of dense and mixture-of-experts"
)
SECOND = FIRST + " (MoE) models"
SMALL = {"LMCACHE_MAX_LOCAL_CPU_SIZE": "0.2"}


@pytest.fixture(scope="session")
def uncached(host: EngineHost, tiny: Path) -> dict[str, list[int]]:
    """Greedy tokens of an engine that has no connector."""
    texts = [FIRST, SECOND, *(f"{i} {FIRST * 8}" for i in range(6))]
    with host.engine("uncached-texts", arguments(tiny)) as engine:
        return {text: engine.ask(text).tokens for text in texts}


def test_the_guides_two_requests(
    tiny: Path, tmp_path: Path, uncached: dict[str, list[int]]
) -> None:
    """Section 3.1, verbatim: the flag, LMCACHE_CHUNK_SIZE=8, two overlapping prompts."""
    environ = {"LMCACHE_CHUNK_SIZE": "8", "VLLM_SERVER_DEV_MODE": "1", **SMALL}
    with VllmServer(ENGINE, tiny, tmp_path / "vllm.log", [*COMMON, *FLAG], environ) as server:
        first = server.complete(FIRST)
        second = server.complete(SECOND)
        assert first.cached_tokens == 0
        shared = first.prompt_tokens // 8 * 8
        assert second.cached_tokens == shared
        assert first.token_ids == uncached[FIRST]
        assert second.token_ids == uncached[SECOND]
        assert server.metric("vllm:external_prefix_cache_hits_total") == shared
        assert server.metric("vllm:lmcache_lookup_hit_tokens_total", tier="host") == shared
        assert server.metric("vllm:lmcache_load_tokens_total") == shared
        assert server.metric("vllm:prompt_tokens_cached_by_source_total", source="host") == shared
        server.post("/reset_prefix_cache?reset_external=true")
        assert server.complete(SECOND).cached_tokens == 0
        log = server.log_text()
    lines = [
        rf"LMCache INFO: Reqid: \S+, Total tokens {second.prompt_tokens}, "
        rf"LMCache hit tokens: {shared}, need to load: {shared}",
        rf"Retrieved {shared} out of {shared} required tokens \(from {shared} total tokens\)\. "
        r"size: \d+\.\d+ gb, cost \d+\.\d+ ms, throughput: \d+\.\d+ GB/s;",
        rf"Storing KV cache for {shared} out of {first.prompt_tokens} tokens "
        r"\(skip_leading_tokens=0\) for request \S+",
        rf"Stored {shared} out of total {shared} tokens\. size: \d+\.\d+ gb, cost \d+\.\d+ ms, "
        r"throughput: \d+\.\d+ GB/s; offload_time: \d+\.\d+ ms, put_time: \d+\.\d+ ms",
    ]
    for line in lines:
        assert re.search(line, log), line


def test_an_engine_killed_while_storing_loses_at_most_chunks(
    host: EngineHost, tiny: Path, tmp_path: Path, uncached: dict[str, list[int]]
) -> None:
    """SIGKILL in the middle; the next engine serves right tokens, and hits what was published."""
    disk = tmp_path / "disk"
    config = tmp_path / "lmcache.yaml"
    config.write_text(
        f"chunk_size: 16\nmax_local_cpu_size: 0.2\nlocal_disk: {disk}\nmax_local_disk_size: 1\n"
    )
    environ = {"LMCACHE_CONFIG_FILE": str(config)}
    settings = arguments(tiny, kv_transfer_config=TRANSFER)
    texts = [text for text in uncached if text not in (FIRST, SECOND)]
    engine = host.engine("killed", settings, environ)
    try:
        for text in texts[:-1]:
            assert engine.ask(text).tokens == uncached[text]
        engine.ask(texts[-1], max_tokens=1)
    finally:
        engine.kill()
    with host.engine("next", settings, environ) as engine:
        hits = 0
        for text in texts:
            answer = engine.ask(text)
            assert answer.tokens == uncached[text]
            hits += answer.cached
        assert hits > 0
        for text in texts:
            answer = engine.ask(text)
            assert answer.tokens == uncached[text]
            assert answer.cached == min(answer.prompt_tokens // 16 * 16, answer.prompt_tokens - 1)


def test_the_simplified_flags(
    host: EngineHost, tiny: Path, tmp_path: Path, uncached: dict[str, list[int]]
) -> None:
    """Section 3.1, second way. The size is what we take, whatever the environment says."""
    flags = [
        *COMMON,
        "--kv-offloading-backend",
        "lmcache",
        "--kv-offloading-size",
        "0.25",
        "--disable-hybrid-kv-cache-manager",
    ]
    environ = {"LMCACHE_CHUNK_SIZE": "8", "LMCACHE_MAX_LOCAL_CPU_SIZE": "1"}
    with VllmServer(
        ENGINE, tiny, tmp_path / "vllm.log", flags, environ, launch=host.launch
    ) as server:
        server.complete(FIRST)
        second = server.complete(SECOND)
        assert second.cached_tokens > 0
        assert second.token_ids == uncached[SECOND]
        assert "(0.25 GiB host memory)" in server.log_text()


def test_a_wrong_configuration_stops_the_start_with_all_mistakes(
    host: EngineHost, tiny: Path, tmp_path: Path
) -> None:
    config = tmp_path / "lmcache.yaml"
    config.write_text("chunk_sise: 256\nremote_url: nowhere://h:1\nmax_local_cpu_size: much\n")
    environ = {"LMCACHE_CONFIG_FILE": str(config), "LMCACHE_SAVE_DECODE_CACHE": "perhaps"}
    log, command = tmp_path / "vllm.log", [*COMMON, *FLAG]
    server = VllmServer(ENGINE, tiny, log, command, environ, launch=host.launch)
    with pytest.raises(ServerError):
        server.start()
    said = server.log_text()
    for expected in (
        "did you mean 'chunk_size'",
        "lmcache.yaml line 1",
        "nowhere",
        "max_local_cpu_size",
        "LMCACHE_SAVE_DECODE_CACHE",
    ):
        assert expected in said


def test_without_our_vllm_plugin_the_start_says_what_to_do(
    host: EngineHost, tiny: Path, tmp_path: Path
) -> None:
    environ = {"VLLM_PLUGINS": "something_else", **SMALL}
    log, command = tmp_path / "vllm.log", [*COMMON, *FLAG]
    server = VllmServer(ENGINE, tiny, log, command, environ, launch=host.launch)
    with pytest.raises(ServerError):
        server.start()
    assert "Add 'lmcache' to VLLM_PLUGINS" in server.log_text()


def test_use_layerwise_under_torch_compile(
    host: EngineHost, tiny: Path, uncached: dict[str, list[int]]
) -> None:
    """The layer hooks run inside a compiled model too."""
    settings = arguments(tiny, enforce_eager=False, kv_transfer_config=TRANSFER)
    environ = {"LMCACHE_CHUNK_SIZE": "8", "LMCACHE_USE_LAYERWISE": "true", **SMALL}
    with host.engine("compiled", settings, environ) as engine:
        first = engine.ask(SECOND)
        again = engine.ask(SECOND)
        assert again.cached > 0
        assert first.tokens == again.tokens == uncached[SECOND]
