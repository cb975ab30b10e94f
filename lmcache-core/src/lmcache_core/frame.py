"""The header that every value outside this process's memory carries.

    offset  bytes  field
    0       8      magic          b"LMCKV\\x00\\x01\\n"
    8       2      version        2
    10      2      serde          wire id of the serde that wrote the payload
    12      4      flags          0
    16      32     key            the chunk's key, padded with zeros
    48      1      key length
    49      15     zeros
    64      16     fingerprint    the namespace fingerprint, in ASCII
    80      8      raw length     bytes of the decoded chunk
    88      8      payload length bytes after the header
    96      8      payload xxh3   xxh3-64 of the pieces' xxh3-64s, each as eight bytes
    104     2      pieces         equal parts of the payload that are checksummed by themselves
    106     14     zeros
    120     8      header xxh3    xxh3-64 of bytes 0-119
    128            payload

All integers are little-endian. The payload of an uncompressed chunk is
checksummed layer by layer (see `checksums`): kernels do that while they copy
it. A reader checks, in this order: header checksum, magic, version and flags,
key, fingerprint, lengths, payload checksum; only then is anything decoded. The
idea is safetensors': the header is validated before any data is touched, and
every way to be invalid has its own name.

Knows bytes. Knows nothing about where they come from or how they are decoded.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

import xxhash

from lmcache_core.checksums import SUM_BYTES, checksums, combined
from lmcache_core.errors import FrameError
from lmcache_core.keys import ChunkKey

HEADER_BYTES = 128
MAGIC = b"LMCKV\x00\x01\n"
VERSION = 2
_FIELDS = struct.Struct("<8sHHI32sB15x16sQQQH14x")
_CHECKSUM = struct.Struct("<Q")


@dataclass(frozen=True)
class Header:
    """What a valid header says."""

    serde: int
    raw_bytes: int
    payload_bytes: int
    pieces: int
    sums: bytes
    """The checksums of the payload's pieces, which were found to be right."""


def write_header(
    frame: memoryview,
    *,
    key: ChunkKey,
    fingerprint: str,
    serde: int,
    raw_bytes: int,
    payload_bytes: int,
    sums: bytes | None = None,
) -> None:
    """Fill in the first 128 bytes of ``frame``, whose payload is already in place behind them.

    ``sums`` are the checksums of the payload's pieces, where they are known; otherwise it is one
    piece, and read for it.
    """
    if sums is None:
        sums = checksums(frame[HEADER_BYTES : HEADER_BYTES + payload_bytes], 1)
    _FIELDS.pack_into(
        frame,
        0,
        MAGIC,
        VERSION,
        serde,
        0,
        bytes(key),
        len(key),
        fingerprint.encode("ascii"),
        raw_bytes,
        payload_bytes,
        combined(sums),
        len(sums) // SUM_BYTES,
    )
    _CHECKSUM.pack_into(frame, 120, xxhash.xxh3_64_intdigest(frame[:120]))


def read_header(
    frame: memoryview,
    *,
    key: ChunkKey,
    fingerprint: str,
    checksums_of: Callable[[memoryview, int], bytes] = checksums,
) -> Header:
    """Check ``frame``, header and payload, against what was asked for.

    ``frame`` is exactly the bytes that the backend returned. ``checksums_of`` is `checksums`, or
    something faster.

    Raises:
        FrameError: with ``reason`` one of ``truncated``, ``header``, ``magic``, ``version``,
            ``key``, ``namespace``, ``length``, ``payload``.
    """
    if frame.nbytes < HEADER_BYTES:
        raise FrameError("truncated", f"{frame.nbytes} bytes are too few for a header")
    (checksum,) = _CHECKSUM.unpack_from(frame, 120)
    if checksum != xxhash.xxh3_64_intdigest(frame[:120]):
        raise FrameError("header", "the header's checksum doesn't match")
    magic, version, serde, flags, name, length, where, raw, payload, digest, pieces = (
        _FIELDS.unpack_from(frame, 0)
    )
    if magic != MAGIC:
        raise FrameError("magic", f"not a chunk: starts with {magic!r}")
    if version != VERSION:
        raise FrameError("version", f"format version {version}, this reader knows {VERSION}")
    if flags:
        raise FrameError("version", f"flags {flags:#x} of a later format, this reader knows none")
    if name[:length] != bytes(key):
        raise FrameError("key", f"holds the chunk {name[:length].hex()}, not {key.hex()}")
    if where != fingerprint.encode("ascii"):
        raise FrameError("namespace", f"written under namespace {where!r}, this is {fingerprint}")
    if frame.nbytes != HEADER_BYTES + payload:
        raise FrameError(
            "length", f"header says {payload} payload bytes, {frame.nbytes - HEADER_BYTES} came"
        )
    if not pieces or payload % pieces:
        raise FrameError("length", f"{payload} bytes can't be cut into {pieces} equal pieces")
    sums = checksums_of(frame[HEADER_BYTES:], pieces)
    if digest != combined(sums):
        raise FrameError("payload", "the payload's checksum doesn't match")
    return Header(serde, raw, payload, pieces, sums)
