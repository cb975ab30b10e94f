"""The ``lm://`` wire format, version 3. Knows bytes and their bounds; does no I/O.

What is said here is all of it; `greeting` has the code for what opens a connection, `inventory` for
what operators ask.

A connection carries messages in both directions. Each is a header, ``meta`` and ``payload``:

    offset  bytes  field
    0       4      magic     b"LM\\r\\n"
    4       1      op        see `Op`; an answer repeats its request's
    5       1      status    0 in requests; see `Status`
    6       2      zero
    8       4      count     keys that the message is about
    12      4      meta      bytes that follow the header
    16      8      request   number chosen by the client; an answer repeats its request's
    24      8      payload   bytes that follow meta: values, one after the other
    32

All integers are little-endian. The magic ends like a line so that servers of text protocols answer
it with an error of their own instead of waiting for more. A client may send any number of requests
without waiting. Answers may come in any order; a server of this version sends them in the order of
the requests. An answer with another status than OK has a sentence in UTF-8 as its meta and no
payload.

    op        meta of the request            payload   meta of the answer            payload
    HELLO     see below                      -         see below                     -
    PROVE     32 bytes proof                 -         as HELLO                      -
    CONTAINS  names                          -         count x u8, 1: there          -
    COUNT     names                          -         u64 leading hits              -
    LOAD      names, count x u64 capacities  -         count x u64 sizes, MISSING    values there
    STORE     names, count x u64 sizes       values    usage, count x u8 outcome     -
    DELETE    names                          -         usage, u64 forgotten          -
    CLEAR     -                              -         usage, u64 forgotten          -
    USAGE     -                              -         usage                         -
    SHARE     see below (+ fds)              -         u64 bytes, u64 offset (+ fd)  -
    BORROW    as LOAD                        -         u64 epoch, sizes, extents     -
    RETURN    u64 number of a BORROW         -         there is none                 -
    STAGE     as STORE                       pieces    as STORE                      -
    ACK       never                          -         u32 slot; see STAGE           -
    OFFER     as STORE, count x u64 offsets  -         as STORE                      -
    DESCRIBE  text                           -         there is none                 -
    LIST      16 bytes fingerprint           -         see below                     -
    STATUS    -                              -         text                          -
    PURGE     16 bytes fingerprint           -         4 x u64, u8; see below        -

    names     count x u8 lengths, then the keys one after the other
    usage     u64 values, u64 bytes of the namespace
    extents   for each value that is there: u32 n, n x (u64 offset, u64 bytes)
    outcome   0 stored, 1 already present, 2 not admitted

HELLO comes first and once, and decides the namespace of everything that follows on this
connection. Its first two bytes are the version in every version to come, and another version than
one's own is refused:

    request   u16 version, u16 flags, 16 bytes fingerprint, 32 bytes nonce
    challenge u16 version, u16 flags, 32 bytes nonce
    welcome   u16 version, u16 flags, 16 bytes instance, u64 longest value, usage, 32 bytes proof,
              u16 n, n bytes

Without a token on either side, the answer is the welcome. A client with a token says so in its flag
1, and a server refuses who has none, or has one that it lacks itself. Otherwise its answer has flag
2 and is the challenge. The client answers that with PROVE and gets the welcome if its proof is
right; it goes on only if the server's proof is, too. A proof is HMAC-SHA256, the token being the
key, of ``lmcache lm:// client`` or ``lmcache lm:// server``, the meta of HELLO, the challenge, and
what binds it to the connection: ``tcp``, ``unix``, or ``tls`` and the connection's ``tls-unique``
(RFC 5929, as OpenSSL has it with TLS 1.3: the client's Finished). Nobody sends the token.

``instance`` is made anew when a server starts. The welcome's flag 1: SHARE is
understood here. The last field is the path of a Unix socket where the same server answers; empty:
there is none.

**Shared memory**, on Unix sockets only. SHARE carries file descriptors (SCM_RIGHTS): the client's
staging memory and, if it has one, the region that its values lie in; back comes the server's arena.
Arena and region are mapped for reading only.

    request   u64 bytes of staging memory, u32 piece, u64 bytes of the region, 0: there is none

BORROW answers where values lie in the arena. They stay there until the client sends RETURN, or the
server has lost patience with it and has changed the u64 at ``offset`` of the arena. So a client
compares that number with ``epoch`` after it copied; if they differ, it read nothing.

OFFER is the same the other way round: a STORE that says where values lie in the region. The staging
memory consists of slots of ``piece`` bytes and, behind the last whole one, of an array of u64. At
an OFFER's number modulo the array's length stands that number for as long as the values don't
change. So a server looks there after it copied; if another number stands there, it got nothing.

STAGE is a STORE of values that lie anywhere: its payload is one u32 for each piece, the slot that
holds it, a value's last piece being shorter. ACK, with the number of the STAGE, says that a slot
may be used again.

**For people.** DESCRIBE says what the connection's namespace is of: up to three lines of UTF-8,
what the model is called, what identifies it and how chunks are written, in 512 bytes at the most.
A server keeps the last thousand of them, and those of folders; nothing else depends on it.

Three requests are about all namespaces, whichever the connection has; who may ask them is who may
ask anything. LIST answers the next 128 namespaces behind the fingerprint, in ascending order; 16
zero bytes come before all. An answer with fewer is the last.

    answer    u16 n, n x (16 bytes fingerprint, u64 values and u64 bytes in memory, u64 bytes of
              files, u16 m, m bytes of the description)

STATUS answers lines ``NAME VALUE``, 16 KiB at the most. PURGE forgets a namespace, in memory and up
to 4096 files of it, and answers values and bytes in memory that went, files and their bytes, and 1
if there may be more files: then it is sent again.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from itertools import accumulate, pairwise
from typing import NamedTuple

from lmcache_core import ChunkKey

VERSION = 3
MAGIC = b"LM\r\n"
HEADER_BYTES = 32
MISSING = (1 << 64) - 1
"""The size, in an answer, of a value that isn't there or doesn't fit."""

MAX_KEYS = 16384
MAX_KEY_BYTES = 64
MAX_VALUE_BYTES = 1 << 40
MAX_TOKEN_BYTES = 1024
MAX_PATH_BYTES = 256
MAX_MESSAGE_BYTES = 1024
MAX_EXTENTS = 64
"""In so many parts a value may lie in the arena."""
MAX_REGION_BYTES = 1 << 46
MAX_STAGING_BYTES = 64 << 20
MAX_META_BYTES = MAX_KEYS * (1 + MAX_KEY_BYTES + 16)
MAX_HELLO_BYTES = 2048

_HEADER = struct.Struct("<4sBBHIIQQ")
_USAGE = struct.Struct("<QQ")
_EXTENT = struct.Struct("<QQ")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

Extent = tuple[int, int]
"""Offset and length of a part of the arena, in bytes."""


class Op(IntEnum):
    """What a message is about."""

    HELLO = 1
    CONTAINS = 2
    COUNT = 3
    LOAD = 4
    STORE = 5
    DELETE = 6
    CLEAR = 7
    USAGE = 8
    SHARE = 9
    BORROW = 10
    RETURN = 11
    STAGE = 12
    ACK = 13
    OFFER = 14
    PROVE = 15
    DESCRIBE = 16
    LIST = 17
    STATUS = 18
    PURGE = 19


class Status(IntEnum):
    """Why a request wasn't done. After anything but OK, the server closes the connection."""

    OK = 0
    MALFORMED = 1
    VERSION = 2
    DENIED = 3
    UNSUPPORTED = 4
    BUSY = 5


