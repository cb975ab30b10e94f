"""The kernels of last resort: torch's own operations.

Imports torch only when a process asks for kernels, which engines do.
"""

from __future__ import annotations

from lmcache_core.contracts.connector import Kernels
from lmcache_core.contracts.hookspecs import hookimpl


@hookimpl(trylast=True)
def lmcache_kernels(device: str) -> Kernels | None:  # noqa: ARG001 - torch runs on all of them
    from lmcache_core.memory.reference import ReferenceKernels

    return ReferenceKernels()
