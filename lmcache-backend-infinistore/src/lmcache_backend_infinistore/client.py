"""InfiniStore's own client: imported when a backend is made, or why it can't be."""

from __future__ import annotations

import importlib
from typing import Any, Final

from lmcache_core import BackendRejected

INSTALL: Final = (
    "pip install infinistore uvloop==0.21.0 (there are wheels for Python 3.10 to 3.12; without "
    "CUDA, install a CPU build of torch first, or pip fetches CUDA's libraries)"
)


def library() -> Any:
    """The module ``infinistore``.

    Raises:
        BackendRejected: it isn't there, or can't be loaded; says what to install.
    """
    try:
        return importlib.import_module("infinistore")
    except ModuleNotFoundError as error:
        raise BackendRejected(
            f"InfiniStore's client isn't installed ({error}): {INSTALL}"
        ) from error
    except ImportError as error:
        remedy = "apt-get install libibverbs1" if "ibverbs" in str(error) else INSTALL
        raise BackendRejected(
            f"InfiniStore's client can't be loaded ({error}): {remedy}"
        ) from error
