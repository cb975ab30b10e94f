"""The serde that changes nothing: a stored chunk is the chunk's own bytes.

LMCache calls it ``naive``. Knows nothing about dtypes or shapes but their size.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from lmcache_core.chunks.layout import LayerGroup
from lmcache_core.contracts.hookspecs import hookimpl
from lmcache_core.contracts.serde import Serde, SerdeDescriptor

WIRE_ID = 1


class RawConfig(BaseModel):
    """``raw`` has no options."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RawSerde(Serde):
    """Stores the canonical bytes as they are."""

    @property
    def wire_id(self) -> int:
        return WIRE_ID

    @property
    def in_place(self) -> bool:
        return True

    def max_encoded_bytes(self, group: LayerGroup, tokens: int) -> int:
        return group.chunk_bytes(tokens)

    def encode(self, chunk: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> int:
        if chunk.nbytes != group.chunk_bytes(tokens):
            raise ValueError(f"{chunk.nbytes} bytes aren't a chunk of {tokens} tokens")
        into[: chunk.nbytes] = chunk
        return chunk.nbytes

    def decode(self, encoded: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> None:
        expected = group.chunk_bytes(tokens)
        if encoded.nbytes != expected:
            raise ValueError(
                f"a raw chunk of {tokens} tokens has {expected} bytes, not {encoded.nbytes}"
            )
        into[:expected] = encoded


def _create(config: RawConfig) -> RawSerde:  # noqa: ARG001  every serde's factory takes its config
    return RawSerde()


@hookimpl
def lmcache_serdes() -> list[SerdeDescriptor]:
    return [
        SerdeDescriptor(
            name="raw",
            summary="the chunk's own bytes, unchanged",
            lossless=True,
            config=RawConfig,
            create=_create,
            aliases=("naive",),
        )
    ]
