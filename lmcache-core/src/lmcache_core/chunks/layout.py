"""The byte layout of one chunk of KV cache.

Knows shapes, dtypes and sizes. Knows nothing about engines, which lay their
own memory out otherwise (see `connector`), nor about where chunks are kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from itertools import pairwise

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
    """Layers whose cache has one shape, and the part of it that lies here.

    A chunk of this group is ``layers x planes x tokens x heads x head_size``
    elements, in that order, with no padding: a layer is a contiguous range.
    ``planes`` is 2 for separate K and V and 1 for MLA's latent, ``layers`` are
    the model's own numbers. A rank or a pipeline stage has some of the heads or
    layers: ``heads`` of ``model_heads`` from number ``first_head`` on.

    Raises:
        LayoutError: a count isn't positive, ``planes`` contradicts ``kind``, layers aren't in
            order, or there are heads that the model doesn't have.
    """

    layers: tuple[int, ...]
    kind: AttentionKind
    planes: int
    heads: int
    head_size: int
    dtype: DType
    window_tokens: int | None = None
    first_head: int = 0
    model_heads: int = 0
    """KV heads of the model; 0 becomes ``heads``: all of them are here."""

    def __post_init__(self) -> None:
        if not self.layers or min(self.planes, self.heads, self.head_size) < 1:
            raise LayoutError(f"a layer group needs layers and positive sizes, not {self}")
        if self.layers[0] < 0 or any(a >= b for a, b in pairwise(self.layers)):
            raise LayoutError(f"layers are numbers in ascending order, not {self.layers}")
        if not self.model_heads:
            object.__setattr__(self, "model_heads", self.heads)
        if self.first_head < 0 or self.first_head + self.heads > self.model_heads:
            raise LayoutError(
                f"{self.heads} KV heads from number {self.first_head} on aren't among a model's "
                f"{self.model_heads}"
            )
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

    def for_rank(self, rank: int, ranks: int) -> LayerGroup:
        """The heads that one of ``ranks`` tensor-parallel ranks has, as every engine deals them.

        An equal run for each rank, in their order; with more ranks than heads, a head for each run
        of ranks. MLA's latent, one head, is on all of them.

        Raises:
            LayoutError: they can't be dealt out evenly, or there is no such rank.
        """
        if not 0 <= rank < ranks:
            raise LayoutError(f"there is no rank {rank} of {ranks}")
        if self.model_heads % ranks and ranks % self.model_heads:
            raise LayoutError(
                f"{self.model_heads} KV heads can't be dealt out evenly to {ranks} ranks"
            )
        count = max(1, self.model_heads // ranks)
        return replace(self, heads=count, first_head=rank * self.model_heads // ranks)


@dataclass(frozen=True)
class KVLayout:
    """The layout of a cache, a whole model's or one rank's: the groups that every chunk has.

    The first group is the one that hits are counted by: that of full attention or MLA, where a
    model has such layers. Layers that have all but their numbers in common are one group.

    Raises:
        LayoutError: there are no tokens or groups, or two groups that are one.
    """

    tokens_per_chunk: int
    groups: tuple[LayerGroup, ...]

    def __post_init__(self) -> None:
        if self.tokens_per_chunk < 1 or not self.groups:
            raise LayoutError("a layout needs at least one token a chunk and one layer group")
        shapes = {replace(group, layers=(0,)) for group in self.groups}
        if len(shapes) < len(self.groups):
            raise LayoutError("layer groups that differ in their layers only must be one group")

    def chunk_bytes(self, group: int = 0) -> int:
        """Bytes of a full chunk of layer group ``group``."""
        return self.groups[group].chunk_bytes(self.tokens_per_chunk)

    def for_rank(self, rank: int, ranks: int) -> KVLayout:
        """The layout of one of ``ranks`` tensor-parallel ranks: see `LayerGroup.for_rank`."""
        return replace(self, groups=tuple(group.for_rank(rank, ranks) for group in self.groups))


def full_attention(*, layers: int, heads: int, head_size: int, dtype: DType) -> LayerGroup:
    """The layer group of a model whose ``layers`` layers all keep K and V of every token.

    ``heads`` are the model's KV heads; `LayerGroup.for_rank` says which of them a rank has.
    """
    return LayerGroup(tuple(range(layers)), AttentionKind.FULL, 2, heads, head_size, dtype)


def mla(*, layers: int, latent_size: int, dtype: DType) -> LayerGroup:
    """The layer group of a model with multi-head latent attention (DeepSeek-V2, arXiv 2405.04434):
    one latent vector of ``latent_size`` elements (with its RoPE part) a token and layer."""
    return LayerGroup(tuple(range(layers)), AttentionKind.MLA, 1, 1, latent_size, dtype)
