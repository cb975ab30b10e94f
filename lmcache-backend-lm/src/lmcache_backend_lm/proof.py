"""How both sides of a ``lm://`` connection prove that they know the token, which neither sends.

A proof is of no use to who sees it: it covers both nonces, the version and the namespace, says
which side made it, and holds for one connection only. Knows nothing about messages.
"""

from __future__ import annotations

import hmac
import socket
import ssl
from enum import Enum
from typing import NamedTuple

NONCE_BYTES = 32
PROOF_BYTES = 32


class Side(Enum):
    """Who proves."""

    CLIENT = b"lmcache lm:// client"
    SERVER = b"lmcache lm:// server"


class Transcript(NamedTuple):
    """What was said so far. HELLO and its answer have a fixed length each."""

    hello: bytes
    challenge: bytes
    binding: bytes
    """See `binding_of`."""

    def proof(self, token: bytes, side: Side) -> bytes:
        """What only somebody with ``token`` can say as ``side``."""
        return hmac.digest(token, side.value + b"".join(self), "sha256")

    def proves(self, said: bytes, token: bytes, side: Side) -> bool:
        """Whether ``said`` is that; takes the same time for all that aren't."""
        return hmac.compare_digest(said, self.proof(token, side))


def binding_of(sock: socket.socket) -> bytes:
    """What no other connection has in common with this one, as far as there is such a thing.

    With TLS it is a secret of this one's handshake, so that a proof can't be passed on over
    another. Without, it is the kind of socket: who sits between can pass everything on.

    Raises:
        OSError: TLS doesn't say.
    """
    if isinstance(sock, ssl.SSLSocket):
        unique = sock.get_channel_binding("tls-unique")
        if unique is None:
            raise OSError("TLS has no channel binding to prove the token over")
        return b"tls" + unique
    return b"unix" if sock.family == socket.AF_UNIX else b"tcp"
