"""The class that vLLM creates, once in the scheduler and once in every worker.

Only hands vLLM's calls on: `scheduler.SchedulerSide` plans, `worker.WorkerSide`
carries out. Written against KVConnectorBase_V1 of vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from lmcache_connector_vllm import identity
from lmcache_connector_vllm.adapter_watch import AdapterWatch
from lmcache_connector_vllm.adapters import AdapterNames, Board
from lmcache_connector_vllm.facts import model_facts
from lmcache_connector_vllm.inactive import InactiveScheduler, InactiveWorker
from lmcache_connector_vllm.metadata import StepPlan, WorkerReport
from lmcache_connector_vllm.scheduler import SchedulerSide
from lmcache_connector_vllm.settings import Settings, read_settings
from lmcache_connector_vllm.stats import LMCachePromMetrics, LMCacheStats
from lmcache_connector_vllm.worker import WorkerSide
from lmcache_core import UnnamedError, init_logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
        KVConnectorPromMetrics,
        KVConnectorStats,
        PromMetric,
        PromMetricT,
    )
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = init_logger(__name__)


class LMCacheConnector(KVConnectorBase_V1):
    """vLLM's door to LMCache; known to users as ``LMCacheConnectorV1``."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        settings = read_settings(vllm_config)
        chunk_tokens = settings.config.core.chunk_size
        self._scheduler: SchedulerSide | InactiveScheduler | None = None
        self._worker: WorkerSide | InactiveWorker | None = None
        self._rank = 0
        if role is not KVConnectorRole.SCHEDULER:
            from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

            self._rank = get_tensor_model_parallel_rank()
        try:
            facts = model_facts(vllm_config)
            name = facts.name()
        except UnnamedError as error:
            self._stay_inactive(role, str(error))
            return
        if role is KVConnectorRole.SCHEDULER:
            events = vllm_config.kv_events_config
            self._scheduler = SchedulerSide(
                settings,
                identity.namespace(vllm_config, kv_cache_config, chunk_tokens, 0, name),
                ranks=vllm_config.parallel_config.tensor_parallel_size,
                block_tokens=kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size,
                events=events is not None and events.enable_kv_cache_events,
                rope=identity.rope(vllm_config),
                weights=facts.weights,
                adapters=_adapter_names(vllm_config, settings),
            )
        else:
            self._worker = WorkerSide(
                settings,
                identity.namespace(vllm_config, kv_cache_config, chunk_tokens, self._rank, name),
                vllm_config,
                rank=self._rank,
                weights=facts.weights,
                adapters=_adapter_watch(vllm_config, self._rank),
            )

    def _stay_inactive(self, role: KVConnectorRole, why: str) -> None:
        """Serve as without us, because what is computed has no name; the scheduler says why."""
        if role is KVConnectorRole.SCHEDULER:
            logger.warning("Nothing is cached, because the model has no name: %s", why)
            self._scheduler = InactiveScheduler()
        else:
            self._worker = InactiveWorker(why)

    @property
    def scheduler(self) -> SchedulerSide | InactiveScheduler:
        """The scheduler's half; only in the scheduler process."""
        if self._scheduler is None:
            raise RuntimeError("vLLM called a scheduler method on a worker's connector")
        return self._scheduler

    @property
    def worker(self) -> WorkerSide | InactiveWorker:
        """The worker's half; only in workers."""
        if self._worker is None:
            raise RuntimeError("vLLM called a worker method on the scheduler's connector")
        return self._worker

    # -- worker ----------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self.worker.register(kv_caches)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        if not isinstance(connector_metadata, StepPlan):
            raise TypeError(f"{type(connector_metadata).__name__} isn't from LMCache's scheduler")
        self.worker.bind(connector_metadata)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        self.worker.start_load()

    def wait_for_layer_load(self, layer_name: str) -> None:
        self.worker.wait_for_layer(layer_name)

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> None:
        self.worker.save_layer(layer_name)

    def wait_for_save(self) -> None:
        self.worker.finish_step()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        self.worker.finished(finished_req_ids)
        return None, self.worker.take_received() or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self.worker.take_invalid_blocks()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        report = self.worker.take_report()
        return WorkerReport(report.of_rank(self._rank)) if report else None

    # -- scheduler -------------------------------------------------------------------------

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # a cache: what isn't delivered is computed

    def on_new_request(self, request: Request) -> None:
        self.scheduler.new_request(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return self.scheduler.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        self.scheduler.allocated(request, blocks, num_external_tokens)

    def get_external_cache_hit_sources(
        self, request: Request, num_external_tokens: int
    ) -> dict[CacheHitSource, int]:
        memory, slow = self.scheduler.hit_sources(request.request_id)
        found = {CacheHitSource.HOST: memory, CacheHitSource.EXTERNAL_UNSPECIFIED: slow}
        return {source: tokens for source, tokens in found.items() if tokens}

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        return self.scheduler.plan_step(scheduler_output)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        self.scheduler.hear(connector_output)

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        self.scheduler.request_finished(request)
        return False, None

    def take_events(self) -> Iterable[KVCacheEvent]:
        return self.scheduler.take_events()

    def reset_cache(self) -> bool | None:
        return self.scheduler.reset()

    # -- both ------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        side = self._scheduler or self._worker
        stats = LMCacheStats.from_delta(side.counters.delta()) if side is not None else None
        return None if stats is None or stats.is_empty() else stats

    def shutdown(self) -> None:
        if self._scheduler is not None:
            self._scheduler.close()
        if self._worker is not None:
            self._worker.close()

    @classmethod
    def build_kv_connector_stats(
        cls, data: dict[str, Any] | None = None
    ) -> KVConnectorStats | None:
        return LMCacheStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics | None:
        return LMCachePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        return bool(extra_config.get("use_layerwise") or extra_config.get("lmcache.use_layerwise"))


def _adapter_names(vllm_config: VllmConfig, settings: Settings) -> AdapterNames | None:
    if vllm_config.lora_config is None:
        return None
    deadline_s = settings.config.core.blocking_timeout_secs
    return AdapterNames(vllm_config, Board(_engine(vllm_config)), deadline_s=deadline_s)


def _adapter_watch(vllm_config: VllmConfig, rank: int) -> AdapterWatch | None:
    if vllm_config.lora_config is None:
        return None
    watch = AdapterWatch(Board(_engine(vllm_config)) if rank == 0 else None)
    watch.install()
    return watch


def _engine(vllm_config: VllmConfig) -> str:
    """What scheduler and workers of one engine share, and nobody else has."""
    return str(vllm_config.kv_transfer_config.engine_id)
