"""What a stored chunk is called.

A name has three parts, and each says what the others don't:

    root          what the numbers are: model, chunk length, the first layer group's kind and
                  shape, all over the whole model. Every digest chain starts from it.
    fingerprint   the root, and which heads and layers are here; in a tier also how values are
                  written there. Names the space that keys are unique in.
    key           digest of a whole prefix, 16 bytes; for each layer group but the first followed
                  by 8 bytes that name the group and its heads and layers.

How a model is split has no part in the root, so that what two ranks stored can be looked for by
one. Facts are canonical JSON: sorted, without blanks, in ASCII. What is empty or a default isn't
there, so that a fact that is added one day leaves the names of whatever doesn't have it.

**Names don't change.** `tests/test_golden_names.py` fixes them; docs/decisions/0018-names.md says
why they are as they are.

Knows names only. How a name is computed from tokens is `hashing`'s business.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from typing import NewType

from lmcache_core.chunks.layout import KVLayout, LayerGroup

DIGEST_BYTES = 16
GROUP_NAME_BYTES = 8

ChunkKey = NewType("ChunkKey", bytes)
"""Digest of a token prefix, followed by a layer group's name for groups after the first.

Raw bytes rather than a dataclass: a long prompt makes thousands of keys, and
bytes hash, compare and travel without Python-level code.
"""


def chunk_key(prefix_digest: bytes, group: bytes = b"") -> ChunkKey:
    """Name the chunk that ends at ``prefix_digest``, of the layer group called ``group``.

    `CacheNamespace.group_names` are these names; the first group has none.
    """
    return ChunkKey(prefix_digest + group)


@dataclass(frozen=True)
class CacheNamespace:
    """Everything that must match for two processes to share stored bytes.

    Constant for the life of an engine process. A backend learns it once, in
    ``open``, so that the key of a single chunk stays small. ``layout`` is this
    rank's. ``salt`` is for a whole process; what differs per request (cache salt,
    LoRA, images) goes into the chunk's digest instead: see `hashing`.
    """

    model: str
    layout: KVLayout
    salt: str = ""
    format_version: int = 2
    """Of the canonical chunk: what a chunk's bytes mean."""
    place: str = ""
    """Which of a tier's places values of this namespace are in: see `placed`."""
    label: str = field(default="", compare=False)
    """What people call the model; for people, and in no name."""

    @cached_property
    def root(self) -> bytes:
        """What every digest chain starts from, however the model is split."""
        facts: dict[str, object] = {
            "chunk": self.layout.tokens_per_chunk,
            "format": self.format_version,
            "group": _shape(self.layout.groups[0]),
            "model": self.model,
        }
        if self.salt:
            facts["salt"] = self.salt
        return _digest(facts, DIGEST_BYTES, b"lmcache root")

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits: a stable, filesystem-safe name for this rank's namespace."""
        facts = {"part": _part(self.layout.groups[0]), "root": self.root.hex()}
        if self.place:
            facts["place"] = self.place
        return _digest(facts, 8, b"lmcache space").hex()

    @cached_property
    def group_names(self) -> tuple[bytes, ...]:
        """What follows the digest in the keys of each layer group: nothing for the first one."""
        named = (
            _digest(
                {"part": _part(group), "shape": _shape(group)}, GROUP_NAME_BYTES, b"lmcache group"
            )
            for group in self.layout.groups[1:]
        )
        return (b"", *named)

    def facts(self) -> dict[str, object]:
        """What people want to know of this namespace, as JSON has it; no name is made of it."""
        return {
            "model": self.model,
            "label": self.label,
            "salted": bool(self.salt),
            "format_version": self.format_version,
            "place": self.place,
            "layout": {
                "tokens_per_chunk": self.layout.tokens_per_chunk,
                "groups": [{**_shape(one), **_part(one)} for one in self.layout.groups],
            },
        }

    def for_rank(self, rank: int, ranks: int) -> CacheNamespace:
        """The namespace of one of ``ranks`` tensor-parallel ranks; equal where the heads are.

        Raises:
            LayoutError: the heads can't be dealt out evenly, or there is no such rank.
        """
        return replace(self, layout=self.layout.for_rank(rank, ranks))

    def placed(self, place: str) -> CacheNamespace:
        """This namespace as one tier knows it, whose values are written as ``place`` says.

        The chunks keep their names, the fingerprint is another one: whoever writes values that
        others can't read, with another serde, key or format, has them elsewhere.
        """
        return replace(self, place=place)


def _shape(group: LayerGroup) -> dict[str, object]:
    """What a layer group is in the whole model, without what any part of it has."""
    facts: dict[str, object] = {
        "dtype": group.dtype.value,
        "head_size": group.head_size,
        "heads": group.model_heads,
        "kind": group.kind.value,
        "planes": group.planes,
    }
    if group.window_tokens is not None:
        facts["window"] = group.window_tokens
    return facts


def _part(group: LayerGroup) -> dict[str, object]:
    """Which of its heads and layers are here."""
    return {"heads": [group.first_head, group.heads], "layers": list(group.layers)}


def _digest(facts: Mapping[str, object], size: int, person: bytes) -> bytes:
    canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return blake2b(canonical.encode(), digest_size=size, person=person).digest()
