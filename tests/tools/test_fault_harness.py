"""A short run of `tools/fault_harness.py`, and mistakes on purpose, each of which it must find."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from faulting.canary import TICK_S, Canary, Latencies
from faulting.findings import Findings
from faulting.kinds import EXCEPTIONS, KINDS, LABELS

PROGRAM = Path(__file__).parents[2] / "tools" / "fault_harness.py"
Program = subprocess.Popen[str]
BROKEN = {"wrong-byte": "WRONG", "leak": "LEFT", "deadline": "LATE"}
"""Mistakes, and what they are called when they are found."""


@contextmanager
def running(*arguments: str) -> Iterator[Program]:
    program = subprocess.Popen(
        [sys.executable, PROGRAM, "--quiet", "--json", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with program:
        try:
            yield program
        finally:
            program.terminate()


def found_by(program: Program) -> dict[str, object]:
    output, _ = program.communicate(timeout=300)
    start = output.find("{\n")
    assert start >= 0, output
    report: dict[str, object] = json.loads(output[start:])
    return report


@pytest.fixture(scope="module")
def broken() -> Iterator[dict[str, Program]]:
    """A run with each mistake, at the same time: they are patient with what doesn't settle."""
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(
                running("--tiers", "memory", "--faults", "40", "--break", name)
            )
            for name in BROKEN
        }


def problems(found: dict[str, object], kind: str) -> list[str]:
    everything = found["problems"]
    assert isinstance(everything, list)
    return [text for text in everything if kind in text]


def test_faults_over_files_and_a_child_of_its_own() -> None:
    """No wrong byte, no call that raises, nothing left. Who is late, a quiet machine shows."""
    with running("--tiers", "two,isolated", "--faults", "200") as program:
        found = found_by(program)
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


@pytest.mark.parametrize(("name", "kind"), BROKEN.items())
def test_a_mistake_is_found(broken: dict[str, Program], name: str, kind: str) -> None:
    found = found_by(broken[name])
    assert broken[name].returncode == 1
    assert problems(found, kind), found


def test_kinds_are_told_apart() -> None:
    assert len(EXCEPTIONS) == len(set(EXCEPTIONS)) == 17
    assert [name for name, count in Counter(LABELS).items() if count > 1] == []
    assert len(set(KINDS)) == len(KINDS)


class Machine:
    """A clock, and how much CPU a process has had."""

    def __init__(self) -> None:
        self.now = self.cpu = 100.0
        self.canary = Canary(lambda: self.now, lambda: self.cpu)

    def goes_on(self, seconds: float, *, ours: float) -> None:
        """The canary wakes up after so many, of which this process had ``ours``."""
        self.now += seconds
        self.cpu += ours
        self.canary.woke()


def test_a_canary_loses_what_others_had_and_not_its_own_work() -> None:
    machine = Machine()
    machine.goes_on(TICK_S, ours=0)
    assert machine.canary.lost_s == pytest.approx(0, abs=1e-9)  # in time
    machine.goes_on(0.5, ours=0.5)
    assert machine.canary.lost_s == pytest.approx(0, abs=1e-9)  # somebody here held the interpreter
    machine.goes_on(0.5, ours=0.1)
    assert machine.canary.lost_s == pytest.approx(0.4)
    assert machine.canary.lost_since(machine.now - 0.25) == pytest.approx(0.25)
    assert machine.canary.lost_between(machine.now - 0.3, machine.now - 0.1) == pytest.approx(0.2)
    assert machine.canary.lost_between(machine.now - 0.9, machine.now - 0.3) == pytest.approx(0.1)
    machine.now += 0.2  # it should have woken up
    assert machine.canary.lost_since(machine.now - 0.2) == pytest.approx(0.2 - TICK_S)


@pytest.mark.parametrize(
    ("before", "after", "waited", "waits", "late"),
    [
        (0.0, 0.0, 0.0, True, 1),
        (0.0, 0.3, 0.0, True, 0),
        (0.0, 0.15, 0.15, True, 0),
        (0.3, 0.0, 0.0, True, 1),  # it would have given up all the same
        (0.3, 0.0, 0.0, False, 0),
    ],
)
def test_a_call_is_late_unless_others_had_the_cpu_after_its_deadline(
    before: float, after: float, waited: float, waits: bool, late: int
) -> None:
    machine, findings = Machine(), Findings()
    waits_s = iter((5.0, 5.0 + waited))  # the calling thread, for a CPU: at first, and at last
    latencies = Latencies(machine.canary, findings, lambda: machine.now, lambda: next(waits_s))
    with latencies.timed("load", 1.0, waits=waits):
        machine.goes_on(1.0, ours=1.0 - before)
        machine.goes_on(0.3, ours=0.3 - after)
    assert len(findings.late) == late
    assert findings.past == {"load": 1}


def test_findings_of_places_add_up() -> None:
    one = Findings(faults=Counter(a=2), rounds=1, memory_mib={"x": [1.0]}, wrong=["word"])
    one.calls, one.longest_s = {"load": Counter({3: 1})}, {"load": 0.5}
    two = Findings(faults=Counter(a=1, b=1), rounds=2, memory_mib={"y": [2.0]})
    two.calls, two.longest_s = {"load": Counter({3: 2})}, {"load": 0.25, "store": 0.125}
    one.add(two)
    assert one.faults == {"a": 3, "b": 1}
    assert one.rounds == 3
    assert one.memory_mib == {"x": [1.0], "y": [2.0]}
    assert one.calls == {"load": {3: 3}}
    assert one.longest_s == {"load": 0.5, "store": 0.125}
    assert one.problems == ["WRONG: word"]
