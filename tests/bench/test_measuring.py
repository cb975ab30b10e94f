"""Figures mean what `bench/measuring.py` says, and calibrations move the bytes that they count."""

from __future__ import annotations

import argparse
import asyncio
import os
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(autouse=True)
def _bench_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


def test_a_ratio_above_one_is_faster_than_the_calibration() -> None:
    from measuring import Run, duration, throughput

    runs = [Run(ours=0.5, calibration=1.0), Run(0.5, 1.0), Run(0.5, 1.0)]
    actual = throughput("copy", 2**30, runs)
    assert (actual.value, actual.calibration, actual.unit) == (2.0, 1.0, "GiB/s")
    assert (actual.ratio, actual.runs, actual.spread) == (2.0, 3, 0.0)
    actual = duration("call", runs, "ms")
    assert (actual.value, actual.calibration, actual.ratio) == (500.0, 1000.0, 2.0)


def test_the_ratio_is_the_median_of_the_runs_not_of_all_turns() -> None:
    from measuring import Run, duration

    # The machine was slow during the second run: both took longer, the ratio stayed.
    actual = duration("call", [Run(1, 2), Run(10, 20), Run(1, 4)], "s")
    assert actual.ratio == 2.0
    assert actual.spread == 0.25  # quartiles 2 and 3, of 2, 2 and 4, around 2


def test_turns_alternate_and_what_comes_before_is_not_timed() -> None:
    from measuring import take_turns

    order: list[str] = []
    ours, others = take_turns(
        lambda turn: order.append(f"ours {turn}"),
        lambda turn: order.append(f"other {turn}"),
        2,
        before=lambda: order.append("before"),
        first=4,
    )
    assert order[1::2] == ["other 4", "ours 4", "ours 5", "other 5"]
    assert order[::2] == ["before"] * 4
    assert len(ours) == len(others) == 2


def test_what_is_awaited_is_timed_in_the_loop() -> None:
    from measuring import Took, awaited, timed

    loop = asyncio.new_event_loop()
    value, took = awaited(loop, asyncio.sleep(0, "value"))
    loop.close()
    assert value == "value"
    assert took.seconds > 0
    assert timed(lambda _: Took(7.5), 0) == 7.5


def test_results_are_written_as_they_are_read(tmp_path: Path) -> None:
    from measuring import Report, Result, read_json

    result = Result("a", 1.5, "µs", 3.0, 2.0, 7, 0.01)
    report = Report(argparse.Namespace(json=tmp_path / "new" / "file.json"), "memcpy")
    report.add(result)
    report.write()
    assert read_json(tmp_path / "new" / "file.json") == [result]
    (tmp_path / "other.json").write_text('[{"name": "a"}]')
    with pytest.raises(ValueError, match=r"other\.json isn't a list of results"):
        read_json(tmp_path / "other.json")


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("nbytes", [100, 4096, 10_001, 1 << 20])
def test_memcpy_copies_all_of_it(threads: int, nbytes: int) -> None:
    from calibrations import Memcpy, aligned

    source, target = aligned(nbytes)[:nbytes], aligned(nbytes + 1)
    source[:] = os.urandom(nbytes)
    with Memcpy(threads) as memcpy:
        memcpy.copy(target[:nbytes], source)
    assert target[:nbytes] == source
    assert target[nbytes] == 1


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_socket_peer_sends_back_what_it_was_sent(kind: str) -> None:
    from calibrations import SocketPeer, aligned

    source, target = aligned(300_000), aligned(300_000)
    source[:] = os.urandom(len(source))
    with SocketPeer(len(source), kind) as peer:
        peer.send(source)
        peer.receive(target)
    assert target == source


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("sync", [False, True])
def test_raw_files_hold_what_was_written_and_go(tmp_path: Path, direct: bool, sync: bool) -> None:
    from calibrations import RawFiles, aligned

    source, target = aligned(40_960), aligned(40_960)
    source[:] = os.urandom(len(source))
    with RawFiles(tmp_path, direct=direct, sync=sync) as files:
        files.write("a", source)
        files.write("b", source)
        files.read("a", target)
        assert target == source
        files.remove("a")
        with pytest.raises(FileNotFoundError):
            files.read("a", target)
    assert not list(tmp_path.iterdir())
