"""Is this build as fast as another one? Both run in turns, and what is compared are their ratios.

    python3 bench/compare.py --base v0.1.0           nine pairs, about fifty minutes on two cores
    python3 bench/compare.py --base HEAD~5 --quick   three short pairs, for a first look
    python3 bench/compare.py --base main --programs disk index

``this`` is the working tree as it is, ``base`` a revision, checked out into a temporary worktree.
Each has its own Python sources and its own build of `kernels`; interpreter and third-party packages
are those of this process for both, and so are entry points. A build is made with the compiler that
is here, once for each content of `kernels`, and kept in ``build/compare``.

A pair runs every program with both builds, one right after the other; who begins alternates. A row
of a program has a ratio to its calibration (see `measuring`), which the machine's mood hits in the
same run. So a pair's quotient of two ratios, this by base, says how much faster this is: 1.02 is
two percent. Of a row's quotients the median is shown, and the interval between two of them that
holds the true median with 95 % confidence, whatever the distribution: the second and the eighth of
nine. With fewer than six pairs there is no such interval, and the extremes are shown.

Both builds run *this* tree's programs, so that they are measured alike. A program that fails with
the base, because the API that it uses is new, runs as it was at that revision, for base alone;
a line says so, and its rows mean less.

Judges nothing: the exit status is 1 if a program failed, whatever the speed. Of sixty rows that
are equally fast three have an interval beside 1. So with ``--again`` programs that have rows wholly
below `SLOWER` run for as many pairs once more, and what is said of these rows is said of pairs that
didn't make anybody look there: a row that is below twice is slower. Stopped with Ctrl-C or SIGTERM
it shows what the pairs up to then say, and the exit status is 130.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import run_all
from measuring import machine
from run_all import Program

ROOT = Path(__file__).resolve().parents[1]
PAIRS, QUICK_PAIRS = 9, 3
SLOWER = 0.97
"""Rows whose interval lies wholly below are listed by themselves."""
CONFIDENCE = 0.95

PROGRAMS = {
    one.title: one
    for one in (
        Program("block_copies", ("--quick",)),
        Program("public_api", ("--quick",)),
        Program("index", ("--quick", "--chunks", "1e6")),
        Program("planner", ("--quick", "--slots", "1e5")),
        Program("disk", ("--quick",)),
        Program("lm_server", ("--quick",)),
        Program("codec_speed", ("--quick",)),
        Program("isolated", ("--quick",)),
        Program("transfer", ("--quick", "--mib", "256", "--channel", "tcp")),
        Program("stress", ("--seconds", "10")),
        Program("stress", ("--seconds", "10", "--tier", "filesystem"), "stress_tier"),
        Program("redis_store", ("--quick",)),
        Program("mooncake_store", ("--quick",)),
        Program("nixl_store", ("--quick",)),
        Program("infinistore_store", ("--quick",)),
    )
}
"""What has ratios of which more is faster, and needs no engine."""
DEFAULT = ("block_copies", "public_api", "index", "planner", "disk", "lm_server", "codec_speed")
QUICKER = {
    "stress": ("--seconds", "2"),
    "index": ("--runs", "1", "--chunks", "1e5"),
    "lm_server": ("--runs", "2"),  # it has quartiles
}


@dataclass(frozen=True)
class Build:
    """One of the two: what it is called, where it lies, and what its modules are imported from."""

    name: str
    root: Path
    kernels: Path

    def environment(self, given: Mapping[str, str]) -> dict[str, str]:
        """``given``, importing this build before anything that is installed."""
        sources = sorted(
            path
            for path in (*self.root.glob("*/src"), *self.root.glob("examples/*/src"))
            if path.parent.name != "kernels"
        )
        return {**given, "PYTHONPATH": os.pathsep.join(map(str, (self.kernels, *sources)))}


@dataclass
class Row:
    """One line of a program: a quotient for each pair."""

    name: str
    quotients: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.quotients)

    @property
    def program(self) -> str:
        """The title of the program that has it."""
        return self.name.split(":")[0]

    @property
    def interval(self) -> tuple[float, float]:
        """See `interval_of`."""
        return interval_of(self.quotients)


def interval_of(values: Sequence[float]) -> tuple[float, float]:
    """Between which of ``values`` the median lies, with `CONFIDENCE` where there are enough."""
    ordered, n = sorted(values), len(values)
    outside, skipped = 0.0, 0
    # The true median is below the k-th of n as often as k - 1 or fewer of n coins show heads.
    while skipped < (n - 1) // 2:
        outside += 2 * math.comb(n, skipped) / 2**n
        if outside > 1 - CONFIDENCE:
            break
        skipped += 1
    first = max(0, skipped - 1)
    return ordered[first], ordered[n - 1 - first]


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


# -- builds --------------------------------------------------------------------------------


def git(*arguments: str) -> str:
    """What git says about this repository.

    Raises:
        SystemExit: it refuses; with what it said.
    """
    done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


@contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """``revision``, checked out for a while."""
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        root = Path(folder).resolve() / "base"
        git("worktree", "add", "--detach", str(root), revision)
        try:
            yield root
        finally:
            git("worktree", "remove", "--force", str(root))


def kernels_of(root: Path, revision: str | None) -> Path:
    """A folder with the compiled kernels of ``root``, built if they aren't there.

    ``revision`` names what ``root`` is a checkout of; ``None`` for a working tree, whose build is
    kept only if `kernels` is as committed.
    """
    changed = revision is None and git("status", "--porcelain", "--", "kernels") != ""
    content = git("rev-parse", f"{revision or 'HEAD'}:kernels")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    target = ROOT / "build" / "compare" / f"{'changed' if changed else content}-{version}"
    if target.exists() and not changed:
        return target
    shutil.rmtree(target, ignore_errors=True)
    print(f"building the kernels of {revision or 'this tree'} (minutes)", flush=True)
    with tempfile.TemporaryDirectory(prefix="compare-build-") as folder:
        made = Path(folder) / "made"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--no-build-isolation", "--target", str(made)]
        command += ["--config-settings", f"build-dir={folder}/objects", str(root / "kernels")]
        subprocess.run(command, check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(made, target)  # whole or not at all
    return target


def require_own(build: Build, environment: Mapping[str, str]) -> None:
    """Fail if a program would import something else than ``build``: figures would mean nothing."""
    code = (
        "import lmcache_core as c, lmcache_kernels as k; print(c.__file__, k.__file__, sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    found = done.stdout.split("\n")[:2]
    expected = (build.root, build.kernels)
    if len(found) < 2 or not all(
        Path(file).is_relative_to(where) for file, where in zip(found, expected, strict=True)
    ):
        raise SystemExit(f"{build.name}: imports {found}, not {expected}\n{done.stderr}")


# -- comparing -----------------------------------------------------------------------------


class Comparison:
    """Two builds, and what was found so far."""

    def __init__(self, this: Build, base: Build, programs: Sequence[Program]) -> None:
        self.rows: dict[str, Row] = {}
        self.pairs: list[list[float]] = []
        self.failed: set[str] = set()
        self.notes: list[str] = []
        self._builds = (this, base)
        self._environments = {one.name: one.environment(os.environ) for one in self._builds}
        self.programs = programs
        self._own: set[str] = set()

    def check(self) -> None:
        """See `require_own`."""
        for build in self._builds:
            require_own(build, self._environments[build.name])

    def run(self, pairs: int) -> None:
        """Run ``pairs`` pairs, and say how it is going."""
        began = time.monotonic()
        each = 2 * len(self.programs)
        for pair in range(pairs):
            found: list[float] = []
            for place, program in enumerate(self.programs):
                if program.title not in self.failed:
                    found += self._pair(program, pair)
                done = pair * each + 2 * (place + 1)
                left = (time.monotonic() - began) / done * (pairs * each - done)
                shown = f"pair {pair + 1}/{pairs}, {program.title}: {left / 60:.0f} min left"
                print(f"{shown:60}", end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr)
            self.pairs.append(found)

    def _pair(self, program: Program, pair: int) -> list[float]:
        this, base = self._builds
        ratios: dict[str, dict[str, float]] = {}
        for build in (this, base) if pair % 2 == 0 else (base, this):
            ratios[build.name] = self._ratios(program, build)
        mine, theirs = ratios[this.name], ratios[base.name]
        if program.title in self.failed:
            return []
        for name in sorted(mine.keys() ^ theirs.keys()):
            note = f"{name}: only {this.name if name in mine else base.name} has it"
            if note not in self.notes:
                self.notes.append(note)
        found = []
        for name in (name for name in mine if theirs.get(name) and mine[name]):
            found.append(mine[name] / theirs[name])
            self.rows.setdefault(name, Row(name)).quotients.append(found[-1])
        return found

    def _ratios(self, program: Program, build: Build) -> dict[str, float]:
        _, base = self._builds
        environment = self._environments[build.name]
        own = build is base and program.title in self._own
        folder = base.root / "bench" if own else ROOT / "bench"
        results = run_all.run(program, folder, environment, subprocess.DEVNULL)
        if results is None and build is base and not own:
            self._own.add(program.title)
            self.notes.append(f"{program.title}: for base as it was at that revision")
            results = run_all.run(program, base.root / "bench", environment, subprocess.DEVNULL)
        if results is None:
            self.failed.add(program.title)
            self.notes.append(f"{program.title}: failed with {build.name}")
        return {one.name: one.ratio for one in results or ()}

    @property
    def slower(self) -> list[Row]:
        """Rows whose interval lies wholly below `SLOWER`."""
        return [row for row in self._good() if row.interval[1] < SLOWER]

    def _good(self) -> list[Row]:
        return [row for row in self.rows.values() if row.program not in self.failed]

    def report(self) -> str:
        """All of it as text."""
        rows = self._good()
        lines = [machine(), f"{'this by base; more is faster':52}{'median':>8}{'from':>8}{'to':>8}"]
        lines += [f"{row.name:52}{row.median:8.3f}{_both(row.interval)}" for row in rows]
        if rows:
            every = geometric_mean([row.median for row in rows])
            pairs = [geometric_mean(pair) for pair in self.pairs if pair]
            means = _both(interval_of(pairs)) if pairs else ""
            lines.append(f"{f'geometric mean of {len(rows)} rows':52}{every:8.3f}{means}")
        lines += [f"wholly below {SLOWER}: {row.name}" for row in self.slower]
        lines += [] if self.slower else [f"no interval lies wholly below {SLOWER}"]
        return "\n".join([*lines, *self.notes])


def once_more(found: Comparison, second: Comparison) -> str:
    """What ``second`` says of the rows that were slower in ``found``."""
    lines = [f"these again, in {len(second.pairs)} more pairs"]
    twice = {row.name for row in second.slower}
    for name in (row.name for row in found.slower):
        if (row := second.rows.get(name)) is not None:
            verdict = "  slower" if name in twice else ""
            lines.append(f"{name:52}{row.median:8.3f}{_both(row.interval)}{verdict}")
    both = twice & {row.name for row in found.slower}
    lines += [] if both else [f"no row lies wholly below {SLOWER} twice"]
    return "\n".join([*lines, *second.notes])


def _both(interval: tuple[float, float]) -> str:
    return f"{interval[0]:8.3f}{interval[1]:8.3f}"


def chosen(names: Sequence[str], *, quick: bool) -> list[Program]:
    """The programs of these names."""
    programs = [PROGRAMS[name] for name in names]
    if not quick:
        return programs
    return [
        Program(one.file, (*one.options, *QUICKER.get(one.file, ("--runs", "1"))), one.name)
        for one in programs
    ]


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True, metavar="REV", help="what to compare with")
    parser.add_argument("--pairs", type=int, help=f"default: {PAIRS}, with --quick {QUICK_PAIRS}")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs")
    parser.add_argument(
        "--again", action="store_true", help="run programs with slower rows once more"
    )
    parser.add_argument(
        "--programs", nargs="+", choices=PROGRAMS, default=DEFAULT, metavar="PROGRAM",
        help=f"of {', '.join(PROGRAMS)}; default: {' '.join(DEFAULT)}",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all quotients here too")
    found = parser.parse_args(arguments)
    if found.pairs is None:
        found.pairs = QUICK_PAIRS if found.quick else PAIRS
    if found.pairs < 1:
        parser.error(f"--pairs {found.pairs}: at least 1")
    return found


def main() -> int:
    arguments = parsed()
    revision = git("rev-parse", "--verify", f"{arguments.base}^{{commit}}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    stopped = False
    with worktree(revision) as root:
        this = Build("this", ROOT, kernels_of(ROOT, None))
        base = Build("base", root, kernels_of(root, revision))
        found = Comparison(this, base, chosen(arguments.programs, quick=arguments.quick))
        found.check()
        second: Comparison | None = None
        try:
            found.run(arguments.pairs)
            if arguments.again and (titles := {row.program for row in found.slower}):
                programs = [one for one in found.programs if one.title in titles]
                second = Comparison(this, base, programs)
                second.run(arguments.pairs)
        except KeyboardInterrupt:
            stopped = True
    print(
        f"{len(found.pairs)} of {arguments.pairs} pairs against {revision[:12]}\n{found.report()}"
    )
    if second is not None and second.pairs:
        print(once_more(found, second))
    if arguments.json is not None:
        text = json.dumps([asdict(row) for row in found.rows.values()], indent=1)
        arguments.json.write_text(text + "\n", encoding="utf-8")
    if stopped:
        return 130
    return 1 if found.failed or (second is not None and second.failed) else 0


if __name__ == "__main__":
    sys.exit(main())
