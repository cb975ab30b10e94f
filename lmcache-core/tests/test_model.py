"""Weights are named by what they are."""

from __future__ import annotations

import shutil
from pathlib import Path

from lmcache_core.model import weights_identity


def _checkpoint(folder: Path, byte: int = 0) -> Path:
    folder.mkdir()
    weights = bytearray(3_000_000)
    weights[2_850_000] = byte  # among what is sampled
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text("{}")
    return folder


def test_a_folder_is_named_by_its_weights(tmp_path: Path) -> None:
    here = _checkpoint(tmp_path / "here")
    identity = weights_identity(str(here))
    copy = shutil.copytree(here, tmp_path / "copy")
    (copy / "README.md").write_text("not weights")
    assert weights_identity(str(copy)) == identity
    assert weights_identity(str(_checkpoint(tmp_path / "retrained", 1))) != identity
    (copy / "more.safetensors").write_bytes(b"1")
    assert weights_identity(str(copy)) != identity


def test_a_hub_model_is_named_by_its_commit() -> None:
    assert weights_identity("org/name", "abc") == "org/name@abc"
    assert weights_identity("org/name", "abd") != weights_identity("org/name", "abc")
