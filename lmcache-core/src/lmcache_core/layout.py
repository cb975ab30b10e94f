"""The byte layout of one chunk of KV cache.

Knows shapes, dtypes and sizes. Knows nothing about engines, which lay their
own memory out otherwise (see `connector`), nor about where chunks are kept.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from lmcache_core.errors import LayoutError


class DType(str, Enum):
    """Element types, named as safetensors names them."""

    BF16 = "BF16"
    F16 = "F16"
    F32 = "F32"
    F8_E4M3 = "F8_E4M3"
    F8_E5M2 = "F8_E5M2"
    U8 = "U8"

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return {"BF16": 2, "F16": 2, "F32": 4}.get(self.value, 1)


class AttentionKind(str, Enum):
    """How one layer group remembers the past."""

    FULL = "full"
    SLIDING_WINDOW = "sliding_window"
    MLA = "mla"
    STATE = "state"


@dataclass(frozen=True)
class LayerGroup:
    """Layers whose cache has one shape.

    A chunk of this group is ``layers x planes x tokens x heads x head_size``
    elements, in that order, with no padding: a layer is a contiguous range.
    ``planes`` is 2 for separate K and V and 1 for MLA's latent.

    Raises:
        LayoutError: a count isn't positive, or ``planes`` contradicts ``kind``.
    """

    layers: tuple[int, ...]
    kind: AttentionKind
    planes: int
    heads: int
    head_size: int
    dtype: DType
    window_tokens: int | None = None

    def __post_init__(self) -> None:
        if not self.layers or min(self.planes, self.heads, self.head_size) < 1:
            raise LayoutError(f"a layer group needs layers and positive sizes, not {self}")
        planes = {AttentionKind.MLA: 1, AttentionKind.STATE: self.planes}.get(self.kind, 2)
        if self.planes != planes:
            raise LayoutError(f"{self.kind.value} attention can't have {self.planes} planes")
        if (self.window_tokens is not None) != (self.kind is AttentionKind.SLIDING_WINDOW):
            raise LayoutError("window_tokens goes with kind sliding_window, and only with it")

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes over all layers of the group."""
        return self.layer_token_bytes * len(self.layers)

    @property
    def layer_token_bytes(self) -> int:
        """Bytes that one token takes in one layer, over all planes."""
        return self.planes * self.heads * self.head_size * self.dtype.itemsize

    def chunk_bytes(self, tokens: int) -> int:
        """Bytes of a chunk of ``tokens`` tokens."""
        return self.token_bytes * tokens


@dataclass(frozen=True)
class KVLayout:
    """The layout of one rank's cache: the groups that every chunk has."""

    tokens_per_chunk: int
    groups: tuple[LayerGroup, ...]

    def __post_init__(self) -> None:
        if self.tokens_per_chunk < 1 or not self.groups:
            raise LayoutError("a layout needs at least one token a chunk and one layer group")

    def chunk_bytes(self, group: int = 0) -> int:
        """Bytes of a full chunk of layer group ``group``."""
        return self.groups[group].chunk_bytes(self.tokens_per_chunk)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for fingerprints and for showing."""
        return asdict(self)


def full_attention(*, layers: int, heads: int, head_size: int, dtype: DType) -> LayerGroup:
    """The layer group of a model whose ``layers`` layers all keep K and V of every token.

    ``heads`` are the KV heads of one tensor-parallel rank.
    """
    return LayerGroup(tuple(range(layers)), AttentionKind.FULL, 2, heads, head_size, dtype)


def mla(*, layers: int, latent_size: int, dtype: DType) -> LayerGroup:
    """The layer group of a model with multi-head latent attention (DeepSeek-V2, arXiv 2405.04434):
    one latent vector of ``latent_size`` elements (with its RoPE part) a token and layer."""
    return LayerGroup(tuple(range(layers)), AttentionKind.MLA, 1, 1, latent_size, dtype)
