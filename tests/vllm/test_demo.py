"""The first command of the README does what the README says."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_the_demo_shows_what_it_promises() -> None:
    demo = subprocess.run(
        ["make", "demo"], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert demo.returncode == 0, demo.stdout[-3000:] + demo.stderr[-3000:]
    lines = [line.split() for line in demo.stdout.splitlines() if line.startswith("request ")]
    requests = [line for line in lines if line[-2:] == ["the", "same"]]
    assert len(requests) == 2
    prompt_tokens, hit_tokens = (int(word) for word in requests[1][2:4])
    assert prompt_tokens > 2000
    assert hit_tokens > prompt_tokens - 50
