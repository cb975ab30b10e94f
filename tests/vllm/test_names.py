"""Nothing passes for what it isn't, on real vLLM: dummy weights, adapters, streamed models.

Over one folder on disk; tokens are always those of an engine without us.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from engine_host import Adapter, Engine, EngineHost, arguments
from made_adapters import WITH_ADAPTERS, adapter, write_adapter
from nixl_servers import s3_server
from pair import prompt

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]

CHUNK = 16
SEED = 3
HIT = len(prompt(SEED)) // CHUNK * CHUNK
Start = Callable[..., Engine]


@pytest.fixture
def start(host: EngineHost, tiny: Path, tmp_path: Path) -> Start:
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
        return host.engine(name, {**arguments(tiny, **more), "model": str(model)}, variables)

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
    assert not list((tmp_path / "disk").glob("*/??/*"))
    with start(tiny) as engine:
        first = engine.ask(prompt(SEED))
        assert (first.cached, first.tokens) == (0, uncached[SEED])
        assert "of weights" in engine.log_text()
    with start(shutil.copytree(tiny, tmp_path / "copy")) as engine:
        again = engine.ask(prompt(SEED))
        assert (again.cached, again.tokens) == (HIT, uncached[SEED])
    with start(tiny, load_format="dummy") as engine:
        assert engine.ask(prompt(SEED)).cached == 0


# -- adapters --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(
    host: EngineHost, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, list[int]]:
    """Greedy tokens by the adapter's seed, of an engine without a connector."""
    answers = {}
    with host.engine("adapted", arguments(tiny, **WITH_ADAPTERS, max_cpu_loras=4)) as engine:
        for seed in (1, 2):
            folder = write_adapter(tmp_path_factory.mktemp("adapters") / str(seed), seed)
            use = adapter(folder, name=str(seed), number=seed)
            answers[seed] = engine.ask(prompt(SEED), adapter=use).tokens
    return answers


def test_adapters(
    start: Start,
    tiny: Path,
    tmp_path: Path,
    uncached: dict[int, list[int]],
    adapted: dict[int, list[int]],
) -> None:
    """Named by what is loaded: on another host, replaced between engines, and within one."""
    assert len({tuple(uncached[SEED]), tuple(adapted[1]), tuple(adapted[2])}) == 3
    folder = write_adapter(tmp_path / "adapter", 1)
    with start(tiny, **WITH_ADAPTERS) as engine:

        def asked(use: Adapter | None = None) -> tuple[int, list[int]]:
            answer = engine.ask(prompt(SEED), adapter=use)
            return answer.cached, answer.tokens

        assert asked() == (0, uncached[SEED])
        assert asked(adapter(folder)) == (0, adapted[1])
        assert asked(adapter(folder)) == (HIT, adapted[1])
        assert asked() == (HIT, uncached[SEED])
        write_adapter(folder, 2)
        assert asked(adapter(folder)) == (HIT, adapted[1]), "vLLM has the old weights, and their KV"
        engine.load(adapter(folder, inplace=True))
        assert asked(adapter(folder)) == (0, adapted[2])
        assert asked(adapter(folder)) == (HIT, adapted[2])
        write_adapter(folder, 1)
        assert asked(adapter(folder, inplace=True)) == (HIT, adapted[1])
        assert asked(adapter(folder)) == (HIT, adapted[1])
        other = write_adapter(tmp_path / "other", 2)
        assert asked(adapter(other, name="other", number=2)) == (HIT, adapted[2])
        assert engine.metric("lmcache_load_failures") == 0
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere", copy_function=shutil.copy)
    with start(tiny, **WITH_ADAPTERS) as engine:
        use = adapter(elsewhere, name="another name", number=7)
        assert asked(use) == (HIT, adapted[1])
        write_adapter(elsewhere, 2)
    with start(tiny, **WITH_ADAPTERS) as engine:
        assert asked(use) == (HIT, adapted[2])


def test_what_vllms_own_cache_has_of_another_adapter(
    start: Start, tiny: Path, tmp_path: Path, adapted: dict[int, list[int]]
) -> None:
    """vLLM gives a reloaded adapter the old one's blocks: they aren't stored as the new one's."""
    folder = write_adapter(tmp_path / "adapter", 1)
    with start(tiny, **WITH_ADAPTERS, enable_prefix_caching=True) as engine:
        assert engine.ask(prompt(SEED), adapter=adapter(folder)).tokens == adapted[1]
        write_adapter(folder, 2)
        engine.load(adapter(folder, inplace=True))
        assert engine.ask(prompt(SEED), adapter=adapter(folder)).cached > 0
    with start(tiny, **WITH_ADAPTERS) as engine:
        answer = engine.ask(prompt(SEED), adapter=adapter(folder))
        assert (answer.cached, answer.tokens) == (0, adapted[2])


# -- models that are streamed from object storage --------------------------------------------------


def fine_tuned(model: Path, folder: Path) -> Path:
    """The same architecture with other numbers."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    file = folder / "model.safetensors"
    dice = torch.Generator().manual_seed(5)
    tensors = {
        name: (tensor.float() + 0.05 * torch.randn(tensor.shape, generator=dice)).to(tensor.dtype)
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_two_models_streamed_from_s3(
    start: Start, tiny: Path, tmp_path: Path, uncached: dict[int, list[int]]
) -> None:
    """Both leave a folder without weights; what the store says of its objects tells them apart."""
    import boto3
    from botocore.config import Config

    tuned = fine_tuned(tiny, tmp_path / "tuned")
    with start(tuned, cached=False) as engine:
        expected = engine.ask(prompt(SEED)).tokens
    assert expected != uncached[SEED]
    with s3_server() as server:
        environ = {
            "AWS_ENDPOINT_URL": server.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
        }
        client = boto3.client(
            "s3",
            endpoint_url=server.endpoint,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
            config=Config(s3={"addressing_style": "path"}),
        )
        client.create_bucket(Bucket="models")

        def upload(model: Path, name: str) -> str:
            for file in model.iterdir():
                if file.is_file():
                    client.upload_file(str(file), "models", f"{name}/{file.name}")
            return f"s3://models/{name}"

        def asked(address: str) -> tuple[int, list[int]]:
            with start(address, environ=environ, load_format="runai_streamer") as engine:
                answer = engine.ask(prompt(SEED))
                return answer.cached, answer.tokens

        first, second = upload(tiny, "base"), upload(tuned, "tuned")
        assert asked(first) == (0, uncached[SEED])
        assert asked(second) == (0, expected)
        assert asked(first) == (HIT, uncached[SEED])
        upload(tuned, "base")
        assert asked(first) == (0, expected), "another model at the same address"
