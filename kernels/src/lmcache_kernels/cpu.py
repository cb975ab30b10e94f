"""Gather and scatter on the CPU, in C++, with checksums made in passing.

Knows tensors only by their addresses: `data_ptr()`, element size, bytes that
are left in their storage. That is all that ties this package to torch, so one
build serves every torch release. What may be moved where is checked in C++
before anything is touched.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lmcache_core import BlockSpan, PagedLayout
from lmcache_kernels import _native

if TYPE_CHECKING:
    import torch
    from typing_extensions import Buffer

    Memory = Sequence[torch.Tensor] | Sequence[Buffer]

DEFAULT_THREADS = 2
"""Two cores saturate the memory of most machines, and the engine wants the others."""


def usable_cpus() -> int:
    """How many CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class CpuKernels:
    """`lmcache_core.contracts.connector.HostKernels`, for tensors in host memory.

    ``threads`` counts the calling thread; ``simd`` is one of ``_native.simd_levels()``. Threads
    start with the first big copy and wait in between. Calls may come from any thread.

    ``tensors`` are torch's or plain C-contiguous buffers. Checksums are those of
    `lmcache_core.chunks.checksums`, one for each layer, so that threads can share a chunk. They
    cover the layers that a call names, and whole chunks: also tokens outside of the span.
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
        tensors: Memory,
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
        addresses, _held = _addresses(tensors, layout, layers, writable=False)
        self._engine.gather(_layout(layout), addresses, spans, into, sums=False)

    def scatter(
        self,
        sources: Sequence[memoryview],
        tensors: Memory,
        layout: PagedLayout,
        spans: Sequence[BlockSpan],
        layers: range,
    ) -> None:
        """See `Kernels.scatter`. Raises as `gather` does; the tensors may be what is read-only."""
        addresses, _held = _addresses(tensors, layout, layers, writable=True)
        self._engine.scatter(sources, _layout(layout), addresses, spans, expected=None)

    def gather_checked(
        self,
        tensors: Memory,
        layout: PagedLayout,
        spans: Sequence[BlockSpan],
        into: Sequence[memoryview],
        layers: range,
    ) -> list[bytes]:
        """`gather`, and the checksums of each chunk's layers. No two spans may share a chunk."""
        addresses, _held = _addresses(tensors, layout, layers, writable=False)
        sums = self._engine.gather(_layout(layout), addresses, spans, into, sums=True)
        return sums or []

    def scatter_checked(
        self,
        sources: Sequence[memoryview],
        tensors: Memory,
        layout: PagedLayout,
        spans: Sequence[BlockSpan],
        layers: range,
        expected: Sequence[bytes],
    ) -> list[int]:
        """`scatter`, and the positions of chunks whose checksums aren't as ``expected``.

        Checked in passing, at the speed of a copy: what the tokens of those chunks hold in the
        engine afterwards is undefined. An engine computes such tokens anew, and has to anyway.
        """
        addresses, _held = _addresses(tensors, layout, layers, writable=True)
        return self._engine.scatter(sources, _layout(layout), addresses, spans, expected)

    def checksums(self, buffer: memoryview, pieces: int) -> bytes:
        """See `HostKernels.checksums`."""
        return self._engine.checksums(buffer, pieces)


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
    tensors: Memory, layout: PagedLayout, layers: range, *, writable: bool
) -> tuple[list[tuple[int, int, int]], list[memoryview]]:
    """(position, address, bytes from there to the storage's end) of each layer.

    And what keeps those addresses: a bytearray mustn't be resized while it is copied to.
    """
    group, itemsize = layout.group, layout.group.dtype.itemsize
    if len(tensors) != len(group.layers):
        raise ValueError(f"{len(tensors)} tensors contradict a group of {len(group.layers)} layers")
    found, held = [], []
    for position in layers:
        if not 0 <= position < len(tensors):
            raise IndexError(f"there is no layer {position} among {len(tensors)}")
        tensor: Any = tensors[position]
        if not hasattr(tensor, "data_ptr"):  # anything but torch's
            view = memoryview(tensor)
            if view.itemsize not in (1, itemsize):
                raise ValueError(
                    f"a buffer of {view.itemsize}-byte elements doesn't hold {group.dtype.value}"
                )
            held.append(view)
            found.append((position, *_native.address_of(view, writable)))
            continue
        if tensor.element_size() != itemsize:
            raise ValueError(f"a tensor of {tensor.dtype} doesn't hold {group.dtype.value}")
        if not tensor.is_cpu:
            raise ValueError(f"a tensor on {tensor.device} isn't in host memory")
        room = tensor.untyped_storage().nbytes() - tensor.storage_offset() * itemsize
        found.append((position, tensor.data_ptr(), room))
    return found, held
