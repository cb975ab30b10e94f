"""What the programs in this folder share: taking turns, the figures, the table, the command line.

Machines differ and are noisy, so no figure here stands alone: what is measured and its calibration
take turns in one process, and their ratio is the result. Whatever else the machine does hits both.

    seconds     of single turns, in runs
    a run       the median of its turns, ours and the calibration's
    a result    the median of the runs' ratios, and half their interquartile range by that median

Knows nothing about what is measured, nor about `calibrations`. Standard library only, so that it
runs where nothing of this project is installed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

RUNS, QUICK_RUNS = 9, 3
T = TypeVar("T")
_SECONDS_IN = {"s": 1.0, "ms": 1e-3, "µs": 1e-6}


@dataclass(frozen=True)
class Result:
    """One line of a table, and of the JSON list."""

    name: str
    value: float
    unit: str
    calibration: float
    """In the same unit."""
    ratio: float
    """1: as fast as the calibration; more is faster. A name with ``a / b`` is that quotient."""
    runs: int
    spread: float
    """Half the distance between the quartiles of the runs' ratios, by their median."""


@dataclass(frozen=True)
class Run:
    """Seconds that one run showed."""

    ours: float
    calibration: float

    @property
    def ratio(self) -> float:
        """How much faster than the calibration."""
        return self.calibration / self.ours


@dataclass(frozen=True)
class Took:
    """What a job answers that has timed itself."""

    seconds: float


Job = Callable[[int], object]
"""One turn; the argument counts them."""


def timed(job: Job, turn: int) -> float:
    """Seconds that one turn takes."""
    began = time.perf_counter()
    answer = job(turn)
    return answer.seconds if isinstance(answer, Took) else time.perf_counter() - began


def awaited(loop: asyncio.AbstractEventLoop, call: Coroutine[object, object, T]) -> tuple[T, Took]:
    """What ``call`` returns, and how long it took in a loop that runs, as core's always does.

    To start and to stop one, with cold caches, is a tenth of a millisecond that no user pays.
    """

    async def inside() -> tuple[T, Took]:
        began = time.perf_counter()
        value = await call
        return value, Took(time.perf_counter() - began)

    return loop.run_until_complete(inside())


def take_turns(
    ours: Job,
    calibration: Job,
    turns: int,
    *,
    before: Callable[[], object] | None = None,
    first: int = 0,
) -> tuple[list[float], list[float]]:
    """Seconds of ``turns`` turns of each, who begins alternating.

    Turns are counted from ``first``. ``before`` is called ahead of each single one and isn't timed.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(first, first + turns):
        order = ((0, ours), (1, calibration))
        for which, job in order if turn % 2 else reversed(order):
            if before is not None:
                before()
            seconds[which].append(timed(job, turn))
    return seconds


def runs_of(
    ours: Job,
    calibration: Job,
    *,
    runs: int,
    turns: int,
    before: Callable[[], object] | None = None,
) -> list[Run]:
    """Medians of ``runs`` runs, after two turns that aren't counted."""
    take_turns(ours, calibration, 2)
    done = []
    for number in range(runs):
        seconds = take_turns(ours, calibration, turns, before=before, first=number * turns)
        done.append(Run(*map(statistics.median, seconds)))
    return done


def throughput(name: str, nbytes: int, runs: Sequence[Run]) -> Result:
    """``nbytes`` a turn, in GiB/s."""
    gib = nbytes / 2**30
    return _result(name, "GiB/s", runs, lambda seconds: gib / seconds)


def duration(name: str, runs: Sequence[Run], unit: str = "µs") -> Result:
    """Time a turn takes, in ``s``, ``ms`` or ``µs``."""
    return _result(name, unit, runs, lambda seconds: seconds / _SECONDS_IN[unit])


def _result(name: str, unit: str, runs: Sequence[Run], of: Callable[[float], float]) -> Result:
    return Result(
        name,
        round(of(statistics.median(run.ours for run in runs)), 2),
        unit,
        round(of(statistics.median(run.calibration for run in runs)), 2),
        round(statistics.median(run.ratio for run in runs), 3),
        len(runs),
        round(spread([run.ratio for run in runs]), 3),
    )


def spread(values: Sequence[float]) -> float:
    """Half the interquartile range by the median; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / middle


class Report:
    """The results of one program: printed as they come, written at the end."""

    def __init__(self, arguments: argparse.Namespace, calibration: str) -> None:
        self.results: list[Result] = []
        self._file: Path | None = arguments.json
        print(machine())
        print(
            f"{'':48}{'value':>10} {'':8}{calibration[:14]:>14}{'ratio':>8}{'spread':>8}{'runs':>5}"
        )

    def add(self, *results: Result) -> None:
        """Print and keep."""
        for one in results:
            self.results.append(one)
            print(
                f"{one.name:48}{one.value:10.2f} {one.unit:8}{one.calibration:14.2f}"
                f"{one.ratio:8.3f}{one.spread:8.1%}{one.runs:5}",
                flush=True,
            )

    def write(self) -> None:
        """To the file of ``--json``, if there is one."""
        if self._file is not None:
            write_json(self._file, self.results)


def write_json(path: Path, results: Sequence[Result]) -> None:
    """A list of objects with the fields of `Result`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps([asdict(one) for one in results], indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> list[Result]:
    """What `write_json` wrote.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        return [Result(**one) for one in json.loads(path.read_text(encoding="utf-8"))]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} isn't a list of results: {error}") from error


def parser(
    doc: str | None, *, runs: int = RUNS, quick_runs: int = QUICK_RUNS
) -> argparse.ArgumentParser:
    """The options that all programs have; ``doc`` is the program's docstring."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="fewer runs, wider spread")
    made.add_argument("--runs", type=int, help=f"default: {runs}, with --quick {quick_runs}")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the results here too")
    made.set_defaults(default_runs=(runs, quick_runs))
    return made


def parse(options: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, with ``runs`` filled in."""
    arguments = options.parse_args()
    if arguments.runs is None:
        arguments.runs = arguments.default_runs[arguments.quick]
    if arguments.runs < 1:
        options.error(f"--runs {arguments.runs}: at least 1")
    return arguments


def machine() -> str:
    """What figures depend on, in one line."""
    return ", ".join(
        [
            _processor(),
            f"{cpus()} CPUs",
            f"SIMD {simd()}",
            f"{platform.system()} {platform.release().split('-')[0]}",
            f"Python {platform.python_version()}",
            f"load {os.getloadavg()[0]:.1f}",
        ]
    )


def cpus() -> int:
    """How many CPUs this process may run on."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def simd() -> str:
    """What the compiled kernels use here."""
    try:
        from lmcache_kernels.cpu import CpuKernels
    except ImportError:
        return "none (lmcache-kernels isn't installed)"
    return CpuKernels(1).simd


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())
