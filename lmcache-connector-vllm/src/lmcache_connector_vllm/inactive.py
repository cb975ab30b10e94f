"""The two halves of a connector that neither stores nor loads.

For a model that can't be named: the engine serves as without us. Answers vLLM's calls; knows
nothing of what it is asked about.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lmcache_connector_vllm.metadata import StepPlan
from lmcache_core import Counters, Report, init_logger

if TYPE_CHECKING:
    import torch
    from vllm.distributed.kv_events import KVCacheEvent
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

logger = init_logger(__name__)


class InactiveScheduler:
    """Finds nothing, plans nothing."""

    def __init__(self) -> None:
        self.counters = Counters()

    def new_request(self, request: Request) -> None:
        pass

    def matched_tokens(self, request: Request, computed: int) -> tuple[int | None, bool]:
        return 0, False

    def allocated(self, request: Request, blocks: KVCacheBlocks, external: int) -> None:
        pass

    def load_into(self, request: Request, block_ids: Sequence[int], external: int) -> None:
        pass

    def hit_sources(self, request_id: str) -> tuple[int, int]:
        return 0, 0

    def plan_step(self, output: SchedulerOutput) -> StepPlan:
        return StepPlan()

    def hear(self, output: KVConnectorOutput) -> None:
        pass

    def request_finished(self, request: Request) -> None:
        pass

    def reset(self) -> bool:
        return True

    def take_events(self) -> Iterable[KVCacheEvent]:
        return ()

    def close(self) -> None:
        pass


class InactiveWorker:
    """Has no memory and moves nothing. ``why`` is said only to a scheduler that isn't inactive."""

    def __init__(self, why: str) -> None:
        self.counters = Counters()
        self._why = why
        self._said = False
        self._report = Report()
        self._invalid_blocks: set[int] = set()

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        pass

    def bind(self, plan: StepPlan) -> None:
        """Refuse what is planned: one rank's store can be listed while another's can't."""
        for load in plan.loads:
            self._invalid_blocks.update(load.blocks)
            self._report.unreadable.update(op.key for op in load.ops)
        refused = [op.op for store in plan.stores for op in store.ops]
        refused += [op.op for op in plan.fetches]
        self._report.add(Report(bad=dict.fromkeys(refused, 1), released=dict.fromkeys(refused, 1)))
        if refused and not self._said:
            self._said = True
            logger.warning("Nothing is cached: %s", self._why)

    def start_load(self) -> None:
        pass

    def wait_for_layer(self, layer_name: str) -> None:
        pass

    def save_layer(self, layer_name: str) -> None:
        pass

    def finish_step(self) -> None:
        pass

    def take_received(self) -> set[str]:
        return set()

    def take_invalid_blocks(self) -> set[int]:
        invalid, self._invalid_blocks = self._invalid_blocks, set()
        return invalid

    def finished(self, request_ids: set[str]) -> None:
        pass

    def take_report(self) -> Report:
        report, self._report = self._report, Report()
        return report

    def close(self) -> None:
        pass
