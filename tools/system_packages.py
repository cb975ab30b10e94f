"""What this repository's builds and tests need of the system, and how what is missing gets here.

    python3 tools/system_packages.py GOAL…     what `make GOAL…` does before anything else

As root, with ``CI`` or ``LMCACHE_INSTALL=1`` set, apt-get installs what is missing. Otherwise the
first line is the command to run; what needs a part that is missing fails then, and says why
(`need`). Ends with 1 where nothing can be prepared at all: this Python is too old or too new, or
one of the parts is missing that an environment is made with.

Knows Debian's packages, and what each is for. Knows nothing about Python's packages. Standard
library only, and an older Python must be able to read it: that is whom it has something to tell.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prepared import REPOSITORY, PreparationError, run_step, say

OLDEST, NEWEST = (3, 10), (3, 13)
LOG = REPOSITORY / "build" / "system-packages.log"
_VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"


class Missing(Exception):
    """A part of the system isn't here. The message is one line, with the package that has it."""


@dataclass(frozen=True)
class Part:
    """Something that is looked for, and the package that brings it."""

    name: str
    package: str
    purpose: str
    found: Callable[[], bool]
    goals: frozenset[str] | None = None
    """Of make: what it is needed for. ``None``: no environment can be made without it."""
    of_python: bool = False
    """It belongs to this Python; another one that has vLLM already needs its own."""

    def wanted(self, goals: Sequence[str]) -> bool:
        """Whether one of ``goals`` needs it."""
        return self.goals is None or not self.goals.isdisjoint(goals)

    def __str__(self) -> str:
        return f"{self.name} (package {self.package}): {self.purpose}"


def _command(*names: str) -> bool:
    return any(shutil.which(name) for name in names)


def _compiler(variable: str, *names: str) -> bool:
    chosen = shlex.split(os.environ.get(variable, ""))
    return _command(*(chosen[:1] or names))


