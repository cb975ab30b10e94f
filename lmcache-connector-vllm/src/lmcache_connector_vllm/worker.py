"""The worker's half of the connector: carries out what the scheduler planned.

One per rank. Copies to and from vLLM's blocks happen when vLLM says so; slow
tiers are read and written in the background. Nothing here decides what to
load or store.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import torch

from lmcache_connector_vllm import identity, kv_memory
from lmcache_connector_vllm.adapter_watch import AdapterWatch
from lmcache_connector_vllm.metadata import RequestLoad, StepPlan
from lmcache_connector_vllm.settings import Settings
from lmcache_core import (
    CacheNamespace,
    ConfigError,
    Counters,
    DaemonPool,
    HostArena,
    IOLoop,
    LoadOp,
    Mover,
    PagedConnector,
    Report,
    StoreOp,
    Tiers,
    init_logger,
    left_of,
    slot_bytes,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(__name__)


class WorkerSide:
    """See the module. All calls come from the worker's thread."""

    def __init__(
        self,
        settings: Settings,
        namespace: CacheNamespace,
        vllm_config: VllmConfig,
        *,
        rank: int,
        weights: str,
        adapters: AdapterWatch | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        core = settings.config.core
        self._settings = settings
        self._namespace = namespace
        self._vllm_config = vllm_config
        self._rank = rank
        self._adapters = adapters
        self._clock = clock
        self.counters = Counters()
        region = settings.plugins.host_region(
            settings.arena_bytes,
            "cpu",
            hugepages=core.local_cpu_use_hugepages,
            numa_mode=core.numa_mode,
            populate=core.local_cpu_populate,
            shared=settings.config.shares_region,
        )
        self._arena = HostArena(region, slot_bytes(namespace))
        if not self._arena.slots:
            raise ConfigError(
                f"max_local_cpu_size = {core.max_local_cpu_size} GiB holds no chunk: one takes "
                f"{self._arena.slot_bytes} bytes ({core.chunk_size} tokens). Raise it."
            )
        self._loop: IOLoop | None = None
        self._tiers: Tiers | None = None
        ranks = vllm_config.parallel_config.tensor_parallel_size
        self._writes_tiers = identity.writes(namespace, rank, ranks)
        if settings.config.backends:
            self._loop = IOLoop("lmcache-worker")
            self._tiers = Tiers.open(
                settings.config.backends,
                settings.plugins,
                namespace=namespace,
                region=region,
                loop=self._loop,
                counters=self.counters,
                lookup_only=False,
                default_deadline_s=core.blocking_timeout_secs,
                default_serde=core.serde,
                serdes=settings.config.serdes,
                rope=identity.rope(vllm_config),
                weights=weights,
            )
        self._mover: Mover | None = None
        self._background = DaemonPool(1, "lmcache-load")
        self._plan = StepPlan()
        self._layer_of: dict[str, int] = {}
        self._layer_loads: list[Future[None]] = []
        self._layers_stored: set[int] = set()
        self._lock = threading.Lock()
        self._received: set[str] = set()
        self._invalid_blocks: set[int] = set()
        self._refused = Report()
        self._loaded_early: dict[str, RequestLoad] = {}

    # -- set-up ----------------------------------------------------------------------------

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Learn where vLLM keeps its KV."""
        group = self._namespace.layout.groups[0]
        tensors, layout = kv_memory.describe(self._vllm_config, group, kv_caches)
        device = tensors[0].device.type
        kernels = self._settings.plugins.kernels(device)
        engine = PagedConnector([layout], [tensors], kernels)
        self._layer_of = {
            name: index for index, name in enumerate(kv_memory.layer_order(kv_caches))
        }
        self._mover = Mover(
            engine,
            self._arena,
            self._namespace,
            self.counters,
            kernels=self._settings.plugins.host_kernels(),
            tiers=self._tiers,
            loop=self._loop,
            writes_tiers=self._writes_tiers,
            rank=self._rank,
            queue_chunks=self._settings.config.core.store_queue_chunks,
        )
        tiers = ", ".join(t.name for t in self._tiers.tiers) if self._tiers is not None else "none"
        logger.info(
            "Rank %d: %d slots of %d tokens (%.2f GiB host memory), kernels %s on %s, "
            "namespace %s, slow tiers: %s",
            self._rank,
            self._arena.slots,
            self._namespace.layout.tokens_per_chunk,
            self._arena.slots * self._arena.slot_bytes / 2**30,
            kernels.name,
            device,
            self._namespace.fingerprint,
            tiers,
        )

    @property
    def mover(self) -> Mover:
        """The mover, once vLLM has registered its KV tensors."""
        if self._mover is None:
            raise RuntimeError("vLLM used the connector before it registered its KV caches")
        return self._mover

    # -- one step --------------------------------------------------------------------------

    def bind(self, plan: StepPlan) -> None:
        """Start an engine step."""
        self._plan = plan
        self._layers_stored.clear()
        if self._mover is None:
            return
        self._mover.fence(plan.acknowledged.get(self._rank, 0))
        self._refuse_other_adapters(plan)
        self._mover.fetch(plan.fetches)

    def _refuse_other_adapters(self, plan: StepPlan) -> None:
        """Take out of the plan what was made for another adapter than is loaded.

        vLLM has loaded the step's adapters by now. An asynchronous load came before that: if it was
        for another one, what it wrote is recomputed now.
        """
        if self._adapters is None:
            return
        uses = dict(plan.adapters)
        uses.update((load.request_id, load.adapter) for load in plan.loads if load.adapter)
        broken = {id_ for id_, use in uses.items() if not self._adapters.agrees(id_, use)}
        early = [load for id_ in plan.adapters if (load := self._loaded_early.pop(id_, None))]
        for load in plan.loads:
            if load.asynchronous and load.adapter and load.request_id not in broken:
                self._loaded_early[load.request_id] = load
        if not broken:
            return
        loads = [load for load in plan.loads if load.request_id in broken]
        for load in loads + [load for load in early if load.request_id in broken]:
            self._give_up(load)
            if load.asynchronous and load in loads:
                with self._lock:
                    self._received.add(load.request_id)
            else:
                self.mover.step_failed()
        ops = [op.op for store in plan.stores if store.request_id in broken for op in store.ops]
        self._refused.add(Report(bad=dict.fromkeys(ops, 1), released=dict.fromkeys(ops, 1)))
        plan.loads = [load for load in plan.loads if load.request_id not in broken]
        plan.stores = [store for store in plan.stores if store.request_id not in broken]

    def start_load(self) -> None:
        """Scatter what this step's requests need: at once, layer by layer, or in the background."""
        synchronous = [load for load in self._plan.loads if not load.asynchronous]
        for load in self._plan.loads:
            if load.asynchronous:
                self._background.submit(self._load_and_report, load)
        if not synchronous:
            return
        if not self._settings.layerwise:
            for load in synchronous:
                self._load(load)
            return
        layers = len(self._layer_of)
        broken: set[str] = set()
        started = time.perf_counter()
        self._layer_loads = [
            self._background.submit(self._load_layer, synchronous, layer, layers, broken, started)
            for layer in range(layers)
        ]

    def wait_for_layer(self, layer_name: str) -> None:
        """Block until the layer's KV is loaded."""
        layer = self._layer_of.get(layer_name)
        if layer is not None and layer < len(self._layer_loads):
            self._layer_loads[layer].result()

    def save_layer(self, layer_name: str) -> None:
        """Gather one layer, which the engine has just computed."""
        layer = self._layer_of.get(layer_name)
        if not self._settings.layerwise or layer is None or not self._plan.stores:
            return
        self._finish_layer_loads(layer)
        self.mover.gather(self._stores(), range(layer, layer + 1))
        self._layers_stored.add(layer)

    def finish_step(self) -> None:
        """Copy out what this step computed; the rest of a store happens in the background."""
        self._finish_layer_loads(len(self._layer_loads) - 1)
        self._layer_loads = []
        if not self._plan.stores:
            return
        ops = self._stores()
        started = time.perf_counter()
        if not self._layers_stored:
            self.mover.gather(ops)
        else:
            for layer in range(len(self._layer_of)):
                if layer not in self._layers_stored:
                    self.mover.gather(ops, range(layer, layer + 1))
        gathered = time.perf_counter()
        stored = self.mover.finish_stores(ops)
        done = time.perf_counter()
        if not stored:
            return
        tokens = sum(op.span.tokens for op in ops)
        logger.info(
            "Stored %d out of total %d tokens. size: %.4f gb, cost %.4f ms, throughput: %.4f GB/s; "
            "offload_time: %.4f ms, put_time: %.4f ms (%s)",
            tokens if stored == len(ops) else 0,
            tokens,
            *_figures(self._bytes(ops), done - started),
            (gathered - started) * 1e3,
            (done - gathered) * 1e3,
            ", ".join(store.request_id for store in self._plan.stores),
        )

    def _stores(self) -> list[StoreOp]:
        return [op for store in self._plan.stores for op in store.ops]

    def _load(self, load: RequestLoad) -> None:
        started = time.perf_counter()
        failed = self.mover.load(load.ops)
        if failed:
            self._give_up(load)
            self.mover.step_failed()
        else:
            self._loaded(load, started)

    def _load_and_report(self, load: RequestLoad) -> None:
        started = time.perf_counter()
        failed = self.mover.load(load.ops)
        if failed:
            # Nothing runs on these blocks before vLLM hears of it, so stores needn't be fenced.
            self._give_up(load)
        else:
            self._loaded(load, started)
        with self._lock:
            self._received.add(load.request_id)

    def _load_layer(
        self, loads: list[RequestLoad], layer: int, layers: int, broken: set[str], started: float
    ) -> None:
        for load in loads:
            if load.request_id in broken:
                continue
            if self.mover.load(load.ops, range(layer, layer + 1)):
                broken.add(load.request_id)
                self._give_up(load)
                self.mover.step_failed()
            elif layer == layers - 1:
                self._loaded(load, started)

    def _finish_layer_loads(self, last: int) -> None:
        for future in self._layer_loads[: last + 1]:
            future.result()

    def _give_up(self, load: RequestLoad) -> None:
        logger.error(
            "Reqid: %s: %d tokens could not be loaded; vLLM's kv_load_failure_policy decides "
            "whether they are recomputed",
            load.request_id,
            load.tokens,
        )
        with self._lock:
            self._invalid_blocks.update(load.blocks)

    def _loaded(self, load: RequestLoad, started: float) -> None:
        """All of it is in its blocks."""
        if self._rank == 0:  # the others loaded the same tokens
            self.counters.add("load_tokens", load.tokens)
        logger.info(
            "Reqid: %s, Retrieved %d out of %d required tokens (from %d total tokens). "
            "size: %.4f gb, cost %.4f ms, throughput: %.4f GB/s;",
            load.request_id,
            load.tokens,
            load.tokens,
            load.hit_tokens,
            *_figures(self._bytes(load.ops), time.perf_counter() - started),
        )

    def _bytes(self, ops: Sequence[LoadOp | StoreOp]) -> int:
        groups = self._namespace.layout.groups
        return sum(groups[op.span.group].chunk_bytes(op.span.tokens) for op in ops)

    # -- reporting -------------------------------------------------------------------------

    def take_received(self) -> set[str]:
        """Requests whose asynchronous load ended, well or badly."""
        with self._lock:
            received, self._received = self._received, set()
            return received

    def take_invalid_blocks(self) -> set[int]:
        """Blocks that a load should have filled and didn't."""
        with self._lock:
            invalid, self._invalid_blocks = self._invalid_blocks, set()
            return invalid

    def take_report(self) -> Report:
        """What became of planned operations."""
        refused, self._refused = self._refused, Report()
        return self._mover.take_report().add(refused) if self._mover is not None else refused

    def finished(self, request_ids: set[str]) -> None:
        """Forget requests that have ended."""
        for request_id in request_ids:
            self._loaded_early.pop(request_id, None)
        if self._adapters is not None:
            self._adapters.forget(request_ids)

    def close(self) -> None:
        """Write out what is queued and let go of everything.

        ``blocking_timeout_secs`` are for all of it; what isn't written in three quarters is lost.
        """
        left_s = left_of(self._settings.config.core.blocking_timeout_secs, self._clock)
        if self._adapters is not None:
            self._adapters.close()
        self._background.shutdown()
        if not self._background.join(0.5 * left_s()):
            logger.warning("A load didn't end before the engine; its thread is left behind")
        if self._mover is not None and not self._mover.flush(0.75 * left_s()):
            logger.warning("Stopped before all chunks were written to the slow tiers")
        if self._tiers is not None:
            self._tiers.close(0.5 * left_s())
        if self._loop is not None:
            self._loop.close(0.5 * left_s())
        if self._mover is not None:
            self._mover.close(left_s())


def _figures(nbytes: int, seconds: float) -> tuple[float, float, float]:
    """GB, milliseconds, GB/s."""
    gigabytes = nbytes / 1e9
    return gigabytes, seconds * 1e3, gigabytes / seconds if seconds else 0.0
