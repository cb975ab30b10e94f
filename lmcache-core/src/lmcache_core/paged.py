"""Connectors for KV that lies in paged tensors, and for KV that lies in one buffer.

`PagedConnector` is what engine integrations build on: they describe, kernels
move. `CanonicalBuffer` needs no torch: it is how an own application hands its
KV over. Knows shapes and strides; knows nothing about engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmcache_core.connector import BlockSpan, EngineConnector, Kernels, PagedLayout
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
        for group, own_spans, buffers in self._by_group(spans, into):
            layout = self._layouts[group]
            chosen = range(len(layout.group.layers)) if layers is None else layers
            self._kernels.gather(self._tensors[group], layout, own_spans, buffers, chosen)

    def scatter(
        self,
        sources: Sequence[memoryview],
        spans: Sequence[BlockSpan],
        layers: range | None = None,
    ) -> None:
        for group, own_spans, buffers in self._by_group(spans, sources):
            layout = self._layouts[group]
            chosen = range(len(layout.group.layers)) if layers is None else layers
            self._kernels.scatter(buffers, self._tensors[group], layout, own_spans, chosen)

    def _by_group(
        self, spans: Sequence[BlockSpan], buffers: Sequence[memoryview]
    ) -> list[tuple[int, list[BlockSpan], list[memoryview]]]:
        sorted_out: dict[int, tuple[list[BlockSpan], list[memoryview]]] = {}
        for span, buffer in zip(spans, buffers, strict=True):
            if not 0 <= span.group < len(self._layouts):
                raise IndexError(f"{span}: there are {len(self._layouts)} layer groups")
            own = sorted_out.setdefault(span.group, ([], []))
            own[0].append(span)
            own[1].append(buffer)
        return [(group, *own) for group, own in sorted_out.items()]


class CanonicalBuffer(EngineConnector):
    """One contiguous buffer: layers x planes x ``tokens`` x heads x head_size, as one block.

    ``buffer`` is whatever has Python's buffer protocol: a numpy array, a bytearray, a memoryview.

    Raises:
        ValueError: the buffer isn't contiguous or has another size.
    """

    def __init__(self, buffer: Buffer, group: LayerGroup, tokens: int) -> None:
        view = memoryview(buffer)
        if not view.c_contiguous or view.nbytes != group.chunk_bytes(tokens):
            raise ValueError(
                f"KV of {tokens} tokens must be a C-contiguous buffer of "
                f"{group.chunk_bytes(tokens)} bytes; this one has {view.nbytes}"
                + ("" if view.c_contiguous else " and isn't contiguous")
            )
        self._view = view.cast("B")
        self._group = group
        self._tokens = tokens

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        return (self._group,)

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
