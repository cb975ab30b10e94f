"""Writers of a folder are killed and lose power: what they acknowledged is there, nothing is wrong.

``LMCACHE_TEST_CRASHES`` and ``LMCACHE_TEST_POWER_CUTS`` are how many. The seed of a run is printed,
and ``LMCACHE_TEST_SEED`` repeats it.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

CRASHES = os.environ.get("LMCACHE_TEST_CRASHES", "60")
CUTS = os.environ.get("LMCACHE_TEST_POWER_CUTS", "60")
SEED = int(os.environ.get("LMCACHE_TEST_SEED") or random.randrange(1 << 32))
PROGRAM = Path(__file__).parent / "servers" / "crashing.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
PATIENCE_S = 300.0


def crash(folder: Path, what: str, *arguments: str, seed: int = SEED) -> tuple[int, str]:
    """The program's exit status and output."""
    done = subprocess.run(
        [sys.executable, PROGRAM, what, folder, "--seed", str(seed), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
    )
    print(done.stdout)
    return done.returncode, done.stdout


def test_writers_are_killed(tmp_path: Path) -> None:
    status, said = crash(tmp_path, "kills", "--count", CRASHES)
    assert status == 0, said
    assert re.search(r"killed: [1-9]\d* at [1-9]\d* of \d+ statements", said), said
    assert re.search(r"; [1-9]\d* at [1-9]\d* places in system calls, {'f", said), said


def test_power_is_cut(tmp_path: Path) -> None:
    status, said = crash(tmp_path, "cuts", "--count", CUTS, "--jobs", "2")
    assert status == 0, said


def test_who_ends_it_hears_what_was_done_and_how_to_go_on(tmp_path: Path) -> None:
    command = [sys.executable, PROGRAM, "cuts", tmp_path / "ended", "--count", "1000000"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        until = time.monotonic() + PATIENCE_S
        while not (tmp_path / "ended" / "chain-1").exists():  # then the first has ended
            assert running.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
        running.terminate()
        said, _ = running.communicate()
    finally:
        running.kill()
    assert running.returncode == 2
    done, after = re.findall(r"'power cuts': (\d+)}\nto go on: .* --first (\d+)\n", said)[0]
    assert int(done) > 0
    assert int(after) > 0
    status, said = crash(tmp_path / "on", "cuts", "--count", "1", "--first", after, seed=0)
    assert (status, f"--first {int(after) + 1}\n" in said) == (0, True), said


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
