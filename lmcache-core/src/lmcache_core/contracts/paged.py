"""Connectors for KV that lies in paged tensors, and for KV that lies in one buffer.

`PagedConnector` is what engine integrations build on: they describe, kernels
move. `CanonicalBuffer` needs no torch: it is how an own application hands its
KV over. `Paged` names blocks of either for one call. Knows shapes and strides;
knows nothing about engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import TYPE_CHECKING

from lmcache_core.chunks.layout import LayerGroup
from lmcache_core.contracts.buffers import carries, kv_memory
from lmcache_core.contracts.connector import (
    BlockSpan,
    EngineConnector,
    HostKernels,
    Kernels,
    PagedLayout,
    Paging,
    PlaneStrides,
)
from lmcache_core.errors import LayoutError

if TYPE_CHECKING:
    import torch
    from typing_extensions import Buffer


@dataclass(frozen=True)
class Paged:
    """KV that lies in paged blocks: token ``i`` is at ``first + i`` of the concatenated blocks.

    ``block_tokens`` is the engine's. Blocks are distinct, and reach as far as whole chunks do.
    """

    engine: EngineConnector
    blocks: Sequence[int]
    block_tokens: int
    first: int = 0

    def checked(self, group: LayerGroup, tokens: int) -> Paged:
        """The same, with the blocks that ``tokens`` tokens of ``group`` lie in, if they are there.

        Raises:
            TypeError: a number isn't an integer.
            ValueError: these aren't blocks for so many tokens, or not of this engine.
            IndexError: the engine has no such block.
        """
        first, size = _integer("first", self.first), _integer("block_tokens", self.block_tokens)
        try:
            blocks = list(map(index, self.blocks))
        except TypeError as error:
            raise TypeError(
                f"Paged.blocks = {self.blocks!r:.80} aren't integers: {error}"
            ) from None
        if first < 0 or size < 1:
            raise ValueError(
                f"Paged.first = {first} and block_tokens = {size}: tokens begin at 0 or later, in "
                "blocks of at least one token"
            )
        theirs = next(iter(self.engine.groups), None)
        if theirs is None or _shape(theirs) != _shape(group):
            raise ValueError(
                f"Paged.engine keeps {theirs}, this cache {group}: open it with the engine's layout"
            )
        paging = self.engine.paging(0)
        if paging is not None and paging.block_tokens != size:
            raise ValueError(
                f"Paged.block_tokens = {size}, but the engine's blocks have {paging.block_tokens}"
            )
        needed = -(-(first + tokens) // size) if tokens else 0
        if len(blocks) < needed:
            raise ValueError(
                f"Paged.blocks names {len(blocks)} blocks of {size} tokens; {tokens} tokens from "
                f"{first} on need {needed}"
            )
        used = blocks[first // size : needed]
        if used and (min(used) < 0 or (paging is not None and max(used) >= paging.blocks)):
            there = "from 0 on" if paging is None else f"0 to {paging.blocks - 1}"
            wrong = min(used) if min(used) < 0 else max(used)
            raise IndexError(f"Paged.blocks names block {wrong}; the engine has blocks {there}")
        if len(set(used)) != len(used):
            twice = next(block for block in used if used.count(block) > 1)
            raise ValueError(f"Paged.blocks names block {twice} twice; each holds other tokens")
        return replace(self, blocks=blocks, block_tokens=size, first=first)

    def span(self, chunk: int, chunk_tokens: int) -> BlockSpan:
        """Where the chunk of that number lies."""
        begin = self.first + chunk * chunk_tokens
        first, last = begin // self.block_tokens, begin + chunk_tokens - 1
        return BlockSpan(
            blocks=self.blocks[first : last // self.block_tokens + 1],
            first=begin - first * self.block_tokens,
            tokens=chunk_tokens,
            chunk_tokens=chunk_tokens,
        )


def _integer(name: str, value: object) -> int:
    try:
        return index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"Paged.{name} = {value!r} isn't an integer") from None


def _shape(group: LayerGroup) -> tuple[object, ...]:
    return len(group.layers), group.planes, group.heads, group.head_size, group.dtype


class PagedConnector(EngineConnector):
    """Blocks in tensors: ``tensors[g][i]`` holds layer ``i`` of group ``g``.

    Raises:
        LayoutError: the layouts, the tensors and the groups contradict each other. Honouring such
            a layout would read and write wrong memory.
    """

    def __init__(
        self,
        layouts: Sequence[PagedLayout],
        tensors: Sequence[Sequence[torch.Tensor]],
        kernels: Kernels,
    ) -> None:
        if len(layouts) != len(tensors):
            raise LayoutError(f"{len(layouts)} layouts for {len(tensors)} groups of tensors")
        for layout, layers in zip(layouts, tensors, strict=True):
            _check(layout, layers)
        self._layouts = tuple(layouts)
        self._tensors = tuple(tuple(layers) for layers in tensors)
        self._kernels = kernels

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        return tuple(layout.group for layout in self._layouts)

    def paging(self, group: int) -> Paging:
        layout = self._layouts[group]
        return Paging(layout.blocks, layout.block_tokens)

    def gather(
        self,
        spans: Sequence[BlockSpan],
        into: Sequence[memoryview],
        layers: range | None = None,
    ) -> None:
        for group, places in self._by_group(spans):
            layout = self._layouts[group]
            self._kernels.gather(
                self._tensors[group],
                layout,
                [spans[i] for i in places],
                [into[i] for i in places],
                _chosen(layout, layers),
            )

    def scatter(
        self,
        sources: Sequence[memoryview],
        spans: Sequence[BlockSpan],
        layers: range | None = None,
    ) -> None:
        for group, places in self._by_group(spans):
            layout = self._layouts[group]
            self._kernels.scatter(
                [sources[i] for i in places],
                self._tensors[group],
                layout,
                [spans[i] for i in places],
                _chosen(layout, layers),
            )

    def gather_checked(
        self,
        spans: Sequence[BlockSpan],
        into: Sequence[memoryview],
        layers: range | None = None,
    ) -> list[bytes]:
        if not isinstance(self._kernels, HostKernels):
            return super().gather_checked(spans, into, layers)
        found = [b""] * len(spans)
        for group, places in self._by_group(spans):
            layout = self._layouts[group]
            sums = self._kernels.gather_checked(
                self._tensors[group],
                layout,
                [spans[i] for i in places],
                [into[i] for i in places],
                _chosen(layout, layers),
            )
            for i, one in zip(places, sums, strict=True):
                found[i] = one
        return found

    def scatter_checked(
        self,
        sources: Sequence[memoryview],
        spans: Sequence[BlockSpan],
        layers: range | None,
        expected: Sequence[bytes],
    ) -> list[int]:
        if not isinstance(self._kernels, HostKernels):
            return super().scatter_checked(sources, spans, layers, expected)
        bad: list[int] = []
        for group, places in self._by_group(spans):
            layout = self._layouts[group]
            found = self._kernels.scatter_checked(
                [sources[i] for i in places],
                self._tensors[group],
                layout,
                [spans[i] for i in places],
                _chosen(layout, layers),
                [expected[i] for i in places],
            )
            bad += [places[i] for i in found]
        return sorted(bad)

    def _by_group(self, spans: Sequence[BlockSpan]) -> list[tuple[int, list[int]]]:
        """The spans' positions, by layer group."""
        places: dict[int, list[int]] = {}
        for i, span in enumerate(spans):
            if not 0 <= span.group < len(self._layouts):
                raise IndexError(f"{span}: there are {len(self._layouts)} layer groups")
            places.setdefault(span.group, []).append(i)
        return list(places.items())


