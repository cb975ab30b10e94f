"""Deadlines, retries, the circuit breaker and quiet logs around calls to code that may fail.

The only module that does these things, and the only one (but for the plugin
loader) that catches whatever comes out of a plugin. What leaves it is an
`Answer`, never an exception: whoever asked degrades to a miss.

Knows calls and clocks. Knows nothing about chunks or tiers.
"""

from __future__ import annotations

import asyncio
import logging
import random
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, TypeVar

from lmcache_core.aio.room import Room, Share
from lmcache_core.errors import (
    BackendError,
    BackendProcessLost,
    BackendRejected,
    BackendTimeout,
    BackendUnavailable,
    contained,
)
from lmcache_core.logging import Seldom
from lmcache_core.metrics import Counters
from lmcache_core.redaction import without_passwords_in

logger = logging.getLogger(__name__)
T = TypeVar("T")

LOG_EVERY_S = 30.0
"""How often, at the most, failures of one operation are logged."""
_BACKOFF_S = 0.05


@dataclass(frozen=True)
class Answer(Generic[T]):
    """What came of a guarded call: ``value``, or ``error`` and no value."""

    value: T | None = None
    error: BaseException | None = None
    unsettled: asyncio.Task[Any] | None = None
    """The call itself, where it missed its deadline and may still touch the caller's buffers.
    Nobody else may have them until it is done; what it returns or raises is of no use."""

    @property
    def ok(self) -> bool:
        """Whether there is a value."""
        return self.error is None


class BreakerState(str, Enum):
    """CLOSED lets calls through, OPEN none, HALF_OPEN is OPEN while one call tries the backend."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


def attempt(call: Callable[..., object], *args: object) -> Exception | None:
    """Like `attempted`, where only what it raised matters."""
    try:
        call(*args)
    except BaseException as error:
        if _meant_for_the_user(error):
            raise
        return contained(error)
    return None


def attempted(call: Callable[..., T], *args: Any) -> Answer[T]:
    """Call code that isn't ours on any thread; answer what it answered, or what it raised.

    Whatever it raises ends here: a plugin's ``SystemExit`` would end a loop or the engine. Only
    what signals raise, in the main thread, goes on to whoever sent them: Ctrl-C, or the
    ``SystemExit`` with which an engine's handler ends it.
    """
    try:
        return Answer(call(*args))
    except BaseException as error:
        if _meant_for_the_user(error):
            raise
        return Answer(error=contained(error))


async def contain(call: Awaitable[T]) -> T:
    """Await code that isn't ours, whose ``SystemExit`` would end the loop, as `contained` does."""
    try:
        return await call
    except (SystemExit, KeyboardInterrupt) as error:
        if _meant_for_the_user(error):
            raise
        raise contained(error) from error


def _meant_for_the_user(error: BaseException) -> bool:
    """Whether a signal raised it, which happened to come while a plugin ran."""
    if isinstance(error, Exception) or threading.current_thread() is not threading.main_thread():
        return False
    if isinstance(error, KeyboardInterrupt):
        return True
    handlers = {getattr(signal.getsignal(s), "__code__", None) for s in signal.valid_signals()}
    return any(frame.f_code in handlers for frame, _ in traceback.walk_tb(error.__traceback__))


def failure_kind(error: BaseException) -> str:
    """A short, fixed word for ``error``: it labels counters."""
    for kind, classes in _KINDS.items():
        if isinstance(error, classes):
            return kind
    return "exception"


