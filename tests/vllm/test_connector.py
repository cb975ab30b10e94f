"""What the connector promises, each promise on a real vLLM engine in this process."""

from __future__ import annotations

import base64
import gc
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from engine_host import KV_CACHE_BYTES, EngineHost, arguments
from made_adapters import WITH_ADAPTERS, adapter, write_adapter

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

CHUNK = 16
WAYS = {
    "sync": {},
    "async": {"LMCACHE_ENABLE_ASYNC_LOADING": "true"},
    "layerwise": {"LMCACHE_USE_LAYERWISE": "true"},
}


class Engine:
    """An engine, and shortcuts to both halves of its connector."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.core = llm.llm_engine.engine_core.engine_core

    @property
    def scheduler(self) -> Any:
        return self.core.scheduler.connector.scheduler

    @property
    def worker(self) -> Any:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group().worker

    def ask(self, prompt: list[int], *, salt: str | None = None, **extra: Any) -> Any:
        from vllm import SamplingParams

        request: dict[str, Any] = {"prompt_token_ids": prompt}
        if salt is not None:
            request["cache_salt"] = salt
        sampling = SamplingParams(
            max_tokens=8,
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            extra_args={"kv_transfer_params": extra["params"]} if "params" in extra else None,
        )
        return self.llm.generate(
            [request], sampling, use_tqdm=False, lora_request=extra.get("adapter")
        )[0]

    def tokens(self, prompt: list[int]) -> list[int]:
        return list(self.ask(prompt).outputs[0].token_ids)

    def hit(self, prompt: list[int], **options: Any) -> int:
        return self.ask(prompt, **options).num_cached_tokens or 0

    def counter(self, name: str) -> float:
        return sum(m.value for m in self.llm.get_metrics() if m.name == f"vllm:lmcache_{name}")


Start = Callable[..., AbstractContextManager[Engine]]


@pytest.fixture(scope="session")
def vllm_imported() -> None:
    """Or whoever collects the garbage of an engine goes through all of vLLM."""
    import vllm.v1.engine.core
    import vllm.v1.worker.cpu_worker  # noqa: F401

    gc.collect()
    gc.freeze()


@pytest.fixture
def start(vllm_imported: None, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    @contextmanager
    def started(environ: dict[str, str] | None = None, **arguments: Any) -> Iterator[Engine]:
        from vllm import LLM
        from vllm.config import KVTransferConfig

        settings = {"LMCACHE_CHUNK_SIZE": str(CHUNK), "LMCACHE_MAX_LOCAL_CPU_SIZE": "0.1"}
        transfer = arguments.pop("transfer", {})
        if transfer is not None:
            arguments["kv_transfer_config"] = KVTransferConfig(
                **{"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both", **transfer}
            )
        options: dict[str, Any] = {
            "model": str(tiny),
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 1024,
            "block_size": 32,
            "enable_prefix_caching": False,
            "disable_log_stats": False,
            "kv_cache_memory_bytes": KV_CACHE_BYTES,
            **arguments,
        }
        with monkeypatch.context() as patch:
            for name, value in {**settings, **(environ or {})}.items():
                patch.setenv(name, value)
            llm = LLM(**options)
        try:
            yield Engine(llm)
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()

    return started


def prompt(length: int = 200, seed: int = 0) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(10, 1000) for _ in range(length)]


@pytest.fixture(scope="session")
def plain(host: EngineHost, tiny: Path) -> dict[int, list[int]]:
    """Greedy tokens of the first prompts, from an engine that has no connector."""
    with host.engine("plain", arguments(tiny, max_model_len=1024)) as engine:
        return {seed: engine.ask(prompt(seed=seed), max_tokens=8).tokens for seed in range(4)}


@pytest.mark.parametrize("way", WAYS)
def test_a_failed_load_is_recomputed(
    start: Start, plain: dict[int, list[int]], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that rests on unfilled blocks reaches the user or the cache."""
    with start(WAYS[way], transfer={"kv_load_failure_policy": "recompute"}) as engine:
        assert engine.tokens(prompt()) == plain[0]

        def broken(*_: object) -> None:
            raise RuntimeError("injected")

        with monkeypatch.context() as patch:
            patch.setattr(engine.worker.mover._engine, "scatter_checked", broken)
            assert engine.tokens(prompt()) == plain[0]
        assert engine.tokens(prompt()) == plain[0]
        assert engine.tokens(prompt()) == plain[0]
        assert engine.hit(prompt()) == 192
        assert engine.counter("load_failures") > 0


