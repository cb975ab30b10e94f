"""Writers of a folder, one after the other and sometimes two at once, each of which is killed.

Where is drawn: at a statement, or at a system call, half way through a write too. The next one
finds what was acknowledged, and nothing else.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from forks import STEPS, FoundError, ended, forked
from promises import Promises, State
from statements import Statements, Tracing
from writers import KINDS, ROOMY

from lmcache_core import clearing, tier, tier_moves
from lmcache_core.builtin import (
    filesystem,
    filesystem_index,
    filesystem_io,
    filesystem_ledger,
    filesystem_manifest,
    filesystem_room,
    filesystem_scan,
    filesystem_usage,
)
from lmcache_core.lm import disk, folders

FILES = (
    *(filesystem, filesystem_index, filesystem_io, filesystem_ledger, filesystem_manifest),
    *(filesystem_room, filesystem_scan, filesystem_usage),
)
MODULES = {
    "files": FILES,
    "server": (*FILES, disk, folders),
    "cache": (*FILES, clearing, tier, tier_moves),
}
WEIGHTS = {"files": 6, "server": 2, "cache": 2}
CALLS = ("open", "pwrite", "ftruncate", "fsync", "replace", "mkdir", "unlink", "rmdir", "utime")
LIVES = 20
"""So many times a folder has writers, of which the last aren't killed."""
RECORDS = 3


class Plan(NamedTuple):
    """Where a writer dies: the ``nth`` time at a statement, or in its ``nth`` system call."""

    at: str
    nth: int
    after: bool
    """The call was done, or half of it where it writes."""


