"""Writers of a folder, one after the other and sometimes two at once, each of which is killed.

Where is drawn: at a statement, or at a system call, half way through a write too. The next one
finds what was acknowledged, and nothing else. Each is a fork of a process that has imported and
parsed what it needs, and is traced only in the function where it is to die.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gc
import json
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from chains import Chains
from forks import STEPS, FoundError, ended, forked
from promises import Promises, State
from statements import Statements, Tracing
from writers import KINDS, ROOMY

from lmcache_backend_lm import disk, folders
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
from lmcache_core.cache import tier_moves
from lmcache_core.tiers import clearing, tier

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

    def watch_calls(self, say: Callable[[str], None]) -> None:
        """Have system calls come past here. None of them waits for a disk."""
        for module, name in (*((os, name) for name in CALLS), (fcntl, "flock")):
            setattr(module, name, self._watched(name, getattr(module, name), say))

    def _watched(
        self, name: str, real: Callable[..., Any], say: Callable[[str], None]
    ) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if self.reached("call"):
                say(f"in {name}")
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

    def say(what: str, chunks: Iterable[int] = (), nbytes: int = 0) -> None:
        some = list(chunks)
        promises.note(what, some, nbytes)
        os.write(told, json.dumps([what, some, nbytes]).encode() + b"\n")

    death.watch_calls(say)
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
            say("late", (), life.part.start or 0)
            death.now()
        writer.close()
    return death


class Kills(Chains):
    """Chains of lives in a folder, and where those can end."""

    counted = "killed"

    def __init__(self, folder: Path, seed: int, kinds: Sequence[str]) -> None:
        super().__init__()
        self._folder = folder
        self._seed = seed
        self._kinds = kinds
        self._places: dict[str, dict[str, int]] = {}

    def record(self) -> None:
        """Let some live, to see where others can die: in new folders, and after a death."""
        for kind in self._kinds:
            statements(kind)  # once, and not in each child
            found: Counter[str] = Counter()
            for number, bound in enumerate((None, KINDS[kind].tight, ROOMY)):
                promises = Promises(KINDS[kind].chunks)
                life = Life(kind, self._folder / "record", f"{self._seed} {number}", bound, None)
                found |= self._recorded(life, promises)
                death = Plan("call", found["call"] // 2, after=True)
                self._turn([life._replace(plan=death)], promises)
                found |= self._recorded(life, promises)
                shutil.rmtree(life.top)
            self._places[kind] = dict(found)
        self.counts.clear()
        gc.collect()
        gc.freeze()

    @property
    def summary(self) -> str:
        """How many died, at how many places, and in which system calls."""
        places = {name for found in self._places.values() for name in found} - {"call"}
        passes, calls = self.counts["at"], self.counts["in"]
        struck = Counter[str]()
        for name, count in passes.items():
            struck[name.split(" pass ")[0]] += count
        others = {name: count for name, count in sorted(self.done.items()) if name != "killed"}
        return (
            f"{self.done['killed']} killed: {struck.total()} at {len(struck)} of {len(places)} "
            f"statements, in {len(passes)} of their passes; {calls.total()} at "
            f"{len(self.counts['call'])} places in system calls, {dict(sorted(calls.items()))}; "
            f"{others}"
        )

    def _recorded(self, life: Life, promises: Promises) -> Counter[str]:
        """What one that isn't killed comes past."""
        report = self._folder / "report"
        self._turn([life], promises, report)
        return Counter(json.loads(report.read_text()))

    def _plan(self, kind: str, chance: random.Random) -> Plan:
        found = self._places[kind]
        at = chance.choice(sorted(found)) if chance.random() < 0.5 else "call"
        return Plan(at, chance.randint(1, found[at]), chance.random() < 0.5)

    def chain(self, number: int) -> None:
        signal.alarm(0)  # each of its lives has one, and it may wait for a processor
        chance = random.Random(f"{self._seed} {number}")
        kind = chance.choices(self._kinds, [WEIGHTS[one] for one in self._kinds])[0]
        bound = chance.choice((None, KINDS[kind].tight, ROOMY))
        top = self._folder / f"chain-{number}"
        shutil.rmtree(top, ignore_errors=True)  # a run that was stopped
        top.mkdir(parents=True)
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

    def _turn(self, lives: Sequence[Life], promises: Promises, report: Path | None = None) -> None:
        """Let them live, the others from when the first has looked around, and hear them.

        ``report``: where the first writes what it came past.
        """
        heard, told = os.pipe()
        waits, go = os.pipe()

        def first() -> None:
            os.close(waits)
            traced, checked = report is not None, functools.partial(os.close, go)
            death = live(lives[0], promises, told, checked=checked, traced=traced)
            if report is not None:
                report.write_text(json.dumps(death.seen))

        def later(life: Life) -> None:
            os.close(go)
            live(life, promises, told, begin=lambda: os.read(waits, 1))

        pids = [forked(first), *(forked(functools.partial(later, one)) for one in lives[1:])]
        for fd in (told, waits, go):
            os.close(fd)
        with open(heard) as said:
            surprise, late = self._hear(said, lives[0].bound, promises)
        for number, (life, pid) in enumerate(zip(lives, pids, strict=True)):
            status = ended(pid)
            if status != (0 if life.plan is None else -signal.SIGKILL):
                raise FoundError(f"a writer ended with {status}")
            if life.plan is not None:
                self._count(life.kind, life.plan, late=number in late)
        if surprise:
            raise FoundError(surprise)
        promises.ended()
        self.done["chunks that had to be there"] += promises.of(State.THERE)

    def _count(self, kind: str, plan: Plan, *, late: bool) -> None:
        self.done["killed"] += 1
        if late:
            self.done["had nothing left to do"] += 1
        elif plan.at == "call":
            self.counts["call"][f"{kind} {plan.nth} {plan.after}"] += 1
        else:
            self.counts["at"][f"{plan.at} pass {plan.nth}"] += 1

    def _hear(
        self, said: Iterable[str], bound: int | None, promises: Promises
    ) -> tuple[str | None, set[int]]:
        """What is wrong, and which of them had nothing left to do."""
        surprise, late = None, set()
        for line in said:
            what, chunks, nbytes = json.loads(line)
            if what == "late":
                late.add(nbytes)
            elif what.startswith("in "):
                self.counts["in"][what[3:]] += 1
            elif what == "removing" and bound in (None, ROOMY):
                surprise = surprise or promises.surprise(chunks[0])
            promises.note(what, chunks, nbytes)
        return surprise, late
