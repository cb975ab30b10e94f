"""Core's counters in vLLM's Prometheus registry."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]

stats = pytest.importorskip("lmcache_connector_vllm.stats")
prometheus = pytest.importorskip("prometheus_client")

from lmcache_core.metrics import GAUGES, Counters  # noqa: E402


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
    """vLLM's engine ends with what a metric raises."""
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


def test_every_gauge_is_exported() -> None:
    assert set(stats.METRICS) >= GAUGES