class Death:
    """Carries a plan out, and counts what it comes past."""

    def __init__(self, plan: Plan | None) -> None:
        self.seen: Counter[str] = Counter()
        self.plan = plan

    def reached(self, name: str) -> bool:
        """Whether this is the place."""
        self.seen[name] += 1
        return self.plan is not None and (self.plan.at, self.plan.nth) == (name, self.seen[name])

    def statement(self, name: str) -> None:
        if self.reached(name):
            self.now()

    def now(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def watch_calls(self) -> None:
        """Have system calls come past here. None of them waits for a disk."""
        for module, name in (*((os, name) for name in CALLS), (fcntl, "flock")):
            setattr(module, name, self._watched(name, getattr(module, name)))

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if self.reached("call"):
                if self.plan and self.plan.after and name == "pwrite":
                    fd, data, at = arguments
                    real(fd, memoryview(data)[: len(data) // 2], at)
                elif self.plan and self.plan.after:
                    real(*arguments, **options)
                self.now()
            return None if name == "fsync" else real(*arguments, **options)

        return call


class Life(NamedTuple):
    """A writer, from its fork on."""

    kind: str
    top: Path
    seed: str
    bound: int | None
    plan: Plan | None
    """Without one it closes what it opened, and ends."""
    alone: bool = True
    part: slice = slice(None)


@functools.cache
def statements(kind: str) -> Statements:
    return Statements(MODULES[kind])


def live(
    life: Life,
    promises: Promises,
    told: int,
    *,
    begin: Callable[[], object] = lambda: None,
    checked: Callable[[], object] = lambda: None,
    traced: bool = False,
) -> Death:
    """Be a writer. What it says goes to ``told``. It waits in ``begin``, or calls ``checked``.

    ``traced``: in all functions, and not only in that where it dies.
    """
    chance, kind, death = random.Random(life.seed), KINDS[life.kind], Death(life.plan)
    named = {key.hex(): chunk for chunk, key in zip(kind.chunks, kind.keys, strict=True)}

    def say(what: str, chunks: Iterable[int], nbytes: int = 0) -> None:
        some = list(chunks)
        promises.note(what, some, nbytes)
        os.write(told, json.dumps([what, some, nbytes]).encode() + b"\n")

    death.watch_calls()
    unlink = os.unlink

    def unlinked(path: Any, **options: Any) -> None:
        chunk = named.get(os.path.basename(path))
        if chunk is None:
            return unlink(path, **options)
        say("removing", [chunk])
        unlink(path, **options)
        return say("removed", [chunk])

    os.unlink = unlinked  # type: ignore[assignment]
    begin()
    places = statements(life.kind) if traced else None
    if life.plan is not None and life.plan.at != "call":
        places = statements(life.kind).around(life.plan.at)
    with Tracing(places, death.statement) if places else contextlib.nullcontext():
        writer = kind(life.top, chance, say, bound=life.bound, alone=life.alone, part=life.part)
        writer.open()
        if not life.part.start:
            writer.check(promises)
            checked()
        for _ in range(chance.randint(*STEPS)):
            writer.step()
        if life.plan is not None:
            say("late", ())
            death.now()
        writer.close()
    return death


class Kills:
    """Chains of lives in a folder, and where those can end."""

    def __init__(self, folder: Path, seed: int, kinds: Sequence[str]) -> None:
        self.done: Counter[str] = Counter()
        self._folder = folder
        self._seed = seed
        self._kinds = kinds
        self._places: dict[str, dict[str, int]] = {}
        self._died: set[str] = set()

    def record(self) -> None:
        """Let some live, to see where others can die."""
        for kind in self._kinds:
            statements(kind)  # once, and not in each child
            found: Counter[str] = Counter()
            for number in range(RECORDS):
                bound = (None, KINDS[kind].tight, ROOMY)[number % 3]
                life = Life(kind, self._folder / "record", f"{self._seed} {number}", bound, None)
                report = self._folder / "report"
                pid = forked(functools.partial(self._recorded, life, report))
                if status := ended(pid):
                    raise FoundError(f"a {kind} writer that was left alone ended with {status}")
                found |= Counter(json.loads(report.read_text()))
                shutil.rmtree(life.top)
            self._places[kind] = dict(found)

    def run(self, count: int, first: int) -> None:
        """Chains from number ``first`` on, until so many writers were killed."""
        number = first
        while self.done["killed"] < count:
            try:
                self._chain(number, random.Random(f"{self._seed} {number}"))
            except FoundError as error:
                raise FoundError(f"chain {number}: {error}") from None
            number += 1

    @property
    def summary(self) -> str:
        places = {name for found in self._places.values() for name in found}
        done = {name: count for name, count in sorted(self.done.items()) if name != "killed"}
        return (
            f"{self.done['killed']} killed, at {len(self._died)} of {len(places) - 1} statements "
            f"and in system calls; {done}"
        )

    def _recorded(self, life: Life, report: Path) -> None:
        told = os.open(os.devnull, os.O_WRONLY)
        death = live(life, Promises(KINDS[life.kind].chunks), told, traced=True)
        report.write_text(json.dumps(death.seen))

    def _plan(self, kind: str, chance: random.Random) -> Plan:
        found = self._places[kind]
        at = chance.choice(sorted(found)) if chance.random() < 0.5 else "call"
        return Plan(at, chance.randint(1, found[at]), chance.random() < 0.5)

    def _chain(self, number: int, chance: random.Random) -> None:
        kind = chance.choices(self._kinds, [WEIGHTS[one] for one in self._kinds])[0]
        bound = chance.choice((None, KINDS[kind].tight, ROOMY))
        top = self._folder / f"chain-{number}"
        top.mkdir()
        promises = Promises(KINDS[kind].chunks)
        for turn in range(LIVES):
            seed = f"{self._seed} {number} {turn}"
            plan = self._plan(kind, chance) if turn < LIVES - 1 else None
            lives = [Life(kind, top, seed, bound, plan)]
            if plan is not None and kind == "files" and chance.random() < 0.3:
                other = Life(kind, top, seed + "b", bound, self._plan(kind, chance))
                both = zip((*lives, other), (slice(0, None, 2), slice(1, None, 2)), strict=True)
                lives = [one._replace(alone=False, part=part) for one, part in both]
            try:
                self._turn(lives, promises)
            except FoundError as error:
                raise FoundError(f"{kind}, bound {bound}, life {turn}: {error}") from None
        left = [one.name for one in (*top.glob(".writers/*"), *top.rglob("*.tmp"))]
        if left:
            raise FoundError(f"left behind: {left}")
        shutil.rmtree(top)

    def _turn(self, lives: Sequence[Life], promises: Promises) -> None:
        """Let them live, the others from when the first has looked around, and hear them."""
        heard, told = os.pipe()
        waits, go = os.pipe()

        def first() -> None:
            os.close(waits)
            live(lives[0], promises, told, checked=lambda: os.close(go))

        def later(life: Life) -> None:
            os.close(go)
            live(life, promises, told, begin=lambda: os.read(waits, 1))

        pids = [forked(first), *(forked(functools.partial(later, one)) for one in lives[1:])]
        for fd in (told, waits, go):
            os.close(fd)
        with open(heard) as said:
            surprise = self._hear(said, lives[0].bound, promises)
        for life, pid in zip(lives, pids, strict=True):
            status = ended(pid)
            if status != (0 if life.plan is None else -signal.SIGKILL):
                raise FoundError(f"a writer ended with {status}")
            if life.plan is not None:
                self.done["killed"] += 1
                self._died.add(life.plan.at)
        if surprise:
            raise FoundError(surprise)
        promises.ended()
        self.done["chunks that had to be there"] += promises.of(State.THERE)

    def _hear(self, said: Iterable[str], bound: int | None, promises: Promises) -> str | None:
        surprise = None
        for line in said:
            what, chunks, nbytes = json.loads(line)
            if what == "late":
                self.done["had nothing left to do"] += 1
                continue
            if what == "removing" and bound in (None, ROOMY):
                surprise = surprise or promises.surprise(chunks[0])
            promises.note(what, chunks, nbytes)
        return surprise
