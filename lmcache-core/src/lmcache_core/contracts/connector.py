"""The contract between lmcache-core and an inference engine's KV memory.

An engine keeps KV in paged blocks whose inner order is its own business; core
keeps chunks in one canonical order (see `layout`). A connector describes the
first and moves tokens between the two. Which tokens move where is decided by
`planner`; a connector knows nothing about keys, tiers or requests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from pydantic import BaseModel

from lmcache_core.chunks.checksums import layer_checksums
from lmcache_core.chunks.layout import LayerGroup

if TYPE_CHECKING:
    import torch
    from typing_extensions import Buffer


@dataclass(frozen=True)
class BlockSpan:
    """Part of one chunk, and where its tokens lie in the engine's memory.

    Token ``i`` of the span (``0 <= i < tokens``) is token ``chunk_offset + i`` of a chunk of
    ``chunk_tokens`` tokens, and lies at ``(first + i) % block_tokens`` of the engine block
    ``blocks[(first + i) // block_tokens]``.
    """

    blocks: Sequence[int]
    first: int
    tokens: int
    chunk_tokens: int
    chunk_offset: int = 0
    group: int = 0


@dataclass(frozen=True)
class PlaneStrides:
    """Where element (block, token, head, dim) of one plane lies, from the tensor's start.

    In elements: ``offset + block·B + token·T + head·H + dim·D``. That says everything about NHD,
    HND, vLLM's packed CPU blocks (K transposed inside a head) and MLA. A layout that can't be said
    so is refused by the connector, never approximated.
    """

    offset: int
    block: int
    token: int
    head: int
    dim: int


@dataclass(frozen=True)
class PagedLayout:
    """The inner order of one layer group's paged tensors, the same for all its layers."""

    group: LayerGroup
    blocks: int
    block_tokens: int
    planes: tuple[PlaneStrides, ...]


@dataclass(frozen=True)
class Paging:
    """How one layer group's memory is divided: blocks 0 … ``blocks - 1`` of ``block_tokens``."""

    blocks: int
    block_tokens: int


class EngineConnector(ABC):
    """Moves tokens between an engine's paged memory and canonical chunks.

    What core guarantees:

    * Buffers are contiguous memoryviews of format ``B`` that hold
      ``group.chunk_bytes(span.chunk_tokens)`` bytes; spans and buffers have the same length.
    * No two concurrent calls touch the same buffer or the same engine block unless both only read.
    * ``layers`` is a range of positions in ``LayerGroup.layers``, or ``None`` for all of them.

    What a connector owes:

    * Spans that it doesn't have (a block that isn't there, fewer blocks than tokens need, tokens
      before the first, outside of their chunk, or none), chunks of another size and chunks to be
      filled that are read-only raise before anything is copied.
    * When a call returns, the copy is complete and visible to the engine (`scatter`) or to the host
      (`gather`). Both may be called from any thread.
    * Bytes of a chunk outside its span stay as they are, and so do engine tokens outside of it.
    * An exception means that nothing can be said about the target; core treats all of it as failed.
    """

    @property
    @abstractmethod
    def groups(self) -> tuple[LayerGroup, ...]:
        """The layer groups of this rank, in the order of ``BlockSpan.group``."""

    @abstractmethod
    def gather(
        self,
        spans: Sequence[BlockSpan],
        into: Sequence[memoryview],
        layers: range | None = None,
    ) -> None:
        """Copy tokens from the engine's blocks into chunks."""

    @abstractmethod
    def scatter(
        self,
        sources: Sequence[memoryview],
        spans: Sequence[BlockSpan],
        layers: range | None = None,
    ) -> None:
        """Copy tokens from chunks into the engine's blocks."""

    def paging(self, group: int) -> Paging | None:  # noqa: ARG002 - a default
        """How layer group ``group`` is divided; ``None``: that isn't known here.

        It is compared with what callers of `Cache` name before anything is planned. Without it, a
        block that isn't there is a failed load, which its caller can't tell from a miss.
        """
        return None

    # What follows needn't be overridden: it is slower than checksums made in passing, that's all.

    def gather_checked(
        self,
        spans: Sequence[BlockSpan],
        into: Sequence[memoryview],
        layers: range | None = None,
    ) -> list[bytes]:
        """`gather`, and the checksums of those layers of each chunk: see `checksums`.

        No two spans may share a chunk. Checksums cover the whole chunk, also outside of its span.
        """
        self.gather(spans, into, layers)
        return self._checksums(spans, into, layers)

    def scatter_checked(
        self,
        sources: Sequence[memoryview],
        spans: Sequence[BlockSpan],
        layers: range | None,
        expected: Sequence[bytes],
    ) -> list[int]:
        """`scatter` what has the ``expected`` checksums; answer the positions of the others.

        What the others' tokens hold in the engine's memory afterwards is undefined.
        """
        found = self._checksums(spans, sources, layers)
        good = [i for i, sums in enumerate(found) if sums == expected[i]]
        if good:
            self.scatter([sources[i] for i in good], [spans[i] for i in good], layers)
        return [i for i, sums in enumerate(found) if sums != expected[i]]

    def _checksums(
        self, spans: Sequence[BlockSpan], chunks: Sequence[memoryview], layers: range | None
    ) -> list[bytes]:
        every = [range(len(group.layers)) for group in self.groups]
        return [
            layer_checksums(
                chunk, len(every[span.group]), every[span.group] if layers is None else layers
            )
            for span, chunk in zip(spans, chunks, strict=True)
        ]


class Kernels(Protocol):
    """What moves the bytes of one layer group: a torch reference, C++ on CPU, Triton on GPU.

    All implementations must match `lmcache_core.memory.reference` bit for bit.
    """

    name: str

    def gather(
        self,
        tensors: Sequence[torch.Tensor],
        layout: PagedLayout,
        spans: Sequence[BlockSpan],
        into: Sequence[memoryview],
        layers: range,
    ) -> None:
        """``tensors[i]`` holds the layer at position ``i`` of ``layout.group.layers``."""

    def scatter(
        self,
        sources: Sequence[memoryview],
        tensors: Sequence[torch.Tensor],
        layout: PagedLayout,
        spans: Sequence[BlockSpan],
        layers: range,
    ) -> None:
        """The inverse of `gather`."""


@runtime_checkable
class HostKernels(Kernels, Protocol):
    """Kernels for host memory that make checksums in passing.

    ``tensors`` may be plain C-contiguous buffers too: memory is memory. Checksums are those of
    `lmcache_core.chunks.checksums`.
    """

    def gather_checked(
        self,
        tensors: Sequence[torch.Tensor] | Sequence[Buffer],
        layout: PagedLayout,
        spans: Sequence[BlockSpan],
        into: Sequence[memoryview],
        layers: range,
    ) -> list[bytes]:
        """See `EngineConnector.gather_checked`."""

    def scatter_checked(
        self,
        sources: Sequence[memoryview],
        tensors: Sequence[torch.Tensor] | Sequence[Buffer],
        layout: PagedLayout,
        spans: Sequence[BlockSpan],
        layers: range,
        expected: Sequence[bytes],
    ) -> list[int]:
        """See `EngineConnector.scatter_checked`."""

    def checksums(self, buffer: memoryview, pieces: int) -> bytes:
        """See `lmcache_core.chunks.checksums.checksums`."""


@dataclass(frozen=True, kw_only=True)
class EngineConnectorDescriptor:
    """What a plugin says about its engine integration.

    ``create`` makes a connector for own applications and the standalone service, which choose it
    by ``engine_connector: NAME``; ``None`` where only the engine itself can make one.
    """

    name: str
    summary: str
    config: type[BaseModel]
    create: Callable[[Any], EngineConnector] | None = None
