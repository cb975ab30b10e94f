"""What `bench/outage_vllm.py` calls wrong. Its engines and stores are run in `tests/vllm`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"
TEXTS = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


@pytest.fixture(autouse=True)
def _bench_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


def answer(**changed: Any) -> dict[str, Any]:
    """Of three requests, the second of which was aborted."""
    whole: dict[str, Any] = {
        "requests": [
            {"tokens": [1, 2, 3], "reason": "length", "cached": 16},
            {"tokens": [4], "reason": "aborted", "cached": 0},
            {"tokens": [7, 8, 9], "reason": "length", "cached": 0},
        ],
        "slow": [["step", 10.0, 10.5]],
        "longest_s": 0.5,
        "left": [],
        "close_s": 0.1,
        "metrics": {
            "num_preemptions": 2.0,
            "lmcache_load_chunks host": 9.0,
            "lmcache_load_chunks store": 1.0,
        },
    }
    return whole | changed


def wrong(given: dict[str, Any], own_s: float | None = 0.4, outages: int = 1) -> list[str]:
    from outage_vllm import Request, row_of

    requests = [Request([1], 0.0), Request([1], 0.0, tokens=1), Request([1], 0.0)]

    def lost(began: float, ended: float) -> float:
        late = [(10.0, 10.1), (19.0, 23.0)]
        return sum(max(0.0, min(ended, until) - max(began, since)) for since, until in late)

    counts = Counter({"stopped": outages} if outages else {})
    row = row_of("x", given, requests, TEXTS, counts, lost)
    return row.wrong(own_s)


def test_nothing_is_wrong() -> None:
    assert wrong(answer()) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({0: {"tokens": [1, 2, 4], "reason": "length"}}, "request 0 has another text"),
        ({0: {"tokens": [1, 2], "reason": "length"}}, "request 0 has another text"),
        ({1: {"tokens": [5], "reason": "aborted"}}, "request 1 has another text"),
        ({2: {"tokens": [7], "reason": None}}, "request 2 was lost"),
        ({2: {"tokens": [7], "reason": "error"}}, "request 2 was lost"),
        ({2: {"tokens": [7], "reason": "aborted"}}, "request 2 was lost"),
    ],
)
def test_a_request(changed: dict[int, dict[str, Any]], said: str) -> None:
    given = answer()
    for index, facts in changed.items():
        given["requests"][index] |= facts
    assert wrong(given) == [said]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"left": ["3 leases"]}, "held for nobody: 3 leases"),
        ({"close_s": 60.0}, "ending took 60.0 s"),
        ({"slow": [["step", 10.0, 11.7]]}, "a call took 1.60 s, the engine's own 0.40 s"),
        ({"metrics": {"lmcache_load_chunks store": 1.0}}, "nothing was preempted"),
        (
            {"metrics": {"num_preemptions": 1.0, "lmcache_load_chunks host": 1.0}},
            "no chunk came from the store",
        ),
    ],
)
def test_an_engine(changed: dict[str, Any], said: str) -> None:
    (found,) = wrong(answer(**changed))
    assert said in found


def test_what_the_canary_lost_is_nobodys_fault() -> None:
    assert wrong(answer(slow=[["step", 19.5, 24.0]])) == []
    assert wrong(answer(slow=[["step", 19.5, 25.0]])) != []
    assert wrong(answer(slow=[["step", 30.0, 40.0]]), own_s=None) == []


def test_without_an_outage_nothing_is_shown() -> None:
    assert wrong(answer(), outages=0) == ["there was no outage"]


def test_requests_are_the_same_for_a_seed() -> None:
    from outage_vllm import requests_of

    first = requests_of(300, 60.0, 7)
    assert first == requests_of(300, 60.0, 7)
    assert first != requests_of(300, 60.0, 8)
    assert len(first) == 300
    assert [one.at_s for one in first] == sorted(one.at_s for one in first)
    assert 0 <= first[0].at_s <= first[-1].at_s < 63
    assert 30 < sum(one.is_aborted for one in first) < 90
