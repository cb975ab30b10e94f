"""What opens a ``lm://`` connection: the meta of HELLO, PROVE and SHARE, and of their answers.

Knows their bytes and bounds, which `protocol` describes along with everything else. Knows nothing
about sockets, nor about what a greeting is good for.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from lmcache_backend_lm.proof import NONCE_BYTES, PROOF_BYTES
from lmcache_backend_lm.protocol import (
    MAX_PATH_BYTES,
    MAX_REGION_BYTES,
    MAX_STAGING_BYTES,
    VERSION,
    ProtocolError,
    Status,
    parse_space,
)

PROVES = 1
"""The flag of a client that has a token: it proves it, and goes on only if the server does."""
SHARES_MEMORY = 1
"""The flag of a server that understands SHARE."""
CHALLENGES = 2
"""The flag of a server that has a token: PROVE comes next."""
_HELLO = struct.Struct(f"<HH16s{NONCE_BYTES}s")
_CHALLENGE = struct.Struct(f"<HH{NONCE_BYTES}s")
_WELCOME = struct.Struct(f"<HH16sQQQ{PROOF_BYTES}sH")
_FLAGS = struct.Struct("<HH")
_VERSION = struct.Struct("<H")
_SHARE = struct.Struct("<QIQ")
_SHARED = struct.Struct("<QQ")


class Hello(NamedTuple):
    """What a client says first."""

    fingerprint: str
    proves: bool


class Welcome(NamedTuple):
    """What a server answers to it."""

    instance: bytes
    shares_memory: bool
    max_value_bytes: int
    usage: tuple[int, int]
    unix_path: str
    proof: bytes = bytes(PROOF_BYTES)
    """Of the token; zeros if there is none."""


# -- hello -------------------------------------------------------------------------------------


def hello(fingerprint: str, nonce: bytes, *, proves: bool = False, version: int = VERSION) -> bytes:
    """A client's first meta."""
    flags = PROVES if proves else 0
    return _HELLO.pack(version, flags, fingerprint.encode("ascii"), nonce)


def parse_hello(data: memoryview) -> Hello:
    """What a client says first.

    Raises:
        ProtocolError: it isn't a hello, or one of another version.
    """
    _check_version(data, "this server")
    if len(data) != _HELLO.size:
        raise ProtocolError(f"a hello has {_HELLO.size} bytes, not {len(data)}")
    _, flags, name, _ = _HELLO.unpack(data)
    return Hello(parse_space(name), bool(flags & PROVES))


def challenge(nonce: bytes) -> bytes:
    """The answer to a hello of a server that has a token."""
    return _CHALLENGE.pack(VERSION, CHALLENGES, nonce)


def is_challenge(data: memoryview) -> bool:
    """Whether an answer to a hello is that, and not a welcome.

    Raises:
        ProtocolError: it is one of another version, or neither.
    """
    _check_version(data, "this client")
    if len(data) < _FLAGS.size or not _FLAGS.unpack_from(data)[1] & CHALLENGES:
        return False
    if len(data) != _CHALLENGE.size:
        raise ProtocolError(f"a challenge has {_CHALLENGE.size} bytes, not {len(data)}")
    return True


def parse_proof(data: memoryview) -> bytes:
    """What a client says in PROVE.

    Raises:
        ProtocolError: it is longer or shorter.
    """
    if len(data) != PROOF_BYTES:
        raise ProtocolError(f"a proof has {PROOF_BYTES} bytes, not {len(data)}")
    return bytes(data)


def welcome(reply: Welcome) -> bytes:
    """A server's answer to a hello, or to the proof of a token."""
    path = reply.unix_path.encode()
    flags = SHARES_MEMORY if reply.shares_memory else 0
    head = _WELCOME.pack(
        VERSION,
        flags,
        reply.instance,
        reply.max_value_bytes,
        *reply.usage,
        reply.proof,
        len(path),
    )
    return head + path


def parse_welcome(data: memoryview) -> Welcome:
    """What `welcome` made.

    Raises:
        ProtocolError: it is something else, or of another version.
    """
    _check_version(data, "this client")
    if len(data) < _WELCOME.size:
        raise ProtocolError(f"{len(data)} bytes are too few for an answer to a hello")
    _, flags, instance, longest, values, nbytes, proof, length = _WELCOME.unpack_from(data)
    try:
        path = bytes(data[_WELCOME.size :]).decode()
    except UnicodeDecodeError:
        path = ""
    if len(data) != _WELCOME.size + length or length > MAX_PATH_BYTES or (length and not path):
        raise ProtocolError("the answer's length doesn't match the path in it")
    shares = bool(flags & SHARES_MEMORY)
    return Welcome(instance, shares, longest, (values, nbytes), path, proof)


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
    if not 0 < piece <= nbytes <= MAX_STAGING_BYTES:
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
            "install the same version of lmcache-backend-lm on both",
            Status.VERSION,
        )