@pytest.mark.parametrize("way", WAYS)
def test_damaged_host_memory_is_recomputed(
    start: Start, plain: dict[int, list[int]], way: str
) -> None:
    """A chunk that isn't what was stored is noticed while it is copied, in whatever layer."""
    with start(WAYS[way], transfer={"kv_load_failure_policy": "recompute"}) as engine:
        assert engine.tokens(prompt()) == plain[0]
        mover = engine.worker.mover
        slot = sorted(mover._held)[3]
        mover._arena.slot(slot)[-5000] ^= 1
        assert engine.tokens(prompt()) == plain[0]
        assert engine.counter("load_failures") > 0
        assert engine.tokens(prompt()) == plain[0]
        assert engine.hit(prompt()) == 192


@pytest.mark.parametrize("way", WAYS)
def test_with_policy_fail_a_failed_load_ends_its_request_only(
    start: Start, plain: dict[int, list[int]], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with start(WAYS[way], transfer={"kv_load_failure_policy": "fail"}) as engine:
        assert engine.tokens(prompt()) == plain[0]

        def broken(*_: object) -> None:
            raise RuntimeError("injected")

        with monkeypatch.context() as patch:
            patch.setattr(engine.worker.mover._engine, "scatter_checked", broken)
            assert engine.ask(prompt()).outputs[0].finish_reason == "error"
        assert engine.tokens(prompt()) == plain[0]
        assert engine.tokens(prompt(seed=1)) == plain[1]


@pytest.mark.parametrize(("way", "early"), [*((way, False) for way in WAYS), ("async", True)])
def test_what_was_planned_for_another_adapter_is_recomputed(
    start: Start, tmp_path: Path, way: str, early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler may believe in what isn't loaded any more; the worker knows.

    ``early``: it was still there when an asynchronous load came, and not for the computation.
    """
    from vllm.lora.request import LoRARequest

    folder = write_adapter(tmp_path / "adapter", 1)
    use = LoRARequest(**adapter(folder))
    arguments = {**WITH_ADAPTERS, "transfer": {"kv_load_failure_policy": "recompute"}}

    def tokens(engine: Engine) -> list[int]:
        return list(engine.ask(prompt(), adapter=use).outputs[0].token_ids)

    with start(WAYS[way], **arguments) as engine:
        first = tokens(engine)
        assert engine.hit(prompt(), adapter=use) == 192
        board = engine.scheduler._adapters.board
        believed = board.read()
        write_adapter(folder, 2)
        engine.llm.llm_engine.add_lora(LoRARequest(**adapter(folder, inplace=True)))
        with monkeypatch.context() as patch:
            patch.setattr(board, "read", lambda: believed)
            watch = engine.worker._adapters
            agrees = watch.agrees
            if early:
                answers = iter([True])
                patch.setattr(watch, "agrees", lambda *of: next(answers, None) or agrees(*of))
            second = tokens(engine)
            assert second != first
            assert engine.counter("lookup_hit_tokens") == 2 * 192, "it did believe"
        assert tokens(engine) == second
        assert tokens(engine) == second
        assert engine.hit(prompt(), adapter=use) == 192
    with start(WAYS[way], **arguments) as engine:
        assert tokens(engine) == second


def test_a_failed_gather_is_not_offered(
    start: Start, plain: dict[int, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with start() as engine:

        def broken(*_: object) -> None:
            raise RuntimeError("injected")

        with monkeypatch.context() as patch:
            patch.setattr(engine.worker.mover._engine, "gather_checked", broken)
            assert engine.tokens(prompt()) == plain[0]
        assert engine.hit(prompt()) == 0
        assert engine.tokens(prompt()) == plain[0]


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damaged_chunk_files_are_misses(
    start: Start, plain: dict[int, list[int]], tmp_path: Path, damage: str
) -> None:
    """Even under policy fail: what a tier can't deliver was never promised to vLLM."""
    disk = {"LMCACHE_LOCAL_DISK": str(tmp_path), "LMCACHE_MAX_LOCAL_DISK_SIZE": "1"}
    with start(disk) as engine:
        assert engine.tokens(prompt()) == plain[0]
    files = sorted(tmp_path.glob("*/??/*"))
    assert len(files) == 200 // CHUNK
    for file in files:
        content = bytearray(file.read_bytes())
        if damage == "flip":
            content[5000] ^= 4
            file.write_bytes(content)
        elif damage == "truncate":
            file.write_bytes(content[:5000])
        else:
            file.unlink()
    with start(disk) as engine:
        answer = engine.ask(prompt())
        assert list(answer.outputs[0].token_ids) == plain[0]
        assert not answer.num_cached_tokens
        assert engine.tokens(prompt()) == plain[0]
        assert engine.hit(prompt()) == 192


def test_another_model_does_not_hit(
    start: Start, tiny: Path, tmp_path: Path, plain: dict[int, list[int]]
) -> None:
    """Same name, same shapes, other weights: what a retrained checkpoint looks like."""
    from safetensors.torch import load_file, save_file

    other = tmp_path / "model"
    shutil.copytree(tiny, other)
    disk = {"LMCACHE_LOCAL_DISK": str(tmp_path / "disk")}
    with start(disk, model=str(other)) as engine:
        assert engine.tokens(prompt()) == plain[0]
    weights = load_file(other / "model.safetensors")
    save_file(
        {k: v * 1.5 for k, v in weights.items()}, other / "model.safetensors", {"format": "pt"}
    )
    with start(disk, model=str(other)) as engine:
        assert engine.hit(prompt()) == 0
    with start(disk) as engine:
        assert engine.hit(prompt()) == 192, "a copy of the same weights elsewhere shares"


def test_reset_forgets(start: Start) -> None:
    with start() as engine:
        engine.ask(prompt())
        assert engine.hit(prompt()) == 192
        assert engine.llm.reset_prefix_cache(reset_connector=True)
        assert engine.hit(prompt()) == 0
        assert engine.hit(prompt()) == 192


def test_a_reset_leaves_the_disk_to_others(start: Start, tmp_path: Path) -> None:
    disk = {"LMCACHE_LOCAL_DISK": str(tmp_path)}
    with start(disk) as engine:
        engine.ask(prompt())
        engine.worker.mover.flush(30)
        assert engine.llm.reset_prefix_cache(reset_connector=True)
        assert engine.hit(prompt()) == 0, "its weights may be others now"
        assert engine.hit(prompt()) == 192
        engine.ask(prompt(seed=5))
        engine.worker.mover.flush(30)
    with start(disk) as engine:
        assert engine.hit(prompt()) == 192, "what was stored before the reset is still right"
        assert engine.hit(prompt(seed=5)) == 0, "what was computed after it may not be"
    with start({**disk, "LMCACHE_WEIGHTS_MAY_CHANGE": "false"}) as engine:
        assert engine.llm.reset_prefix_cache(reset_connector=True)
        assert engine.hit(prompt()) == 192


def test_requests_that_ask_not_to_be_saved(start: Start) -> None:
    with start() as engine:
        engine.ask(prompt(), params={"lmcache.skip_save": True})
        assert engine.hit(prompt()) == 0
        assert engine.hit(prompt(), params={"lmcache.skip_save": True}) == 192


def test_salts_and_tags_set_apart(start: Start) -> None:
    with start() as engine:
        engine.ask(prompt(), salt="a")
        assert engine.hit(prompt()) == 0
        assert engine.hit(prompt(), salt="b") == 0
        assert engine.hit(prompt(), salt="a") == 192
        assert engine.hit(prompt(), params={"lmcache.tag.user": "x"}) == 0
        assert engine.hit(prompt(), params={"lmcache.tag.user": "y"}) == 0
        assert engine.hit(prompt(), params={"lmcache.tag.user": "x"}) == 192


def test_min_retrieve_tokens(start: Start) -> None:
    with start({"LMCACHE_MIN_RETRIEVE_TOKENS": "100"}) as engine:
        engine.ask(prompt(96))
        assert engine.hit(prompt(96)) == 0
        engine.ask(prompt(200))
        assert engine.hit(prompt(200)) == 192


def test_priority_limit(start: Start) -> None:
    from vllm import SamplingParams

    with start({"LMCACHE_PRIORITY_LIMIT": "5"}, scheduling_policy="priority") as engine:

        def ask(priority: int) -> int:
            sampling = SamplingParams(max_tokens=1, temperature=0)
            request = {"prompt_token_ids": prompt()}
            answers = engine.llm.generate([request], sampling, use_tqdm=False, priority=[priority])
            return answers[0].num_cached_tokens or 0

        assert ask(9) == 0
        assert ask(5) == 0, "the request over the limit wasn't stored"
        assert ask(9) == 0, "and it doesn't load either"
        assert ask(0) == 192


@pytest.mark.parametrize(("role", "saves"), [("kv_producer", True), ("kv_consumer", False)])
def test_roles_without_a_disaggregation_spec(
    start: Start, plain: dict[int, list[int]], role: str, saves: bool
) -> None:
    with start(transfer={"kv_role": role}) as engine:
        assert engine.tokens(prompt()) == plain[0]
        assert engine.hit(prompt()) == (192 if saves else 0)
        assert engine.tokens(prompt()) == plain[0]


def test_decode_is_saved_when_asked(start: Start) -> None:
    with start({"LMCACHE_SAVE_DECODE_CACHE": "true"}) as engine:
        answer = engine.tokens(prompt(28))
        assert engine.hit(prompt(28) + answer + [11]) == 32
    with start() as engine:
        answer = engine.tokens(prompt(28))
        assert engine.hit(prompt(28) + answer + [11]) == 16


def test_unfull_chunks_are_saved_when_asked(start: Start, plain: dict[int, list[int]]) -> None:
    with start({"LMCACHE_SAVE_UNFULL_CHUNK": "true"}) as engine:
        assert engine.tokens(prompt()) == plain[0]
        answer = engine.ask(prompt())
        assert answer.num_cached_tokens == 199, "all but the token that has to be computed"
        assert list(answer.outputs[0].token_ids) == plain[0]
        assert engine.hit([*prompt(), 11]) == 192, "an unfull chunk never stands for a full one"


def test_offloading_size_takes_effect(start: Start) -> None:
    with start(
        {"LMCACHE_MAX_LOCAL_CPU_SIZE": "0.5"},
        transfer=None,
        kv_offloading_size=0.25,
        kv_offloading_backend="lmcache",
    ) as engine:
        slot = engine.worker._arena.slot_bytes
        assert engine.scheduler._planner.slots == int(0.25 * 2**30) // slot
        engine.ask(prompt())
        assert engine.hit(prompt()) == 192


def test_extra_config_beats_the_environment(start: Start) -> None:
    extra = {"lmcache.chunk_size": 64, "lmcache_rpc_port": "consumer1"}
    with start(transfer={"kv_connector_extra_config": extra}) as engine:
        engine.ask(prompt())
        assert engine.hit(prompt()) == 192
        assert engine.hit(prompt(100)) == 64


def test_statistics_reach_prometheus(start: Start) -> None:
    with start() as engine:
        engine.ask(prompt())
        engine.ask(prompt())
        assert engine.counter("lookup_requests") == 2
        assert engine.counter("lookup_hit_tokens") == 192
        assert engine.counter("store_chunks") == 12
        assert engine.counter("load_chunks") == 12


def test_kv_events(start: Start) -> None:
    import msgspec
    import zmq
    from vllm.config import KVEventsConfig
    from vllm.distributed.kv_events import BlockStored, KVEventBatch

    with zmq.Context() as context, context.socket(zmq.SUB) as subscriber:
        port = subscriber.bind_to_random_port("tcp://127.0.0.1")
        subscriber.subscribe("")
        subscriber.setsockopt(zmq.RCVTIMEO, 20_000)
        events = KVEventsConfig(
            enable_kv_cache_events=True,
            publisher="zmq",
            endpoint=f"tcp://127.0.0.1:{port}",
        )
        with start(kv_events_config=events) as engine:
            decoder = msgspec.msgpack.Decoder(KVEventBatch)

            def received() -> list[BlockStored]:
                batch = decoder.decode(subscriber.recv_multipart()[-1])
                return [e for e in batch.events if isinstance(e, BlockStored) and e.medium == "CPU"]

            seed = 1
            while not subscriber.poll(100):  # a publisher drops what it sends before it connects
                engine.ask(prompt(64, seed))
                seed += 1
            engine.ask(prompt(64))
            stored: list[BlockStored] = []
            while len(stored) < 4:
                stored += [e for e in received() if set(e.token_ids) <= set(prompt(64))]
    assert [token for event in stored for token in event.token_ids] == prompt(64)
    assert [event.parent_block_hash for event in stored[1:]] == [
        event.block_hashes[0] for event in stored[:-1]
    ]


@pytest.mark.parametrize("way", ["sync", "async"])
def test_aborted_requests_leave_nothing_behind(
    start: Start, plain: dict[int, list[int]], way: str
) -> None:
    from vllm import SamplingParams

    with start(WAYS[way]) as engine:
        engine.ask(prompt())
        sampling = SamplingParams(max_tokens=50, temperature=0, ignore_eos=True)
        for steps in range(4):
            engine.llm.llm_engine.add_request(
                f"gone-{steps}", {"prompt_token_ids": prompt()}, sampling
            )
            for _ in range(steps):
                engine.llm.llm_engine.step()
            engine.llm.llm_engine.abort_request([f"gone-{steps}"])
            while engine.llm.llm_engine.has_unfinished_requests():
                engine.llm.llm_engine.step()
        assert engine.tokens(prompt()) == plain[0]
        planner = engine.scheduler._planner
        assert planner.pending == 0
        assert planner.leases == 0
        assert sum(planner._use.leases) == 0
        assert engine.scheduler._requests == {}


def test_sliding_window_models_are_refused(start: Start, tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "window"
    shutil.copytree(tiny, model)
    settings = json.loads((model / "config.json").read_text())
    settings |= {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 64,
    }
    (model / "config.json").write_text(json.dumps(settings))
    refusal = pytest.raises(Exception, match="can't store this model's KV cache yet")
    with refusal, start(model=str(model)):
        pass


def test_upstream_beside_us_stops_the_start(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "lmcache-0.5.6.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lmcache\nVersion: 0.5.6\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(Exception, match="pip uninstall"), start():
        pass


def test_all_configuration_mistakes_at_once(start: Start) -> None:
    environ = {"LMCACHE_CHUNK_SIZE": "-3", "LMCACHE_CACHE_POLICY": "FANCY"}
    extra = {"lmcache.chunk_sise": 16}
    with (
        pytest.raises(
            Exception, match=r"(?s)LMCACHE_CHUNK_SIZE.*chunk_sise|chunk_sise.*CHUNK_SIZE"
        ),
        start(environ, transfer={"kv_connector_extra_config": extra}),
    ):
        pass


def test_an_unusable_disk_folder_stops_the_start(start: Start, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    refusal = pytest.raises(Exception, match=str(tmp_path / "file"))
    with refusal, start({"LMCACHE_LOCAL_DISK": str(tmp_path / "file")}):
        pass


# -- serdes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("serde", ["lossless", "cachegen", "cachegen+aesgcm"])
def test_compressed_chunks(start: Start, tmp_path: Path, serde: str) -> None:
    """In bfloat16, from a disk tier alone: lossless gives the same tokens, the others all hits."""
    file = tmp_path / "lmcache.yaml"
    file.write_text(
        "local_cpu: false\n"
        f"backends: {{disk: {{type: filesystem, path: {tmp_path / 'disk'}, serde: {serde}}}}}\n"
    )
    environ = {
        "LMCACHE_CONFIG_FILE": str(file),
        "LMCACHE_AESGCM_KEYS": "1 " + base64.b64encode(bytes(range(32))).decode(),
    }
    with start(environ, dtype="bfloat16") as engine:
        raw = 12 * engine.worker._namespace.layout.chunk_bytes()
        first = engine.tokens(prompt())
        assert engine.worker.mover.flush(30)
        again = engine.ask(prompt())
        assert again.num_cached_tokens == 192
        if serde == "lossless":
            assert list(again.outputs[0].token_ids) == first
        assert engine.counter("frame_rejected") == 0
    stored = sum(path.stat().st_size for path in (tmp_path / "disk").glob("*/??/*"))
    assert 0 < stored < (0.8 if serde == "lossless" else 0.6) * raw
