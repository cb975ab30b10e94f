"""What goes wrong in the calls of a plugin, and when: for tests of those who call plugins.

    from lmcache_core.testing.faults import Corrupt, Faults, Raise
    from lmcache_core.testing.faulty import FaultySerde

    faults = Faults(seed=7)
    serde = FaultySerde(RawSerde(), faults)
    faults.arm("encode", Raise(MemoryError), after=2)         # the third call, once
    faults.arm("decode", Corrupt(), chance=0.1, times=None)   # every tenth or so, always
    ...
    assert faults.count("encode") == failures_counted

Each fault that was injected is recorded once, with the number of the call that it hit, so that a
test can compare them with what was counted. The same seed and calls give the same faults. No
fault writes outside of the buffers that a call was given.

Knows calls. Knows no plugin (those are in `faulty`), needs no pytest, and never sleeps.
"""

from __future__ import annotations

import asyncio
import random
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from lmcache_core.aio.futures import settle_soon

PATIENCE_S = 60.0
"""A gate that nobody opens for so long is a mistake in the test."""

_ANSWERS: Final = frozenset(
    (
        *("identity", "bound", "for_chunk", "max_encoded_bytes", "encode"),  # serdes
        *("gather_checked", "scatter_checked", "checksums"),  # connectors and kernels
        *("victims", "victim"),  # policies: the iterator, and each step of it
        *("contains", "load", "store", "delete", "count_leading_hits", "usage"),  # backends
    )
)
_WRITES: Final = frozenset(("encode", "decode", "gather", "gather_checked", "load"))
_OTHERS: Final = frozenset(("scatter", "added", "touched", "removed", "clear", "open", "close"))
OPERATIONS: Final = _ANSWERS | _WRITES | _OTHERS
"""What can be armed: methods of plugins."""


class Injection:
    """One call, the fault that hits it, if any, and what it may do harm to."""

    def __init__(self, faults: Faults, operation: str, number: int, fault: Fault | None) -> None:
        self.operation = operation
        self.number = number
        self.fault = fault
        self.outputs: Sequence[memoryview] = ()
        """What the call has written, whole."""
        self.limits: Sequence[int] = ()
        """The largest that each number of its answer may be, where there is such a thing."""
        self._faults = faults

    def happened(self) -> None:
        """Record it: from here on somebody must notice."""
        if self.fault is not None:
            self._faults._record(Injected(self.operation, self.number, self.fault))

    def draw(self, below: int) -> int:
        """A number from 0 on, by the seed."""
        return self._faults._draw(below)

    def besides(self, fault: Fault) -> Injection:
        """The same call, hit by another fault too; each that happens is recorded."""
        return Injection(self._faults, self.operation, self.number, fault)

    def before(self) -> None:
        """What comes before the real call, on the thread that makes it."""
        if self.fault is not None:
            self.fault.before(self)

    async def before_in_loop(self) -> None:
        """`before`, where nothing may block."""
        if self.fault is not None:
            await self.fault.before_in_loop(self)

    def after(
        self, answer: Any, outputs: Sequence[memoryview] = (), limits: Sequence[int] = ()
    ) -> Any:
        """What the caller gets for the real ``answer``."""
        self.outputs, self.limits = outputs, limits
        return answer if self.fault is None else self.fault.after(self, answer)


class Fault(ABC):
    """One way to fail. Immutable, so that one may be armed often."""

    def before(self, call: Injection) -> None:  # noqa: B027  most have nothing to do here
        """Called in place of the real call's beginning; may raise or block."""

    async def before_in_loop(self, call: Injection) -> None:
        """The same on an event loop."""
        self.before(call)

    def after(self, call: Injection, answer: Any) -> Any:
        """Called when the real call has returned ``answer``; what the caller gets instead."""
        return answer

    @abstractmethod
    def fits(self, operation: str) -> bool:
        """Whether ``operation`` can fail like this."""


@dataclass(frozen=True)
class Raise(Fault):
    """Raises ``kind`` instead of doing anything: an exception's class, or what makes one."""

    kind: Callable[[str], BaseException] = ValueError

    def before(self, call: Injection) -> None:
        call.happened()
        raise self.kind(f"injected into call {call.number} of {call.operation}")

    def fits(self, operation: str) -> bool:
        return True


