"""Models for the tests that run real vLLM. Run them with the engine environment's Python."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_host import EngineHost, arguments
from pair import PROMPTS, prompt

ROOT = Path(__file__).parents[2]

# By itself an OpenMP thread spins while it waits, and two engines on two cores crawl: a request
# of eight tokens takes 180 ms of a core instead of 8. For engines here and servers, before torch.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Test processes side by side (pytest-xdist) have a core each; all engines of one compute alike.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cores = sorted(os.sched_getaffinity(0))
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(cores[int(worker[2:]) % len(cores)])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long begins first. Groups of `xdist_group` begin before single tests anyway."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def _model(name: str) -> Path:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "models.py"), name],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Path(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="session")
def tiny() -> Path:
    """Random weights, four layers: fast, and its KV matters as much as a real one's."""
    return _model("tiny")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, a real small model."""
    return _model("smollm2")


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineHost]:
    with EngineHost(tmp_path_factory.mktemp("engines")) as one:
        yield one


@pytest.fixture(scope="session")
def uncached(host: EngineHost, tiny: Path) -> dict[int, list[int]]:
    """Greedy tokens of an engine without a connector, by prompt seed."""
    with host.engine("uncached", arguments(tiny)) as engine:
        return {seed: engine.ask(prompt(seed), max_tokens=16).tokens for seed in range(PROMPTS)}
