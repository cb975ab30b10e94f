"""Gather and scatter on the CPU, in C++, with checksums made in passing.

Knows tensors only by their addresses: `data_ptr()`, element size, bytes that
are left in their storage. That is all that ties this package to torch, so one
build serves every torch release. What may be moved where is checked in C++
before anything is touched.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmcache_core.connector import BlockSpan, PagedLayout
from lmcache_kernels import _native

if TYPE_CHECKING:
    import torch

DEFAULT_THREADS = 2
"""Two cores saturate the memory of most machines, and the engine wants the others."""


def usable_cpus() -> int:
    """How many CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class CpuKernels:
    """`lmcache_core.connector.Kernels` for tensors in host memory.

    ``threads`` counts the calling thread; ``simd`` is one of ``_native.simd_levels()``. Threads
    start with the first big copy and wait in between. Calls may come from any thread.

    Checksums are of canonical bytes: the XXH3-64 of each layer, and for a chunk the XXH3-64 of its
    layers' checksums, each as eight little-endian bytes. So threads can share a chunk, and what is
    stored layer by layer can be checked too. They cover the layers that a call names, and whole
    chunks: also tokens outside of the span.
    """

    name = "native-cpu"

    def __init__(self, threads: int | None = None, simd: str | None = None) -> None:
        if threads is None:
            threads = min(DEFAULT_THREADS, usable_cpus())
        self._engine = _native.Engine(threads, simd)

    @property
    def threads(self) -> int:
        """Threads that a call may use, its own among them."""
        return self._engine.threads

    @property
    def simd(self) -> str:
        """The instruction set that is used."""
        return self._engine.simd

    def gather(
        self,
        tensors: Sequence[torch.Tensor],
        layout: PagedLayout,
        spans: Sequence[BlockSpan],
        into: Sequence[memoryview],
        layers: range,
    ) -> None:
        """See `Kernels.gather`. Nothing is copied if any argument is wrong.

        Raises:
            IndexError: a span names a block, or ``layers`` a layer, that isn't there.
            ValueError: a span, a buffer or a tensor contradicts the layout.
            BufferError: a buffer can't be written to.
        """
        addresses = _addresses(tensors, layout, layers)
        self._engine.gather(_layout(layout), addresses, spans, into, sums=False)

    def scatter(
        self,
        sources: Sequence[memoryview],
        tensors: Sequence[torch.Tensor],
        layout: PagedLayout,
        spans: Sequence[BlockSpan],
        layers: range,
    ) -> None:
        """See `Kernels.scatter`. Raises as `gather` does."""
        addresses = _addresses(tensors, layout, layers)
        self._engine.scatter(
            sources, _layout(layout), addresses, spans, expected=None, verify_first=False
        )

    def gather_checksummed(
        self,
        tensors: Sequence[torch.Tensor],
        layout: PagedLayout,
        spans: Sequence[BlockSpan],
        into: Sequence[memoryview],
        layers: range,
    ) -> list[int]:
        """`gather`, and the checksum of each chunk. No two spans may share a chunk."""
        sums = self.gather_layer_sums(tensors, layout, spans, into, layers)
        return [_native.xxh3_64(one) for one in sums]

    def gather_layer_sums(
        self,
        tensors: Sequence[torch.Tensor],
        layout: PagedLayout,
        spans: Sequence[BlockSpan],
        into: Sequence[memoryview],
        layers: range,
    ) -> list[bytes]:
        """`gather`, and for each chunk the checksums of the layers, eight bytes each.

        For those who store layer by layer: a chunk's checksum is `checksum_of` all of them.
        """
        addresses = _addresses(tensors, layout, layers)
        sums = self._engine.gather(_layout(layout), addresses, spans, into, sums=True)
        return sums or []

    def scatter_verified(
        self,
        sources: Sequence[memoryview],
        tensors: Sequence[torch.Tensor],
        layout: PagedLayout,
        spans: Sequence[BlockSpan],
        layers: range,
        expected: Sequence[int],
        *,
        verify_first: bool = True,
    ) -> list[int]:
        """`scatter` the chunks whose checksum is as ``expected``; answer the others' positions.

        With ``verify_first`` nothing of the others is scattered, which means that each chunk is
        read twice. Without, chunks are checked in passing, at the speed of a copy, and what the
        others' tokens hold in the engine afterwards is undefined: for engines that compute such
        tokens anew, and have to anyway.
        """
        addresses = _addresses(tensors, layout, layers)
        return self._engine.scatter(
            sources, _layout(layout), addresses, spans, expected, verify_first
        )


def checksum_of(layer_sums: bytes) -> int:
    """The checksum of a chunk, given those of all its layers, in their order."""
    return _native.xxh3_64(layer_sums)


def _layout(layout: PagedLayout) -> _native.Layout:
    group = layout.group
    if len(layout.planes) != group.planes:
        raise ValueError(f"{len(layout.planes)} planes contradict a group of {group.planes} planes")
    return _native.Layout(
        len(group.layers),
        group.dtype.itemsize,
        layout.blocks,
        layout.block_tokens,
        group.heads,
        group.head_size,
        [(p.offset, p.block, p.token, p.head, p.dim) for p in layout.planes],
    )


def _addresses(
    tensors: Sequence[torch.Tensor], layout: PagedLayout, layers: range
) -> list[tuple[int, int, int]]:
    """(position, address, bytes from there to the storage's end) of each layer."""
    group, itemsize = layout.group, layout.group.dtype.itemsize
    if len(tensors) != len(group.layers):
        raise ValueError(f"{len(tensors)} tensors contradict a group of {len(group.layers)} layers")
    found = []
    for position in layers:
        if not 0 <= position < len(tensors):
            raise IndexError(f"there is no layer {position} among {len(tensors)}")
        tensor = tensors[position]
        if tensor.element_size() != itemsize:
            raise ValueError(f"a tensor of {tensor.dtype} doesn't hold {group.dtype.value}")
        if not tensor.is_cpu:
            raise ValueError(f"a tensor on {tensor.device} isn't in host memory")
        room = tensor.untyped_storage().nbytes() - tensor.storage_offset() * itemsize
        found.append((position, tensor.data_ptr(), room))
    return found
