"""What this distribution tells lmcache-core.

Imports neither torch nor triton, until an engine asks for kernels for its GPU.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from lmcache_core import CachePolicyDescriptor, ConfigError, Kernels, SerdeDescriptor, hookimpl
from lmcache_kernels.codec import descriptors
from lmcache_kernels.codec_eval import cli
from lmcache_kernels.cpu import CpuKernels
from lmcache_kernels.index import FIFO, LRU, MRU, ChunkIndex

if TYPE_CHECKING:
    from argparse import ArgumentParser, _SubParsersAction

THREADS_VARIABLE = "LMCACHE_KERNEL_THREADS"
TRITON_VARIABLE = "LMCACHE_KERNEL_TRITON"
_MOST_THREADS = 256


def threads_from(environ: Mapping[str, str]) -> int | None:
    """How many threads ``LMCACHE_KERNEL_THREADS`` asks for; ``None`` where it isn't set.

    Raises:
        ConfigError: it isn't a number from 1 to 256.
    """
    text = environ.get(THREADS_VARIABLE)
    if text is None:
        return None
    if text.isascii() and text.isdigit() and 1 <= int(text) <= _MOST_THREADS:
        return int(text)
    raise ConfigError(
        f"{THREADS_VARIABLE}={text!r} (environment): set it to a number of threads from 1 to "
        f"{_MOST_THREADS}, or unset it"
    )


@hookimpl
def lmcache_kernels(device: str) -> Kernels | None:
    if device == "cpu":
        return CpuKernels(threads_from(os.environ))
    # Asked for by name, because it was never run on hardware.
    if device == "cuda" and os.environ.get(TRITON_VARIABLE) == "1":
        from lmcache_kernels.triton_kernels import TritonKernels

        return TritonKernels()
    return None


@hookimpl
def lmcache_chunk_index(slots: int) -> ChunkIndex:
    return ChunkIndex(slots)


@hookimpl
def lmcache_cache_policies() -> Sequence[CachePolicyDescriptor]:
    return [
        CachePolicyDescriptor(
            name="LRU", summary="least recently used goes first", create=lambda _: LRU()
        ),
        CachePolicyDescriptor(
            name="FIFO", summary="first stored goes first", create=lambda _: FIFO()
        ),
        CachePolicyDescriptor(
            name="MRU", summary="most recently used goes first", create=lambda _: MRU()
        ),
    ]


@hookimpl
def lmcache_serdes() -> Sequence[SerdeDescriptor]:
    return descriptors.all_of(lambda: threads_from(os.environ))


@hookimpl
def lmcache_cli(subcommands: _SubParsersAction[ArgumentParser]) -> None:
    cli.add(subcommands)


@hookimpl
def lmcache_report() -> Sequence[str]:
    kernels = CpuKernels(threads_from(os.environ))
    return [
        f"lmcache-kernels {version('lmcache-kernels')}: SIMD {kernels.simd}, "
        f"{kernels.threads} thread{'s' if kernels.threads > 1 else ''}"
    ]
