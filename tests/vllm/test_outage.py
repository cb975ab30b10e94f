"""A short `bench/outage_vllm.py`: real vLLM; its store is stopped and killed meanwhile."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]

PROGRAM = Path(__file__).parents[2] / "bench" / "outage_vllm.py"
SHORT = "--requests 40 --seconds 12 --stores lm-tcp --modes async --no-steps"


def test_texts_are_right_while_the_store_dies_and_hangs(tiny: Path, tmp_path: Path) -> None:
    """And no request is lost, nor anything held for one; ``--no-steps`` asks for no times."""
    command = [sys.executable, PROGRAM, "--python", sys.executable, "--model", tiny]
    done = subprocess.run(
        [*command, "--work", tmp_path / "work", *SHORT.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    assert "no text differs, no request was lost" in done.stdout
