"""Prepares ``.venv``: everything that tests without an engine, lint, types and docs need.

    python3 tools/dev_env.py       what `make venv` does

An environment that is there is brought up to date; one in which pip doesn't run, because its making
was interrupted or its Python is gone, is made anew. Knows how to install, not what: that is
requirements-dev.txt. Standard library only.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from prepared import NIXL, REPOSITORY, PreparationError, need_room, run_step, say
from system_packages import need_to_build

ENVIRONMENT = REPOSITORY / ".venv"
READY = ENVIRONMENT / ".ready"
REQUIREMENTS = REPOSITORY / "requirements-dev.txt"
ROOM_BYTES = 5 << 30
"""3.2 GB in the end; pip unpacks into another place first."""


def build(directory: Path, requirements: Path) -> None:
    """Make the environment, or bring it up to date.

    Raises:
        PreparationError: something is missing, or a step failed.
    """
    log = REPOSITORY / "build" / "venv.log"
    python = directory / "bin" / "python"
    if not _has_pip(python):
        need_to_build()
        need_room(directory, ROOM_BYTES)
        new = [sys.executable, "-m", "venv", "--clear", directory]
        run_step("[1/3] a new virtual environment", new, log)
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    run_step(
        "[2/3] packages, and kernels compiled (several minutes)",
        [*pip, "-r", requirements],
        log,
        cwd=REPOSITORY,
    )
    run_step("[3/3] clients of NIXL", [*pip, "--no-deps", *NIXL], log)


def _has_pip(python: Path) -> bool:
    try:
        done = subprocess.run(
            [str(python), "-m", "pip", "--version"], capture_output=True, check=False
        )
    except OSError:
        return False
    return done.returncode == 0


def main() -> int:
    """Prepare it, and mark it as ready."""
    say(f"this clone's environment: {ENVIRONMENT} (about 3 GB)")
    try:
        build(ENVIRONMENT, REQUIREMENTS)
    except PreparationError as error:
        say(f"error: {error}")
        return 1
    READY.touch()
    return 0


if __name__ == "__main__":
    sys.exit(main())
