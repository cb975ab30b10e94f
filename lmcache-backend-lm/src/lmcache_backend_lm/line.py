"""A stream of the client's that its writer and its reader share: whole messages, and patience.

Knows when nothing moved for too long, when it was cut, and how a server refuses. Knows nothing
about calls, nor about who waits for what.
"""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable, Sequence

from lmcache_backend_lm import protocol
from lmcache_backend_lm.config import LmConfig
from lmcache_backend_lm.protocol import ProtocolError, Status
from lmcache_core import (
    BackendError,
    BackendRejected,
    BackendTimeout,
    BackendUnavailable,
    Stream,
    last_first,
    next_of,
    take_out,
)

_SCRATCH_BYTES = 256 << 10
_REJECTED = (Status.DENIED, Status.VERSION, Status.UNSUPPORTED, Status.MALFORMED)


class Line:
    """The stream in use. One thread sends and another fills; anybody may cut.

    ``is_due`` says whether answers are due: only then is silence a fault.
    """

    def __init__(self, config: LmConfig, is_due: Callable[[], bool]) -> None:
        self.address = config.address
        self._config = config
        self._is_due = is_due
        self._stream: Stream | None = None
        self._lock = threading.Lock()
        self._cut = False
        self._moved_at = time.monotonic()
        self._scratch: memoryview | None = None

    def use(self, stream: Stream, *, keep_other: bool = False) -> None:
        """Go on with ``stream``, the one that `cut` ends; close the one before.

        ``keep_other``: don't, its user may come back to it.

        Raises:
            EOFError: it was cut.
        """
        with self._lock:
            before, self._stream = self._stream, stream
            cut = self._cut
        if before is not None and before is not stream and not keep_other:
            before.close()
        if cut:
            raise EOFError

    def cut(self) -> None:
        """Make both threads fail, whatever they wait for. From any thread; idempotent."""
        with self._lock:
            self._cut = True
            stream = self._stream
        if stream is not None:
            stream.shutdown()

    def close(self) -> None:
        """Give the stream back, once nobody uses it."""
        with self._lock:
            stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def moved(self) -> None:
        """Measure silence from now on."""
        self._moved_at = time.monotonic()

    def tick(self, until: float | None = None) -> None:
        """Called when nothing moved for a while; as part of a greeting ``until`` then.

        Raises:
            BackendTimeout: for too long, or ``until`` is over.
            EOFError: it was cut.
        """
        if until is not None and time.monotonic() > until:
            raise BackendTimeout(
                f"{self.address}: connected, but no greeting came within "
                f"{self._config.connect_timeout_s:g} s; is it an lmcache_server?"
            ) from None
        if self._cut:
            raise EOFError  # not the error behind it: that would collect tracebacks
        quiet_s = time.monotonic() - self._moved_at
        if self._is_due() and quiet_s > self._config.stall_timeout_s:
            raise BackendTimeout(f"{self.address}: nothing moved for {quiet_s:.0f} s")

    def send(self, views: Sequence[memoryview]) -> None:
        """Send all of ``views``.

        Raises:
            OSError, EOFError: the connection broke, or was cut.
            BackendTimeout: as `tick`.
        """
        if self._stream is None:
            raise EOFError
        self._move(views, self._stream.send, None)

    def fill(self, *views: memoryview, until: float | None = None) -> None:
        """Receive all of ``views``, one after the other; as part of a greeting ``until`` then.

        Raises:
            OSError, EOFError: the connection broke, ended, or was cut.
            BackendTimeout: as `tick`.
        """
        if self._stream is None:
            raise EOFError
        self._move(views, self._stream.receive, until)

    def drain(self, nbytes: int) -> None:
        """Receive ``nbytes`` that nobody wants.

        Raises:
            OSError, EOFError, BackendTimeout: as `fill`.
        """
        if self._scratch is None:
            self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        while nbytes > 0:
            length = min(nbytes, _SCRATCH_BYTES)
            self.fill(self._scratch[:length])
            nbytes -= length

    def _move(
        self,
        views: Sequence[memoryview],
        some: Callable[[Sequence[memoryview]], int],
        until: float | None,
    ) -> None:
        left = last_first(views)
        while left:
            try:
                moved = some(next_of(left))
            except BlockingIOError:
                self.tick(until)
                continue
            if not moved:
                raise EOFError
            self.moved()
            take_out(left, moved)

    def refusal(self, header: protocol.Header) -> BackendError:
        """What the server says in a message whose status isn't OK, as the error to raise."""
        text = memoryview(bytearray(min(header.meta, protocol.MAX_MESSAGE_BYTES)))
        self.fill(text, until=time.monotonic() + self._config.connect_timeout_s)
        said = bytes(text).decode(errors="replace")
        kind = BackendRejected if header.status in _REJECTED else BackendUnavailable
        return kind(f"{self.address}: the server refused: {said}")

    def explained(self, error: Exception, *, greeted: bool) -> BackendError:
        """What went wrong, in a sentence. ``greeted``: it is an lmcache_server for sure."""
        if isinstance(error, BackendError):
            return error
        where = self.address
        if isinstance(error, ProtocolError):
            hint = "" if greeted else "; is it an lmcache_server?"
            kind = BackendUnavailable if greeted else BackendRejected
            return kind(f"{where}: {error}{hint}")
        if isinstance(error, EOFError):
            return BackendUnavailable(f"{where}: the server closed the connection")
        if isinstance(error, ssl.SSLCertVerificationError):
            return BackendRejected(
                f"{where}: its certificate isn't trusted: {error.verify_message}; set ca_file"
            )
        if isinstance(error, ssl.SSLError):
            return BackendRejected(f"{where}: no TLS connection: {error.reason or error}")
        if isinstance(error, TimeoutError):
            return BackendTimeout(f"{where}: no connection within its time ({error})")
        if isinstance(error, PermissionError):
            return BackendRejected(f"{where}: {error.strerror}: this user may not connect")
        if isinstance(error, OSError):
            why = error.strerror or str(error)
            hint = "" if greeted else "; is lmcache_server running there?"
            return BackendUnavailable(f"{where}: {why}{hint}")
        return BackendUnavailable(f"{where}: {error!r}")
