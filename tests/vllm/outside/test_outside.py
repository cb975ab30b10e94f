"""vLLM's own connector tests pass with ours. What they are: tools/outside_vllm.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RUNNER = Path(__file__).resolve().parents[3] / "tools" / "outside_vllm.py"


@pytest.mark.vllm
@pytest.mark.long
@pytest.mark.parametrize("check", ["unit", "edge"])
def test_vllms_own_tests_pass(check: str) -> None:
    done = subprocess.run(
        [sys.executable, RUNNER, "--only", check], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr + done.stdout
    assert f"{check:8} ok" in done.stdout
