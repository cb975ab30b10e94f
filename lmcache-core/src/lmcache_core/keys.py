"""What a stored chunk is called.

Knows names only. How a name is computed from tokens is `hashing`'s business.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NewType

from lmcache_core.layout import KVLayout

DIGEST_BYTES = 16

ChunkKey = NewType("ChunkKey", bytes)
"""Digest of a token prefix, followed by a 2-byte layer-group index for groups after the first.

Raw bytes rather than a dataclass: a long prompt makes thousands of keys, and
bytes hash, compare and travel without Python-level code.
"""


def chunk_key(prefix_digest: bytes, group: int = 0) -> ChunkKey:
    """Name the chunk that ends at ``prefix_digest``, for one layer group."""
    return ChunkKey(prefix_digest + group.to_bytes(2, "little") if group else prefix_digest)


@dataclass(frozen=True)
class CacheNamespace:
    """Everything that must match for two processes to share stored bytes.

    Constant for the life of an engine process. A backend learns it once, in
    ``open``, so that the key of a single chunk stays small. ``salt`` is for a
    whole process; what differs per request (cache salt, LoRA, images) goes into
    the chunk's digest instead: see `hashing`.
    """

    model: str
    layout: KVLayout
    shard: int = 0
    shard_count: int = 1
    salt: str = ""
    format_version: int = 1
    place: str = ""
    """Which of a tier's places values of this namespace are in: see `placed`."""

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits: a stable, filesystem-safe name for this rank's namespace."""
        return self._digest(self.shard)

    @cached_property
    def root(self) -> bytes:
        """What every digest chain starts from, the same on all ranks of a model."""
        return bytes.fromhex(self._digest(None))

    def for_shard(self, shard: int) -> CacheNamespace:
        """The same namespace seen from another rank."""
        return replace(self, shard=shard)

    def placed(self, place: str) -> CacheNamespace:
        """This namespace as one tier knows it, whose values are written as ``place`` says.

        The chunks keep their names, the fingerprint is another one: whoever writes values that
        others can't read, with another serde, key or format, has them elsewhere.
        """
        return replace(self, place=place)

    def _digest(self, shard: int | None) -> str:
        facts = {
            "model": self.model,
            "layout": self.layout.as_dict(),
            "shard": shard,
            "shard_count": self.shard_count,
            "salt": self.salt,
            "format_version": self.format_version,
        }
        if shard is not None and self.place:
            facts["place"] = self.place
        canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]
