"""A short run of `tools/fault_harness.py`, and mistakes on purpose, each of which it must find."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from faulting.kinds import EXCEPTIONS, LABELS, PROGRAMME

PROGRAM = Path(__file__).parents[2] / "tools" / "fault_harness.py"


def run(*arguments: str) -> tuple[int, dict[str, object]]:
    done = subprocess.run(
        [sys.executable, PROGRAM, "--quiet", "--json", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    start = done.stdout.find("{\n")
    assert start >= 0, done.stdout
    return done.returncode, json.loads(done.stdout[start:])


def problems(found: dict[str, object], kind: str) -> list[str]:
    everything = found["problems"]
    assert isinstance(everything, list)
    return [text for text in everything if kind in text]


def test_faults_over_files_and_a_child_of_its_own() -> None:
    """No wrong byte, no call that raises, nothing left. Who is late, a quiet machine shows."""
    _, found = run("--tiers", "two,isolated", "--faults", "200")
    assert not problems(found, "WRONG")
    assert not problems(found, "RAISED")
    assert not problems(found, "LEFT")
    assert isinstance(found["faults"], int)
    assert found["faults"] >= 200
    assert found["checked MiB"]
    kinds = found["kinds"]
    assert isinstance(kinds, dict)
    assert {kind.partition(":")[0] for kind in kinds} >= {"load", "store", "encode", "decode"}
    assert any(kind.startswith("file ") for kind in kinds)


@pytest.mark.parametrize(
    ("broken", "kind"), [("wrong-byte", "WRONG"), ("leak", "LEFT"), ("deadline", "LATE")]
)
def test_a_mistake_is_found(broken: str, kind: str) -> None:
    status, found = run("--tiers", "memory", "--faults", "40", "--break", broken)
    assert status == 1
    assert problems(found, kind), found


def test_kinds_are_told_apart() -> None:
    assert len(EXCEPTIONS) == len(set(EXCEPTIONS)) == 17
    assert [name for name, count in Counter(LABELS).items() if count > 1] == []
    assert len({(operation, fault) for operation, fault, _ in PROGRAMME}) == len(PROGRAMME)
