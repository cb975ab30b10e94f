"""Counters, and how they reach Prometheus."""

from __future__ import annotations

import ast
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import lmcache_core
from lmcache_core.metrics import GAUGES, METRICS, Counters, render_prometheus


def test_series_are_told_apart_by_labels_in_any_order() -> None:
    counters = Counters()
    counters.add("load_failures", tier="disk", reason="miss")
    counters.add("load_failures", 2, reason="miss", tier="disk")
    counters.add("load_failures", tier="host", reason="miss")
    assert counters.snapshot() == {
        ("load_failures", (("reason", "miss"), ("tier", "disk"))): 3,
        ("load_failures", (("reason", "miss"), ("tier", "host"))): 1,
    }


def test_a_label_may_be_called_name() -> None:
    counters = Counters()
    counters.add("x", 1, name="y", value="z")
    assert counters.snapshot() == {("x", (("name", "y"), ("value", "z"))): 1}


def test_a_snapshot_is_a_copy() -> None:
    counters = Counters()
    before = counters.snapshot()
    counters.add("store_chunks")
    assert before == {}


def test_deltas_add_up_to_the_total_on_the_other_side() -> None:
    worker, scheduler = Counters(), Counters()
    scheduler.add("store_chunks", 5)
    for value in (1, 2):
        worker.add("store_chunks", value)
        scheduler.merge(worker.delta())
    assert scheduler.snapshot() == {("store_chunks", ()): 8}
    assert worker.delta() == {}
    assert worker.snapshot() == {("store_chunks", ()): 3}


def test_a_gauge_that_came_back_is_not_shipped() -> None:
    counters = Counters()
    counters.add("breaker_open", 1, backend="a")
    counters.add("breaker_open", -1, backend="a")
    assert counters.delta() == {}


def test_what_was_merged_is_shipped_on() -> None:
    counters = Counters()
    counters.merge({("store_chunks", ()): 4})
    assert counters.delta() == {("store_chunks", ()): 4}


def test_no_addition_is_lost_between_threads() -> None:
    counters, shipped = Counters(), Counters()

    def work() -> None:
        for _ in range(2000):
            counters.add("store_chunks")
            shipped.merge(counters.delta())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counters.snapshot() == shipped.snapshot() == {("store_chunks", ()): 8000}


def test_prometheus_text() -> None:
    counters = Counters()
    counters.add("store_chunks", 2)
    counters.add("load_failures", 1, tier="disk", reason='say "no"\\\n')
    counters.add("load_failures", 1.5, tier="host", reason="miss")
    counters.add("breaker_open", backend="a")
    assert render_prometheus(counters.snapshot()) == (
        "# TYPE lmcache_breaker_open gauge\n"
        'lmcache_breaker_open{backend="a"} 1\n'
        "# TYPE lmcache_load_failures_total counter\n"
        'lmcache_load_failures_total{reason="miss",tier="host"} 1.5\n'
        'lmcache_load_failures_total{reason="say \\"no\\"\\\\\\n",tier="disk"} 1\n'
        "# TYPE lmcache_store_chunks_total counter\n"
        "lmcache_store_chunks_total 2\n"
    )


def test_prometheus_text_of_nothing_is_empty() -> None:
    assert render_prometheus({}) == ""


def counted() -> Iterator[tuple[str, set[str]]]:
    """Name and labels of every ``counters.add(...)`` in core, and of every named series."""
    for file in Path(lmcache_core.__file__).parent.rglob("*.py"):
        for node in ast.walk(_parsed(file.read_text())):
            match node:
                case ast.Call(
                    func=ast.Attribute(
                        value=ast.Attribute(attr="_counters" | "counters"), attr="add"
                    ),
                    args=[ast.Constant(value=str(name)), *_],
                    keywords=keywords,
                ):
                    yield name, {keyword.arg for keyword in keywords if keyword.arg}
                case ast.AnnAssign(
                    annotation=ast.Name(id="Series"),
                    value=ast.Tuple(elts=[ast.Constant(value=str(name)), ast.Tuple(elts=labels)]),
                ):
                    yield name, {ast.literal_eval(label)[0] for label in labels}


def test_what_is_counted_is_in_the_table() -> None:
    """Exporters show only what is there."""
    found = list(counted())
    assert {name for name, _ in found} == set(METRICS)
    for name, labels in found:
        assert labels <= set(METRICS[name][1])
    assert set(METRICS) >= GAUGES


def test_the_page_has_them_all() -> None:
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    for name, (text, labels) in METRICS.items():
        gauge = " (a gauge)" if name in GAUGES else ""
        assert f"| `{name}`{gauge} | {', '.join(f'`{one}`' for one in labels)} | {text} |" in page


def _parsed(source: str) -> ast.Module:
    # Some Pythons, 3.11.7 for one, lose count once in a while: python/cpython issue 106905.
    for _ in range(5):
        with contextlib.suppress(SystemError):
            return ast.parse(source)
    return ast.parse(source)
