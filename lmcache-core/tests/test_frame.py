"""A frame that isn't exactly what was asked for is refused, with the reason."""

from __future__ import annotations

import struct

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_core.chunks.checksums import checksums, combined, layer_checksums
from lmcache_core.chunks.frame import HEADER_BYTES, Header, read_header, write_header
from lmcache_core.chunks.keys import ChunkKey, chunk_key
from lmcache_core.errors import FrameError

KEY = chunk_key(bytes(range(1, 17)))
FINGERPRINT = "0123456789abcdef"
PAYLOAD = bytes(range(24))
CHUNK_SUMS = bytes(range(24, 48))
"""Checksums of the three layers of the chunk that was encoded."""
CHUNK_SUM = combined(CHUNK_SUMS)


def frame(
    payload: bytes = PAYLOAD,
    *,
    key: ChunkKey = KEY,
    fingerprint: str = FINGERPRINT,
    serde: int = 7,
    raw_bytes: int = 99,
    sums: bytes | None = None,
    exact: bool = True,
) -> bytearray:
    """A frame; of a raw chunk that has the checksums ``sums``, or else of an encoded one."""
    written = bytearray(HEADER_BYTES) + payload
    write_header(
        memoryview(written),
        key=key,
        fingerprint=fingerprint,
        serde=serde,
        raw_bytes=raw_bytes,
        payload_bytes=len(payload),
        exact=exact,
        chunk_sums=CHUNK_SUMS if sums is None else sums,
        raw=sums is not None,
    )
    return written


def pieces(payload: bytes, count: int) -> bytes:
    """The checksums of equal parts, by the format's own words."""
    size = len(payload) // count
    return b"".join(
        struct.pack("<Q", xxhash.xxh3_64_intdigest(payload[i * size : (i + 1) * size]))
        for i in range(count)
    )


def read(data: bytes | bytearray, *, key: ChunkKey = KEY, fingerprint: str = FINGERPRINT) -> Header:
    return read_header(memoryview(data), key=key, fingerprint=fingerprint)


def refusal(data: bytes | bytearray, key: ChunkKey = KEY, fingerprint: str = FINGERPRINT) -> str:
    with pytest.raises(FrameError) as caught:
        read(data, key=key, fingerprint=fingerprint)
    return caught.value.reason


def forged(offset: int, value: bytes) -> bytearray:
    """A frame with one field changed by somebody who can compute the header's checksum."""
    data = frame()
    data[offset : offset + len(value)] = value
    data[120:128] = struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(data[:120])))
    return data


def test_what_was_written_is_read() -> None:
    sums = pieces(PAYLOAD, 1)
    assert read(frame()) == Header(7, True, 99, 24, 1, sums, 3, CHUNK_SUM)
    assert read(frame(exact=False)) == Header(7, False, 99, 24, 1, sums, 3, CHUNK_SUM)


def test_an_empty_payload() -> None:
    assert read(frame(b"")) == Header(7, True, 99, 0, 1, pieces(b"", 1), 3, CHUNK_SUM)


@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"\1" * 8, bytes(range(8))]),
    st.integers(0, 0xFFFF),
    st.integers(0, (2**64 - 1) // 3),
)
@settings(max_examples=50, deadline=None)
def test_round_trip(payload: bytes, group: bytes, serde: int, raw_bytes: int) -> None:
    key = chunk_key(KEY, group)
    nbytes = 3 * raw_bytes
    written = frame(payload, key=key, serde=serde, raw_bytes=nbytes)
    sums = pieces(payload, 1)
    expected = Header(serde, True, nbytes, len(payload), 1, sums, 3, CHUNK_SUM)
    assert read(written, key=key) == expected
    assert written[HEADER_BYTES:] == payload


@pytest.mark.parametrize("count", [1, 2, 3, 24])
def test_a_payload_that_is_checksummed_in_pieces(count: int) -> None:
    sums = pieces(PAYLOAD, count)
    assert checksums(memoryview(PAYLOAD), count) == sums
    written = frame(sums=sums, raw_bytes=24)
    assert read(written) == Header(7, True, 24, 24, count, sums, count, combined(sums))
    written[-1] ^= 1
    assert refusal(written) == "payload"


def test_checksums_of_some_layers() -> None:
    chunk = memoryview(PAYLOAD)
    assert layer_checksums(chunk, 4, range(1, 3)) == pieces(PAYLOAD, 4)[8:24]
    assert combined(pieces(PAYLOAD, 4)) == xxhash.xxh3_64_intdigest(pieces(PAYLOAD, 4))
    with pytest.raises(ValueError, match="5 equal pieces"):
        checksums(chunk, 5)


