"""The format: the documented decoder reads it, all instruction sets write it, damage is found."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import codec_reference
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmcache_kernels import _native

LOSSLESS, VALUES, INT8, E4M3 = 1, 2, 3, 4
_ITEM = ("<u2", "<u2", "<u4", "u1")


@dataclass(frozen=True)
class Case:
    kind: int
    shape: tuple[int, int, int, int, int, int]
    """dtype, layers, planes, heads, head size, tokens"""
    pairs: int
    interleaved: bool
    first_raw: int
    step: float
    profile: bool
    content: str
    seed: int
    basis_heads: int = 0
    """With a profile: heads of its bases, which has gains, too; 0 for none."""
    start: int | None = None

    def chunk(self) -> bytes:
        dtype, layers, planes, heads, size, tokens = self.shape
        draw = np.random.default_rng(self.seed)
        shape = (layers, planes, tokens, heads, size)
        if self.content == "bits" or dtype == 3:
            return draw.integers(
                0, 256, np.prod(shape) * np.dtype(_ITEM[dtype]).itemsize, "u1"
            ).tobytes()
        if self.content == "zeros":
            return bytes(int(np.prod(shape)) * np.dtype(_ITEM[dtype]).itemsize)
        values = draw.normal(size=shape) * np.exp(
            draw.normal(0, 1, (layers, planes, 1, heads, size))
        )
        values += draw.normal(0, 3, (layers, planes, 1, heads, size))
        values *= np.exp(draw.normal(0, 0.5, (1, 1, tokens, heads, 1)))
        flat = values.reshape(-1)
        if self.content == "odd":
            for value in (np.nan, np.inf, -np.inf, 1e4, -3e4, 1e-7):
                flat[draw.integers(0, flat.size, 1 + flat.size // 500)] = value
        if self.content == "heavy":
            flat *= draw.standard_t(2, flat.size)
        with np.errstate(over="ignore"):
            if dtype == 1:
                return flat.astype("<f2").tobytes()
            wide = flat.astype("<f4")
        return wide.tobytes() if dtype == 2 else (wide.view("<u4") >> 16).astype("<u2").tobytes()

    @property
    def channels(self) -> tuple[int, int, int]:
        return self.shape[1], self.shape[3], self.shape[4]

    def numbers(self) -> codec_reference.Numbers | None:
        """What a profile holds."""
        if not self.profile or self.shape[2] != 2:
            return None
        draw = np.random.default_rng(self.seed + 1)
        layers, heads, size = self.channels

        def means() -> np.ndarray:
            return (draw.normal(size=self.channels).astype("<f4").view("<u4") >> 16).astype("<u2")

        def bases() -> list[list[np.ndarray]]:
            widths = [
                min(self.basis_heads, heads - first) * size
                for first in range(0, heads, self.basis_heads)
            ]
            return [[_orthogonal(draw, width) for width in widths] for _ in range(layers)]

        steps = np.exp(draw.normal(0, 1, self.channels)).astype("<f4")
        if not self.basis_heads:
            return codec_reference.Numbers(steps, means())
        return codec_reference.Numbers(steps, means(), means(), bases(), bases())

    def native_profile(self) -> _native.CodecProfile | None:
        numbers = self.numbers()
        if numbers is None:
            return None
        key_means = b"" if numbers.key_means is None else numbers.key_means.tobytes()
        return _native.CodecProfile(
            42,
            numbers.steps.tobytes(),
            numbers.means.tobytes(),
            key_means,
            np.linspace(0.5, 2, self.shape[1], dtype="<f4").tobytes() if self.basis_heads else b"",
            self.basis_heads,
            b"".join(basis.tobytes() for layer in numbers.key_bases for basis in layer),
            b"".join(basis.tobytes() for layer in numbers.value_bases for basis in layer),
        )

    def encode(self, codec: _native.Codec) -> bytes:
        angles = [f(0.7 / (1 + j)) for j in range(self.pairs) for f in (np.cos, np.sin)]
        into = bytearray(_native.codec_max_encoded(self.shape, self.pairs))
        size = codec.encode(
            self.kind,
            self.shape,
            self.chunk(),
            into,
            (self.step, self.step * 1.2),
            struct.pack(f"<{len(angles)}d", *angles),
            self.interleaved,
            self.first_raw,
            self.native_profile(),
            self.start,
        )
        return bytes(into[:size])

    def decode(self, codec: _native.Codec, stream: bytes) -> bytes:
        into = bytearray(len(self.chunk()))
        codec.decode(self.kind, self.shape, stream, into, self.native_profile())
        return bytes(into)


def _orthogonal(draw: np.random.Generator, width: int) -> np.ndarray:
    return np.linalg.qr(draw.normal(size=(width, width)))[0].astype("<f2")


@st.composite
def cases(draw: st.DrawFn, most_tokens: int = 70) -> Case:
    size = draw(st.sampled_from([1, 2, 7, 8, 16, 32, 40, 64, 80, 128, 130, 256]))
    shape = (
        draw(st.sampled_from([0, 0, 0, 1, 1, 2, 3])),
        draw(st.integers(1, 3)),
        draw(st.sampled_from([2, 2, 2, 1, 3])),
        draw(st.integers(1, 5)),
        size,
        draw(st.integers(1, most_tokens)),
    )
    return Case(
        draw(st.sampled_from([LOSSLESS, VALUES, VALUES, VALUES, INT8, E4M3])),
        shape,
        draw(st.sampled_from([0, size // 2, size // 4])),
        draw(st.booleans()),
        draw(st.sampled_from([-1, 0, 1])),
        draw(st.sampled_from([0.02, 0.15, 0.3, 2.0])),
        draw(st.booleans()),
        draw(st.sampled_from(["normal", "normal", "odd", "heavy", "bits", "zeros"])),
        draw(st.integers(0, 1000)),
        draw(st.sampled_from([0, 1, 2, shape[3]])) % (shape[3] + 1),
        draw(st.sampled_from([None, 0, 1, 1000, 2**32 - 1])),
    )


CODECS = [_native.Codec(1, level) for level in _native.simd_levels()]
SETTINGS = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@settings(SETTINGS, max_examples=300)
@given(cases())
def test_levels_agree(case: Case) -> None:
    """The same streams, and the same elements from them."""
    streams = [case.encode(codec) for codec in CODECS]
    assert all(stream == streams[0] for stream in streams)
    decoded = [case.decode(codec, streams[0]) for codec in CODECS]
    assert all(one == decoded[0] for one in decoded)
    if case.kind == LOSSLESS:
        assert decoded[0] == case.chunk()


@settings(SETTINGS, max_examples=25)
@given(cases(most_tokens=12))
def test_the_documented_decoder_reads_it(case: Case) -> None:
    stream = case.encode(CODECS[0])
    with np.errstate(all="ignore"):
        found = codec_reference.decode(stream, case.numbers())
    assert found == case.decode(CODECS[0], stream)


def test_threads_write_the_same() -> None:
    case = Case(VALUES, (0, 3, 2, 5, 64, 60), 32, False, -1, 0.3, False, "heavy", 3)
    several = _native.Codec(3)
    stream = case.encode(several)
    assert stream == case.encode(CODECS[0])
    assert case.decode(several, stream) == case.decode(CODECS[0], stream)


@pytest.mark.parametrize("kind", [LOSSLESS, VALUES, INT8, E4M3])
def test_every_changed_byte_is_found(kind: int) -> None:
    case = Case(kind, (0, 2, 2, 2, 32, 9), 16, False, 1, 0.3, False, "odd", 5)
    stream = case.encode(CODECS[0])
    for place in range(0, len(stream), 3):
        broken = bytearray(stream)
        broken[place] ^= 1 << place % 8
        with pytest.raises(ValueError):
            case.decode(CODECS[0], bytes(broken))


@pytest.mark.parametrize(
    "shape",
    [
        (4, 1, 1, 1, 1, 1),
        (0, 0, 1, 1, 1, 1),
        (0, 1, 1, 1, 1, -1),
        (0, 2**31, 2, 2**15, 2**15, 2**15),
    ],
)
def test_shapes_that_cannot_be(shape: tuple[int, int, int, int, int, int]) -> None:
    with pytest.raises(ValueError):
        _native.codec_max_encoded(shape, 0)


def test_arguments_that_contradict_each_other() -> None:
    codec, shape = CODECS[0], (0, 1, 2, 1, 8, 4)
    room = bytearray(_native.codec_max_encoded(shape, 0))

    def encode(chunk: bytes, into: bytearray, turns: bytes = b"", step: float = 0.3) -> int:
        return codec.encode(VALUES, shape, chunk, into, (step, step), turns, False, -1, None)

    assert encode(bytes(128), room) > 0
    for wrong in (
        lambda: encode(bytes(127), room),
        lambda: encode(bytes(128), bytearray(len(room) - 1)),
        lambda: encode(bytes(128), room, bytes(15)),
        lambda: encode(bytes(128), room, bytes(16 * 5)),
        lambda: encode(bytes(128), room, step=float("nan")),
        lambda: codec.decode(VALUES, shape, bytes(room), bytearray(127), None),
        lambda: codec.decode(9, shape, bytes(room), bytearray(128), None),
    ):
        with pytest.raises(ValueError):
            wrong()
