"""Nothing passes for what it isn't, on real vLLM: dummy weights, adapters, streamed models.

Over one folder on disk; tokens are always those of an engine without us.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from engine_host import Engine, EngineHost, arguments
from pair import prompt

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]

CHUNK = 16
SEED = 3
HIT = len(prompt(SEED)) // CHUNK * CHUNK
Start = Callable[..., Engine]


@pytest.fixture
def start(host: EngineHost, tmp_path: Path) -> Start:
    """Starts an engine whose chunks go to this test's folder, or one without a connector."""
    count = iter(range(100))

    def started(
        model: Path | str,
        *,
        cached: bool = True,
        environ: Mapping[str, str] | None = None,
        **more: Any,
    ) -> Engine:
        if cached:
            more["kv_transfer_config"] = {
                "kv_connector": "LMCacheConnectorV1",
                "kv_role": "kv_both",
            }
        variables = {
            "LMCACHE_CHUNK_SIZE": str(CHUNK),
            "LMCACHE_MAX_LOCAL_CPU_SIZE": "0.2",
            "LMCACHE_LOCAL_DISK": str(tmp_path / "disk"),
            "LMCACHE_MAX_LOCAL_DISK_SIZE": "1",
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
            **(environ or {}),
        }
        name = f"{tmp_path.name}-{next(count)}"
        return host.engine(name, arguments(Path(model), **more), variables)

    return started


def test_a_dummy_run_before_a_real_one(
    start: Start, tiny: Path, tmp_path: Path, uncached: dict[int, list[int]]
) -> None:
    """Made-up weights are neither stored nor given anything, which one line says."""
    with start(tiny, load_format="dummy") as engine:
        dummy = engine.ask(prompt(SEED))
        assert dummy.tokens != uncached[SEED]
        again = engine.ask(prompt(SEED))
        assert (again.cached, again.tokens) == (0, dummy.tokens)
        lines = [line for line in engine.log_text().splitlines() if "Nothing is cached" in line]
        assert len(lines) == 1
        assert "load_format=dummy" in lines[0]
    assert not [file for file in (tmp_path / "disk").rglob("*") if file.is_file()]
    with start(tiny) as engine:
        first = engine.ask(prompt(SEED))
        assert (first.cached, first.tokens) == (0, uncached[SEED])
        assert "of weights" in engine.log_text()
    with start(shutil.copytree(tiny, tmp_path / "copy")) as engine:
        again = engine.ask(prompt(SEED))
        assert (again.cached, again.tokens) == (HIT, uncached[SEED])
    with start(tiny, load_format="dummy") as engine:
        assert engine.ask(prompt(SEED)).cached == 0
