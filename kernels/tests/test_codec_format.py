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

    def numbers(self) -> tuple[np.ndarray, np.ndarray] | None:
        """A profile's steps and means."""
        if not self.profile or self.shape[2] != 2:
            return None
        draw = np.random.default_rng(self.seed + 1)
        steps = np.exp(draw.normal(0, 1, self.channels)).astype("<f4")
        means = (draw.normal(size=self.channels).astype("<f4").view("<u4") >> 16).astype("<u2")
        return steps, means

    def native_profile(self) -> _native.CodecProfile | None:
        numbers = self.numbers()
        return numbers and _native.CodecProfile(42, numbers[0].tobytes(), numbers[1].tobytes())

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
        )
        return bytes(into[:size])

    def decode(self, codec: _native.Codec, stream: bytes) -> bytes:
        into = bytearray(len(self.chunk()))
        codec.decode(self.kind, self.shape, stream, into, self.native_profile())
        return bytes(into)


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
    numbers = case.numbers() or (None, None)
    with np.errstate(all="ignore"):
        assert codec_reference.decode(stream, *numbers) == case.decode(CODECS[0], stream)


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