class Guard:
    """Calls one backend on behalf of everybody else. Lives on one event loop.

    ``retries``: how often a call is tried again after `BackendUnavailable` or `BackendTimeout`,
    within its deadline. After ``breaker_threshold`` failed calls in a row the circuit opens: calls
    fail at once for ``breaker_cooldown_s``, then one is let through to see. A call that was
    rejected was answered, so it is no failure in this sense; nor is one whose `BackendProcessLost`
    says that the process of an isolated backend is being replaced: calls are misses until then, and
    the first one afterwards is let through. Set ``max_concurrency`` to bound the calls that run at
    one time; waiting for a turn counts against a call's deadline but not against the backend.

    Set ``max_bytes`` to bound the bytes of the buffers that the calls of one operation have at one
    time, and so what those that never come back can keep: once they have so much that a further
    call's can't be had, it is refused at once, as saturated. Set ``cancels`` where a call that is
    cancelled ends, and has let go of its buffers when it has.
    """

    def __init__(
        self,
        name: str,
        *,
        deadline_s: float,
        retries: int = 1,
        breaker_threshold: int = 5,
        breaker_cooldown_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
        counters: Counters,
    ) -> None:
        self.name = name
        self.deadline_s = deadline_s
        self.max_concurrency: int | None = None
        self.max_bytes: int | None = None
        self.cancels = False
        self._retries = retries
        self._threshold = breaker_threshold
        self._cooldown_s = breaker_cooldown_s
        self._clock = clock
        self._jitter = jitter
        self._counters = counters
        self._state = BreakerState.CLOSED
        self._failures = 0
        self._opened_at = 0.0
        self._running = 0
        self._turns: deque[asyncio.Future[None]] = deque()
        self._rooms: dict[str, Room] = {}
        self._unsettled: set[asyncio.Task[Any]] = set()
        self._abandoned: set[asyncio.Task[Any]] = set()
        self._seldom = Seldom(logger, LOG_EVERY_S, clock)

    @property
    def state(self) -> BreakerState:
        """Where the circuit breaker stands."""
        return self._state

    @property
    def saturated(self) -> bool:
        """Whether so many calls hang and hold buffers that no more buffers are risked."""
        return len(self._unsettled) >= self._threshold

    def is_full(self, operation: str) -> bool:
        """Whether calls of ``operation`` that hang hold as many bytes as they may."""
        return self._room(operation).full

    async def call(
        self,
        operation: str,
        make: Callable[[], Awaitable[T]],
        *,
        deadline_s: float | None = None,
        owns_buffers: bool = False,
        nbytes: int = 0,
    ) -> Answer[T]:
        """Await what ``make`` makes, which is called once for each try, for ``deadline_s`` at most.

        ``owns_buffers``: the call reads or writes its caller's buffers, ``nbytes`` of them, perhaps
        on a thread that can't be stopped. At its deadline it is then handed back as ``unsettled``,
        and left running unless the backend ``cancels``; otherwise it is cancelled. Raises nothing
        but ``CancelledError``; a caller that is cancelled learns nothing about its buffers and must
        not use them again.
        """
        deadline_s = self.deadline_s if deadline_s is None else deadline_s
        until = asyncio.get_running_loop().time() + deadline_s
        call = _Call(operation, deadline_s, until, owns_buffers, nbytes)
        refusal = await self._admit(call)
        if refusal is not None:
            self._count(operation, refusal)
            return Answer(error=refusal)
        probe = self._begin()
        answer: Answer[T] | None = None
        tried = 0
        try:
            while True:
                answer = await self._once(call, make)
                tried += 1
                if not await self._may_retry(answer, tried, until):
                    return answer
        finally:
            self._end_turn()
            if call.share is not None:
                call.share.end()
            self._learn(operation, answer, probe)

    async def once(
        self,
        operation: str,
        make: Callable[[], Awaitable[T]],
        *,
        deadline_s: float,
        owns_buffers: bool = False,
    ) -> Answer[T]:
        """Like `call`, but one try, beside the breaker, and unlogged: for opening and closing."""
        until = asyncio.get_running_loop().time() + deadline_s
        return await self._once(_Call(operation, deadline_s, until, owns_buffers), make)

    def now(self, operation: str, call: Callable[[], T]) -> Answer[T]:
        """Call something that doesn't block; for the few synchronous methods of plugins."""
        answer = attempted(call)
        if answer.error is not None:
            self._count(operation, answer.error)
            self.log(operation, answer.error)
        return answer

    # -- one try ---------------------------------------------------------------------------

    async def _once(self, call: _Call, make: Callable[[], Awaitable[T]]) -> Answer[T]:
        async def awaited() -> T:
            return await contain(make())

        loop = asyncio.get_running_loop()
        task = loop.create_task(awaited())
        left = call.until - loop.time()
        try:
            await asyncio.wait([task], timeout=max(0.0, left))
        except asyncio.CancelledError:
            self._leave(task, call)
            raise
        if not task.done():
            late = self._late(call)
            self._count(call.operation, late)
            self._leave(task, call)
            return Answer(error=late, unsettled=task if call.owns_buffers else None)
        if task.cancelled():
            what = f"{self.name}: {call.operation} was cancelled"
            error: BaseException = BackendUnavailable(what)
        elif (raised := task.exception()) is None:
            return Answer(task.result())
        else:
            error = self._translated(call.operation, raised)
        self._count(call.operation, error)
        return Answer(error=error)

    def _leave(self, task: asyncio.Task[Any], call: _Call) -> None:
        """Let go of a task that isn't done. The loop itself holds tasks only weakly."""
        group = self._unsettled if call.owns_buffers else self._abandoned
        group.add(task)
        if call.share is not None:
            call.share.leave_to(task)

        def ended(task: asyncio.Task[Any]) -> None:
            group.discard(task)
            if not task.cancelled():
                task.exception()  # retrieved, or asyncio logs that nobody did

        task.add_done_callback(ended)
        if self.cancels or not call.owns_buffers:
            task.cancel()

    def _late(self, call: _Call, doing: str = "") -> BackendTimeout:
        return BackendTimeout(
            f"{self.name}: {call.operation} took longer than {round(call.deadline_s, 3):g} s{doing}"
        )

    def _translated(self, operation: str, raised: BaseException) -> BaseException:
        """Give what sloppy clients let through the class that it should have had."""
        if isinstance(raised, BackendError):
            return raised
        error: BackendError
        if isinstance(raised, (TimeoutError, asyncio.TimeoutError)):
            error = BackendTimeout(f"{self.name}: {operation}: {raised or 'timed out'}")
        elif isinstance(raised, (ConnectionError, EOFError)):
            error = BackendUnavailable(f"{self.name}: {operation}: {raised!r}")
        else:
            return contained(raised)
        error.__cause__ = raised
        return error

    async def _may_retry(self, answer: Answer[T], tried: int, until: float) -> bool:
        if tried > self._retries:
            return False
        retriable = isinstance(answer.error, (BackendUnavailable, BackendTimeout))
        retriable = retriable and not isinstance(answer.error, BackendProcessLost)
        if not retriable or answer.unsettled is not None or self._state is not BreakerState.CLOSED:
            return False
        pause = _BACKOFF_S * 2 ** (tried - 1) * (0.5 + self._jitter())
        if asyncio.get_running_loop().time() + pause >= until:
            return False
        await asyncio.sleep(pause)
        return True

    # -- turns -----------------------------------------------------------------------------

    async def _admit(self, call: _Call) -> BackendError | None:
        """Wait for room and for a turn; why there is none."""
        refusal: BackendError | None = self._refusal(call)
        if refusal is not None:
            return refusal
        if call.nbytes:
            left_s = call.until - asyncio.get_running_loop().time()
            call.share = await self._room(call.operation).take(call.nbytes, left_s)
            if call.share is None:
                refusal = self._refusal(call) or self._late(call, ", all of it waiting for room")
                if isinstance(refusal, BackendTimeout):
                    self.log(call.operation, refusal)
                return refusal
        turn = False
        try:
            turn = await self._take_turn(call.until)
            if turn:
                refusal = self._refusal(call)  # again: things may have changed meanwhile
            else:
                refusal = self._late(call, ", all of it waiting for its turn")
                self.log(call.operation, refusal)
        finally:
            if call.share is not None and (refusal is not None or not turn):
                call.share.end()
        if turn and refusal is not None:
            self._end_turn()
        return refusal

    def _room(self, operation: str) -> Room:
        """What the calls of one operation have: a store that hangs is in no load's way."""
        room = self._rooms.get(operation)
        if room is None:
            room = self._rooms[operation] = Room()
        room.limit = self.max_bytes
        return room

    async def _take_turn(self, until: float) -> bool:
        left = until - asyncio.get_running_loop().time()
        if left <= 0:
            return False
        if self.max_concurrency is None or self._running < self.max_concurrency:
            self._running += 1
            return True
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._turns.append(turn)
        try:
            await asyncio.wait([turn], timeout=left)
        except asyncio.CancelledError:
            if turn.done():
                self._end_turn()
            else:
                self._turns.remove(turn)
            raise
        if turn.done():
            return True
        self._turns.remove(turn)
        return False

    def _end_turn(self) -> None:
        if self._turns:
            self._turns.popleft().set_result(None)  # the turn passes on; as many are running
        else:
            self._running -= 1

    # -- breaker ---------------------------------------------------------------------------

    def _refusal(self, call: _Call) -> BackendUnavailable | None:
        if self._state is not BreakerState.CLOSED:
            left = self._opened_at + self._cooldown_s - self._clock()
            if left > 0 or self._state is BreakerState.HALF_OPEN:
                return _CircuitOpen(f"{self.name}: circuit open for {max(0.0, left):.0f} s more")
        if not call.owns_buffers:
            return None
        denied = call.share is None and self._room(call.operation).denies(call.nbytes)
        if denied or self.saturated:
            hanging = len(self._unsettled)
            refusal = _Saturated(
                f"{self.name}: {hanging} calls never came back and hold their buffers"
            )
            self.log(f"{call.operation} (saturated)", refusal)
            return refusal
        return None

    def _begin(self) -> bool:
        if self._state is BreakerState.OPEN:
            self._state = BreakerState.HALF_OPEN
            return True
        return False

    def _learn(self, operation: str, answer: Answer[Any] | None, probe: bool) -> None:
        if answer is None or isinstance(answer.error, BackendProcessLost):
            # Cancelled, or not a word from the backend: nothing was learned.
            if probe:
                self._state = BreakerState.OPEN
            return
        failed = answer.error is not None and not isinstance(answer.error, BackendRejected)
        if answer.error is not None and not (probe and failed):
            self._log_unless_opening(operation, answer.error, failed)
        if probe:
            self._state = BreakerState.OPEN if failed else BreakerState.CLOSED
            self._opened_at = self._clock()
            if not failed:
                self._failures = 0
                self._counters.add("breaker_open", -1, backend=self.name)
                logger.info("%s: works again", self.name)
        elif self._state is BreakerState.CLOSED:
            self._failures = self._failures + 1 if failed else 0
            if self._failures >= self._threshold:
                self._state = BreakerState.OPEN
                self._opened_at = self._clock()
                self._counters.add("breaker_open", backend=self.name)
                logger.warning(
                    "%s: circuit open, failures in a row: %d, the last one in %s: %s. Its chunks "
                    "are misses until it answers again; trying every %g s",
                    self.name,
                    self._failures,
                    operation,
                    _said(answer.error),
                    self._cooldown_s,
                )

    # -- telling ---------------------------------------------------------------------------

    def _count(self, operation: str, error: BaseException) -> None:
        kind = failure_kind(error)
        if kind == "timeout":
            self._counters.add("backend_timeouts", backend=self.name, operation=operation)
        else:
            self._counters.add("backend_errors", backend=self.name, operation=operation, kind=kind)

    def _log_unless_opening(self, operation: str, error: BaseException, failed: bool) -> None:
        opening = failed and self._failures + 1 >= self._threshold
        if self._state is BreakerState.CLOSED and not opening:
            self.log(operation, error)

    def log(self, operation: str, error: BaseException) -> None:
        """Say that a call failed, at most once in `LOG_EVERY_S` for each operation."""
        if self._seldom.warn(operation, "%s: %s failed: %s", self.name, operation, _said(error)):
            logger.debug("%s: %s failed", self.name, operation, exc_info=error)


@dataclass(slots=True)
class _Call:
    """What is asked of the backend, and what the call has of its ``max_bytes``."""

    operation: str
    deadline_s: float
    until: float
    owns_buffers: bool
    nbytes: int = 0
    share: Share | None = None


class _CircuitOpen(BackendUnavailable):
    """Refused here: the breaker is open."""


class _Saturated(BackendUnavailable):
    """Refused here: too many calls hold buffers."""


_KINDS: dict[str, tuple[type[BaseException], ...]] = {
    "circuit_open": (_CircuitOpen,),
    "saturated": (_Saturated,),
    "timeout": (BackendTimeout,),
    "process_lost": (BackendProcessLost,),
    "unavailable": (BackendUnavailable,),
    "rejected": (BackendRejected,),
    "failed": (BackendError,),
}


def _said(error: BaseException | None) -> str:
    """An error as one sentence; its class too where that is all there is to go by."""
    said = str(error) if isinstance(error, BackendError) else f"{type(error).__name__}: {error}"
    return without_passwords_in(said)
