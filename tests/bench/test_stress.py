"""Two seconds of `bench/stress.py`: every loaded byte right, nothing stuck, no slot lost.

Also where a serde and a backend fail in each way that there is.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "bench" / "stress.py"


@pytest.mark.parametrize("tier", ["none", "filesystem", "shaky"])
def test_sixteen_threads_and_a_full_arena(tier: str) -> None:
    done = subprocess.run(
        [sys.executable, PROGRAM, "--seconds", "2", "--tier", tier],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    assert "no wrong byte" in done.stdout
    assert "evicted_chunks (host)" in done.stdout
    assert ("faults were injected" in done.stdout) == (tier == "shaky")
