"""Which of vLLM's settings make another model, on vLLM's own configuration."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]

pytest.importorskip("vllm")

from vllm.engine.arg_utils import EngineArgs  # noqa: E402

from lmcache_connector_vllm.facts import model_facts  # noqa: E402
from lmcache_core.errors import UnnamedError  # noqa: E402

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 128,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}
Name = Callable[..., str]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def checkpoint(folder: Path, weights: bytes = b"w" * 500_000, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**LLAMA, **config}))
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def configured(model: Path | str, **arguments: Any) -> Any:
    options = {"max_model_len": 512, "skip_tokenizer_init": True, **arguments}
    return EngineArgs(model=str(model), **options).create_engine_config()


def name(model: Path | str, **arguments: Any) -> str:
    return model_facts(configured(model, **arguments)).name()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "model")


def test_defaults_add_nothing(model: Path) -> None:
    """Another engine knows the weights and the type it computes in, and nothing else."""
    facts = {k: v for k, v in vars(model_facts(configured(model))).items() if v}
    assert set(facts) == {"weights", "dtype"}
    assert facts["dtype"] == "bfloat16"


def test_a_copy_is_the_same_model_and_a_retrained_one_is_not(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy", copy_function=shutil.copy)
    assert name(copy) == name(model)
    retrained = checkpoint(tmp_path / "retrained", b"w" * 499_999 + b"v")
    assert name(retrained) != name(model)


@pytest.mark.parametrize(
    "arguments",
    [
        {"dtype": "float32"},
        {"hf_overrides": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}},
        {"additional_config": {"platform": 1}},
        {"attention_config": {"backend": "CUSTOM"}},
        {"attention_config": {"use_prefill_query_quantization": True}},
        {"model_class_overrides": {"Other": "module:Class"}},
    ],
    ids=str,
)
def test_what_changes_numbers(model: Path, arguments: dict[str, Any]) -> None:
    assert name(model, **arguments) != name(model)


@pytest.mark.parametrize(
    "arguments",
    [
        {"seed": 7},
        {"max_model_len": 256},
        {"block_size": 64},
        {"enforce_eager": True},
        {"served_model_name": "x"},
        {"max_num_seqs": 3},
        {"load_format": "safetensors"},
        {"kv_cache_dtype": "bfloat16"},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
        {"enable_lora": True},
    ],
    ids=str,
)
def test_what_does_not(model: Path, arguments: dict[str, Any]) -> None:
    assert name(model, **arguments) == name(model)


def test_the_longest_context_counts_where_it_chooses_rope(tmp_path: Path) -> None:
    factors = [1.0] * 32
    rope = {"rope_type": "longrope", "short_factor": factors, "long_factor": [2.0] * 32}
    model = checkpoint(
        tmp_path / "phi",
        rope_scaling=rope,
        original_max_position_embeddings=512,
        architectures=["Phi3ForCausalLM"],
        model_type="phi3",
    )
    assert name(model, max_model_len=256) == name(model, max_model_len=512)
    assert name(model, max_model_len=1024) != name(model, max_model_len=512)


def test_a_draft_is_named_by_its_weights(model: Path, tmp_path: Path) -> None:
    def drafted(draft: Path) -> str:
        speculative = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 2}
        return name(model, speculative_config=speculative)

    one = checkpoint(tmp_path / "draft", b"draft")
    first = drafted(one)
    assert first != name(model)
    assert drafted(shutil.copytree(one, tmp_path / "copy")) == first
    (one / "model.safetensors").write_bytes(b"other")
    assert drafted(one) != first


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"load_format": "dummy"}, "load_format=dummy makes weights up"),
        ({"load_format": "tensorizer"}, "load_format=tensorizer"),
        ({"load_format": "ipc_cache"}, "load_format=ipc_cache"),
        ({"hf_overrides": lambda config: config}, "hf_overrides is a function"),
        ({"attention_config": {"use_non_causal": True}}, "later tokens"),
        ({"weight_transfer_config": {"backend": "nccl"}}, "weight_transfer_config"),
    ],
    # By their names: a function's text is another one in each process, and so would be the test's.
    ids=lambda given: given if isinstance(given, str) else "+".join(given),
)
def test_what_has_no_name(model: Path, arguments: dict[str, Any], says: str) -> None:
    if "load_format" in arguments:
        config = configured(model)
        config.load_config.load_format = arguments["load_format"]
    else:
        config = configured(model, **arguments)
    with pytest.raises(UnnamedError, match=says):
        model_facts(config)


def test_a_folder_without_weights_has_no_name(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(UnnamedError, match="has no weights"):
        name(model)


def test_a_loader_of_somebody_elses(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a name of its own, or under vLLM's."""
    from vllm.model_executor import model_loader

    class Loader(model_loader.DefaultModelLoader):
        pass

    config = configured(model)
    for form in ("own", "auto"):
        monkeypatch.setitem(model_loader._LOAD_FORMAT_TO_MODEL_LOADER, form, Loader)
        config.load_config.load_format = form
        with pytest.raises(UnnamedError, match=f"load_format={form}"):
            model_facts(config)


def test_hub_models_are_named_by_the_commit_that_was_resolved(model: Path) -> None:
    config = configured(model)
    config.model_config.model = "org/model"
    config.model_config.revision = "main"
    with pytest.raises(UnnamedError, match="only a commit"):
        model_facts(config)
    config.model_config.hf_config._commit_hash = "a" * 40
    assert model_facts(config).weights == f"org/model@{'a' * 40}"


def test_a_configuration_from_elsewhere(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "config"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(LLAMA))
    first = name(model, hf_config_path=str(other))
    assert first != name(model)
    (other / "config.json").write_text(json.dumps({**LLAMA, "rope_theta": 5.0}))
    assert name(model, hf_config_path=str(other)) != first


def test_streamed_weights_are_named_by_their_address(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What vLLM leaves in a folder of its own is the configuration alone."""
    from lmcache_core.chunks import identity as core

    asked: list[str] = []

    def listed(address: str) -> list[str]:
        asked.append(address)
        return ["model.safetensors 9 etag:x"]

    monkeypatch.setattr(core, "listed", listed)
    (model / "model.safetensors").unlink()
    config = configured(model)
    config.model_config.model_weights = "s3://bucket/model"
    config.load_config.load_format = "runai_streamer"
    model_facts(config)
    assert asked == ["s3://bucket/model"]
