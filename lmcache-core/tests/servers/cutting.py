"""Writers of a folder whose power is cut, after any of their system calls; others go on from there.

What they do is recorded, and the disk made as `power_cut` says that a cut may have left it.
"""

from __future__ import annotations

import copy
import os
import random
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
from chains import Chains
from forks import STEPS, FoundError
from power_cut import Disk, Entry, Kept, PowerLog, everything, nothing, torn
from promises import CHUNKS, NUMBERS, Promises, State
from writers import ROOMY, FileWriter, WrongError

SEGMENTS = 4
"""So many recordings go on from each other."""
CUTS = 10
"""So many cuts are tried of each."""


def replayed(promises: Promises, log: Iterable[Entry], bound: int | None) -> Promises:
    """What was promised when all of ``log`` was done and everybody is gone.

    Raises:
        WrongError: a chunk was removed without need.
    """
    found = copy.deepcopy(promises)
    for operation, *rest in log:
        if operation == "mark":
            found.note(*rest)
        elif operation == "remove":
            chunk = NUMBERS.get(os.path.basename(rest[0]))
            if chunk is not None:
                if bound in (None, ROOMY) and (surprise := found.surprise(chunk)):
                    raise WrongError(surprise)
                found.note("removing", [chunk])
                found.note("removed", [chunk])
    found.ended()
    return found


def loose(promises: Promises) -> set[int]:
    """Chunks whose files may be damaged after a power cut."""
    return {chunk for chunk, one in promises.known.items() if one.loose}


def drawn(chance: random.Random) -> Callable[[], Kept]:
    """What a cut leaves, which is the same each time."""
    seed, kind = chance.getrandbits(32), chance.choices("tne", (6, 1, 1))[0]
    return lambda: torn(seed) if kind == "t" else nothing if kind == "n" else everything


class Cuts(Chains):
    """Chains of recordings, each from what a power cut left of the one before."""

    counted = "power cuts"

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__()
        self._folder = folder
        self._seed = seed

    @property
    def summary(self) -> str:
        return str(dict(sorted(self.done.items())))

    def chain(self, number: int) -> None:
        chance = random.Random(f"{self._seed} {number}")
        os.fsync = lambda fd: None
        top = self._folder / f"chain-{number}"
        place = top / "first"
        shutil.rmtree(top, ignore_errors=True)  # a run that was stopped
        place.mkdir(parents=True)
        bound = chance.choice((None, FileWriter.tight, ROOMY))
        promises, done = Promises(CHUNKS), self.done
        for segment in range(SEGMENTS):
            before = Disk.of(place)
            log = self._record(place, chance, bound, promises)
            for turn, end in enumerate(self._ends(log, chance)):
                disk, kept = Disk.after(log[:end], before), drawn(chance)
                left, place = top / f"{segment}-{turn}", top / f"{segment}-{turn}-again"
                try:
                    after = replayed(promises, log[:end], bound)
                    for one in (left, place):
                        one.mkdir()
                        disk.rebuild(one, kept())
                    self._look(left, chance, after)
                except WrongError as error:
                    where = f"recording {segment}, cut {turn}, after {log[end - 1]!r:.200}"
                    raise FoundError(f"{where}: {error}") from None
                done["power cuts"] += 1
                done["after a flush"] += log[end - 1][0] == "sync"
                done["chunks that had to be there"] += after.of(State.THERE)
            promises = after
        shutil.rmtree(top)

    def _record(
        self, place: Path, chance: random.Random, bound: int | None, promises: Promises
    ) -> list[Entry]:
        """What one writer, or two in turns, do to ``place``."""
        durable = chance.choice(((True,), (True,), (True, True), (True, False)))
        damaged = loose(promises)
        with pytest.MonkeyPatch.context() as patch:
            recording = PowerLog(place, patch)

            def say(what: str, chunks: Iterable[int], nbytes: int = 0) -> None:
                recording.mark(what, tuple(chunks), nbytes)

            writers = [
                FileWriter(
                    *(place / "new" / "kv", random.Random(chance.random()), say),
                    durable=yes,
                    promises=yes,
                    damaged=damaged,
                    bound=bound,
                    alone=len(durable) == 1,
                    part=slice(number, None, len(durable)),
                )
                for number, yes in enumerate(durable)
            ]
            for number, writer in enumerate(writers):
                writer.open()
                if not number:
                    writer.check(replayed(promises, recording.log, bound))
            for _ in range(len(writers) * chance.randint(*STEPS)):
                chance.choice(writers).step()
            if polite := chance.random() < 0.5:
                for writer in writers:
                    writer.close()
        if not polite:
            for writer in writers:
                writer.close()
        return recording.log

    def _ends(self, log: Sequence[Entry], chance: random.Random) -> list[int]:
        """After which entries power is cut: any that changed something, and flushes above all."""
        changes = [i for i, one in enumerate(log, 1) if one[0] not in ("mark", "open")]
        flushes = [i for i in changes if log[i - 1][0] == "sync"]
        ends = chance.sample(changes, min(len(changes), CUTS // 2))
        ends += chance.sample(flushes, min(len(flushes), CUTS - len(ends)))
        chance.shuffle(ends)
        return ends

    def _look(self, place: Path, chance: random.Random, promises: Promises) -> None:
        """Everything that was promised is there, and there is room for everything."""
        writer = FileWriter(
            *(place / "new" / "kv", chance, lambda *_: None),
            durable=False,
            promises=False,
            damaged=loose(promises),
            bound=None,
        )
        writer.open()
        writer.check(promises)
        for _ in range(STEPS[0]):
            writer.step()
        writer.close()
