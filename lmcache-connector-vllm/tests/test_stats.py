"""Core's counters in vLLM's Prometheus registry."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]

stats = pytest.importorskip("lmcache_connector_vllm.stats")
prometheus = pytest.importorskip("prometheus_client")

from lmcache_core.metrics import GAUGES, METRICS, Counters  # noqa: E402


@pytest.fixture
def registry() -> Any:
    return prometheus.CollectorRegistry()


@pytest.fixture
def exported(registry: Any) -> Any:
    """The connector's metrics as vLLM makes them, in a registry of their own."""

    def into(kind: Any) -> Any:
        return lambda **facts: kind(registry=registry, **facts)

    kinds = {kind: into(kind) for kind in (prometheus.Counter, prometheus.Gauge)}
    kinds[prometheus.Histogram] = into(prometheus.Histogram)
    config = SimpleNamespace(kv_transfer_config=None)
    return stats.LMCachePromMetrics(config, kinds, ["engine"], {0: ["0"]})


def test_a_breaker_that_closes_is_a_gauge_that_falls(registry: Any, exported: Any) -> None:
    """A metric must never raise into the engine."""
    counters = Counters()
    labels = {"engine": "0", "backend": "far"}
    for change, open_now in ((1, 1), (-1, 0)):
        counters.add("breaker_open", change, backend="far")
        exported.observe(stats.LMCacheStats.from_delta(counters.delta()).data)
        assert registry.get_sample_value("vllm:lmcache_breaker_open", labels) == open_now


def test_counters_add_up(registry: Any, exported: Any) -> None:
    counters = Counters()
    for _ in range(2):
        counters.add("load_chunks", 3, tier="host")
        exported.observe(stats.LMCacheStats.from_delta(counters.delta()).data)
    labels = {"engine": "0", "tier": "host"}
    assert registry.get_sample_value("vllm:lmcache_load_chunks_total", labels) == 6


@pytest.mark.parametrize("name", METRICS)
def test_each_is_exported_with_its_labels(registry: Any, exported: Any, name: str) -> None:
    counters = Counters()
    labels = {label: f"a {label}" for label in METRICS[name][1]}
    counters.add(name, 2, **labels)
    exported.observe(stats.LMCacheStats.from_delta(counters.delta()).data)
    sample = f"vllm:lmcache_{name}" + ("" if name in GAUGES else "_total")
    assert registry.get_sample_value(sample, {"engine": "0", **labels}) == 2
