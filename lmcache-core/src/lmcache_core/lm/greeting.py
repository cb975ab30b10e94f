"""What opens a ``lm://`` connection: the meta of HELLO and SHARE, and of their answers.

Knows their bytes and bounds, which `protocol` describes along with everything else. Knows nothing
about sockets, nor about what a greeting is good for.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from lmcache_core.lm.protocol import (
    MAX_PATH_BYTES,
    MAX_REGION_BYTES,
    MAX_TOKEN_BYTES,
    VERSION,
    ProtocolError,
    Status,
)

SHARES_MEMORY = 1
"""The flag of a server that understands SHARE."""
_HELLO = struct.Struct("<HH16sH")
_WELCOME = struct.Struct("<HH16sQQQH")
_VERSION = struct.Struct("<H")
_SHARE = struct.Struct("<QIQ")
_SHARED = struct.Struct("<QQ")


class Hello(NamedTuple):
    """What a client says first."""

    version: int
    fingerprint: str
    token: bytes


class Welcome(NamedTuple):
    """What a server answers to it."""

    instance: bytes
    shares_memory: bool
    max_value_bytes: int
    usage: tuple[int, int]
    unix_path: str


# -- hello -------------------------------------------------------------------------------------


def hello(fingerprint: str, token: bytes, version: int = VERSION) -> bytes:
    """A client's first meta."""
    return _HELLO.pack(version, 0, fingerprint.encode("ascii"), len(token)) + token


def parse_hello(data: memoryview) -> Hello:
    """What a client says first.

    Raises:
        ProtocolError: it isn't a hello, or one of another version.
    """
    _check_version(data, "this server")
    if len(data) < _HELLO.size:
        raise ProtocolError(f"{len(data)} bytes are too few for a hello")
    version, _, name, length = _HELLO.unpack_from(data)
    token = bytes(data[_HELLO.size : _HELLO.size + length])
    if len(data) != _HELLO.size + length or length > MAX_TOKEN_BYTES:
        raise ProtocolError("the hello's length doesn't match its token")
    try:
        fingerprint = name.decode("ascii")
    except UnicodeDecodeError:
        fingerprint = ""
    # It becomes the name of a folder.
    if len(fingerprint) != 16 or not set(fingerprint) <= set("0123456789abcdef"):
        raise ProtocolError(f"{name!r} is no namespace: it has 16 hexadecimal digits")
    return Hello(version, fingerprint, token)


def welcome(reply: Welcome) -> bytes:
    """A server's answer to a hello."""
    path = reply.unix_path.encode()
    flags = SHARES_MEMORY if reply.shares_memory else 0
    head = _WELCOME.pack(
        VERSION, flags, reply.instance, reply.max_value_bytes, *reply.usage, len(path)
    )
    return head + path


def parse_welcome(data: memoryview) -> Welcome:
    """A server's answer to a hello.

    Raises:
        ProtocolError: it isn't one, or one of another version.
    """
    _check_version(data, "this client")
    if len(data) < _WELCOME.size:
        raise ProtocolError(f"{len(data)} bytes are too few for an answer to a hello")
    _, flags, instance, longest, values, nbytes, length = _WELCOME.unpack_from(data)
    try:
        path = bytes(data[_WELCOME.size :]).decode()
    except UnicodeDecodeError:
        path = ""
    if len(data) != _WELCOME.size + length or length > MAX_PATH_BYTES or (length and not path):
        raise ProtocolError("the answer's length doesn't match the path in it")
    return Welcome(instance, bool(flags & SHARES_MEMORY), longest, (values, nbytes), path)


# -- shared memory -----------------------------------------------------------------------------


def share(nbytes: int, piece: int, region: int) -> bytes:
    """Announce staging memory, and a region of so many bytes."""
    return _SHARE.pack(nbytes, piece, region)


def parse_share(data: memoryview) -> tuple[int, int, int]:
    """Bytes of staging memory, of a slot in it, and of the region.

    Raises:
        ProtocolError: there isn't a single slot, or the region is longer than any can be.
    """
    if len(data) != _SHARE.size:
        raise ProtocolError(f"{len(data)} bytes don't announce staging memory")
    nbytes, piece, region = _SHARE.unpack(data)
    if not 0 < piece <= nbytes <= 1 << 32:
        raise ProtocolError(f"slots of {piece} bytes in {nbytes} bytes of staging memory")
    if region > MAX_REGION_BYTES:
        raise ProtocolError(f"a region of {region} bytes; at most {MAX_REGION_BYTES} are allowed")
    return nbytes, piece, region


def shared(nbytes: int, offset: int) -> bytes:
    """Describe the arena: its size, and where this connection's epoch is."""
    return _SHARED.pack(nbytes, offset)


def parse_shared(data: memoryview) -> tuple[int, int]:
    """Bytes of the arena, and the offset of this connection's epoch in it.

    Raises:
        ProtocolError: the epoch lies outside.
    """
    if len(data) != _SHARED.size:
        raise ProtocolError(f"{len(data)} bytes don't describe an arena")
    nbytes, offset = _SHARED.unpack(data)
    if offset + 8 > nbytes or offset % 8:
        raise ProtocolError(f"the epoch lies at {offset} of {nbytes} bytes")
    return nbytes, offset


def _check_version(data: memoryview, who: str) -> None:
    if len(data) < _VERSION.size:
        raise ProtocolError(f"{len(data)} bytes are too few for a version")
    (version,) = _VERSION.unpack_from(data)
    if version != VERSION:
        raise ProtocolError(
            f"the other side speaks version {version} of lm://, {who} speaks version {VERSION}; "
            "install the same version of lmcache-core on both",
            Status.VERSION,
        )
