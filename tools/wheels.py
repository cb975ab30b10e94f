"""Build what is published, and try it on every Python that it is for.

    python3 tools/wheels.py                           what `make wheels` does
    python3 tools/wheels.py --python python3.10 /opt/python3.14/bin/python3

Archives go to dist/, which is emptied first: an sdist of each package and the wheel made from it;
of the kernels one wheel for each Python below 3.12, and one for all from 3.12 on (the stable ABI).
Then each Python gets a new environment, in which every package is installed by itself from dist/
and nothing else of ours, `lmcache plugins --load` has to list it as working, and `lmcache doctor
--connect` stores, loads and deletes a chunk in a folder. Prints a table, and exits with 1 if
anything failed. A Python that isn't there is a line of the table, not a success.

Knows how to build and to try. How a release is made is docs/releasing.md's business. Standard
library only.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from prepared import REPOSITORY, PreparationError, run_step, say
from system_packages import need_to_build

VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
STABLE_ABI = (3, 12)
"""From this Python on one wheel of the kernels fits all."""
KERNELS = "lmcache-kernels"
CORE = "lmcache-core"
WORK = REPOSITORY / "build" / "wheels"
LOG = WORK / "log"


@dataclass(frozen=True)
class Interpreter:
    """One Python to build with and to try."""

    command: str
    version: tuple[int, int]

    @property
    def label(self) -> str:
        return ".".join(map(str, self.version))

    @property
    def folder(self) -> Path:
        return WORK / self.label


def packages() -> dict[str, Path]:
    """The folder of each distribution, core first: the others need it."""
    found = {}
    for path in sorted(REPOSITORY.glob("*/pyproject.toml")):
        name = re.findall(r'^name = "(.+)"$', path.read_text(), re.MULTILINE)[0]
        found[name] = path.parent
    return {CORE: found.pop(CORE), **found}


def version_of(command: str) -> tuple[int, int] | None:
    """Of the Python that ``command`` starts; ``None`` if that doesn't."""
    code = "import sys; print(*sys.version_info[:2])"
    try:
        said = subprocess.run([command, "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    major, minor = map(int, said.stdout.split())
    return major, minor


def interpreters(named: list[str]) -> tuple[list[Interpreter], list[str]]:
    """Those that start, and the versions that nobody has.

    Raises:
        PreparationError: one that was named doesn't start.
    """
    found: dict[tuple[int, int], Interpreter] = {}
    for command in named or [f"python{one}" for one in VERSIONS]:
        version = version_of(command)
        if version is not None:
            found.setdefault(version, Interpreter(command, version))
        elif named:
            raise PreparationError(f"--python {command}: it doesn't start; name a Python's command")
    chosen = [found[version] for version in sorted(found)]
    return chosen, [one for one in VERSIONS if one not in {each.label for each in chosen}]


def environment(python: Interpreter, name: str) -> Path:
    """A new environment; the answer is its Python."""
    folder = python.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    run_step(f"python {python.label}: {name}", [python.command, "-m", "venv", folder], LOG)
    return folder / "bin" / "python"


def build(every: list[Interpreter], dist: Path) -> None:
    """Fill ``dist``.

    Raises:
        PreparationError: a step failed.
    """
    shutil.rmtree(dist, ignore_errors=True)
    dist.mkdir(parents=True)
    builder = environment(every[0], "build")
    run_step("tools", [builder, "-m", "pip", "install", "-q", "build", "twine"], LOG)
    for name, folder in packages().items():
        only = ["--sdist"] if name == KERNELS else []
        run_step(name, [builder, "-m", "build", *only, "--outdir", dist, folder], LOG)
    (kernels,) = dist.glob("lmcache_kernels-*.tar.gz")
    below = [one for one in every if one.version < STABLE_ABI]
    for python in [*below, *[one for one in every if one.version >= STABLE_ABI][:1]]:
        pip = [environment(python, "kernels"), "-m", "pip", "wheel", "-q", "--no-deps"]
        run_step(f"{KERNELS} for {python.label}", [*pip, "-w", dist, kernels], LOG)
    archives = sorted(dist.iterdir())
    run_step("twine check", [builder, "-m", "twine", "check", "--strict", *archives], LOG)


def problem(python: Interpreter, package: str, dist: Path) -> str:
    """Why a package doesn't work there; empty if it does."""
    try:
        own = environment(python, package)
        pip = [own, "-m", "pip", "install", "-q", "--find-links", dist]
        run_step("  installed", [*pip, "--only-binary", ":all:", package], LOG)
        listed = _said(own, "plugins", "--load", "--json")
        broken = [
            f"{one['name']}: {one['detail']}"
            for one in json.loads(listed)["plugins"]
            if one["status"] != "ok"
        ]
        here = {one["distribution"] for one in json.loads(listed)["plugins"]}
        if package not in here:
            return f"lmcache plugins --load doesn't list {package}"
        if not broken:
            disk = own.parents[1] / "chunks"
            options = (f"local_disk={disk}", "max_local_disk_size=1", "max_local_cpu_size=0.1")
            sets = [part for option in options for part in ("--set", option)]
            _said(own, "doctor", "--connect", "--layers", "2", *sets)
    except PreparationError as error:
        return str(error).splitlines()[0]
    return "; ".join(broken)


def _said(python: Path, *arguments: str) -> str:
    command = [str(python.with_name("lmcache")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        wrong = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
        said = "; ".join(wrong) or done.stderr.strip() or done.stdout.strip()
        raise PreparationError(f"{' '.join(arguments[:2])}: {said[:300]}")
    return done.stdout


def main() -> int:
    """Build, try and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", nargs="+", default=[], metavar="COMMAND", help="instead")
    parser.add_argument("--dist", type=Path, default=REPOSITORY / "dist", help="default: dist/")
    args = parser.parse_args()
    try:
        need_to_build()
        every, missing = interpreters(args.python)
        if not every:
            raise PreparationError(f"there is none of Python {', '.join(VERSIONS)}; see --python")
        LOG.unlink(missing_ok=True)
        build(every, args.dist)
    except PreparationError as error:
        say(f"error: {error}")
        return 1
    for archive in sorted(args.dist.iterdir()):
        print(f"{archive.stat().st_size / 1024:8.0f} KiB  {archive.name}")
    failed = False
    for python in every:
        for package in packages():
            why = problem(python, package, args.dist)
            failed |= bool(why)
            print(f"{'FAIL' if why else 'ok':4}  python {python.label}  {package}  {why}".rstrip())
    for version in missing:
        print(f"----  python {version}  not here, so not tried")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
