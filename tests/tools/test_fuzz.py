"""A few runs of each target of `tools/fuzz.py`, and wrong parsers, which it must find."""

from __future__ import annotations

import random

import pytest
from fuzz import TARGETS, fuzz
from fuzzing import Target

RUNS = 300


@pytest.mark.parametrize("name", list(TARGETS))
def test_only_documented_errors(name: str) -> None:
    assert fuzz(TARGETS[name](), RUNS, seed=1, most_mib=64) is None


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


def test_another_error_is_found() -> None:
    found = fuzz(Wrong(), 1000, seed=0, most_mib=64)
    assert found is not None
    assert "IndexError" in found
    assert "of b'" in found


def test_memory_that_is_only_announced_is_found() -> None:
    found = fuzz(Hungry(), 10, seed=0, most_mib=2)
    assert found is not None
    assert "MiB" in found