@dataclass(frozen=True)
class Half(Fault):
    """Raises with the work half done: the second half of what was written is rubbish."""

    kind: Callable[[str], BaseException] = ValueError

    def after(self, call: Injection, answer: Any) -> Any:
        for output in call.outputs:
            rest = output[output.nbytes // 2 :]
            rest[:] = b"\xa5" * rest.nbytes
        call.happened()
        raise self.kind(f"injected half way through call {call.number} of {call.operation}")

    def fits(self, operation: str) -> bool:
        return operation in _WRITES


@dataclass(frozen=True)
class Corrupt(Fault):
    """Changes one byte of what was written. A backend's ``store`` keeps a damaged copy.

    ``at`` is the byte's place in the output; ``None``: anywhere. A call that wrote nothing is
    left alone.
    """

    at: int | None = None

    def after(self, call: Injection, answer: Any) -> Any:
        outputs = [output for output in call.outputs if output.nbytes > (self.at or 0)]
        if outputs:
            output = outputs[call.draw(len(outputs))]
            place = call.draw(output.nbytes) if self.at is None else self.at
            output[place] ^= 1 << call.draw(8)
            call.happened()
        return answer

    def fits(self, operation: str) -> bool:
        return operation in _WRITES or operation == "store"


@dataclass(frozen=True)
class WrongAnswer(Fault):
    """Does the work, and answers ``made(answer, limits)`` instead.

    ``limits`` are what numbers of the answer mustn't exceed, where there is such a thing. If that
    is what was to be answered anyway, nothing is injected.
    """

    name: str
    made: Callable[[Any, Sequence[int]], Any] = field(compare=False)

    def after(self, call: Injection, answer: Any) -> Any:
        nonsense = self.made(answer, call.limits)
        if nonsense is not answer and nonsense != answer:
            call.happened()
        return nonsense

    def fits(self, operation: str) -> bool:
        return operation in _ANSWERS


def _everywhere(answer: Any, value: int, count: int) -> Any:
    """``value`` in the shape of ``answer``: a number, a list, an iterator."""
    if isinstance(answer, Iterator):
        return iter([value])
    return [value] * max(1, count) if isinstance(answer, list) else value


def _too_large(answer: Any, limits: Sequence[int]) -> Any:
    if isinstance(answer, list) and limits:
        return [limit + 1 for limit in limits]
    return _everywhere(answer, limits[0] + 1 if limits else 1 << 62, 1)


TOO_FEW: Final = WrongAnswer("too few", lambda answer, _: answer[:-1])
"""A list without its last element: checksums, sizes, hits, outcomes."""
TOO_MANY: Final = WrongAnswer("too many", lambda answer, _: [*answer, *(answer[-1:] or [0])])
SHORT: Final = WrongAnswer("too short", lambda answer, _: [one[:-1] for one in answer])
"""Checksums that lack their last byte."""
WRONG_TYPE: Final = WrongAnswer("of another type", lambda *_: "nonsense")
NEGATIVE: Final = WrongAnswer(
    "negative", lambda answer, _: _everywhere(answer, -2, _length(answer))
)
"""A negative size, position or slot, and not the one that means a miss."""
TOO_LARGE: Final = WrongAnswer("too large", _too_large)
"""A size behind the buffer, a position behind the batch, a slot behind the arena."""


def _length(answer: Any) -> int:
    return len(answer) if isinstance(answer, list) else 1


@dataclass(frozen=True)
class Wait(Fault):
    """Stands still until the test opens ``gate``; ``then`` is what happens afterwards."""

    gate: Gate
    then: Fault | None = None

    def before(self, call: Injection) -> None:
        self.gate.wait()
        if self.then is None:
            call.happened()
        else:
            self.then.before(call)

    async def before_in_loop(self, call: Injection) -> None:
        await self.gate.wait_in_loop()
        if self.then is None:
            call.happened()
        else:
            await self.then.before_in_loop(call)

    def after(self, call: Injection, answer: Any) -> Any:
        return answer if self.then is None else self.then.after(call, answer)

    def fits(self, operation: str) -> bool:
        return self.then is None or self.then.fits(operation)


class Gate:
    """Where calls stand until it is opened, and where a test learns that they do."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._opened = False
        self._standing = 0
        self._futures: list[asyncio.Future[None]] = []

    def open(self) -> None:
        """Let everybody through, now and later."""
        with self._lock:
            self._opened = True
            self._lock.notify_all()
            futures, self._futures = self._futures, []
        for future in futures:
            settle_soon(future, None)

    def reached(self, calls: int = 1, timeout_s: float = PATIENCE_S) -> bool:
        """Wait until ``calls`` calls stand at it, or stood."""
        with self._lock:
            return self._lock.wait_for(lambda: self._standing >= calls, timeout_s)

    def wait(self) -> None:
        """Stand still on this thread.

        Raises:
            TimeoutError: nobody opened it.
        """
        with self._lock:
            self._stand()
            if not self._lock.wait_for(lambda: self._opened, PATIENCE_S):
                raise TimeoutError(f"nobody opened the gate in {PATIENCE_S:g} s")

    async def wait_in_loop(self) -> None:
        """Stand still without holding up the event loop. May be cancelled."""
        with self._lock:
            self._stand()
            if self._opened:
                return
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._futures.append(future)
        await future

    def _stand(self) -> None:
        self._standing += 1
        self._lock.notify_all()


@dataclass(frozen=True)
class Injected:
    """A fault that hit a call. ``number`` counts the calls of this operation, from 1."""

    operation: str
    number: int
    fault: Fault


@dataclass
class _Armed:
    fault: Fault
    times: int | None
    after: int
    chance: float


class Faults:
    """Which calls fail, and which did. Thread-safe; may be shared by several plugins of a test."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._random = random.Random(seed)  # noqa: S311  the same every time
        self._lock = threading.Lock()
        self._armed: dict[str, list[_Armed]] = {}
        self._calls: dict[str, int] = {}
        self._injected: list[Injected] = []

    def arm(
        self,
        operation: str,
        fault: Fault,
        *,
        times: int | None = 1,
        after: int = 0,
        chance: float = 1.0,
    ) -> None:
        """Let calls of ``operation`` fail: the next ``after`` ones don't, then ``times`` ones do.

        With a ``chance`` below 1 each of them only so often. ``times=None``: all from then on. Of
        several that are armed, the first whose turn it is hits a call, and no other one.

        Raises:
            ValueError: there is no such operation, or it can't fail like this.
        """
        if operation not in OPERATIONS:
            raise ValueError(
                f"no operation {operation!r}; there are {', '.join(sorted(OPERATIONS))}"
            )
        if not fault.fits(operation):
            raise ValueError(f"{operation} has nothing that {fault} could change")
        with self._lock:
            self._armed.setdefault(operation, []).append(_Armed(fault, times, after, chance))

    def disarm(self) -> None:
        """Let everything work from now on. What was injected stays recorded."""
        with self._lock:
            self._armed.clear()

    @property
    def injected(self) -> tuple[Injected, ...]:
        """What was injected so far, in that order."""
        with self._lock:
            return tuple(self._injected)

    def count(self, operation: str | None = None, kind: type[Fault] = Fault) -> int:
        """How many faults of ``kind`` hit calls of ``operation``; ``None``: of any."""
        return sum(
            isinstance(one.fault, kind) and operation in (None, one.operation)
            for one in self.injected
        )

    def begin(self, operation: str) -> Injection:
        """A call of ``operation``: who wraps a plugin asks, and does what the answer says."""
        with self._lock:
            number = self._calls[operation] = self._calls.get(operation, 0) + 1
            return Injection(self, operation, number, self._next(operation))

    def _next(self, operation: str) -> Fault | None:
        chosen = None
        for armed in self._armed.get(operation, ()):
            if armed.after:
                armed.after -= 1
            elif chosen is None and armed.times != 0 and self._random.random() < armed.chance:
                armed.times = None if armed.times is None else armed.times - 1
                chosen = armed.fault
        return chosen

    def _draw(self, below: int) -> int:
        with self._lock:
            return self._random.randrange(below)

    def _record(self, injected: Injected) -> None:
        with self._lock:
            self._injected.append(injected)