class ProtocolError(Exception):
    """Bytes that aren't a message of this protocol. ``status`` is what to tell their sender."""

    def __init__(self, message: str, status: Status = Status.MALFORMED) -> None:
        super().__init__(message)
        self.status = status


class Header(NamedTuple):
    """A message's fixed part."""

    op: Op
    status: Status
    keys: int
    request: int
    meta: int
    payload: int


# -- headers -----------------------------------------------------------------------------------


def header(
    op: Op,
    request: int,
    *,
    count: int = 0,
    meta: int = 0,
    payload: int = 0,
    status: Status = Status.OK,
) -> bytes:
    """The 32 bytes that a message begins with."""
    return _HEADER.pack(MAGIC, op, status, 0, count, meta, request, payload)


def parse_header(data: bytes | bytearray | memoryview) -> Header:
    """Check what can be checked without knowing the request.

    Raises:
        ProtocolError: it isn't a header, or it announces more than the format allows.
    """
    magic, op, status, zero, count, meta, request, payload = _HEADER.unpack(data)
    if magic != MAGIC:
        raise ProtocolError(f"not an lm:// message: it starts with {bytes(data[:16])!r}")
    try:
        known = Op(op), Status(status)
    except ValueError:
        raise ProtocolError(
            f"operation {op} with status {status} isn't known", Status.UNSUPPORTED
        ) from None
    if zero:
        raise ProtocolError("the header's reserved bytes aren't zero")
    if count > MAX_KEYS:
        raise ProtocolError(f"{count} keys in a message; at most {MAX_KEYS} are allowed")
    if meta > MAX_META_BYTES * 2:
        raise ProtocolError(f"{meta} bytes of meta are announced; that is too many")
    if payload > MAX_VALUE_BYTES:
        raise ProtocolError(f"{payload} bytes of values are announced; that is too many")
    return Header(*known, count, request, meta, payload)


