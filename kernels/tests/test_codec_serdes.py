"""The serdes keep core's contract, and what else they promise."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from lmcache_core.cache.cache import Cache
from lmcache_core.chunks.layout import (
    AttentionKind,
    DType,
    KVLayout,
    LayerGroup,
    full_attention,
    mla,
)
from lmcache_core.config import load_config
from lmcache_core.contracts.serde import Rope, Serde, SerdeFacts
from lmcache_core.errors import ConfigError, UnknownPluginError
from lmcache_core.plugins.manager import Plugins
from lmcache_core.testing.serde import (
    MakeSerde,
    SerdeTests,
    any_bits,
    decode,
    encode,
    ordinary,
    unpack,
)
from lmcache_core.tiers.serde_chain import chain_serdes
from lmcache_kernels.codec.config import CacheGenConfig, CodecConfig
from lmcache_kernels.codec.profile import Profile
from lmcache_kernels.codec.serdes import (
    CacheGenSerde,
    CodecSerde,
    Fp8Serde,
    Int8Serde,
    LosslessSerde,
    engine,
)

CONFIG = CodecConfig(threads=2)
FLOATS = (DType.BF16, DType.F16, DType.F32)
GROUP = full_attention(layers=4, heads=4, head_size=64, dtype=DType.BF16)
TOKENS = 100
ROPE = Rope.of(theta=10_000.0, rotary_size=64)


def safe(rope: Rope | None = None, step: float = 0.3, profile: Profile | None = None) -> Serde:
    return CacheGenSerde(CacheGenConfig(step=step), engine(2), rope=rope, profile=profile)


class TestLossless(SerdeTests):
    @pytest.fixture
    def make_serde(self) -> MakeSerde:
        return lambda: LosslessSerde(CONFIG, engine(2))


class TestInt8(SerdeTests):
    max_error: ClassVar[float] = 0.01  # half a step of 127, and rounding to bf16
    dtypes = FLOATS

    @pytest.fixture
    def make_serde(self) -> MakeSerde:
        return lambda: Int8Serde(CONFIG, engine(2))


class TestFp8(SerdeTests):
    max_error: ClassVar[float] = 0.05
    dtypes = FLOATS

    @pytest.fixture
    def make_serde(self) -> MakeSerde:
        return lambda: Fp8Serde(CONFIG, engine(2))


class TestCacheGen(SerdeTests):
    max_error: ClassVar[float] = 0.1

    @pytest.fixture
    def make_serde(self) -> MakeSerde:
        return lambda: safe()

    def groups(self) -> Iterator[LayerGroup]:
        yield from super().groups()
        for dtype in FLOATS:
            yield full_attention(layers=3, heads=3, head_size=64, dtype=dtype)
            yield full_attention(layers=1, heads=1, head_size=80, dtype=dtype)


class TestCacheGenWithRope(TestCacheGen):
    @pytest.fixture
    def make_serde(self) -> MakeSerde:
        return lambda: safe(Rope.of(theta=10_000.0, rotary_size=8))


class TestCacheGenWithInterleavedRope(TestCacheGen):
    @pytest.fixture
    def make_serde(self) -> MakeSerde:
        return lambda: safe(Rope.of(theta=500.0, rotary_size=6, interleaved=True))


class TestAChain(SerdeTests):
    max_error: ClassVar[float] = 0.1

    @pytest.fixture
    def make_serde(self) -> MakeSerde:
        return lambda: chain_serdes([safe(), LosslessSerde(CONFIG, engine(1))])


# -- what codecs are for ---------------------------------------------------------------------


def kv(group: LayerGroup, tokens: int, rope: Rope | None = None) -> bytearray:
    """Chunks with what real ones have: channels' means and sizes, tokens' sizes, keys turned."""
    draw = np.random.default_rng(7)
    shape = (len(group.layers), group.planes, 1, group.heads, group.head_size)
    values = draw.normal(size=(*shape[:2], tokens, *shape[3:]))
    size = np.exp(draw.normal(0, 0.5, shape))
    values = (values + draw.normal(0, 1.5, shape) * [[[[[1]]], [[[0]]]]]) * size
    values[:, 1] *= np.exp(draw.normal(0, 0.3, (tokens, 1, 1)))
    if rope is not None:
        pairs = len(rope.frequencies)
        angles = (np.arange(tokens)[:, None] + 5) * np.array(rope.frequencies)
        cosines, sines = np.cos(angles)[:, None], np.sin(angles)[:, None]
        a, b = values[:, 0, ..., :pairs].copy(), values[:, 0, ..., pairs : 2 * pairs].copy()
        values[:, 0, ..., :pairs] = a * cosines - b * sines
        values[:, 0, ..., pairs : 2 * pairs] = b * cosines + a * sines
    return bytearray((values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes())


def error(chunk: bytearray, decoded: bytearray) -> float:
    """The root of mean squares of the difference, by that of the chunk."""
    a, b = (
        (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4") for data in (chunk, decoded)
    )
    return float(np.sqrt(((a - b) ** 2).mean() / (a * a).mean()))


def test_lossless_makes_less_of_it() -> None:
    chunk = kv(GROUP, TOKENS)
    serde = LosslessSerde(CONFIG, engine(1))
    assert len(chunk) / len(encode(serde, chunk, GROUP, TOKENS)) > 1.4


@pytest.mark.parametrize(
    ("step", "ratio", "most"), [(0.15, 2.9, 0.05), (0.3, 3.5, 0.1), (0.6, 4.5, 0.2)]
)
def test_a_coarser_step_makes_less_of_it(step: float, ratio: float, most: float) -> None:
    chunk = kv(GROUP, TOKENS, ROPE)
    serde = safe(ROPE, step)
    encoded = encode(serde, chunk, GROUP, TOKENS)
    assert len(chunk) / len(encoded) > ratio
    assert error(chunk, decode(serde, encoded, GROUP, TOKENS)) < most


def test_knowing_the_rotation_helps() -> None:
    """At the same step relative to what is left of a key, less is left of it."""
    chunk = kv(GROUP, TOKENS, ROPE)
    errors = []
    for rope in (ROPE, None):
        serde = safe(rope)
        errors.append(
            error(chunk, decode(serde, encode(serde, chunk, GROUP, TOKENS), GROUP, TOKENS))
        )
    assert errors[0] < 0.9 * errors[1]


def test_a_reader_needs_no_rotation() -> None:
    """Angles are in the stream: whoever reads it may not know the model."""
    chunk = kv(GROUP, TOKENS, ROPE)
    encoded = encode(safe().bound(SerdeFacts(rope=ROPE)), chunk, GROUP, TOKENS)
    assert decode(safe(), encoded, GROUP, TOKENS) == decode(safe(ROPE), encoded, GROUP, TOKENS)


def test_latents_have_no_keys_to_turn() -> None:
    group = mla(layers=2, latent_size=576, dtype=DType.BF16)
    chunk = ordinary(group, TOKENS)
    encoded = encode(safe(ROPE), chunk, group, TOKENS)
    assert encoded == encode(safe(), chunk, group, TOKENS)
    assert len(chunk) / len(encoded) > 3.5


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", [CacheGenSerde, Int8Serde, Fp8Serde])
def test_what_is_not_finite_comes_back(dtype: DType, kind: type[CodecSerde]) -> None:
    group = full_attention(layers=1, heads=2, head_size=32, dtype=dtype)
    size = dtype.itemsize
    patterns = {
        DType.BF16: (0x7F80, 0xFF80, 0x7FC1, 0xFFAB),
        DType.F16: (0x7C00, 0xFC00, 0x7E01, 0xFDAB),
        DType.F32: (0x7F800000, 0xFF800000, 0x7FC00001, 0xFF8000AB),
    }[dtype]
    chunk = ordinary(group, 64)
    places = [size * (977 * i % (len(chunk) // size)) for i in range(len(patterns))]
    for place, pattern in zip(places, patterns, strict=True):
        chunk[place : place + size] = pattern.to_bytes(size, "little")
    serde: Serde = safe(Rope.of(theta=100.0, rotary_size=32))
    if kind is not CacheGenSerde:
        serde = kind(CONFIG, engine(1))
    encoded = encode(serde, chunk, group, 64)
    assert len(encoded) < 0.8 * len(chunk), "stored raw: that proves nothing"
    decoded = decode(serde, encoded, group, 64)
    for place in places:
        assert decoded[place : place + size] == chunk[place : place + size]


def test_outliers_survive() -> None:
    """An element a thousand times as large as the others keeps the others as they were."""
    chunk = ordinary(GROUP, 256)
    place = 2 * 54321
    chunk[place : place + 2] = struct.pack("<f", 3000.0)[2:]
    serde = safe()
    decoded = unpack(DType.BF16, decode(serde, encode(serde, chunk, GROUP, 256), GROUP, 256))
    assert decoded[54321] == pytest.approx(3000.0, rel=0.01)
    plane = 256 * 4 * 64
    before = unpack(DType.BF16, chunk)
    apart = [
        abs(a - b)
        for i, (a, b) in enumerate(zip(before, decoded, strict=True))
        if i // plane != 54321 // plane
    ]
    assert max(apart) < 2.0


def test_noise_is_stored_raw() -> None:
    chunk = any_bits(GROUP, 32)
    for serde in (safe(), LosslessSerde(CONFIG, engine(1)), Int8Serde(CONFIG, engine(1))):
        encoded = encode(serde, chunk, GROUP, 32)
        assert len(encoded) < 1.05 * len(chunk)


@pytest.mark.parametrize("kind", [LosslessSerde, Int8Serde, Fp8Serde, CacheGenSerde])
def test_layers_one_by_one(kind: type[CodecSerde]) -> None:
    """A layer needs the bytes up to its own end only."""
    chunk = kv(GROUP, TOKENS, ROPE)
    serde = safe(ROPE) if kind is CacheGenSerde else kind(CONFIG, engine(1))
    assert isinstance(serde, CodecSerde)
    encoded = encode(serde, chunk, GROUP, TOKENS)
    whole = decode(serde, encoded, GROUP, TOKENS)
    layer = GROUP.layer_token_bytes * TOKENS
    for first in range(4):
        into = bytearray(layer)
        serde.decode_layers(
            memoryview(encoded), memoryview(into), GROUP, TOKENS, range(first, first + 1)
        )
        assert into == whole[first * layer : (first + 1) * layer]
    half = bytearray(2 * layer)
    cut = memoryview(encoded)[: int(len(encoded) * 0.6)]
    serde.decode_layers(cut, memoryview(half), GROUP, TOKENS, range(2))
    assert half == whole[: 2 * layer]
    with pytest.raises(ValueError, match="last section"):
        serde.decode_layers(cut, memoryview(half), GROUP, TOKENS, range(2, 4))
    with pytest.raises(IndexError):
        serde.decode_layers(cut, memoryview(half), GROUP, TOKENS, range(3, 5))


def test_another_codec_s_stream_is_refused() -> None:
    encoded = encode(Int8Serde(CONFIG, engine(1)), ordinary(GROUP, 8), GROUP, 8)
    with pytest.raises(ValueError, match="another codec"):
        decode(Fp8Serde(CONFIG, engine(1)), encoded, GROUP, 8)


# -- profiles ------------------------------------------------------------------------------------


def profile(group: LayerGroup, scale: float = 1.0) -> Profile:
    channels = len(group.layers) * group.heads * group.head_size
    steps = struct.pack(f"<{channels}f", *(scale * (1 + i % 3) for i in range(channels)))
    return Profile(len(group.layers), group.heads, group.head_size, steps, bytes(2 * channels))


def test_a_profile_says_the_steps() -> None:
    chunk = kv(GROUP, TOKENS, ROPE)
    fine, coarse = safe(ROPE, profile=profile(GROUP, 0.3)), safe(ROPE, profile=profile(GROUP, 3.0))
    sizes, errors = [], []
    for serde in (fine, coarse):
        encoded = encode(serde, chunk, GROUP, TOKENS)
        sizes.append(len(encoded))
        errors.append(error(chunk, decode(serde, encoded, GROUP, TOKENS)))
    assert sizes[0] > sizes[1]
    assert errors[0] < errors[1]


def test_a_stream_needs_its_profile() -> None:
    chunk = kv(GROUP, TOKENS)
    encoded = encode(safe(profile=profile(GROUP)), chunk, GROUP, TOKENS)
    for other in (safe(), safe(profile=profile(GROUP, 2.0))):
        with pytest.raises(ValueError, match="profile"):
            decode(other, encoded, GROUP, TOKENS)


def test_a_foreign_profile_is_not_used() -> None:
    other = profile(full_attention(layers=4, heads=2, head_size=64, dtype=DType.BF16))
    chunk = kv(GROUP, TOKENS)
    assert encode(safe(profile=other), chunk, GROUP, TOKENS) == encode(safe(), chunk, GROUP, TOKENS)


def test_a_profile_serves_the_layers_it_has() -> None:
    """A group of layers 2 and 3, of a profile that has 0 to 3."""
    group = LayerGroup((2, 3), AttentionKind.FULL, 2, 4, 64, DType.BF16)
    chunk = kv(group, TOKENS)
    serde = safe(profile=profile(GROUP))
    encoded = encode(serde, chunk, group, TOKENS)
    assert encoded != encode(safe(), chunk, group, TOKENS)
    assert error(chunk, decode(serde, encoded, group, TOKENS)) < 0.5


# -- as core finds them --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lossless", "cachegen", "int8", "fp8"])
def test_core_finds_it(name: str) -> None:
    descriptor = Plugins().serde(name)
    serde = descriptor.create(descriptor.config())
    chunk = ordinary(GROUP, 32)
    decoded = decode(serde, encode(serde, chunk, GROUP, 32), GROUP, 32)
    assert (decoded == chunk) is descriptor.lossless


def test_wire_ids_differ() -> None:
    kinds: list[Callable[[], Serde]] = [safe] + [
        lambda kind=kind: kind(CONFIG, engine(1))  # type: ignore[misc]
        for kind in (LosslessSerde, Int8Serde, Fp8Serde)
    ]
    assert len({make().wire_id for make in kinds}) == 4


@pytest.mark.parametrize("step", [0, -1.0, 11.0])
def test_steps_that_cannot_be(step: float) -> None:
    with pytest.raises(ConfigError, match="such as 0"):
        safe(step=step)


def test_unknown_names_are_refused_with_those_there_are() -> None:
    with pytest.raises(UnknownPluginError, match=r"cachegen.*lossless"):
        Plugins().serde("cachegn")


@pytest.mark.parametrize(
    ("name", "exact"), [("lossless", True), ("cachegen", False), ("cachegen+aesgcm", False)]
)
def test_a_cache_stores_and_loads_with_it(
    name: str, exact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through core's files, from one cache to another."""
    monkeypatch.setenv("LMCACHE_AESGCM_KEYS", "1 " + "5a" * 32)
    plugins = Plugins()
    config = load_config(
        plugins,
        environ={},
        assignments=[
            "chunk_size=64",
            "max_local_cpu_size=0.01",
            f"backends.disk.path={tmp_path}",
            "backends.disk.type=filesystem",
            f"backends.disk.serde={name}",
        ],
    )
    layout = KVLayout(64, (GROUP,))
    tokens = list(range(128))
    chunk = kv(GROUP, 128, ROPE)
    with Cache.open(model="m", layout=layout, config=config, plugins=plugins) as cache:
        cache.store(tokens, chunk)
        cache.flush()
    stored = sum(file.stat().st_size for file in tmp_path.rglob("??/*"))
    assert stored < 0.8 * len(chunk)
    with Cache.open(model="m", layout=layout, config=config, plugins=plugins) as cache:
        into = bytearray(len(chunk))
        assert cache.load(tokens, into) == 128
    assert (into == chunk) is exact
    assert error(chunk, into) < 0.1