@pytest.mark.parametrize("raw", [False, True])
def test_golden_frame(raw: bool) -> None:
    """The bytes on disk don't change unless the version does."""
    sums = pieces(PAYLOAD, 3)
    expected = (
        b"LMCKV\0\1\n" + b"\3\0" + b"\7\0" + b"\1\0\0\0" + KEY + bytes(16) + b"\x10" + bytes(15)
        + FINGERPRINT.encode() + struct.pack("<QQ", 99, 24)
        + struct.pack("<QHH", combined(sums if raw else pieces(PAYLOAD, 1)), 3 if raw else 1, 3)
        + bytes(4) + struct.pack("<Q", combined(sums if raw else CHUNK_SUMS))
    )  # fmt: skip
    whole = expected + struct.pack("<Q", xxhash.xxh3_64_intdigest(expected)) + PAYLOAD
    assert frame(sums=sums if raw else None) == whole


# -- attacks -------------------------------------------------------------------------------


def test_every_flipped_bit_is_refused() -> None:
    whole = frame()
    for bit in range(len(whole) * 8):
        broken = bytearray(whole)
        broken[bit // 8] ^= 1 << bit % 8
        place = bit // 8
        parts = ((8, "magic"), (10, "version"), (HEADER_BYTES, "header"), (len(whole), "payload"))
        expected = next(reason for end, reason in parts if place < end)
        assert refusal(broken) == expected, bit


def test_every_truncation_is_refused() -> None:
    whole = frame()
    for size in range(len(whole)):
        assert refusal(whole[:size]) == ("truncated" if size < HEADER_BYTES else "length"), size


def test_bytes_behind_the_payload_are_refused() -> None:
    assert refusal(frame() + b"\0") == "length"


def test_two_payloads_swapped() -> None:
    one, two = frame(), frame(PAYLOAD[::-1])
    assert refusal(one[:HEADER_BYTES] + two[HEADER_BYTES:]) == "payload"


def test_another_chunk() -> None:
    assert refusal(frame(), key=chunk_key(bytes(16))) == "key"


@pytest.mark.parametrize(
    ("written", "asked"), [(b"", b"1" * 8), (b"1" * 8, b""), (b"1" * 8, b"2" * 8)]
)
def test_another_layer_group_of_the_same_chunk(written: bytes, asked: bytes) -> None:
    assert refusal(frame(key=chunk_key(KEY, written)), key=chunk_key(KEY, asked)) == "key"


def test_another_model() -> None:
    assert refusal(frame(), fingerprint="fedcba9876543210") == "namespace"


def test_something_else_altogether() -> None:
    assert refusal(bytes(200)) == "magic"
    assert refusal(b"") == "truncated"
    assert refusal(b"GET / HTTP/1.1\r\n" * 20) == "magic"


FORGERIES = {
    "not ours": (0, b"\x89PNG\r\n\x1a\n", "magic"),
    "version from the past": (8, b"\2\0", "version"),
    "version from the future": (8, b"\4\0", "version"),
    "version nought": (8, b"\0\0", "version"),
    "flag from the future": (12, b"\3\0\0\0", "version"),
    "no key": (48, b"\0", "key"),
    "key shorter than it is": (48, b"\x0f", "key"),
    "key longer than its field": (48, b"\xff", "key"),
    "key with a tail": (48, b"\x12", "key"),
    "no namespace": (64, bytes(16), "namespace"),
    "payload of nothing": (88, bytes(8), "length"),
    "payload one short": (88, struct.pack("<Q", 23), "length"),
    "payload of 16 EiB": (88, b"\xff" * 8, "length"),
    "payload that wraps to the right size": (88, struct.pack("<Q", 24 + 2**63), "length"),
    "another payload": (96, bytes(8), "payload"),
    "no pieces": (104, b"\0\0", "length"),
    "pieces that aren't equal": (104, b"\5\0", "length"),
    "as many pieces as fit": (104, b"\xff\xff", "length"),
    "another number of pieces": (104, b"\2\0", "payload"),
    "a chunk of no layers": (106, b"\0\0", "length"),
    "layers that aren't equal": (106, b"\5\0", "length"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_header(name: str) -> None:
    offset, value, reason = FORGERIES[name]
    assert refusal(forged(offset, value)) == reason


def test_messages_say_what_was_found() -> None:
    with pytest.raises(FrameError, match=f"holds the chunk {KEY.hex()}, not 00000000"):
        read(frame(), key=chunk_key(bytes(16)))
    with pytest.raises(FrameError, match="format version 4, this reader knows 3"):
        read(forged(8, b"\4\0"))