def _library(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def _header(name: str) -> bool:
    """Asks the compiler: it knows where to look."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return False
    done = subprocess.run(
        [compiler, "-E", "-x", "c", "-"],
        input=f"#include <{name}>\n".encode(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    return done.returncode == 0


def _module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _python_header() -> bool:
    return (Path(sysconfig.get_path("include")) / "Python.h").exists()


_UNIT = frozenset({"test", "unit"})
_TESTS = frozenset({"test", "unit", "e2e", "bench"})
_ENGINE = frozenset({"test", "unit", "e2e", "bench", "demo", "matrix"})
_WITH_ENGINE = frozenset({"e2e", "demo", "matrix", "engine-env"})
"""Goals that run in the engine's Python alone."""

PARTS = (
    Part(
        "venv",
        f"python{_VERSION}-venv",
        "makes Python's environments",
        partial(_module, "ensurepip"),
        of_python=True,
    ),
    Part("a C compiler", "gcc", "compiles for tests", partial(_compiler, "CC", "cc", "gcc")),
    Part(
        "a C++ compiler",
        "g++",
        "compiles kernels",
        partial(_compiler, "CXX", "c++", "g++", "clang++"),
    ),
    Part(
        "Python.h",
        f"python{_VERSION}-dev",
        "compiles kernels",
        _python_header,
        of_python=True,
    ),
    Part(
        "redis-server",
        "redis-server",
        "tests with Redis",
        partial(_command, "redis-server"),
        _TESTS,
    ),
    Part(
        "ip",
        "iproute2",
        "tests with another host",
        partial(_command, "ip"),
        _UNIT | {"bench"},
    ),
    Part(
        "libibverbs.so.1",
        "libibverbs1",
        "InfiniStore's and Mooncake's clients",
        partial(_library, "libibverbs.so.1"),
        _TESTS,
    ),
    Part(
        "libcurl.so.4",
        "libcurl4",
        "Mooncake's client and its master",
        partial(_library, "libcurl.so.4"),
        _TESTS,
    ),
    Part(
        "infiniband/verbs.h",
        "libibverbs-dev",
        "tests over an emulated NIC",
        partial(_header, "infiniband/verbs.h"),
        _TESTS,
    ),
    Part(
        "libnuma.so.1",
        "libnuma1",
        "Mooncake's client, and vLLM",
        partial(_library, "libnuma.so.1"),
        _ENGINE,
    ),
)


def need(*names: str, parts: Sequence[Part] = PARTS) -> None:
    """For tests: say that these parts have to be here.

    Raises:
        Missing: one isn't; a test that this ends has failed, with that line for a reason.
    """
    by_name = {part.name: part for part in parts}
    for part in (by_name[name] for name in names):
        if not part.found():
            raise Missing(
                f"{part.name} isn't here ({part.purpose}); run: apt-get install -y {part.package}"
            )


def need_to_build(parts: Sequence[Part] = PARTS) -> None:
    """For tools that make environments.

    Raises:
        PreparationError: something is missing that this takes.
    """
    missing = [part for part in parts if part.goals is None and not part.found()]
    if missing:
        raise PreparationError(
            f"{', '.join(part.name for part in missing)}: not here, and no environment can be made "
            f"without; run: {_apt_get(missing)}"
        )


def allowed(environ: Mapping[str, str]) -> bool:
    """Whether the environment says that packages may be installed."""
    return any(
        environ.get(name, "").lower() not in ("", "0", "false", "no")
        for name in ("CI", "LMCACHE_INSTALL")
    )


def wrong_python(version: Sequence[int]) -> str | None:
    """Why this Python won't do; ``None``: it will."""
    if OLDEST <= tuple(version[:2]) <= NEWEST:
        return None
    oldest, newest = (".".join(map(str, one)) for one in (OLDEST, NEWEST))
    return (
        f"{sys.executable} is Python {'.'.join(map(str, version[:3]))}, and this needs {oldest} to "
        f"{newest}; name another: make PYTHON=python{newest} …"
    )


def install(missing: Sequence[Part], log: Path = LOG) -> None:
    """Have apt-get install the packages of ``missing``; takes a minute.

    Raises:
        PreparationError: it can't, or they aren't there afterwards.
    """
    packages = _packages(missing)
    say(f"installing {' '.join(packages)}")
    apt = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-o", "DPkg::Lock::Timeout=600"]
    try:
        run_step("[1/2] apt-get update", [*apt, "update"], log)
    except PreparationError as error:
        # One source of several may be out of order, and the packages in another one.
        say(f"  {error}\n  going on with what is known")
    run_step("[2/2] apt-get install", [*apt, *_INSTALL, *packages], log)
    if left := [part for part in missing if not part.found()]:
        raise PreparationError(
            f"apt-get has installed {', '.join(_packages(left))}, and still there is no "
            f"{', '.join(part.name for part in left)} (its output: {log})"
        )


def provide(
    goals: Sequence[str],
    parts: Sequence[Part] = PARTS,
    *,
    root: bool,
    environ: Mapping[str, str],
    log: Path = LOG,
) -> list[Part]:
    """Install or name what ``goals`` of make need; answers what is missing still."""
    missing = [part for part in parts if part.wanted(goals) and not part.found()]
    if missing and root and allowed(environ) and shutil.which("apt-get"):
        try:
            install(missing, log)
        except PreparationError as error:
            print(f"error: {error}")
            root = False  # the same again won't help: name the packages
        missing = [part for part in missing if not part.found()]
    if missing:
        if shutil.which("apt-get") is None:
            print(
                "this system has no apt-get; install what Debian has in these packages: "
                f"{' '.join(_packages(missing))}"
            )
        elif root:
            print(f"LMCACHE_INSTALL=1 make {' '.join(goals)}")
        else:
            print(_apt_get(missing))
        print("Run this first. What is missing, and what fails without:")
        for part in missing:
            print(f"  {part}")
    return missing


_INSTALL = ("install", "-y", "--no-install-recommends")


def _apt_get(missing: Sequence[Part]) -> str:
    command = f"apt-get {' '.join(_INSTALL)} {' '.join(_packages(missing))}"
    return f"sudo apt-get update && sudo {command}"


def _packages(missing: Sequence[Part]) -> list[str]:
    return list(dict.fromkeys(part.package for part in missing))


def main() -> int:
    """Check, install or name."""
    if wrong := wrong_python(sys.version_info):
        print(f"error: {wrong}")
        return 1
    goals = sys.argv[1:] or ["test"]
    parts: Sequence[Part] = PARTS
    if os.environ.get("LMCACHE_VLLM_PYTHON") and _WITH_ENGINE.issuperset(goals):
        parts = [part for part in PARTS if not part.of_python]
    missing = provide(goals, parts, root=os.geteuid() == 0, environ=os.environ)
    sys.stdout.flush()
    return int(any(part.goals is None for part in missing))


if __name__ == "__main__":
    sys.exit(main())
