"""Which faults calls of plugins have, how often, and how they are counted across processes.

`PROGRAMME` is the same list in every process of a run. Each process counts into a file of its own;
one byte, which all of them map, turns faults on and off.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, Final

from lmcache_core.contracts.storage import MISS, StoreOutcome
from lmcache_core.errors import BackendRejected, BackendUnavailable
from lmcache_core.testing.faults import (
    NEGATIVE,
    TOO_FEW,
    TOO_LARGE,
    TOO_MANY,
    WRONG_TYPE,
    Corrupt,
    Fault,
    Faults,
    Half,
    Injected,
    Injection,
    Raise,
    WrongAnswer,
)

DEADLINE_S = 0.5
"""Of a tier's call, and of a load. Short, so that a late answer costs a run little."""
LOOKUP_DEADLINE_S = 0.3


class Rogue(BaseException):
    """What nobody knows, and no ``except Exception`` catches."""


EXCEPTIONS: Final[tuple[Callable[[str], BaseException], ...]] = (
    *(SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError, Rogue),
    *(StopIteration, StopAsyncIteration, MemoryError, RecursionError, BrokenPipeError),
    *(ConnectionResetError, TimeoutError, EOFError, OSError, ValueError),
    *(BackendUnavailable, BackendRejected),
)


@dataclass(frozen=True)
class Late(Fault):
    """Works, but so many seconds too late."""

    seconds: float

    def before(self, call: Injection) -> None:
        call.happened()
        time.sleep(self.seconds)

    async def before_in_loop(self, call: Injection) -> None:
        call.happened()
        await asyncio.sleep(self.seconds)

    def fits(self, operation: str) -> bool:  # noqa: ARG002  everything can be late
        return True


