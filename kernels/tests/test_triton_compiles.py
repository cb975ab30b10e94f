"""Triton's kernels compile for GPUs, and keep float operations apart. They were never run there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="pip install lmcache-kernels[triton]")
pytest.importorskip("torch", reason="pip install lmcache-kernels[testing]")

import compile_kernels

from lmcache_kernels import triton_kernels

# Fused operations would round once where the C++ rounds twice; ftz would lose small numbers.
UNWANTED = ("fma", "ftz", "approx", "full")


def test_every_kernel_compiles(tmp_path: Path) -> None:
    # Another process: in this one Triton interprets.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", compile_kernels.__file__, "90"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(one["bytes"] > 0 for one in found)
    launched = {one["kernel"] for one in found}
    assert launched == {
        name
        for module in (triton_kernels, *compile_kernels.CODEC)
        for name in compile_kernels.public(module)
    }
    floats = {each for one in found for each in one["floats"]}
    assert {each.split(".")[0] for each in floats} == {"add", "sub", "mul", "div", "sqrt"}
    assert not [each for each in floats if any(part in each for part in UNWANTED)]
