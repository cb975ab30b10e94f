"""Carries core's counters through vLLM's statistics to its log and to Prometheus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter, Gauge
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
    PromMetric,
    PromMetricT,
)

from lmcache_core import GAUGES, METRICS

Labels = tuple[tuple[str, str], ...]


@dataclass
class LMCacheStats(KVConnectorStats):
    """Counter increments: ``data[name]`` is a list of [labels, value]."""

    @classmethod
    def from_delta(cls, delta: dict[tuple[str, Labels], float]) -> LMCacheStats:
        """What changed since the last time."""
        data: dict[str, Any] = {}
        for (name, labels), value in delta.items():
            data.setdefault(name, []).append([[list(pair) for pair in labels], value])
        return cls(data=data)

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def is_empty(self) -> bool:
        return not self.data

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, entries in other.data.items():
            mine = self.data.setdefault(name, [])
            for labels, value in entries:
                found = next((entry for entry in mine if entry[0] == labels), None)
                if found is None:
                    mine.append([labels, value])
                else:
                    found[1] += value
        return self

    def reduce(self) -> dict[str, int | float]:
        return {
            name: sum(value for _, value in entries) for name, entries in sorted(self.data.items())
        }


class LMCachePromMetrics(KVConnectorPromMetrics):
    """One Prometheus counter, or gauge, for each of core's `METRICS`.

    Exported as ``vllm:lmcache_NAME_total``, gauges without ``_total``: vLLM unregisters what
    carries its name when an engine is made anew.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter: Any = metric_types[Counter]
        gauge: Any = metric_types[Gauge]
        self._metrics: dict[str, Any] = {}
        for name, (text, labels) in METRICS.items():
            facts = {
                "name": f"vllm:lmcache_{name}",
                "documentation": text,
                "labelnames": [*labelnames, *labels],
            }
            # What comes are differences, which a counter refuses when they are negative.
            self._metrics[name] = (
                gauge(**facts, multiprocess_mode="sum") if name in GAUGES else counter(**facts)
            )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        engine = self.per_engine_labelvalues[engine_idx]
        for name, entries in transfer_stats_data.items():
            if name not in self._metrics:
                continue
            for labels, value in entries:
                values = dict(labels)
                own = [values.get(label, "") for label in METRICS[name][1]]
                self._metrics[name].labels(*engine, *own).inc(value)
