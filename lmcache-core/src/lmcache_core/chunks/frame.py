"""The header that every value outside this process's memory carries.

    offset  bytes  field
    0       8      magic          b"LMCKV\\x00\\x01\\n"
    8       2      version        3
    10      2      serde          wire id of the serde that wrote the payload
    12      4      flags          bit 0: the serde is exact; the others 0
    16      32     key            the chunk's key, padded with zeros
    48      1      key length
    49      15     zeros
    64      16     fingerprint    of the namespace, with the tier's place, in ASCII
    80      8      raw length     bytes of the decoded chunk
    88      8      payload length bytes after the header
    96      8      payload xxh3   xxh3-64 of the pieces' xxh3-64s, each as eight bytes
    104     2      pieces         equal parts of the payload that are checksummed by themselves
    106     2      layers         equal parts of the chunk that are checksummed by themselves
    108     4      zeros
    112     8      chunk xxh3     xxh3-64 of the layers' xxh3-64s, made when the chunk was gathered
    120     8      header xxh3    xxh3-64 of bytes 0-119
    128            payload

All integers are little-endian. There are two digests. *Payload* is what a store
and a network may damage. *Chunk* is what the engine computed: its checksums are
made while the chunk is copied out of the engine's memory and travel with it, so
that nothing between the two ends can change a byte unseen (Saltzer, Reed and
Clark, "End-to-end arguments in system design", 1984). An exact serde's decoded
chunk must have that digest; a lossy one's can't. A raw payload is the chunk, so
the two are the same, layer by layer (see `checksums`).

A reader checks, in this order: magic, version, header checksum, flags, key,
fingerprint, lengths, payload; only then is anything decoded, and compared with
the chunk's digest. Magic and version come first because another version may
have its checksums elsewhere. The idea is safetensors': the header is validated
before any data is touched, and every way to be invalid has its own name.

Knows bytes. Knows nothing about where they come from or how they are decoded.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

import xxhash

from lmcache_core.chunks.checksums import SUM_BYTES, checksums, combined
from lmcache_core.chunks.keys import ChunkKey
from lmcache_core.errors import FrameError

HEADER_BYTES = 128
MAGIC = b"LMCKV\x00\x01\n"
VERSION = 3
EXACT = 1
DAMAGE = frozenset({"truncated", "magic", "header", "key", "length", "payload"})
"""Reasons that prove that a value is no good for anybody, so that it may be deleted. The others
only say that it isn't for this reader."""
_FIELDS = struct.Struct("<8sHHI32sB15x16sQQQHH4xQ")
_PREFIX = struct.Struct("<8sH")
_CHECKSUM = struct.Struct("<Q")


@dataclass(frozen=True)
class Header:
    """What a valid header says."""

    serde: int
    exact: bool
    raw_bytes: int
    payload_bytes: int
    pieces: int
    sums: bytes
    """The checksums of the payload's pieces, which were found to be right."""
    layers: int
    chunk_sum: int
    """What `combined` makes of the checksums of the chunk's layers, as it was gathered."""


def write_header(
    frame: memoryview,
    *,
    key: ChunkKey,
    fingerprint: str,
    serde: int,
    exact: bool,
    raw_bytes: int,
    payload_bytes: int,
    chunk_sums: bytes,
    raw: bool = False,
) -> None:
    """Fill in the first 128 bytes of ``frame``, whose payload is already in place behind them.

    ``chunk_sums`` are the checksums of the chunk's layers, made when it was gathered. ``raw``: the
    payload is the chunk itself, and needn't be read; otherwise it is one piece, and read for it.
    """
    sums = chunk_sums if raw else checksums(frame[HEADER_BYTES : HEADER_BYTES + payload_bytes], 1)
    _FIELDS.pack_into(
        frame,
        0,
        MAGIC,
        VERSION,
        serde,
        EXACT if exact else 0,
        bytes(key),
        len(key),
        fingerprint.encode("ascii"),
        raw_bytes,
        payload_bytes,
        combined(sums),
        len(sums) // SUM_BYTES,
        len(chunk_sums) // SUM_BYTES,
        combined(chunk_sums),
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
        FrameError: with ``reason`` one of ``truncated``, ``magic``, ``version``, ``header``,
            ``key``, ``namespace``, ``length``, ``payload``.
    """
    if frame.nbytes < HEADER_BYTES:
        raise FrameError("truncated", f"{frame.nbytes} bytes are too few for a header")
    magic, version = _PREFIX.unpack_from(frame, 0)
    if magic != MAGIC:
        raise FrameError("magic", f"not a chunk: starts with {magic!r}")
    if version != VERSION:
        raise FrameError("version", f"format version {version}, this reader knows {VERSION}")
    (checksum,) = _CHECKSUM.unpack_from(frame, 120)
    if checksum != xxhash.xxh3_64_intdigest(frame[:120]):
        raise FrameError("header", "the header's checksum doesn't match")
    (_, _, serde, flags, name, length, where, raw, payload, digest, pieces, layers, chunk_sum) = (
        _FIELDS.unpack_from(frame, 0)
    )
    if flags & ~EXACT:
        raise FrameError("version", f"flags {flags:#x}, of which this reader knows {EXACT:#x}")
    if name[:length] != bytes(key):
        raise FrameError("key", f"holds the chunk {name[:length].hex()}, not {key.hex()}")
    if where != fingerprint.encode("ascii"):
        raise FrameError("namespace", f"written under namespace {where!r}, this is {fingerprint}")
    if frame.nbytes != HEADER_BYTES + payload:
        raise FrameError(
            "length", f"header says {payload} payload bytes, {frame.nbytes - HEADER_BYTES} came"
        )
    for what, nbytes, parts in (("payload", payload, pieces), ("chunk", raw, layers)):
        if not parts or nbytes % parts:
            raise FrameError("length", f"{nbytes} bytes of {what} can't be cut into {parts} parts")
    sums = checksums_of(frame[HEADER_BYTES:], pieces)
    if digest != combined(sums):
        raise FrameError("payload", "the payload's checksum doesn't match")
    return Header(serde, bool(flags & EXACT), raw, payload, pieces, sums, layers, chunk_sum)


def may_start(head: bytes, *, key: ChunkKey, nbytes: int) -> bool:
    """Whether ``head``, the first 128 bytes, may be those of a good frame of ``nbytes`` bytes.

    Costs a checksum of the header; the payload isn't looked at. What another version wrote isn't
    known to be bad.
    """
    if len(head) < HEADER_BYTES:
        return False
    magic, version = _PREFIX.unpack_from(head, 0)
    if magic != MAGIC:
        return False
    if version != VERSION:
        return True
    (checksum,) = _CHECKSUM.unpack_from(head, 120)
    if checksum != xxhash.xxh3_64_intdigest(head[:120]):
        return False
    _, _, _, _, name, length, _, _, payload, *_ = _FIELDS.unpack_from(head, 0)
    return bool(name[:length] == bytes(key) and payload + HEADER_BYTES == nbytes)