# -- names and numbers -------------------------------------------------------------------------


def parse_space(data: memoryview | bytes) -> str:
    """A namespace's fingerprint: 16 hexadecimal digits.

    Raises:
        ProtocolError: it isn't one.
    """
    try:
        space = bytes(data).decode("ascii")
    except UnicodeDecodeError:
        space = ""
    # It becomes the name of a folder.
    if len(space) != 16 or not set(space) <= set("0123456789abcdef"):
        raise ProtocolError(f"{bytes(data[:16])!r} is no namespace: it has 16 hexadecimal digits")
    return space


def names(keys: Sequence[ChunkKey]) -> bytes:
    """``keys`` as they travel.

    Raises:
        ProtocolError: there are too many, or one is too long.
    """
    if len(keys) > MAX_KEYS:
        raise ProtocolError(f"{len(keys)} keys in a request; at most {MAX_KEYS} are allowed")
    lengths = list(map(len, keys))
    if keys and not 0 < min(lengths) <= max(lengths) <= MAX_KEY_BYTES:
        raise ProtocolError(f"a key has from 1 to {MAX_KEY_BYTES} bytes")
    return bytes(lengths) + b"".join(keys)


def parse_names(meta: memoryview, count: int) -> tuple[list[ChunkKey], memoryview]:
    """The keys, and what follows them.

    Raises:
        ProtocolError: they don't fit into ``meta``, or one is empty, too long, or there twice.
    """
    lengths = bytes(meta[:count])
    if len(lengths) < count:
        raise ProtocolError(f"{count} keys don't fit into {len(meta)} bytes")
    if count and not 0 < min(lengths) <= max(lengths) <= MAX_KEY_BYTES:
        raise ProtocolError(f"a key has from 1 to {MAX_KEY_BYTES} bytes")
    ends = list(accumulate(lengths, initial=count))
    if ends[-1] > len(meta):
        raise ProtocolError(f"keys of {ends[-1]} bytes don't fit into {len(meta)} bytes")
    packed = bytes(meta[: ends[-1]])
    keys = [ChunkKey(packed[i:j]) for i, j in pairwise(ends)]
    if len(set(keys)) < count:
        raise ProtocolError("a key is there twice in one request")
    return keys, meta[ends[-1] :]


def numbers(values: Sequence[int]) -> bytes:
    """``values`` as u64."""
    return struct.pack(f"<{len(values)}Q", *values)


