"""Models and adapters are named by what they are."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from lmcache_core.chunks.digests import FileDigests
from lmcache_core.chunks.identity import (
    ModelFacts,
    adapter_identity,
    config_identity,
    weights_identity,
)
from lmcache_core.errors import UnnamedError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def _checkpoint(folder: Path, byte: int = 0, at: int = 1_234_567) -> Path:
    folder.mkdir(parents=True)
    weights = bytearray(3_000_000)
    weights[at] = byte
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text("{}")
    return folder


# -- weights ---------------------------------------------------------------------------------------


def test_golden(tmp_path: Path) -> None:
    """Names on disk and in stores are made of these: they don't change."""
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    (tmp_path / "config.json").write_text("{}")
    assert (
        weights_identity(str(tmp_path))
        == "1ecf9233f0319f1063ecbfad84481c9d397db96b6c5105997452553d8b9e9277"
    )
    assert (
        weights_identity(str(tmp_path / "model.safetensors"))
        == "91c1b8d15aa328a643fe9125ac55a4a0d6a6ef04b5e443331dede7d4b0516bd9"
    )


def test_a_copy_has_the_same_name(tmp_path: Path) -> None:
    here = _checkpoint(tmp_path / "here")
    identity = weights_identity(str(here))
    copy = shutil.copytree(here, tmp_path / "copy", copy_function=shutil.copy)
    (copy / "README.md").write_text("not weights")
    (copy / "tokenizer.json").write_text("{}")
    (copy / "optimizer.pt").write_bytes(b"not loaded")
    (copy / "original").mkdir()
    (copy / "original" / "consolidated.safetensors").write_bytes(b"not loaded")
    assert weights_identity(str(copy)) == identity
    assert weights_identity(f"{copy}/") == identity
    linked = tmp_path / "link"
    linked.symlink_to(here)
    assert weights_identity(str(linked)) == identity


def test_a_hubs_cache_is_read_through_its_links(tmp_path: Path) -> None:
    here = _checkpoint(tmp_path / "here")
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    shutil.copytree(here, blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(os.path.relpath(file, snapshot))
    assert weights_identity(str(snapshot)) == weights_identity(str(here))


@pytest.mark.parametrize("at", [0, 17, 100_001, 1_234_567, 2_999_999])
def test_any_other_byte_is_another_model(tmp_path: Path, at: int) -> None:
    one, other = _checkpoint(tmp_path / "one", 0, at), _checkpoint(tmp_path / "other", 1, at)
    assert weights_identity(str(one)) != weights_identity(str(other))


@pytest.mark.parametrize(
    "name",
    [
        "model-00002.safetensors",
        "pytorch_model.bin",
        "draft/model.safetensors",
        "config.json",
        "params.json",
        "hf_quant_config.json",
        "quantize_config.json",
        "preprocessor_config.json",
        "model.safetensors.index.json",
        "modeling_own.py",
    ],
)
def test_what_changes_numbers_is_in_the_name(tmp_path: Path, name: str) -> None:
    folder = _checkpoint(tmp_path / "model")
    before = weights_identity(str(folder))
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text('{"rope_theta": 1}')
    assert weights_identity(str(folder)) != before


def test_a_hub_model_is_named_by_its_commit() -> None:
    assert weights_identity("org/name", "abc") == "org/name@abc"
    assert weights_identity("org/name", "abd") != weights_identity("org/name", "abc")


@pytest.mark.parametrize(
    ("model", "commit", "says"),
    [
        ("org/name", None, "which commit"),
        ("org/name", "main", "only a commit stays"),
        ("/nowhere/model", None, "/nowhere/model is no folder here"),
        ("/nowhere/model", "abc", "no folder here"),
        ("ftp://host/model", None, "only s3://, gs:// and az://"),
    ],
)
def test_what_has_no_name(model: str, commit: str | None, says: str) -> None:
    with pytest.raises(UnnamedError, match=says):
        weights_identity(model, commit)


def test_a_folder_without_weights_has_no_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnnamedError, match="has no weights"):
        weights_identity(str(tmp_path))


