"""The first command of the README runs in a Python in which nothing is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.mark.parametrize(
    "tool", ["demo", "dev_env", "engine_env", "models", "summary", "system_packages"]
)
def test_it_needs_nothing_installed(tool: str) -> None:
    code = f"import sys; sys.path.insert(0, {str(TOOLS)!r}); import {tool}"
    bare = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False
    )
    assert bare.returncode == 0, bare.stderr
