"""What the two ends of the ``tcp`` channel say to each other, and how it is taken apart.

Both know the owner's secret, and prove it before anything else: neither sends it, and a proof is of
no use a second time.

    owner       LMTC, version (2), nonce (16)
    client      LMTC, version (2), length of its name (2), nonce (16), proof (32), name
    owner       status (1), proof (32)

Then, one after the other and as often as the client likes:

    client      operation (1), 0 (1), length of a note (4), ranges (4), their bytes (8);
                offset (8) and length (8) of each; the note; if it writes, the bytes
    owner       status (1); if it was read, the bytes

Integers are little-endian. Knows encodings and their limits. Knows nothing about sockets.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import chain
from typing import Final

from lmcache_core.contracts.transfer import MAX_NAME_BYTES, MAX_NOTE_BYTES

SECRET_BYTES: Final = 32
NONCE_BYTES: Final = 16
PROOF_BYTES: Final = 32
MAX_RANGES: Final = 1 << 16
"""Of one request: a longer batch is several. What claims more isn't a request."""

_MAGIC: Final = b"LMTC"
_VERSION: Final = 1
GREETING: Final = struct.Struct(f"<4sH{NONCE_BYTES}s")
HELLO: Final = struct.Struct(f"<4sHH{NONCE_BYTES}s{PROOF_BYTES}s")
WELCOME: Final = struct.Struct(f"<B{PROOF_BYTES}s")
REQUEST: Final = struct.Struct("<BxIIQ")
STATUS_BYTES: Final = 1
_RANGE_BYTES: Final = 16
_BODY: Final = struct.Struct(f"<BH{SECRET_BYTES}s")
_TLS: Final = 1


class WireError(Exception):
    """Bytes that make no sense here."""


class Op(IntEnum):
    """What a client asks for."""

    READ = 1
    WRITE = 2


class Status(IntEnum):
    """What an owner answers."""

    OK = 0
    DENIED = 1
    """The proof is wrong."""
    OUTSIDE = 2
    """A range that isn't inside the region, or a region that isn't writable."""


@dataclass(frozen=True)
class Address:
    """What a descriptor's body says."""

    host: str
    port: int
    secret: bytes
    tls: bool

    def encode(self) -> bytes:
        """The body: flags (1; 1: TLS), port (2), secret, host."""
        return _BODY.pack(_TLS if self.tls else 0, self.port, self.secret) + self.host.encode()

    @classmethod
    def decode(cls, body: bytes) -> Address:
        """What `encode` made.

        Raises:
            WireError: it is something else.
        """
        if len(body) <= _BODY.size:
            raise WireError(f"{len(body)} bytes are no address")
        flags, port, secret = _BODY.unpack_from(body)
        try:
            return cls(body[_BODY.size :].decode(), port, secret, bool(flags & _TLS))
        except UnicodeDecodeError as error:
            raise WireError("an address whose host isn't text") from error


@dataclass(frozen=True)
class Hello:
    """A client's half of the greeting."""

    name_bytes: int
    nonce: bytes
    proof: bytes


@dataclass(frozen=True)
class Request:
    """The fixed part of a request."""

    op: Op
    note_bytes: int
    count: int
    total: int

    @property
    def rest_bytes(self) -> int:
        """Of its ranges and its note, which come next."""
        return self.count * _RANGE_BYTES + self.note_bytes


def greeting(nonce: bytes) -> bytes:
    """The owner's first words."""
    return GREETING.pack(_MAGIC, _VERSION, nonce)


def parse_greeting(data: memoryview) -> bytes:
    """The owner's nonce.

    Raises:
        WireError: that isn't an owner, or one of another version.
    """
    magic, version, nonce = GREETING.unpack(data)
    _check(magic, version)
    return bytes(nonce)


def hello(name: bytes, nonce: bytes, proof: bytes) -> bytes:
    """The client's answer to it."""
    return HELLO.pack(_MAGIC, _VERSION, len(name), nonce, proof) + name


def parse_hello(data: memoryview) -> Hello:
    """The fixed part of `hello`.

    Raises:
        WireError: that isn't a client, or one of another version.
    """
    magic, version, name_bytes, nonce, proof = HELLO.unpack(data)
    _check(magic, version)
    if name_bytes > MAX_NAME_BYTES:
        raise WireError(f"a name of {name_bytes} bytes")
    return Hello(name_bytes, nonce, proof)


def prove(secret: bytes, who: bytes, owner_nonce: bytes, client_nonce: bytes, name: bytes) -> bytes:
    """What only someone with ``secret`` can say as ``who``, ``b"client"`` or ``b"owner"``, and
    only in this connection."""
    return hmac.digest(secret, who + owner_nonce + client_nonce + name, "sha256")


def proves(said: bytes, right: bytes) -> bool:
    """Whether a proof is right; takes the same time for each that isn't."""
    return hmac.compare_digest(said, right)


def request(op: Op, places: Sequence[tuple[int, int]], total: int, note: bytes) -> bytes:
    """A request for ``total`` bytes at ``places``, each an offset and a length."""
    flat = chain.from_iterable(places)
    head = REQUEST.pack(op, len(note), len(places), total)
    return head + struct.pack(f"<{2 * len(places)}Q", *flat) + note


def parse_request(data: memoryview) -> Request:
    """The fixed part of a request.

    Raises:
        WireError: it makes no sense, or asks for too much.
    """
    op, note_bytes, count, total = REQUEST.unpack(data)
    if op not in (Op.READ, Op.WRITE):
        raise WireError(f"operation {op}")
    if note_bytes > MAX_NOTE_BYTES or (note_bytes and op is Op.READ):
        raise WireError(f"a note of {note_bytes} bytes")
    if count > MAX_RANGES:
        raise WireError(f"{count} ranges in one request")
    return Request(Op(op), note_bytes, count, total)


def parse_places(data: memoryview, asked: Request) -> list[tuple[int, int]]:
    """Offset and length of each range.

    Raises:
        WireError: their sum is another one than the request said.
    """
    numbers = struct.unpack_from(f"<{2 * asked.count}Q", data)
    if sum(numbers[1::2]) != asked.total:
        raise WireError(f"ranges of {sum(numbers[1::2])} bytes, {asked.total} were announced")
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _check(magic: bytes, version: int) -> None:
    if magic != _MAGIC:
        raise WireError("it speaks something else")
    if version != _VERSION:
        raise WireError(f"it speaks version {version}, this is version {_VERSION}")