@dataclass(frozen=True)
class Short(Fault):
    """A value without its second half."""

    def after(self, call: Injection, answer: Any) -> Any:
        found = [i for i, size in enumerate(answer) if size > 1]
        if not found:
            return answer
        call.happened()
        place = found[call.draw(len(found))]
        return [size // 2 if i == place else size for i, size in enumerate(answer)]

    def fits(self, operation: str) -> bool:
        return operation == "load"


@dataclass(frozen=True)
class Swapped(Fault):
    """Two values of one call, each in the other's place."""

    def after(self, call: Injection, answer: Any) -> Any:
        whole = [output for output in call.outputs if output.nbytes]
        first = whole[0] if whole else None
        for other in whole[1:]:
            if first is not None and other.nbytes == first.nbytes and other != first:
                kept = bytes(first)
                first[:], other[:] = other, kept
                call.happened()
                break
        return answer

    def fits(self, operation: str) -> bool:
        return operation == "load"


@dataclass(frozen=True)
class Foreign(Fault):
    """What an earlier call wrote, for another key: whole, sound, and not what was asked for."""

    kept: list[bytes] = field(default_factory=list, compare=False)

    def after(self, call: Injection, answer: Any) -> Any:
        whole = [output for output in call.outputs if output.nbytes]
        if not whole:
            return answer
        output = whole[call.draw(len(whole))]
        now = bytes(output)
        for value in self.kept[:]:
            if len(value) == len(now) and value != now:
                output[:] = value
                call.happened()
                break
        self.kept[:] = [now]
        return answer

    def fits(self, operation: str) -> bool:
        return operation in ("load", "decode", "encode")


def _opposite(answer: Any, _: Sequence[int]) -> Any:
    return [not one for one in answer] if isinstance(answer, list) else answer + 1


@dataclass(frozen=True)
class Values(Fault):
    """What a call has read, each value by itself: ``percent`` of them, in one of several ways."""

    percent: int
    ways: tuple[Fault, ...]

    def after(self, call: Injection, answer: Any) -> Any:
        sizes, outputs = list(answer), iter(call.outputs)
        for position, (size, limit) in enumerate(zip(answer, call.limits, strict=True)):
            if size <= 0:
                continue
            output = next(outputs)
            if call.draw(100) < self.percent:
                one = call.besides(self.ways[call.draw(len(self.ways))])
                (sizes[position],) = one.after([size], [output], [limit])
        return sizes

    def fits(self, operation: str) -> bool:
        return operation == "load"


LIES: Final = WrongAnswer("the opposite", _opposite)
LOST: Final = WrongAnswer("a miss", lambda answer, _: [MISS] * len(answer))
ONLY_SAID: Final = WrongAnswer(
    "stored, it says", lambda answer, _: [StoreOutcome.ALREADY_PRESENT for _ in answer]
)

_NONSENSE = (TOO_FEW, TOO_MANY, WRONG_TYPE, NEGATIVE)
_LATE = (Late(0.4 * DEADLINE_S), Late(1.2 * DEADLINE_S), Late(3 * DEADLINE_S))
Programme = tuple[tuple[str, Fault, float], ...]


def _each(operation: str, faults: Sequence[Fault], chance: float) -> Programme:
    """``faults`` of one operation, of which all together have ``chance``."""
    return tuple((operation, fault, chance / len(faults)) for fault in faults)


def _raised(*kinds: Callable[[str], BaseException]) -> tuple[Fault, ...]:
    return tuple(Raise(kind) for kind in kinds)


def _programme() -> Programme:
    raised = _raised(*EXCEPTIONS)
    halves = tuple(Half(kind) for kind in (ValueError, SystemExit, asyncio.CancelledError))
    return (
        # Five failures in a row open a breaker, and what was damaged is no failure: calls fail
        # seldom, values are damaged often.
        *_each("load", (*raised, *halves, *_NONSENSE, TOO_LARGE), 0.08),
        *_each("load", (Swapped(),), 0.06),
        *(late for op in ("load", "store", "contains") for late in _each(op, _LATE, 0.003)),
        ("load", Values(60, (Corrupt(), Corrupt(at=0), Short(), Foreign(), LOST)), 0.9),
        *_each("store", (Corrupt(), ONLY_SAID), 0.12),
        *_each("store", (*raised, TOO_FEW, TOO_MANY, WRONG_TYPE), 0.08),
        *_each("contains", (LIES,), 0.08),
        *_each("contains", (*raised, TOO_FEW, TOO_MANY, WRONG_TYPE), 0.08),
        *_each("count_leading_hits", (LIES, NEGATIVE, WRONG_TYPE, *raised), 0.08),
        *_each("delete", (*raised, NEGATIVE, WRONG_TYPE), 0.1),
        *_each("clear", raised, 0.1),
        *_each("encode", (Corrupt(), Foreign(), TOO_LARGE, NEGATIVE, WRONG_TYPE, *halves), 0.03),
        *_each("encode", raised, 0.02),
        *_each("decode", (Corrupt(), Foreign(), *halves), 0.2),
        *_each("decode", raised, 0.1),
        *_each("max_encoded_bytes", (*raised, NEGATIVE, WRONG_TYPE), 0.03),
        *_each("for_chunk", (*raised, WRONG_TYPE), 0.03),
        *(late for op in ("encode", "decode") for late in _each(op, _LATE, 0.001)),
        # After five failures LRU takes a policy's place, so a round sees no more of these.
        *(one for op in ("added", "touched", "removed") for one in _each(op, raised, 0.02)),
        *_each("victims", (*raised, WRONG_TYPE), 0.02),
        *_each("victim", (*raised, NEGATIVE, TOO_LARGE, WRONG_TYPE), 0.02),
    )


PROGRAMME: Final = _programme()
KINDS: Final = tuple(
    (operation, way)
    for operation, fault, _ in PROGRAMME
    for way in (fault.ways if isinstance(fault, Values) else (fault,))
)
"""What its faults do, and to which calls."""
SEAM: Final = tuple(
    f"{call}: {what}"
    for call, kinds in {
        "open": ("EIO", "EMFILE", "ENOSPC"),
        "preadv": ("EIO", "ESTALE", "short", "end of file"),
        "pwrite": ("ENOSPC", "EDQUOT", "EIO", "short"),
        "fsync": ("EIO",),
        "replace": ("EIO", "ENOSPC"),
        "stat": ("EIO",),
    }.items()
    for what in kinds
)
"""Failures of the operating system below the filesystem backend."""
WHILE_COLD: Final = ("load", "contains", "count_leading_hits", "decode", "preadv")
"""Calls that only happen for what isn't in host memory; and while the breaker is closed, but for
the one call that tries a backend after that."""
_ARMED, _TALLY = "armed", "tally-"


def label(operation: str, fault: Fault) -> str:
    """One kind of fault in words."""
    if isinstance(fault, (Raise, Half)):
        half = "half done, " if isinstance(fault, Half) else ""
        return f"{operation}: {half}{getattr(fault.kind, '__name__', fault.kind)}"
    if isinstance(fault, WrongAnswer):
        return f"{operation}: {fault.name}"
    if isinstance(fault, Late):
        return f"{operation}: {fault.seconds:g} s late"
    if isinstance(fault, Corrupt):
        return f"{operation}: a bit flipped" + ("" if fault.at is None else " in the header")
    return f"{operation}: {type(fault).__name__.lower()}"


LABELS: Final = (*(label(operation, fault) for operation, fault in KINDS), *SEAM)


class Switch:
    """Turns faults on and off in every process that has the folder."""

    def __init__(self, folder: Path) -> None:
        with (folder / _ARMED).open("a+b") as file:
            file.truncate(mmap.PAGESIZE)
            self._page = mmap.mmap(file.fileno(), mmap.PAGESIZE)

    @property
    def on(self) -> bool:
        """Whether calls may fail."""
        return self._page[0] != 0

    def turn(self, on: bool) -> None:
        """From now on."""
        self._page[0] = on


@cache
def switch(folder: Path) -> Switch:
    """This process's."""
    return Switch(folder)


class Tally(Faults):
    """`PROGRAMME`, armed, and a file that says how often each of `LABELS` was injected."""

    _numbers = count()

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__(seed)
        self._switch = switch(folder)
        self._places = {kind: place for place, kind in enumerate(KINDS)}
        for operation, fault, chance in PROGRAMME:
            self.arm(operation, fault, times=None, chance=chance)
        name = f"{os.getpid()}-{next(self._numbers)}"
        path = folder / f"new-{name}"
        with path.open("w+b") as file:
            file.truncate(8 * len(LABELS))
            self._counts = memoryview(mmap.mmap(file.fileno(), 8 * len(LABELS))).cast("Q")
        path.rename(folder / f"{_TALLY}{name}")

    def begin(self, operation: str) -> Injection:
        if not self._switch.on:
            return Injection(self, operation, 0, None)
        return super().begin(operation)

    def below(self, call: str, chance: float) -> str | None:
        """Which fault hits a ``call`` of the operating system, if any; counted."""
        if not self._switch.on:
            return None
        with self._lock:
            if self._random.random() >= chance:
                return None
            kind = self._random.choice([name for name in SEAM if name.startswith(f"{call}: ")])
            self._counts[LABELS.index(kind)] += 1
        return kind.partition(": ")[2]

    def _record(self, injected: Injected) -> None:
        place = self._places[injected.operation, injected.fault]
        with self._lock:
            self._counts[place] += 1


@cache
def tally(folder: Path, seed: int) -> Tally:
    """This process's. A child that follows another one has other faults."""
    return Tally(folder, seed + len(_tallies(folder)))


def counted(folder: Path) -> Counter[str]:
    """How often each kind was injected so far, in all processes."""
    found: Counter[str] = Counter()
    for numbers in _read(folder):
        found.update({name: n for name, n in zip(LABELS, numbers, strict=True) if n})
    return found


def total(folder: Path) -> int:
    """All of `counted`."""
    return sum(map(sum, _read(folder)))


def _tallies(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(_TALLY)]


def _read(folder: Path) -> Iterator[memoryview]:
    """Counts by `LABELS`, of each process that ever lived."""
    for name in _tallies(folder):
        descriptor = os.open(f"{folder}/{name}", os.O_RDONLY)
        try:
            yield memoryview(os.read(descriptor, 8 * len(LABELS))).cast("Q")
        finally:
            os.close(descriptor)
