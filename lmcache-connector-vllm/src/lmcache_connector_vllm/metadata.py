"""What scheduler and workers send each other through vLLM. Pickled; plain values only."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from lmcache_connector_vllm.adapters import AdapterUse
from lmcache_core import FetchOp, LoadOp, Report, StoreOp


@dataclass
class RequestLoad:
    """One request's load: ``blocks`` are what becomes invalid if it fails."""

    request_id: str
    ops: list[LoadOp]
    blocks: list[int]
    asynchronous: bool
    hit_tokens: int
    tokens: int
    adapter: AdapterUse | None = None


@dataclass
class RequestStore:
    """One request's stores of this step."""

    request_id: str
    ops: list[StoreOp]


@dataclass
class StepPlan(KVConnectorMetadata):
    """Scheduler to workers: what to do in one engine step."""

    loads: list[RequestLoad] = field(default_factory=list)
    stores: list[RequestStore] = field(default_factory=list)
    fetches: list[FetchOp] = field(default_factory=list)
    acknowledged: dict[int, int] = field(default_factory=dict)
    """For each rank, of how many of its failed steps the scheduler knew: see `Mover.fence`."""
    adapters: dict[str, AdapterUse] = field(default_factory=dict)
    """What the requests that this step computes are taken to compute with."""


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):
    """Workers to scheduler: what became of earlier plans, added up over ranks."""

    report: Report

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        if not isinstance(other, WorkerReport):
            raise TypeError(f"can't add {type(other).__name__} to a WorkerReport")
        return WorkerReport(Report().add(self.report).add(other.report))
