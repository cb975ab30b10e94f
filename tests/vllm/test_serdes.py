"""Real vLLM, and compressed chunks in our own server and in Redis.

With the deployment guide's configuration files: section 2.1 and appendix 1, section 4.2. In
bfloat16, which codecs are for. The second engine starts with nothing in its own memory.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from engine_host import Engine, EngineHost, arguments
from pair import CHUNK, lmcache_server, prompt
from redis_servers import Server, running, until

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("default"),
    # Servers listen on the guide's ports.
    pytest.mark.xdist_group("guide's ports"),
]

LM = """
chunk_size: 256
local_cpu: true
remote_url: "lm://localhost:65432"
remote_serde: "{serde}"
"""
REDIS = """
# 256 Tokens per KV Chunk
chunk_size: 256
# Redis host
remote_url: "redis://localhost:6379"
# 序列化方式
remote_serde: "{serde}" # "naive" (default) or "cachegen"
"""
MOST_BYTES = {"cachegen": 0.45, "lossless": 0.8, "cachegen+aesgcm": 0.45}
"""Of those that were computed, as stored. Random weights are harder on codecs than real ones."""


@contextmanager
def store(config: str, folder: Path) -> Iterator[None]:
    with ExitStack() as stack:
        if config is LM:
            stack.enter_context(lmcache_server(folder))
        else:
            stack.enter_context(running(Server(folder / "redis", port=6379)))
        yield


def metric(engine: Engine, name: str, **labels: str) -> float:
    """A counter of ours, after a step: vLLM reports what happened before it."""
    engine.ask([1, 2, 3], max_tokens=1)
    return engine.metric(f"lmcache_{name}", **labels)


@pytest.mark.parametrize("serde", MOST_BYTES)
@pytest.mark.parametrize("config", [pytest.param(LM, id="lm"), pytest.param(REDIS, id="redis")])
def test_compressed_chunks_are_shared(
    host: EngineHost, tiny: Path, tmp_path: Path, config: str, serde: str
) -> None:
    """All whole chunks hit, and with `lossless` tokens are the same."""
    file = tmp_path / "lmcache.yaml"
    file.write_text(config.format(serde=serde))
    environ = {
        "LMCACHE_CONFIG_FILE": str(file),
        "LMCACHE_MAX_LOCAL_CPU_SIZE": "0.2",
        "LMCACHE_AESGCM_KEYS": "1 " + base64.b64encode(bytes(range(32))).decode(),
    }
    transfer = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}
    settings = arguments(tiny, dtype="bfloat16", kv_transfer_config=transfer)

    def started(name: str) -> Engine:
        return host.engine(f"{tmp_path.name}-{name}", settings, environ)

    with store(config, tmp_path):
        with started("first") as engine:
            first = engine.ask(prompt(0))
            until(lambda: metric(engine, "tier_store_chunks") == 3, "the store")
            stored = metric(engine, "tier_store_bytes")
            computed = metric(engine, "store_bytes")
        with started("second") as engine:
            second = engine.ask(prompt(0))
            received = metric(engine, "load_bytes") - metric(engine, "load_bytes", tier="host")
            rejected = metric(engine, "frame_rejected")
    assert first.cached == 0
    assert second.cached == 3 * CHUNK
    assert rejected == 0
    if serde == "lossless":
        assert second.tokens == first.tokens
    assert 0 < stored < MOST_BYTES[serde] * computed
    assert 0.7 * stored < received <= stored  # whole chunks of what was stored
