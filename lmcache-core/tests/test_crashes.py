"""Writers of a folder are killed and lose power: what they acknowledged is there, nothing is wrong.

``LMCACHE_TEST_CRASHES`` and ``LMCACHE_TEST_POWER_CUTS`` are how many. The seed of a run is printed,
and ``LMCACHE_TEST_SEED`` repeats it.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

CRASHES = os.environ.get("LMCACHE_TEST_CRASHES", "60")
CUTS = os.environ.get("LMCACHE_TEST_POWER_CUTS", "60")
SEED = int(os.environ.get("LMCACHE_TEST_SEED") or random.randrange(1 << 32))
PROGRAM = Path(__file__).parent / "servers" / "crashing.py"


def crash(folder: Path, what: str, *arguments: str, seed: int = SEED) -> tuple[int, str]:
    """The program's exit status and output."""
    done = subprocess.run(
        [sys.executable, PROGRAM, what, folder, "--seed", str(seed), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    print(done.stdout)
    return done.returncode, done.stdout


def test_writers_are_killed(tmp_path: Path) -> None:
    status, said = crash(tmp_path, "kills", "--count", CRASHES)
    assert status == 0, said


def test_power_is_cut(tmp_path: Path) -> None:
    status, said = crash(tmp_path, "cuts", "--count", CUTS)
    assert status == 0, said


@pytest.mark.parametrize(
    ("what", "mistake", "found"),
    [
        ("cuts", "no-names", "is missing"),
        ("cuts", "no-bytes", "is missing|is damaged"),
        ("cuts", "no-clear", "was forgotten"),
        ("kills", "in-place", "is missing|is damaged|nobody asked for it|bytes: "),
        ("kills", "no-clear", "was forgotten"),
        ("kills", "swept", "nobody asked for it"),
    ],
)
def test_a_mistake_is_found(tmp_path: Path, what: str, mistake: str, found: str) -> None:
    arguments = ("--count", "400", "--kinds", "files", "--break", mistake)
    status, said = crash(tmp_path, what, *arguments, seed=1)
    assert status == 1
    assert any(text in said for text in found.split("|")), said
