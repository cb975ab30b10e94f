"""The codecs' Triton kernels against the C++, in Triton's interpreter, which needs no GPU.

They were never run on hardware. ``LMCACHE_TEST_LAYOUTS`` says how many layouts are drawn. Every
address that a kernel uses is checked, whatever the stream's bytes are.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Iterator

import codec_reference
import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_codec_format import CODECS, E4M3, INT8, LOSSLESS, VALUES, Case

from lmcache_kernels import _native

pytest.importorskip("triton", reason="pip install lmcache-kernels[triton]")
torch = pytest.importorskip("torch", reason="pip install lmcache-kernels[testing]")

from watched_memory import watched_memory  # noqa: E402

from lmcache_kernels.codec.gpu import tables  # noqa: E402
from lmcache_kernels.codec.gpu.decoder import GpuDecoder  # noqa: E402
from lmcache_kernels.codec.gpu.device import DeviceProfile  # noqa: E402
from lmcache_kernels.codec.gpu.encoder import GpuEncoder  # noqa: E402
from lmcache_kernels.codec.gpu.work import EncoderOptions  # noqa: E402

CPU = torch.device("cpu")
LAYOUTS = int(os.environ.get("LMCACHE_TEST_LAYOUTS", "24"))
PARTS = range(4)
"""So that several processes can share them."""
SETTINGS = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
ENCODERS = {streams: GpuEncoder(CPU, streams) for streams in (1, 2, 4)}
DECODERS = {streams: GpuDecoder(CPU, streams) for streams in (1, 2, 4)}


@pytest.fixture(scope="module", autouse=True)
def _watched() -> Iterator[None]:
    # numpy, which interprets, warns of overflows that the C++ has, too.
    with watched_memory(), np.errstate(all="ignore"):
        yield


def profile_of(case: Case) -> DeviceProfile | None:
    numbers = case.numbers()
    if numbers is None:
        return None
    return DeviceProfile.of(42, numbers.steps.tobytes(), numbers.means.tobytes(), CPU)


def encode(case: Case, streams: int = 1) -> bytes:
    angles = [f(0.7 / (1 + j)) for j in range(case.pairs) for f in (np.cos, np.sin)]
    options = EncoderOptions(
        case.kind,
        (case.step, case.step * 1.2),
        struct.pack(f"<{len(angles)}d", *angles),
        case.interleaved,
        case.first_raw,
        profile_of(case),
    )
    chunk = torch.frombuffer(bytearray(case.chunk()), dtype=torch.uint8)
    return ENCODERS[streams].encode(case.shape, options, chunk)


def decode(case: Case, stream: bytes, streams: int = 1) -> bytes:
    into = torch.empty(len(case.chunk()), dtype=torch.uint8)
    DECODERS[streams].decode(case.kind, case.shape, stream, into, profile_of(case))
    return bytes(into.numpy())


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Smaller ones than the C++ is tested with, as the interpreter is slow, but seldom raw."""
    kind = draw(st.sampled_from([LOSSLESS, VALUES, VALUES, VALUES, INT8, E4M3]))
    size = draw(st.sampled_from([1, 7, 8, 16, 20, 32, 32, 40, 64]))
    # What has no loss must save more bytes before it saves any.
    tokens = [1, 3, 20, 25, 33, 40] if kind == LOSSLESS else [1, 2, 3, 7, 9, 12, 13, 16, 17]
    shape = (
        draw(st.sampled_from([0, 0, 0, 1, 1, 1, 2, 3])),
        draw(st.sampled_from([1, 1, 2])),
        draw(st.sampled_from([2, 2, 2, 1, 3])),
        draw(st.sampled_from([1, 2, 3] if size > 16 else [2, 3, 4, 5])),
        size,
        draw(st.sampled_from(tokens)),
    )
    return Case(
        kind=kind,
        shape=shape,
        pairs=draw(st.sampled_from([0, size // 2, size // 4])),
        interleaved=draw(st.booleans()),
        first_raw=draw(st.sampled_from([-1, 0, 1])),
        step=draw(st.sampled_from([0.02, 0.15, 0.3, 2.0])),
        profile=draw(st.booleans()),
        content=draw(
            st.sampled_from(["normal", "normal", "normal", "odd", "heavy", "bits", "zeros"])
        ),
        seed=draw(st.integers(0, 1000)),
    )


def test_tables_are_those_of_the_format() -> None:
    assert tables.frequencies() == codec_reference.VALUES + codec_reference.EXPONENTS
    text = codec_reference.TABLES.read_text()
    body = text[text.index("kValueThresholds[") :]
    numbers = re.findall(r"\d+", body[body.index("=") : body.index("};")])
    assert list(tables.THRESHOLDS) == [int(n) for n in numbers]


@pytest.mark.parametrize("part", PARTS)
@settings(SETTINGS, max_examples=LAYOUTS // len(PARTS))
@given(case=cases(), streams=st.sampled_from(sorted(ENCODERS)))
def test_gpu_and_all_instruction_sets_agree(part: int, case: Case, streams: int) -> None:
    """The same stream, and the same elements from it."""
    stream = encode(case, streams)
    chunk = decode(case, stream, streams)
    for codec in CODECS:
        assert case.encode(codec) == stream
        assert case.decode(codec, stream) == chunk


def resealed(stream: bytes, section: int) -> bytes:
    """With checksums that fit, so that damage reaches the kernels."""
    head = struct.unpack_from("<28xI12xI16x", stream)
    at, broken = 64 + 16 * head[0], bytearray(stream)
    payload = at + 32 * head[1]
    offset, size = struct.unpack_from("<QI", stream, at + 32 * section)
    data = stream[payload + offset : payload + offset + size]
    struct.pack_into("<I", broken, at + 32 * section + 24, xxhash.xxh3_64_intdigest(data) % 2**32)
    struct.pack_into("<I", broken, 60, 0)
    struct.pack_into("<I", broken, 60, xxhash.xxh3_64_intdigest(broken[:payload]) % 2**32)
    return bytes(broken)


def damage(stream: bytes, draw: np.random.Generator) -> bytes:
    """Some changed bytes in a section or in its numbers, under new checksums."""
    pairs, count = struct.unpack_from("<28xI12xI16x", stream)
    directory = 64 + 16 * pairs
    section = int(draw.integers(count))
    offset, size = struct.unpack_from("<QI", stream, directory + 32 * section)
    start, broken = directory + 32 * count + offset, bytearray(stream)
    for _ in range(draw.integers(1, 4)):
        if draw.random() < 0.2:
            place = directory + 32 * section + int(draw.integers(12, 30))
        else:
            place = start + int(
                draw.integers(min(size, 400)) if draw.random() < 0.5 else draw.integers(size)
            )
        broken[place] ^= 1 << int(draw.integers(8))
    return resealed(bytes(broken), section)


def outcome(work: Callable[[], bytes], dtype: int) -> list[float] | None:
    """The elements, as numbers; ``None`` for an error. Any NaN is like another."""
    try:
        found = np.frombuffer(work(), ("<u2", "<f2", "<f4", "u1")[dtype])
    except ValueError:
        return None
    if dtype == 0:
        found = (found.astype("<u4") << 16).view("<f4")
    return np.where(np.isnan(found), 1e38, found.astype("f8")).tolist()


@pytest.mark.parametrize("part", PARTS)
@settings(SETTINGS, max_examples=LAYOUTS // len(PARTS))
@given(case=cases(), seed=st.integers(0, 2**32), streams=st.sampled_from(sorted(DECODERS)))
def test_damaged_streams(part: int, case: Case, seed: int, streams: int) -> None:
    """An error where the C++ finds one, and otherwise the same elements."""
    broken = damage(case.encode(CODECS[0]), np.random.default_rng(seed))
    expected = outcome(lambda: case.decode(CODECS[0], broken), case.shape[0])
    assert outcome(lambda: decode(case, broken, streams), case.shape[0]) == expected


NOT_A_NUMBER = (struct.pack("<f", float("nan")), b"\xc0\x7f", struct.pack("<d", float("nan")))
HUGE = (struct.pack("<f", 2e18), b"\x80\x5d", struct.pack("<d", 1.01))


@pytest.mark.parametrize("values", [NOT_A_NUMBER, HUGE], ids=["nan", "huge"])
@pytest.mark.parametrize(("what", "reason"), list(enumerate(["steps", "means", "angles"])))
def test_numbers_that_could_become_nans_are_refused(
    what: int, reason: str, values: tuple[bytes, ...]
) -> None:
    """Instruction sets may choose the sign of a NaN: everybody refuses what could make one."""
    stream = bytearray(CASE.encode(CODECS[0]))
    pairs, count = struct.unpack_from("<28xI12xI16x", stream)
    directory = 64 + 16 * pairs
    section = directory + 32 * count  # the first one's: states, steps of heads, means
    at = (section + 128, section + 128 + 4 * CASE.shape[3], 64)[what]
    stream[at : at + len(values[what])] = values[what]
    broken = resealed(bytes(stream), 0)
    into = bytearray(len(CASE.chunk()))
    for codec in CODECS:
        with pytest.raises(ValueError, match=reason):
            codec.decode(VALUES, CASE.shape, broken, into, None)
    with pytest.raises(ValueError, match=reason):
        decode(CASE, broken)


CASE = Case(VALUES, (0, 3, 2, 2, 32, 9), 16, False, 1, 0.3, False, "odd", 5)


@pytest.mark.parametrize("kind", [LOSSLESS, VALUES, INT8, E4M3])
def test_some_layers_of_a_stream_that_ends_behind_them(kind: int) -> None:
    case = Case(kind, CASE.shape, 16, False, 1, 0.3, False, "normal", 5)
    stream = case.encode(CODECS[0])
    layer = len(case.chunk()) // 3
    sections = struct.unpack_from("<I", stream, 44)[0]
    pairs = struct.unpack_from("<I", stream, 28)[0]
    directory = 64 + 16 * pairs
    entry = struct.unpack_from("<QI", stream, directory + 32 * (2 * sections // 3 - 1))
    end = directory + 32 * sections + sum(entry)
    into = torch.empty(layer, dtype=torch.uint8)
    DECODERS[1].decode(kind, case.shape, stream[:end], into, None, 1, 1)
    assert bytes(into.numpy()) == case.decode(CODECS[0], stream)[layer : 2 * layer]
    with pytest.raises(ValueError, match="ends before its last section"):
        DECODERS[1].decode(kind, case.shape, stream[: end - 1], into, None, 1, 1)


def test_sections_with_too_many_channels_are_raw() -> None:
    case = Case(VALUES, (0, 1, 2, 1, 65536, 1), 8, False, -1, 0.3, False, "zeros", 5)
    stream = encode(case)
    assert stream == case.encode(CODECS[0])


def test_every_changed_byte_is_found() -> None:
    stream = CASE.encode(CODECS[0])
    for place in range(0, len(stream), 61):
        broken = bytearray(stream)
        broken[place] ^= 1 << place % 8
        with pytest.raises(ValueError):
            decode(CASE, bytes(broken))


def test_streams_of_something_else() -> None:
    stream, into = CASE.encode(CODECS[0]), torch.empty(len(CASE.chunk()), dtype=torch.uint8)
    known = DeviceProfile.of(7, bytes(4 * 192), bytes(2 * 192), CPU)

    def refused(match: str, kind: int, shape: tuple[int, ...], data: bytes) -> None:
        with pytest.raises(ValueError, match=match):
            DECODERS[1].decode(kind, shape, data, into, known)  # type: ignore[arg-type]

    refused("shorter than its header", VALUES, CASE.shape, stream[:63])
    refused("begins like this", VALUES, CASE.shape, b"KVC2" + stream[4:])
    refused("later format", VALUES, CASE.shape, stream[:4] + b"\x02" + stream[5:])
    refused("of codec 2, not of 1", LOSSLESS, CASE.shape, stream)
    refused("isn't the chunk's", VALUES, (1, *CASE.shape[1:]), stream)
    refused("shorter than its directory", VALUES, CASE.shape, stream[:64])
    refused("longer than its sections", VALUES, CASE.shape, stream + b"\0")
    other = Case(VALUES, CASE.shape, 16, False, 1, 0.3, True, "normal", 5)
    refused("profile 0x2a", VALUES, CASE.shape, other.encode(CODECS[0]))


def test_arguments_that_contradict_each_other() -> None:
    stream, chunk = CASE.encode(CODECS[0]), torch.empty(len(CASE.chunk()), dtype=torch.uint8)
    short, shape = chunk[:-1], CASE.shape
    profile = DeviceProfile.of(7, bytes(4 * 191), bytes(2 * 191), CPU)
    encoder, decoder = ENCODERS[1], DECODERS[1]
    for wrong in (
        lambda: decoder.decode(VALUES, shape, stream, short),
        lambda: decoder.decode(VALUES, shape, stream, chunk, profile),
        lambda: encoder.encode(shape, EncoderOptions(VALUES), short),
        lambda: encoder.encode(shape, EncoderOptions(9), chunk),
        lambda: encoder.encode(shape, EncoderOptions(VALUES, steps=(0.3, float("nan"))), chunk),
        lambda: encoder.encode(shape, EncoderOptions(VALUES, turns=bytes(15)), chunk),
        lambda: encoder.encode(shape, EncoderOptions(VALUES, turns=bytes(16 * 17)), chunk),
        lambda: encoder.encode(shape, EncoderOptions(VALUES, profile=profile), chunk),
        lambda: DeviceProfile.of(0, bytes(8), bytes(4), CPU),
        lambda: DeviceProfile.of(1, bytes(8), bytes(2), CPU),
    ):
        with pytest.raises(ValueError):
            wrong()
    for first, layers in ((3, 1), (-1, 1), (0, 4), (1, 0)):
        with pytest.raises(IndexError):
            decoder.decode(VALUES, shape, stream, chunk, None, first, layers)


def test_kernels_that_leave_their_tensors_are_noticed() -> None:
    from lmcache_kernels.codec.gpu import value_kernels

    sections = torch.zeros(11, dtype=torch.int64)
    few = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(Exception, match="accesses lie in none of"):
        value_kernels.choose_tables[(2, 1)](sections, few, few, few, few, few, 1, TILE=16)


def test_native_levels_are_what_this_cpu_has() -> None:
    """What the comparison above was with."""
    assert [codec.simd for codec in CODECS] == list(_native.simd_levels())
