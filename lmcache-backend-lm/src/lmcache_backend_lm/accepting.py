"""Takes connections from listening sockets, and rests while there are no descriptors for more.

Knows descriptors and how many of them there may be. Knows nothing about who connects.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import resource
import socket
from collections.abc import Callable
from typing import Any

from lmcache_core import ConfigError

logger = logging.getLogger(__name__)

DEFAULT_CONNECTIONS = 4096
RESERVED_DESCRIPTORS = 64
"""For everything but connections: listeners, event loops, files that are being written."""
REST_S = 1.0
_SOME = 64
_NONE_LEFT = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

Take = Callable[[socket.socket, Any, bool], None]


def connections(asked: int | None) -> int:
    """How many connections there may be; lets the process have all the descriptors that it can.

    ``None``: `DEFAULT_CONNECTIONS`, or as many as fit.

    Raises:
        ConfigError: so many don't fit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # more than the kernel has
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    fit = soft - RESERVED_DESCRIPTORS if soft != resource.RLIM_INFINITY else DEFAULT_CONNECTIONS
    if asked is None:
        asked = min(DEFAULT_CONNECTIONS, fit)
        if asked < DEFAULT_CONNECTIONS:
            logger.warning("the limit of %d descriptors allows %d connections", soft, asked)
    if asked < 1 or (soft != resource.RLIM_INFINITY and asked > fit):
        raise ConfigError(
            f"--max-connections {asked}: this process may have {soft} descriptors, which is enough "
            f"for {max(fit, 0)} connections; raise the limit (ulimit -Hn), or ask for fewer"
        )
    return asked


class Accepting:
    """Accepts on the running event loop. ``take`` gets a socket, its address, and whether
    it is to speak TLS.

    ``rests``: called with the error when there are no descriptors left.
    """

    def __init__(self, take: Take, rests: Callable[[OSError], None]) -> None:
        self._take = take
        self._rests = rests
        self._loop = asyncio.get_running_loop()
        self._listeners: list[tuple[socket.socket, bool]] = []
        self._timer: asyncio.TimerHandle | None = None

    def listen(self, listener: socket.socket, *, encrypted: bool) -> None:
        """Accept from ``listener``, which is closed in the end."""
        self._listeners.append((listener, encrypted))
        self._loop.add_reader(listener, self._accept, listener, encrypted)

    def freed(self) -> None:
        """A descriptor was closed: go on at once. On the event loop's thread."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            for listener, encrypted in self._listeners:
                self._loop.add_reader(listener, self._accept, listener, encrypted)

    def close(self) -> None:
        """Accept no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for listener, _ in self._listeners:
            self._loop.remove_reader(listener)
            listener.close()
        self._listeners.clear()

    def _accept(self, listener: socket.socket, encrypted: bool) -> None:
        for _ in range(_SOME):
            try:
                sock, address = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _NONE_LEFT and self._timer is None:
                    # Who waits stays readable: asking again at once would keep a core busy.
                    for each, _ in self._listeners:
                        self._loop.remove_reader(each)
                    self._timer = self._loop.call_later(REST_S, self.freed)
                    self._rests(error)
                return  # otherwise the peer is gone already
            self._take(sock, address, encrypted)
