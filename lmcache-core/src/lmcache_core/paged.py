"""Connectors for KV that lies in paged tensors, and for KV that lies in one buffer.

`PagedConnector` is what engine integrations build on: they describe, kernels
move. `CanonicalBuffer` needs no torch: it is how an own application hands its
KV over. Knows shapes and strides; knows nothing about engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmcache_core.connector import (
    BlockSpan,
    EngineConnector,
    HostKernels,
    Kernels,
    PagedLayout,
    PlaneStrides,
)
from lmcache_core.errors import LayoutError
from lmcache_core.layout import LayerGroup

if TYPE_CHECKING:
    import torch
    from typing_extensions import Buffer


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

    ``buffer`` is whatever has Python's buffer protocol: a numpy array, a bytearray, a memoryview.
    ``kernels`` copy and make checksums faster than Python's own slices.

    Raises:
        ValueError: the buffer isn't contiguous or has another size.
    """

    def __init__(
        self,
        buffer: Buffer,
        group: LayerGroup,
        tokens: int,
        kernels: HostKernels | None = None,
    ) -> None:
        view = memoryview(buffer)
        if not view.c_contiguous or view.nbytes != group.chunk_bytes(tokens):
            raise ValueError(
                f"KV of {tokens} tokens must be a C-contiguous buffer of "
                f"{group.chunk_bytes(tokens)} bytes; this one has {view.nbytes}"
                + ("" if view.c_contiguous else " and isn't contiguous")
            )
        # Python casts no view that has a zero in its shape.
        self._view = view.cast("B") if view.nbytes else memoryview(bytearray())
        self._group = group
        self._tokens = tokens
        self._kernels = kernels

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        return (self._group,)

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
        for span, chunk in zip(spans, into, strict=True):
            for mine, theirs in self._pieces(span, layers):
                chunk[theirs] = self._view[mine]

    def scatter(
        self,
        sources: Sequence[memoryview],
        spans: Sequence[BlockSpan],
        layers: range | None = None,
    ) -> None:
        for span, chunk in zip(spans, sources, strict=True):
            for mine, theirs in self._pieces(span, layers):
                self._view[mine] = chunk[theirs]

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
        if tensor.element_size() != group.dtype.itemsize:
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
