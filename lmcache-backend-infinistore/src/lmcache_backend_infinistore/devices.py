"""RDMA devices of this machine: their names, and what their ports are linked to.

InfiniStore's client takes the first device if the one it is told isn't there, and says so only in
its log. Knows nothing else about InfiniStore.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

_SYSTEM: Final = Path("/sys/class/infiniband")
_LINK_TYPES: Final = {"InfiniBand": "IB", "Ethernet": "Ethernet"}


def names() -> list[str]:
    """What libibverbs finds, in its order; nothing if it isn't installed."""
    verbs = _verbs()
    if verbs is None:
        return []
    verbs.ibv_get_device_list.restype = ctypes.POINTER(ctypes.c_void_p)
    verbs.ibv_get_device_name.restype = ctypes.c_char_p
    verbs.ibv_get_device_name.argtypes = [ctypes.c_void_p]
    count = ctypes.c_int(0)
    found = verbs.ibv_get_device_list(ctypes.byref(count))
    if not found:
        return []
    try:
        return [verbs.ibv_get_device_name(found[i]).decode() for i in range(count.value)]
    finally:
        verbs.ibv_free_device_list(found)


def link_type(device: str, port: int) -> str | None:
    """``IB`` or ``Ethernet``; ``None`` if the system doesn't say."""
    try:
        text = (_SYSTEM / device / "ports" / str(port) / "link_layer").read_text().strip()
    except OSError:
        return None
    return _LINK_TYPES.get(text)


def _verbs() -> Any:
    """The library that the client uses, too: a preloaded one comes first."""
    for library in _libraries():
        if hasattr(library, "ibv_get_device_list"):
            return library
    return None


def _libraries() -> Iterator[ctypes.CDLL]:
    yield ctypes.CDLL(None)
    try:
        yield ctypes.CDLL("libibverbs.so.1")
    except OSError:
        return