def parse_numbers(data: memoryview, count: int) -> tuple[int, ...]:
    """Exactly ``count`` u64.

    Raises:
        ProtocolError: ``data`` is longer or shorter.
    """
    if len(data) != 8 * count:
        raise ProtocolError(f"{len(data)} bytes aren't {count} numbers")
    return struct.unpack(f"<{count}Q", data)


def number(value: int) -> bytes:
    """``value`` as u64."""
    return _U64.pack(value)


def parse_number(data: memoryview) -> int:
    """Exactly one u64.

    Raises:
        ProtocolError: ``data`` is longer or shorter.
    """
    return parse_numbers(data, 1)[0]


def slot(index: int) -> bytes:
    """A staging slot's number."""
    return _U32.pack(index)


def parse_slot(data: memoryview, slots: int) -> int:
    """A staging slot's number, below ``slots``.

    Raises:
        ProtocolError: it isn't one.
    """
    if len(data) != _U32.size or _U32.unpack(data)[0] >= slots:
        raise ProtocolError(f"{bytes(data[:8])!r} isn't one of {slots} slots")
    return int(_U32.unpack(data)[0])


def usage(values: int, nbytes: int) -> bytes:
    """How much a namespace holds."""
    return _USAGE.pack(values, nbytes)


def parse_usage(data: memoryview) -> tuple[tuple[int, int], memoryview]:
    """Values and bytes, and what follows them.

    Raises:
        ProtocolError: ``data`` is too short.
    """
    if len(data) < _USAGE.size:
        raise ProtocolError(f"{len(data)} bytes are too few for a usage")
    values, nbytes = _USAGE.unpack_from(data)
    return (values, nbytes), data[_USAGE.size :]


def parse_offers(data: memoryview, count: int, bound: int) -> tuple[list[int], list[int]]:
    """Sizes and offsets of ``count`` values, all of them below ``bound``.

    Raises:
        ProtocolError: one lies outside.
    """
    found = parse_numbers(data, 2 * count)
    sizes, offsets = list(found[:count]), list(found[count:])
    for size, offset in zip(sizes, offsets, strict=True):
        if offset + size > bound:
            raise ProtocolError(f"{size} bytes at {offset} of a region of {bound} bytes")
    return sizes, offsets


def parse_sizes(data: memoryview, capacities: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """What a load answered for buffers of ``capacities`` bytes, and the bytes of all values.

    Raises:
        ProtocolError: a value is longer than its buffer.
    """
    sizes = parse_numbers(data, len(capacities))
    total = 0
    for size, capacity in zip(sizes, capacities, strict=True):
        if size == MISSING:
            continue
        if size > capacity:
            raise ProtocolError(f"a value of {size} bytes for a buffer of {capacity}")
        total += size
    return sizes, total


# -- shared memory -----------------------------------------------------------------------------


def extents(parts: Sequence[Extent]) -> bytes:
    """Where one value lies."""
    return _U32.pack(len(parts)) + b"".join([_EXTENT.pack(*part) for part in parts])


def parse_extents(data: memoryview, sizes: Sequence[int], bound: int) -> list[list[Extent]]:
    """Where each value that is there lies, all of it below ``bound``.

    Raises:
        ProtocolError: parts lie outside, or don't add up to the value's size.
    """
    found: list[list[Extent]] = []
    at = 0
    for size in sizes:
        if size == MISSING:
            found.append([])
            continue
        count = _U32.unpack_from(data, at)[0] if len(data) >= at + _U32.size else 0
        at += _U32.size
        if not 0 < count <= MAX_EXTENTS or len(data) < at + count * _EXTENT.size:
            raise ProtocolError(f"a value in {count} parts, which the message doesn't have")
        parts = [_EXTENT.unpack_from(data, at + i * _EXTENT.size) for i in range(count)]
        at += count * _EXTENT.size
        if sum(length for _, length in parts) != size or any(o + n > bound for o, n in parts):
            raise ProtocolError(f"the parts of a value of {size} bytes make no sense")
        found.append(parts)
    if at != len(data):
        raise ProtocolError(f"{len(data) - at} bytes too many after the last value's parts")
    return found
