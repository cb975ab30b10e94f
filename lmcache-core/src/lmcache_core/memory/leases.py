"""The right to use something that somebody else would use again: taken once, given back once.

A slot of host memory, a value of a server: many may use it at the same time, and it may serve
another purpose only when the last of them has let go. Each holds a `Lease` of its own, so that
what one of them does, or fails to do, can't end it for the others; a `Ledger` has the sum. The
idea is Rust's: ownership is a thing with one holder, that can be handed on and not copied.

Knows who still holds something. Knows nothing about what it is.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from types import TracebackType

from lmcache_core.errors import LeaseError
from lmcache_core.metrics import Counters

logger = logging.getLogger(__name__)


class Ledger:
    """How many leases of one ``kind`` are out. Thread-safe.

    At rest, when nobody uses anything, that is none: see `out`.
    """

    def __init__(self, kind: str, counters: Counters) -> None:
        self.kind = kind
        self._counters = counters
        self._lock = threading.Lock()
        self._out = 0

    @property
    def out(self) -> int:
        """Leases that were taken and not given back. Forgotten ones are among them."""
        return self._out

    def lease(self, end: Callable[[], None], what: str = "") -> Lease:
        """A lease whose `Lease.release` calls ``end``. ``what`` is for messages."""
        with self._lock:
            self._out += 1
        return Lease(self, end, what)

    def _take_end(self, lease: Lease) -> Callable[[], None]:
        """``lease``'s end, which from now on it hasn't got: of two that ask, one gets it."""
        with self._lock:
            end, lease._end = lease._end, None
            if end is not None:
                self._out -= 1
                return end
        raise LeaseError(
            f"the lease of {lease} was given back before; whoever has it now must not lose it, so "
            "this is a mistake in the code that gives it back again"
        )

    def _abandon(self, lease: Lease) -> None:
        self._take_end(lease)
        with self._lock:
            self._out += 1

    def _forgotten(self, lease: Lease) -> None:
        self._counters.add("leases_forgotten", kind=self.kind)
        logger.error(
            "The lease of %s was forgotten: nobody can give it back any more, and what it is for "
            "stays taken until a restart. This is a mistake in the code that had it",
            lease,
        )


class Lease:
    """The right to use something until `release`, which is called exactly once.

    As a context manager it is released at the end. One that is dropped without that is reported,
    and what it was for stays taken: memory that may still be used by a thread that nobody knows of
    is worth less than a wrong byte.
    """

    __slots__ = ("_end", "_ledger", "_what")

    def __init__(self, ledger: Ledger, end: Callable[[], None], what: str) -> None:
        self._ledger = ledger
        self._end: Callable[[], None] | None = end
        self._what = what

    @property
    def live(self) -> bool:
        """Whether it is still to be released."""
        return self._end is not None

    def release(self) -> None:
        """Give it back.

        Raises:
            LeaseError: that was done before.
        """
        self._ledger._take_end(self)()

    def abandon(self) -> None:
        """Keep what it is for taken for good: somebody may use it, and nobody will say how long.

        Raises:
            LeaseError: it was given back before.
        """
        self._ledger._abandon(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def __del__(self) -> None:
        if self._end is not None and not sys.is_finalizing():
            self._ledger._forgotten(self)

    def __str__(self) -> str:
        return f"{self._ledger.kind} {self._what}".rstrip()


class SharedResource:
    """Something that several may use at once: ``end`` is called when the last lease of it ends.

    Starts with no lease, and is over once it had one and all are released; then it gives no more.
    Thread-safe.
    """

    __slots__ = ("_count", "_end", "_ledger", "_lock", "_over", "_what")

    def __init__(self, ledger: Ledger, end: Callable[[], None], what: str = "") -> None:
        self._ledger = ledger
        self._end = end
        self._what = what
        self._lock = threading.Lock()
        self._count = 0
        self._over = False

    def lease(self) -> Lease:
        """One more user.

        Raises:
            LeaseError: it is over, and may be somebody else's by now.
        """
        with self._lock:
            if self._over:
                raise LeaseError(
                    f"{self._ledger.kind} {self._what} was given back by its last user; "
                    "a lease of it must be taken while another one is held"
                )
            self._count += 1
        return self._ledger.lease(self._one_less, self._what)

    def _one_less(self) -> None:
        with self._lock:
            self._count -= 1
            self._over = over = not self._count
        if over:
            self._end()