class CanonicalBuffer(EngineConnector):
    """One contiguous buffer: layers x planes x ``tokens`` x heads x head_size, as one block.

    ``buffer`` is whatever has Python's buffer protocol (a numpy array, a bytearray, a memoryview),
    or a torch tensor in host memory. Its elements are those of the group's dtype, or carry their
    bits: bytes, or integers of the same size (``uint16`` for BF16 and F16, ``uint8`` for F8).
    ``kernels`` copy and make checksums faster than Python's own slices. ``writable``: it is going
    to be scattered to.

    Raises:
        TypeError: this is no memory.
        ValueError: it isn't contiguous, has another size, shape or type, or is read-only though it
            mustn't be.
    """

    def __init__(
        self,
        buffer: Buffer,
        group: LayerGroup,
        tokens: int,
        kernels: HostKernels | None = None,
        *,
        writable: bool = False,
    ) -> None:
        self._view = kv_memory(buffer, group, tokens, writable=writable)
        self._group = group
        self._tokens = tokens
        self._kernels = kernels

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        return (self._group,)

    def paging(self, group: int) -> Paging:  # noqa: ARG002 - there is one group
        return Paging(1, self._tokens)

    def gather_checked(
        self,
        spans: Sequence[BlockSpan],
        into: Sequence[memoryview],
        layers: range | None = None,
    ) -> list[bytes]:
        if self._kernels is None or not self._tokens:
            return super().gather_checked(spans, into, layers)
        layout = self._layout()
        return self._kernels.gather_checked(
            self._layers(), layout, spans, into, _chosen(layout, layers)
        )

    def scatter_checked(
        self,
        sources: Sequence[memoryview],
        spans: Sequence[BlockSpan],
        layers: range | None,
        expected: Sequence[bytes],
    ) -> list[int]:
        self._check_writable()
        if self._kernels is None or not self._tokens:
            return super().scatter_checked(sources, spans, layers, expected)
        layout = self._layout()
        return self._kernels.scatter_checked(
            sources, self._layers(), layout, spans, _chosen(layout, layers), expected
        )

    def _layout(self) -> PagedLayout:
        """What this buffer looks like to kernels: a layer is one block."""
        group = self._group
        row = group.heads * group.head_size
        planes = tuple(
            PlaneStrides(plane * self._tokens * row, 0, row, group.head_size, 1)
            for plane in range(group.planes)
        )
        return PagedLayout(group, 1, self._tokens, planes)

    def _layers(self) -> list[memoryview]:
        size = self._group.layer_token_bytes * self._tokens
        return [self._view[i * size : (i + 1) * size] for i in range(len(self._group.layers))]

    def gather(
        self,
        spans: Sequence[BlockSpan],
        into: Sequence[memoryview],
        layers: range | None = None,
    ) -> None:
        for chunk in into:
            if chunk.readonly:
                raise ValueError("a chunk that is read-only can't be filled")
        for chunk, pieces in self._moves(spans, into, layers):
            for mine, theirs in pieces:
                chunk[theirs] = self._view[mine]

    def scatter(
        self,
        sources: Sequence[memoryview],
        spans: Sequence[BlockSpan],
        layers: range | None = None,
    ) -> None:
        self._check_writable()
        for chunk, pieces in self._moves(spans, sources, layers):
            for mine, theirs in pieces:
                self._view[mine] = chunk[theirs]

    def _check_writable(self) -> None:
        if self._view.readonly:
            raise ValueError("this buffer is read-only, nothing can be scattered to it")

    def _moves(
        self, spans: Sequence[BlockSpan], chunks: Sequence[memoryview], layers: range | None
    ) -> list[tuple[memoryview, list[tuple[slice, slice]]]]:
        """Each chunk and its pieces: all are checked before the first is moved."""
        moves = []
        for span, chunk in zip(spans, chunks, strict=True):
            size = self._group.chunk_bytes(span.chunk_tokens)
            if chunk.nbytes != size:
                raise ValueError(
                    f"a chunk of {span.chunk_tokens} tokens has {size} bytes, the buffer "
                    f"{chunk.nbytes}"
                )
            moves.append((chunk, self._pieces(span, layers)))
        return moves

    def _pieces(self, span: BlockSpan, layers: range | None) -> list[tuple[slice, slice]]:
        """For each layer and plane: the span's bytes here and in the chunk."""
        group = self._group
        if span.group or list(span.blocks) != [0]:
            raise IndexError(f"{span}: there is one layer group, and one block, number 0")
        if not 0 <= span.first < span.first + span.tokens <= self._tokens:
            raise ValueError(f"{span} doesn't lie inside the buffer's {self._tokens} tokens")
        if not 0 <= span.chunk_offset <= span.chunk_tokens - span.tokens:
            raise ValueError(f"{span} doesn't lie inside its chunk")
        row = group.heads * group.head_size * group.dtype.itemsize
        pieces = []
        for layer in layers if layers is not None else range(len(group.layers)):
            if not 0 <= layer < len(group.layers):
                raise IndexError(f"there is no layer {layer} among {len(group.layers)}")
            for plane in range(group.planes):
                index = layer * group.planes + plane
                here = (index * self._tokens + span.first) * row
                there = (index * span.chunk_tokens + span.chunk_offset) * row
                size = span.tokens * row
                pieces.append((slice(here, here + size), slice(there, there + size)))
        return pieces


