"""`cachegen` with a profile's bases and gains, and how it comes by its profile."""

from __future__ import annotations

import logging
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lmcache_core.chunks.layout import DType, LayerGroup, full_attention
from lmcache_core.contracts.serde import Rope, Serde, SerdeFacts
from lmcache_core.testing.serde import decode, encode
from lmcache_kernels import _native
from lmcache_kernels.codec.config import CacheGenConfig
from lmcache_kernels.codec.profile import Profile
from lmcache_kernels.codec.profiles import profile_folder
from lmcache_kernels.codec.serdes import CacheGenSerde, engine

LAYERS, HEADS, SIZE, TOKENS, START = 2, 4, 16, 96, 512
WIDTH = HEADS * SIZE
GROUP = full_attention(layers=LAYERS, heads=HEADS, head_size=SIZE, dtype=DType.BF16)
HALF = full_attention(layers=LAYERS, heads=HEADS // 2, head_size=SIZE, dtype=DType.BF16)
SECOND = GROUP.for_rank(1, 2)
ROPE = Rope.of(theta=100.0, rotary_size=SIZE)


def _bf16(values: np.ndarray) -> bytes:
    return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()


def _turn(keys: np.ndarray, start: int) -> np.ndarray:
    angles = (start + np.arange(len(keys[0])))[:, None] * np.array(ROPE.frequencies)
    cosines, sines = np.cos(angles)[:, None], np.sin(angles)[:, None]
    a, b = keys[..., : SIZE // 2], keys[..., SIZE // 2 :]
    return np.concatenate([a * cosines - b * sines, b * cosines + a * sines], -1)


def _mixture() -> tuple[np.ndarray, np.ndarray]:
    """Orthogonal mixtures, layers x planes x channels x components, and components' sizes."""
    draw = np.random.default_rng(3)
    mixed = np.linalg.qr(draw.normal(size=(LAYERS, 2, WIDTH, WIDTH)))[0]
    return mixed, np.exp(-np.arange(WIDTH) / 12)


def chunk() -> bytes:
    """KV at position `START` whose channels are mixtures of few components, in all heads."""
    mixed, sizes = _mixture()
    draw = np.random.default_rng(4)
    parts = draw.normal(size=(LAYERS, 2, TOKENS, WIDTH)) * sizes
    values = np.einsum("lptk,lpck->lptc", parts, mixed).reshape(LAYERS, 2, TOKENS, HEADS, SIZE)
    values[:, 0] = _turn(values[:, 0], START)
    return _bf16(values)


def profile(*, basis_heads: int = HEADS, gains: float | None = None) -> Profile:
    """What calibration would say of `chunk`."""
    mixed, sizes = _mixture()
    covariance = np.einsum("lpck,k,lpdk->lpcd", mixed, sizes**2, mixed)
    bases: list[list[bytes]] = [[], []]
    for layer in range(LAYERS):
        for plane in range(2):
            for first in range(0, WIDTH, SIZE * basis_heads):
                part = slice(first, first + SIZE * basis_heads)
                found = np.linalg.eigh(covariance[layer, plane, part, part])[1][:, ::-1]
                bases[plane].append(found.astype("<f2").tobytes())
    channels = LAYERS * WIDTH
    return Profile(
        LAYERS,
        HEADS,
        SIZE,
        struct.pack("<f", 0.3) * channels,
        bytes(2 * channels),
        model="m",
        key_means=bytes(2 * channels),
        basis_heads=basis_heads,
        key_basis=b"".join(bases[0]),
        value_basis=b"".join(bases[1]),
        gains=b"" if gains is None else struct.pack("<f", gains) * 2 * LAYERS,
    )


def plain() -> Profile:
    """Without bases."""
    return replace(profile(), basis_heads=0, key_basis=b"", value_basis=b"")


def serde(known: Profile | None = None, start: int | None = START, **options: object) -> Serde:
    config = CacheGenConfig.model_validate({"step": 0.3, "profile": "none", **options})
    return CacheGenSerde(config, engine(1), rope=ROPE, profile=known).for_chunk(b"", start)


def error(before: bytes, after: bytes) -> float:
    a, b = ((np.frombuffer(x, "<u2").astype("<u4") << 16).view("<f4") for x in (before, after))
    return float(np.sqrt(((a - b) ** 2).mean() / (a * a).mean()))


def through(with_it: Serde, group: LayerGroup = GROUP) -> tuple[int, float]:
    """How many bytes a chunk takes, and the error."""
    before = chunk()
    encoded = encode(with_it, before, group, TOKENS)
    return len(encoded), error(before, decode(with_it, encoded, group, TOKENS))


def test_a_basis_makes_less_of_it() -> None:
    without, loss = through(serde(plain()))
    for heads, share in ((HEADS, 0.8), (2, 0.95)):
        size, lost = through(serde(profile(basis_heads=heads)))
        assert size < share * without
        assert lost < 1.2 * loss


def test_blocks_may_differ_in_heads() -> None:
    assert through(serde(profile(basis_heads=3)))[1] < 0.2


def test_gains_multiply_steps() -> None:
    sizes, errors = zip(*(through(serde(profile(gains=g))) for g in (0.5, 1.0, 2.0)), strict=True)
    assert sizes[0] > sizes[1] > sizes[2]
    assert errors[0] < 0.7 * errors[1] < 0.49 * errors[2]
    assert through(serde(profile(gains=1.0))) == through(serde(profile()))


def test_keys_need_their_position() -> None:
    """Where it isn't known, or isn't what it is, only values profit from their basis."""
    size = through(serde(profile()))[0]
    unplaced, loss = through(serde(profile(), None))
    assert size < 0.95 * unplaced < 0.95 * through(serde(plain(), None))[0]
    assert loss < 0.2
    wrong, loss = through(serde(profile(), START + 7))
    assert wrong > 1.05 * size
    assert loss < 0.2


def test_a_reader_needs_no_position() -> None:
    before = chunk()
    encoded = encode(serde(profile()), before, GROUP, TOKENS)
    far = decode(serde(profile(), 2**31), encoded, GROUP, TOKENS)
    assert far == decode(serde(profile(), None), encoded, GROUP, TOKENS)
    assert error(before, far) < 0.2


def test_a_rank_takes_its_heads() -> None:
    """Chunks of the second half of the heads are as with a profile of these heads alone."""
    whole, values = profile(basis_heads=2), np.frombuffer(chunk(), "<u2")
    half = values.reshape(LAYERS, 2, TOKENS, HEADS, SIZE)[:, :, :, 2:].tobytes()

    def second(data: bytes, size: int) -> bytes:
        return np.frombuffer(data, "u1").reshape(LAYERS, 2, size)[:, 1].tobytes()

    own = replace(
        whole,
        heads=2,
        steps=second(whole.steps, 2 * WIDTH),
        means=second(whole.means, WIDTH),
        key_means=second(whole.key_means, WIDTH),
        key_basis=second(whole.key_basis, 2 * (2 * SIZE) ** 2),
        value_basis=second(whole.value_basis, 2 * (2 * SIZE) ** 2),
    )
    facts = SerdeFacts(rope=ROPE)
    mine = serde(whole).bound(facts).for_chunk(b"", START)
    encoded = encode(mine, half, SECOND, TOKENS)
    assert encoded[64:] == encode(serde(own), half, HALF, TOKENS)[64:]
    assert error(half, decode(mine, encoded, SECOND, TOKENS)) < 0.2
    mixing = serde(profile()).bound(facts).for_chunk(b"", START)
    assert error(half, decode(mixing, encode(mixing, half, SECOND, TOKENS), SECOND, TOKENS)) < 0.2


# -- finding it ----------------------------------------------------------------------------------


def test_it_is_found_by_the_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lmcache_kernels")
    before, known = chunk(), profile()
    known.save(tmp_path)
    looking = serde(None, profile="auto", profiles=tmp_path)
    found = looking.bound(SerdeFacts(rope=ROPE, weights="m")).for_chunk(b"", START)
    encoded = encode(found, before, GROUP, TOKENS)
    assert encoded == encode(serde(known), before, GROUP, TOKENS)
    assert not caplog.records
    other = looking.bound(SerdeFacts(rope=ROPE, weights="another")).for_chunk(b"", START)
    assert encode(other, before, GROUP, TOKENS) == encode(serde(), before, GROUP, TOKENS)
    encode(other.for_chunk(b"2", 0), before, GROUP, TOKENS)
    assert [record.message.count("codec calibrate") for record in caplog.records] == [1]


def test_a_reader_looks_for_what_a_stream_names(tmp_path: Path) -> None:
    encoded = encode(serde(profile()), chunk(), GROUP, TOKENS)
    reader = serde(None, profiles=tmp_path)
    with pytest.raises(ValueError, match="profile that isn't here"):
        decode(reader, encoded, GROUP, TOKENS)
    profile().save(tmp_path)
    assert error(chunk(), decode(reader, encoded, GROUP, TOKENS)) < 0.2
    with pytest.raises(ValueError, match="begins like this"):
        decode(reader, bytes(len(encoded)), GROUP, TOKENS)


def test_one_that_is_named_must_be_of_the_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = profile().save(tmp_path)
    named = serde(None, profile=path)
    before = chunk()
    right = named.bound(SerdeFacts(rope=ROPE, weights="m")).for_chunk(b"", START)
    assert encode(right, before, GROUP, TOKENS) == encode(serde(profile()), before, GROUP, TOKENS)
    wrong = named.bound(SerdeFacts(rope=ROPE, weights="another")).for_chunk(b"", START)
    for _ in range(2):
        assert encode(wrong, before, GROUP, TOKENS) == encode(serde(), before, GROUP, TOKENS)
    assert len([r for r in caplog.records if "isn't" in r.message or "not of" in r.message]) == 1


@pytest.mark.parametrize(
    ("configured", "environ", "folder"),
    [
        (Path("/a"), {"LMCACHE_PROFILES": "/b"}, Path("/a")),
        (None, {"LMCACHE_PROFILES": "/b", "XDG_CACHE_HOME": "/c"}, Path("/b")),
        (None, {"XDG_CACHE_HOME": "/c"}, Path("/c/lmcache/profiles")),
        (None, {}, Path.home() / ".cache/lmcache/profiles"),
    ],
)
def test_where_profiles_are(configured: Path | None, environ: dict[str, str], folder: Path) -> None:
    assert profile_folder(configured, environ) == folder


@pytest.mark.parametrize(
    "wrong",
    [
        {"basis_heads": 5},
        {"key_basis": b"12"},
        {"key_means": b""},
        {"value_gains": bytes(4)},
        {"value_basis": struct.pack("<e", float("inf")) * (LAYERS * WIDTH**2)},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_numbers_that_do_not_fit(wrong: dict[str, object]) -> None:
    known, channels = profile(), LAYERS * WIDTH
    right: dict[str, object] = {
        "key_means": bytes(2 * channels),
        "basis_heads": HEADS,
        "key_basis": known.key_basis,
        "value_basis": known.value_basis,
    }
    shape = (0, LAYERS, 2, HEADS, SIZE, TOKENS)
    into = bytearray(_native.codec_max_encoded(shape, 0))

    def use(numbers: dict[str, object]) -> int:
        made = _native.CodecProfile(1, known.steps, bytes(2 * channels), **numbers)  # type: ignore[arg-type]
        return engine(1).encode(2, shape, chunk(), into, (0.3, 0.3), b"", False, -1, made)

    assert use(right) > 0
    with pytest.raises(ValueError, match=r"profile|basis"):
        use({**right, **wrong})
