"""Profiles are files, found by the model that they are of."""

from __future__ import annotations

import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from lmcache_core.chunks.layout import AttentionKind, DType, LayerGroup, full_attention
from lmcache_core.errors import ConfigError
from lmcache_kernels.codec.profile import Profile, basis_bytes

GROUP = full_attention(layers=4, heads=4, head_size=8, dtype=DType.BF16)
CHANNELS = 4 * 4 * 8


def profile(scale: float = 1.0, *, bases: int = 0, gains: bool = False) -> Profile:
    """Of the model called ``m``."""
    basis = 4 * basis_bytes(4, 8, bases)
    return Profile(
        4,
        4,
        8,
        struct.pack("<f", scale) * CHANNELS,
        bytes(2 * CHANNELS),
        model="m",
        key_means=bytes(2 * CHANNELS) if bases else b"",
        basis_heads=bases,
        key_basis=bytes(basis),
        value_basis=bytes(basis),
        gains=struct.pack("<f", 1.0) * 8 if gains else b"",
    )


@pytest.mark.parametrize(
    ("made", "kind"),
    [(profile(), "T2"), (profile(bases=3), "T3"), (profile(bases=2, gains=True), "T4")],
)
def test_files_are_named_after_their_content(made: Profile, kind: str, tmp_path: Path) -> None:
    path = made.save(tmp_path / "new")
    assert Profile.load(path) == made
    assert path.stem == made.digest
    assert made.kind == kind
    assert Profile.named(path.parent, made.id) == made
    assert Profile.named(path.parent, made.id ^ 1) is None
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_isn_t_a_profile(tmp_path: Path) -> None:
    path = profile().save(tmp_path)
    path.write_bytes(profile(2.0).content)
    with pytest.raises(ConfigError, match="has changed"):
        Profile.load(path)
    for content in (b"KVP1rubbish", b"", profile().content[:-1], profile().content + b"1"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="isn't one"):
            Profile.load(path)
    with pytest.raises(ConfigError, match="calibrate"):
        Profile.load(tmp_path / "nothing")


def test_lengths_must_fit() -> None:
    whole = profile(bases=3, gains=True)
    assert len(whole.key_basis) == 4 * 2 * (24 * 24 + 8 * 8)
    for wrong in (
        {"steps": whole.steps[:-4]},
        {"key_means": b""},
        {"key_basis": whole.key_basis + b"12"},
        {"basis_heads": 5},
        {"gains": bytes(4)},
        {"layers": 0},
        {"model": "x" * 5000},
    ):
        with pytest.raises(ValueError):
            replace(whole, **wrong)


def test_the_best_of_a_model_is_found(tmp_path: Path) -> None:
    assert Profile.find(tmp_path / "nothing", "m", GROUP) is None
    old, new = profile(1.0).save(tmp_path), profile(2.0).save(tmp_path)
    os.utime(old, (1, 1))
    (tmp_path / "rubbish.kvprofile").write_bytes(b"?")
    assert Profile.find(tmp_path, "m", GROUP) == Profile.load(new)
    better = profile(bases=4)
    os.utime(better.save(tmp_path), (2, 2))
    assert Profile.find(tmp_path, "m", GROUP) == better
    best = profile(bases=4, gains=True)
    os.utime(best.save(tmp_path), (1, 1))
    assert Profile.find(tmp_path, "m", GROUP) == best


@pytest.mark.parametrize(
    ("model", "group", "found"),
    [
        ("m", GROUP, True),
        ("m", full_attention(layers=2, heads=4, head_size=8, dtype=DType.F16), True),
        ("m", GROUP.for_rank(1, 2), True),
        ("m", full_attention(layers=4, heads=2, head_size=8, dtype=DType.BF16), False),
        ("another", GROUP, False),
        ("", GROUP, False),
        ("m", full_attention(layers=5, heads=4, head_size=8, dtype=DType.BF16), False),
        ("m", full_attention(layers=4, heads=3, head_size=8, dtype=DType.BF16), False),
        ("m", full_attention(layers=4, heads=4, head_size=16, dtype=DType.BF16), False),
        ("m", LayerGroup((3,), AttentionKind.FULL, 2, 4, 8, DType.BF16), True),
    ],
)
def test_a_foreign_one_is_not(tmp_path: Path, model: str, group: LayerGroup, found: bool) -> None:
    """A rank may have some of the heads, a group some of the layers."""
    profile().save(tmp_path)
    assert (Profile.find(tmp_path, model, group) is not None) is found


def test_a_changed_file_is_an_error(tmp_path: Path) -> None:
    path = profile().save(tmp_path)
    path.write_bytes(profile(2.0).content)
    with pytest.raises(ConfigError, match="has changed"):
        Profile.find(tmp_path, "m", GROUP)
