"""A few runs of each target of `tools/fuzz.py`, and wrong parsers, which it must find."""

from __future__ import annotations

import logging
import os
import random
import signal

import pytest
from fuzz import TARGETS, Rendered, Stop, fuzz
from fuzzing import Target

RUNS = 300


@pytest.mark.parametrize("name", list(TARGETS))
def test_only_documented_errors(name: str) -> None:
    report = fuzz(TARGETS[name](), RUNS, seed=1, most_mib=64)
    assert report.found is None
    assert report.runs == sum(report.outcomes.values()) == RUNS


class Wrong(Target):
    name = "wrong"
    documented = (ValueError,)

    def samples(self) -> list[bytes]:
        return [b"0123"]

    def parse(self, data: bytes, chance: random.Random) -> None:
        if len(data) > 4:
            raise ValueError("too long")
        data[3]


class Hungry(Wrong):
    name = "hungry"

    def parse(self, data: bytes, chance: random.Random) -> None:
        bytearray(3 << 20)


class Fine(Wrong):
    name = "fine"

    def parse(self, data: bytes, chance: random.Random) -> None:
        if len(data) > 4:
            raise ValueError("too long")


class Interrupted(Fine):
    """Asks for its own end in the hundredth run."""

    count = 0

    def parse(self, data: bytes, chance: random.Random) -> None:
        self.count += 1
        if self.count == 101:  # the sample itself was the first
            os.kill(os.getpid(), signal.SIGTERM)
        super().parse(data, chance)


def test_another_error_is_found() -> None:
    report = fuzz(Wrong(), 1000, seed=0, most_mib=64)
    assert report.found is not None
    assert "IndexError" in report.found
    assert "of b'" in report.found


def test_memory_that_is_only_announced_is_found() -> None:
    report = fuzz(Hungry(), 10, seed=0, most_mib=2)
    assert report.found is not None
    assert "MiB" in report.found


def test_a_report_counts_what_came_out() -> None:
    report = fuzz(Fine(), 1000, seed=0, most_mib=64)
    assert set(report.outcomes) == {"none raised", "ValueError"}
    assert "1,000 runs" in str(report)
    assert f"ValueError {report.outcomes['ValueError']}" in str(report)
    assert "only documented errors" in str(report)


def test_a_signal_ends_the_runs_with_what_was_done() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        report = fuzz(Interrupted(), 1000, seed=0, most_mib=64, stop=Stop().on(signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert report.stopped
    assert report.found is None
    assert report.runs == 100
    assert "100 runs" in str(report)


def test_a_line_of_a_log_that_cannot_be_made_is_an_error() -> None:
    record = logging.LogRecord("x", logging.WARNING, "x.py", 1, "%d", ("text",), None)
    with pytest.raises(TypeError):
        Rendered().emit(record)
