"""Greedy tokens of real vLLM are the same with and without us, whatever is configured.

float32, so that no result hangs on the order of a sum: with it, vLLM's own
batches of different composition agree with each other, and so must ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_host import EngineHost, arguments
from prompts import expected_hits, overlapping

pytestmark = pytest.mark.vllm

MANY, FEW = 60, 40
WAVE, MAX_TOKENS = 8, 8
VERBATIM = {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"}
MODES = {
    "sync": {},
    "async": {"LMCACHE_ENABLE_ASYNC_LOADING": "true"},
    "layerwise": {"LMCACHE_USE_LAYERWISE": "true"},
}
MATRIX = [(block, chunk, mode) for block in (32, 128) for chunk in (8, 16, 256) for mode in MODES]

Case = dict[str, Any]
Result = dict[str, Any]
Run = Callable[[list[Case]], list[Result]]


def results(host: EngineHost, cases: list[Case]) -> Iterator[Result]:
    """One case after another, with an engine for each life of it.

    A result: ``name``, ``repeat`` (which life), and for each prompt its ``tokens`` and how many
    tokens of it were ``cached``.
    """
    for one in cases:
        prompts, wave = one["prompts"], one["wave"]
        for repeat in range(1 + one["restarts"]):
            answers = []
            with host.engine(f"{one['name']}-{repeat}", one["engine"], one["environ"]) as engine:
                for start in range(0, len(prompts), wave):
                    answers += engine.ask_all(
                        prompts[start : start + wave],
                        max_tokens=one["max_tokens"],
                        ignore_eos=True,
                    )
            yield {
                "name": one["name"],
                "repeat": repeat,
                "tokens": [answer.tokens for answer in answers],
                "cached": [answer.cached for answer in answers],
            }


@pytest.fixture(scope="session")
def run(host: EngineHost) -> Run:
    return lambda cases: list(results(host, cases))


def case(
    name: str,
    arguments: dict[str, Any],
    prompts: list[list[int]],
    environ: dict[str, str] | None = None,
    *,
    restarts: int = 0,
) -> Case:
    quiet = {"LMCACHE_LOG_LEVEL": "WARNING", "LMCACHE_MAX_LOCAL_CPU_SIZE": "0.5"}
    return {
        "name": name,
        "engine": arguments,
        "prompts": prompts,
        "wave": WAVE,
        "max_tokens": MAX_TOKENS,
        "environ": {**quiet, **(environ or {})},
        "restarts": restarts,
    }


def differences(actual: Result, expected: Result) -> list[int]:
    return [
        index
        for index, (a, b) in enumerate(zip(actual["tokens"], expected["tokens"], strict=True))
        if a != b
    ]


def check(actual: Result, expected: Result, floor: list[int]) -> None:
    assert differences(actual, expected) == []
    below = [
        (index, hit, least)
        for index, (hit, least) in enumerate(zip(actual["cached"], floor, strict=True))
        if hit < least
    ]
    assert below == [], "prompts with fewer hit tokens than their prefix allows"
    assert sum(floor) > 0


@pytest.fixture(scope="session")
def many() -> list[list[int]]:
    return overlapping(MANY, vocabulary=1000)


@pytest.fixture(scope="session")
def few() -> list[list[int]]:
    return overlapping(FEW, vocabulary=1000, longest=400, seed=1)


@pytest.fixture(scope="session")
def matrix(run: Run, tiny: Path, many: list[list[int]]) -> dict[str, Result]:
    cases = [case(f"none-{block}", arguments(tiny, block_size=block), many) for block in (32, 128)]
    cases += [
        case(
            f"{block}-{chunk}-{mode}",
            arguments(tiny, block_size=block, kv_transfer_config=VERBATIM),
            many,
            {"LMCACHE_CHUNK_SIZE": str(chunk), **MODES[mode]},
        )
        for block, chunk, mode in MATRIX
    ]
    return {result["name"]: result for result in run(cases)}


@pytest.mark.xdist_group("matrix")
@pytest.mark.parametrize(("block", "chunk", "mode"), MATRIX)
def test_every_block_and_chunk_size_and_way_of_loading(
    matrix: dict[str, Result], many: list[list[int]], block: int, chunk: int, mode: str
) -> None:
    actual = matrix[f"{block}-{chunk}-{mode}"]
    check(actual, matrix[f"none-{block}"], expected_hits(many, WAVE, chunk))


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "vllm-prefix-cache-too": ({"enable_prefix_caching": True}, {}),
    "chunked-prefill": ({"max_num_batched_tokens": 64}, {}),
    "decode-and-unfull-chunks": (
        {},
        {"LMCACHE_SAVE_DECODE_CACHE": "true", "LMCACHE_SAVE_UNFULL_CHUNK": "true"},
    ),
    "preemption": ({"num_gpu_blocks_override": 40, "max_model_len": 1024}, {}),
    "preemption-async": (
        {"num_gpu_blocks_override": 40, "max_model_len": 1024},
        {"LMCACHE_ENABLE_ASYNC_LOADING": "true"},
    ),
    "tiny-arena": ({}, {"LMCACHE_MAX_LOCAL_CPU_SIZE": "0.004"}),
    "torch-reference": ({}, {"LMCACHE_DISABLE_PLUGINS": "kernels"}),
    "torch-reference-layerwise": (
        {},
        {"LMCACHE_DISABLE_PLUGINS": "kernels", "LMCACHE_USE_LAYERWISE": "true"},
    ),
    "module-path": (
        {
            "kv_transfer_config": {
                "kv_connector": "LMCacheConnector",
                "kv_connector_module_path": "lmcache_connector_vllm.connector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {"lmcache.chunk_size": 16},
            }
        },
        {"LMCACHE_CHUNK_SIZE": "256"},
    ),
}
WITHOUT_FLOOR = {"tiny-arena", "preemption", "preemption-async"}
"""Where what can be hit depends on what was evicted or preempted."""


@pytest.fixture(scope="session")
def variants(run: Run, tiny: Path, few: list[list[int]]) -> dict[str, Result]:
    cases = [case("none", arguments(tiny), few)]
    for name, (more, environ) in VARIANTS.items():
        cases.append(
            case(
                name,
                arguments(tiny, **{"kv_transfer_config": VERBATIM, **more}),
                few,
                {"LMCACHE_CHUNK_SIZE": "16", **environ},
            )
        )
    return {result["name"]: result for result in run(cases)}


@pytest.mark.xdist_group("variants")
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(variants: dict[str, Result], few: list[list[int]], name: str) -> None:
    floor = expected_hits(few, WAVE, 16)
    if name in WITHOUT_FLOOR:
        assert differences(variants[name], variants["none"]) == []
        assert sum(variants[name]["cached"]) > 0
    else:
        check(variants[name], variants["none"], floor)


def test_disk_survives_a_restart(
    run: Run, tiny: Path, few: list[list[int]], tmp_path: Path
) -> None:
    """The second life of the server hits from the first request on, from disk."""
    cases = [case("none", arguments(tiny), few)]
    for name, more in (("host-and-disk", {}), ("disk-only", {"LMCACHE_LOCAL_CPU": "false"})):
        environ = {
            "LMCACHE_CHUNK_SIZE": "16",
            "LMCACHE_LOCAL_DISK": str(tmp_path / name),
            "LMCACHE_MAX_LOCAL_DISK_SIZE": "1",
            **more,
        }
        cases.append(
            case(
                name,
                arguments(tiny, kv_transfer_config=VERBATIM),
                few,
                environ,
                restarts=1,
            )
        )
    results = {(r["name"], r["repeat"]): r for r in run(cases)}
    everything = [min(len(p) // 16 * 16, len(p) - 1) for p in few]
    for name in ("host-and-disk", "disk-only"):
        first, second = results[name, 0], results[name, 1]
        assert differences(first, results["none", 0]) == []
        assert differences(second, results["none", 0]) == []
        assert second["cached"] == everything


@pytest.mark.long
def test_tensor_parallel(run: Run, tiny: Path, few: list[list[int]]) -> None:
    """Two ranks, one planner. Compared with two ranks, whose sums differ from those of one."""
    two = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "LMCACHE_CHUNK_SIZE": "16"}
    cases = [case("none", arguments(tiny, tensor_parallel_size=2), few, two)]
    cases += [
        case(
            mode,
            arguments(tiny, tensor_parallel_size=2, kv_transfer_config=VERBATIM),
            few,
            {**two, **environ},
        )
        for mode, environ in MODES.items()
    ]
    none, *others = run(cases)
    for other in others:
        check(other, none, expected_hits(few, WAVE, 16))
