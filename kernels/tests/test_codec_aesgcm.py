"""Encryption: the contract, keys, and what a value is tied to."""

from __future__ import annotations

import base64
import dataclasses
from pathlib import Path

import pytest

from lmcache_core.chunks.layout import DType, full_attention
from lmcache_core.contracts.serde import Serde, SerdeFacts
from lmcache_core.errors import ConfigError
from lmcache_core.testing.serde import MakeSerde, SerdeTests, decode, encode, ordinary
from lmcache_core.tiers.serde_chain import chain_serdes
from lmcache_kernels.codec import aesgcm
from lmcache_kernels.codec.config import AesGcmConfig, CacheGenConfig
from lmcache_kernels.codec.serdes import CacheGenSerde, engine

pytest.importorskip("cryptography", reason="pip install lmcache-kernels[aesgcm]")

GROUP = full_attention(layers=2, heads=2, head_size=64, dtype=DType.BF16)
OLD, NEW = bytes(range(32)), bytes(range(100, 116))
LINES = f"1 {base64.b64encode(OLD).decode()}\n# a comment\n\n7 {NEW.hex()}  # current\n"


@pytest.fixture
def make_serde(monkeypatch: pytest.MonkeyPatch) -> MakeSerde:
    monkeypatch.setenv(aesgcm.KEYS_VARIABLE, LINES.replace("\n", ","))
    monkeypatch.delenv(aesgcm.FILE_VARIABLE, raising=False)
    return lambda: aesgcm.create(AesGcmConfig())


class TestAesGcm(SerdeTests):
    @pytest.fixture
    def make_serde(self, make_serde: MakeSerde) -> MakeSerde:
        return make_serde

    def test_rubbish_is_refused(self, serde: Serde) -> None:
        """More than the contract asks: a changed bit is never decoded."""
        encoded = encode(serde, ordinary(GROUP, 2), GROUP, 2)
        for place in range(0, len(encoded), 37):
            broken = bytearray(encoded)
            broken[place] ^= 1
            with pytest.raises(ValueError):
                decode(serde, broken, GROUP, 2)


class TestAesGcmBehindACodec(SerdeTests):
    max_error = 0.1

    @pytest.fixture
    def make_serde(self, make_serde: MakeSerde) -> MakeSerde:
        return lambda: chain_serdes([CacheGenSerde(CacheGenConfig(), engine(1)), make_serde()])


def test_a_value_belongs_to_its_place(make_serde: MakeSerde) -> None:
    chunk = ordinary(GROUP, 16)
    here = make_serde().bound(SerdeFacts("a" * 16))
    encoded = encode(here.for_chunk(b"key", None), chunk, GROUP, 16)
    assert decode(here.for_chunk(b"key", None), encoded, GROUP, 16) == chunk
    elsewhere = make_serde().bound(SerdeFacts("b" * 16))
    other_shape = dataclasses.replace(GROUP, heads=4, head_size=32, model_heads=4)
    for serde, group in (
        (here.for_chunk(b"another", None), GROUP),
        (elsewhere.for_chunk(b"key", None), GROUP),
        (here.for_chunk(b"key", None), other_shape),
    ):
        with pytest.raises(ValueError, match="for this place"):
            decode(serde, encoded, group, 16)


def test_the_same_chunk_never_looks_the_same(make_serde: MakeSerde) -> None:
    chunk, serde = ordinary(GROUP, 4), make_serde()
    assert encode(serde, chunk, GROUP, 4) != encode(serde, chunk, GROUP, 4)


def test_keys_are_rotated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    monkeypatch.setenv(aesgcm.FILE_VARIABLE, str(file))

    def serde(*keep: int) -> Serde:
        lines = [line for line in LINES.splitlines() if line[:1].isdecimal()]
        file.write_text("\n".join(lines[i] for i in keep))
        return aesgcm.create(AesGcmConfig())

    chunk = ordinary(GROUP, 4)
    before = encode(serde(0), chunk, GROUP, 4)
    after = encode(serde(0, 1), chunk, GROUP, 4)
    assert decode(serde(1), after, GROUP, 4) == chunk
    with pytest.raises(ValueError, match="encrypted with key 1, not 7"):
        decode(serde(0, 1), before, GROUP, 4)
    # Where values lie: those of both keys are side by side, and nobody reads the other's.
    assert serde(0).identity(GROUP) != serde(0, 1).identity(GROUP)
    assert serde(0, 1).identity(GROUP) == serde(1).identity(GROUP)


def test_two_keys_of_one_id_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A typing error in a key leaves everybody's chunks alone. Says nothing about the key."""
    identities = []
    for key in ("11" * 32, "22" * 32):
        monkeypatch.setenv(aesgcm.KEYS_VARIABLE, f"1 {key}")
        identities.append(aesgcm.create(AesGcmConfig()).identity(GROUP))
    assert identities[0] != identities[1]
    assert all(one.startswith("14:1:") and len(one) == 21 for one in identities)
    assert all(key not in one for one in identities for key in ("1111", "2222"))


@pytest.mark.parametrize(
    ("lines", "wrong"),
    [
        ("", "needs keys"),
        ("1", "isn't an id"),
        ("x " + "00" * 16, "isn't an id"),
        ("4294967296 " + "00" * 16, "isn't an id"),
        ("9" * 5000 + " " + "00" * 16, "isn't an id"),
        ("1 " + "00" * 15, "neither"),
        ("1 " + "00" * 18, "16, 24 or 32"),
        ("1 !!!!", "neither"),
        ("1 \xe4\xe4\xe4\xe4", "neither"),
        (f"1 {'00' * 16}\n1 {'11' * 16}", "again"),
    ],
)
def test_keys_that_cannot_be(monkeypatch: pytest.MonkeyPatch, lines: str, wrong: str) -> None:
    monkeypatch.setenv(aesgcm.KEYS_VARIABLE, lines)
    monkeypatch.delenv(aesgcm.FILE_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match=wrong):
        aesgcm.create(AesGcmConfig())


def test_errors_show_no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        aesgcm.create(AesGcmConfig(key_file=tmp_path / "nothing"))
    file = tmp_path / "keys"
    file.write_text("1 c2VjcmV0c2VjcmV0")
    with pytest.raises(ConfigError) as caught:
        aesgcm.create(AesGcmConfig(key_file=file))
    assert "c2VjcmV0" not in str(caught.value)
