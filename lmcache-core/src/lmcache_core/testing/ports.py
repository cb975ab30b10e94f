"""Ports for servers that tests start, for tests that run side by side.

A port that the system gives away (``bind`` to 0, then close) may be a client's a moment later: it
comes from the range in which all connections get theirs. These are from below that range.
"""

from __future__ import annotations

import os
import socket

_FIRST, _COUNT = 20000, 12000
_next = os.getpid() * 37 % _COUNT


def free_port(*offsets: int) -> int:
    """A port at which nobody listens on loopback, nor at ``offsets`` from it; each only once here.

    ``offsets`` are for servers that take more ports without being asked, as nodes of a Redis
    cluster take the one 10,000 above.
    """
    global _next
    while True:
        port = _FIRST + _next
        _next = (_next + 1) % _COUNT
        if all(_is_free(port + offset) for offset in (0, *offsets)):
            return port


def _is_free(port: int) -> bool:
    with socket.socket() as one:
        try:
            one.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
