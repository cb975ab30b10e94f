"""One request of the client, from the event loop that makes it to the threads that serve it.

Knows who holds its buffers, and whom to tell about its end. Knows nothing about connections.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from lmcache_backend_lm.protocol import Op
from lmcache_core import BackendError, settle_soon

logger = logging.getLogger(__name__)


class Stage(Enum):
    """Where a call is, which decides what its cancellation takes."""

    QUEUED = auto()
    SENDING = auto()
    SENT = auto()
    RECEIVING = auto()
    ANSWERED = auto()
    """Before the writer's last system call came back: the writer settles it."""
    OVER = auto()


@dataclass(eq=False)
class Call:
    """One request, and where its answer goes. A load has ``into``, a store has ``payload``."""

    op: Op
    count: int = 0
    meta: bytes = b""
    parse: Callable[[memoryview], Any] = bytes
    """Makes the answer from its meta. Raises `ProtocolError`."""
    meta_limit: int = 0
    payload: Sequence[memoryview] = ()
    into: Sequence[memoryview] = ()
    number: int = 0
    stage: Stage = Stage.QUEUED
    abandoned: bool = False
    answer: Any = None
    capacities: list[int] = field(default_factory=list)
    future: asyncio.Future[Any] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its buffers, in either direction; 0 once it is over."""
        return sum(view.nbytes for view in (*self.payload, *self.into))

    def settle(self, answer: Any, error: BackendError | None) -> None:
        """Tell the caller, whose buffers nobody touches any more. From any thread."""
        self.stage, self.payload, self.into = Stage.OVER, (), ()
        # Let go of: once the caller raised, its traceback leads to the buffers.
        future, self.future = self.future, None
        if future is None or self.abandoned:
            return
        if not settle_soon(future, answer, error):
            logger.debug("the event loop ended before a call did")
