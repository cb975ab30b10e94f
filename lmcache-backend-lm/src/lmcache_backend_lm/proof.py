"""How both sides of a ``lm://`` connection prove that they know the token, which neither sends.

A proof is of no use to who sees it: it covers both nonces, the version and the namespace, says
which side made it, and holds for one connection only. Knows nothing about messages.
"""

from __future__ import annotations

import hmac
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
    """See `lmcache_core.binding_of`."""

    def proof(self, token: bytes, side: Side) -> bytes:
        """What only somebody with ``token`` can say as ``side``."""
        return hmac.digest(token, side.value + b"".join(self), "sha256")

    def proves(self, said: bytes, token: bytes, side: Side) -> bool:
        """Whether ``said`` is that; takes the same time for all that aren't."""
        return hmac.compare_digest(said, self.proof(token, side))