def _chosen(layout: PagedLayout, layers: range | None) -> range:
    return range(len(layout.group.layers)) if layers is None else layers


def _check(layout: PagedLayout, tensors: Sequence[torch.Tensor]) -> None:
    """Refuse a layout that doesn't lie inside its tensors."""
    group = layout.group
    if len(layout.planes) != group.planes or len(tensors) != len(group.layers):
        raise LayoutError(
            f"{len(tensors)} tensors of {len(layout.planes)} planes for a group of "
            f"{len(group.layers)} layers and {group.planes} planes"
        )
    counts = (layout.blocks, layout.block_tokens, group.heads, group.head_size)
    for tensor in tensors:
        if not carries(tensor.dtype, group.dtype):
            raise LayoutError(f"a tensor of {tensor.dtype} doesn't hold {group.dtype.value}")
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        for plane in layout.planes:
            steps = (plane.block, plane.token, plane.head, plane.dim)
            reach = plane.offset + sum((n - 1) * s for n, s in zip(counts, steps, strict=True))
            if min(plane.offset, *steps) < 0 or min(counts) < 1 or reach > last:
                raise LayoutError(
                    f"{plane} of {layout.blocks} blocks x {layout.block_tokens} tokens reaches "
                    f"element {reach}; the tensor of shape {tuple(tensor.shape)} and stride "
                    f"{tuple(tensor.stride())} ends at {last}"
                )
