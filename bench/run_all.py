"""Runs every program here, and keeps what they found.

    python3 bench/run_all.py                     all; writes bench/results/latest.json
    python3 bench/run_all.py index disk          only these; others' results stay as they were
    python3 bench/run_all.py --page              writes the results into docs/performance-figures.md

Each program is a process of its own, so that none inherits another one's memory. One that fails is
named at the end, and in the exit status, and stops no other. Knows the list of programs and the
page; what a program measures is said in its docstring.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from measuring import Result, machine, read_json, write_json

HERE = Path(__file__).resolve().parent
LATEST = HERE / "results" / "latest.json"
MACHINE = HERE / "results" / "machine.txt"
PAGE = HERE.parent / "docs" / "performance-figures.md"
TIMEOUT_S = 1200  # for one program; longer is a hang, however busy the machine
BEGIN, END = "<!-- results: bench/run_all.py --page -->", "<!-- end of results -->"


@dataclass(frozen=True)
class Program:
    """A file in this folder, and how it is called to be quick enough."""

    file: str
    options: tuple[str, ...] = ()
    name: str = ""
    """In the results; where it isn't that of the file."""

    @property
    def title(self) -> str:
        return self.name or self.file


# Under ten minutes together, on two cores. `--json FILE` is added.
PROGRAMS = [
    Program("block_copies"),
    Program("public_api"),
    Program("index"),
    Program("planner"),
    Program("disk"),
    Program("lm_server", ("--runs", "7")),
    Program("lm_crowd", ("--quick",)),
    Program("redis_store", ("--quick",)),
    Program("mooncake_store", ("--quick",)),
    Program("nixl_store", ("--quick",)),
    Program("transfer", ("--quick", "--mib", "256")),
    Program("infinistore_store", ("--quick",)),
    Program("isolated", ("--quick",)),
    Program("codec_speed", ("--quick",)),
    Program("stress", ("--seconds", "60")),
    Program("stress", ("--seconds", "15", "--tier", "filesystem"), "stress_tier"),
    Program("ttft_vllm", ("--runs", "3", "--turns", "7")),
]


def run(
    program: Program,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    output: int | None = None,
) -> list[Result] | None:
    """Its results, named after it; ``None`` if it failed.

    ``folder`` has the program, if not this one; ``output`` is what `subprocess` calls ``stdout``.
    """
    with tempfile.TemporaryDirectory(prefix="bench-") as work:
        found = Path(work) / "results.json"
        file = (folder or HERE) / f"{program.file}.py"
        command = [sys.executable, file, *program.options, "--json", found]
        try:
            subprocess.run(command, check=True, timeout=TIMEOUT_S, env=environment, stdout=output)
            results = read_json(found)
        except subprocess.CalledProcessError as error:
            print(f"{program.title}: exit status {error.returncode}", flush=True)
            return None
        except subprocess.TimeoutExpired:
            print(f"{program.title}: not ready after {TIMEOUT_S} s, ended", flush=True)
            return None
        except (OSError, ValueError) as error:
            print(f"{program.title}: no results: {error}", flush=True)
            return None
    return [dataclasses.replace(one, name=f"{program.title}: {one.name}") for one in results]


def run_all(programs: Sequence[Program], latest: Path) -> int:
    """Run them one after the other; answer an exit status."""
    began = time.monotonic()
    kept: dict[str, list[Result]] = {one.title: [] for one in PROGRAMS}  # in this order
    if latest.exists():
        for one in read_json(latest):
            kept.get(one.name.split(":")[0], []).append(one)
    failed = []
    for number, program in enumerate(programs, 1):
        shown = " ".join([f"{program.file}.py", *program.options])
        print(f"\n== {number}/{len(programs)} {shown}", flush=True)
        started = time.monotonic()
        results = run(program)
        print(f"   {time.monotonic() - started:.0f} s", flush=True)
        if results is None:
            failed.append(program.title)
        # What failed has no figures, not those of last week.
        kept[program.title] = results or []
        write_json(latest, [one for some in kept.values() for one in some])
        (latest.parent / MACHINE.name).write_text(f"{time.strftime('%Y-%m-%d')}, {machine()}\n")
    print(f"\n{latest}: {time.monotonic() - began:.0f} s in all")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def table(results: Sequence[Result]) -> str:
    """Results as a table in Markdown."""
    head = ("what", "value", "calibration", "unit", "ratio", "spread", "runs")
    rows = [head, ("---", *["---:"] * 2, "---", *["---:"] * 3)]
    rows += [
        (
            one.name,
            f"{one.value:,.2f}",
            f"{one.calibration:,.2f}",
            one.unit,
            f"{one.ratio:.3f}",
            f"{one.spread:.1%}",
            str(one.runs),
        )
        for one in results
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def refreshed(page: str, between: str) -> str:
    """``page`` with other text between its markers.

    Raises:
        ValueError: the markers aren't there.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no {BEGIN} … {END}")
    return f"{before}{begin}\n\n{between}\n{end}{after}"


def write_page(latest: Path, page: Path) -> None:
    """Put the latest results and what machine they are from into the page."""
    facts = (latest.parent / MACHINE.name).read_text().strip()
    between = f"{facts}\n\n{table(read_json(latest))}"
    page.write_text(refreshed(page.read_text(encoding="utf-8"), between), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    titles = [one.title for one in PROGRAMS]
    parser.add_argument("only", nargs="*", metavar="PROGRAM", help=", ".join(titles))
    parser.add_argument("--page", action="store_true", help="run nothing, write the page")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.only) - set(titles))
    if unknown:
        parser.error(f"{', '.join(unknown)}: no such program; there are {', '.join(titles)}")
    if arguments.page:
        if not LATEST.exists():
            parser.error(f"{LATEST} isn't there: run the programs first")
        write_page(LATEST, PAGE)
        return 0
    chosen = [one for one in PROGRAMS if not arguments.only or one.title in arguments.only]
    return run_all(chosen, LATEST)


if __name__ == "__main__":
    sys.exit(main())