def test_the_cost_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = _checkpoint(tmp_path / "model")
    digests = FileDigests(tmp_path / "kept", clock=lambda: 4e9)
    with caplog.at_level(logging.INFO, "lmcache_core.chunks.identity"):
        weights_identity(str(folder), digests=digests)
        weights_identity(str(folder), digests=digests)
    (line,) = caplog.messages
    assert line.startswith("Named 0.0 GiB of weights")
    assert line.endswith("s; cached")


def test_a_configuration_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = config_identity(str(tmp_path))
    (tmp_path / "config.json").write_text('{"rope_theta": 1}')
    assert config_identity(str(tmp_path)) != before
    assert config_identity("org/name", "abc") == "org/name@abc"
    with pytest.raises(UnnamedError):
        config_identity("org/name")


# -- adapters --------------------------------------------------------------------------------------


def _adapter(folder: Path, weights: bytes = b"one", alpha: int = 16) -> Path:
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "adapter_config.json").write_text(f'{{"r": 8, "lora_alpha": {alpha}}}')
    return folder


def test_adapters_are_named_by_what_they_hold(tmp_path: Path) -> None:
    one = _adapter(tmp_path / "one")
    identity = adapter_identity(one)
    copy = shutil.copytree(one, tmp_path / "copy", copy_function=shutil.copy)
    (copy / "README.md").write_text("a copy")
    assert adapter_identity(copy) == identity
    assert adapter_identity(_adapter(tmp_path / "weights", b"two")) != identity
    assert adapter_identity(_adapter(tmp_path / "scaling", alpha=32)) != identity


def test_what_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(UnnamedError, match="No such file"):
        adapter_identity(tmp_path / "gone")
    with pytest.raises(UnnamedError, match="has no adapter"):
        adapter_identity(tmp_path)
    folder = _adapter(tmp_path / "one")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(UnnamedError, match="has no adapter"):
        adapter_identity(folder)


# -- all that a model's values depend on -----------------------------------------------------------

PLAIN = ModelFacts(weights="w", dtype="bfloat16")


def test_golden_name() -> None:
    """Names on disk and in stores are made of these: they don't change."""
    assert PLAIN.name() == "80d5932c231d54213951e687d126370bf53b31e8cd179d28b99da9644416f477"
    full = ModelFacts("w", "float16", "fp8", "fp8_e4m3", "d", {"rope_theta": 1.5}, {"x": [1]})
    assert full.name() == "a7b0d991e7e61a9194d3fba3da1e3a6e636022480d24198585aaa7549cb8ed2a"


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "v"},
        {"dtype": "float16"},
        {"quantization": "fp8"},
        {"kv_dtype": "fp8_e4m3"},
        {"draft": "d"},
        {"overrides": {"rope_theta": 1}},
        {"more": {"x": True}},
    ],
    ids=str,
)
def test_every_fact_sets_apart(change: dict[str, Any]) -> None:
    assert dataclasses.replace(PLAIN, **change).name() != PLAIN.name()


def test_a_fact_that_is_as_the_checkpoint_says_adds_nothing() -> None:
    """So that a fact found later leaves the names of those that never had it."""
    same = ModelFacts("w", "bfloat16", "", "", "", {}, {})
    assert same.name() == PLAIN.name()
    assert ModelFacts("w", "bfloat16", more={"a": 1, "b": 2}).name() == (
        ModelFacts("w", "bfloat16", more={"b": 2, "a": 1}).name()
    )


@pytest.mark.parametrize("value", [object(), float("nan"), b"bytes"])
def test_a_value_that_nobody_else_would_write_alike(value: object) -> None:
    with pytest.raises(UnnamedError, match="without a name"):
        ModelFacts("w", "bfloat16", more={"x": value}).name()
