"""What the scheduler's half promises vLLM, without an engine: leases, resets and events."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]

kv_events = pytest.importorskip("vllm.distributed.kv_events")

from lmcache_connector_vllm.scheduler import SchedulerSide  # noqa: E402
from lmcache_connector_vllm.settings import Settings  # noqa: E402
from lmcache_core.cache.mover import slots_in  # noqa: E402
from lmcache_core.cache.plan import FetchOp, Report, StoreOp  # noqa: E402
from lmcache_core.chunks.chunk_index import ChunkState  # noqa: E402
from lmcache_core.chunks.keys import CacheNamespace, ChunkKey  # noqa: E402
from lmcache_core.chunks.layout import DType, KVLayout, full_attention  # noqa: E402
from lmcache_core.config import load_config  # noqa: E402
from lmcache_core.contracts.eviction import LRU, CachePolicyDescriptor, PolicyRequest  # noqa: E402
from lmcache_core.contracts.hookspecs import hookimpl  # noqa: E402
from lmcache_core.plugins.manager import Plugins  # noqa: E402

CHUNK, SLOTS = 16, 40
NAMESPACE = CacheNamespace(
    model="m",
    layout=KVLayout(CHUNK, (full_attention(layers=1, heads=1, head_size=8, dtype=DType.BF16),)),
)
Make = Callable[..., SchedulerSide]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """A scheduler's half with `SLOTS` slots; with ``disk`` it has a tier."""
    made: list[SchedulerSide] = []

    def start(
        *, disk: bool = False, register: Sequence[object] = (), **options: Any
    ) -> SchedulerSide:
        slot_bytes = (1 << 30) // slots_in(1 << 30, NAMESPACE)
        gib = SLOTS * slot_bytes / 2**30
        extra: dict[str, Any] = {"lmcache.chunk_size": CHUNK, "lmcache.max_local_cpu_size": gib}
        if disk:
            extra |= {"lmcache.local_disk": str(tmp_path), "lmcache.max_local_disk_size": 1}
        extra |= {f"lmcache.{name}": value for name, value in options.items()}
        plugins = Plugins(register=register)
        config = load_config(plugins, engine=("test", extra))
        settings = Settings(config, plugins, saves=True, asynchronous=False, layerwise=False)
        side = SchedulerSide(settings, NAMESPACE, ranks=1, block_tokens=16, events=True)
        assert side._planner.slots == SLOTS
        made.append(side)
        return side

    yield start
    for side in made:
        side.close()


def request(name: str, chunks: int, first: int = 0, **more: Any) -> Any:
    tokens = [*range(first, first + chunks * CHUNK), 7]
    facts = {
        "request_id": name,
        "kv_transfer_params": None,
        "priority": 0,
        "prompt_token_ids": tokens,
        "prompt_embeds": None,
        "resumable": False,
        "cache_salt": None,
        "mm_features": [],
        "all_token_ids": tokens,
        "num_tokens": len(tokens),
        "num_prompt_tokens": len(tokens),
        "lora_request": None,
        "skip_reading_prefix_cache": False,
    }
    return SimpleNamespace(**{**facts, **more})


def step(side: SchedulerSide, *new: Any) -> Any:
    """A step in which ``new`` are computed from their first token on."""
    scheduled = [
        SimpleNamespace(
            req_id=one.request_id,
            block_ids=(list(range(one.num_tokens // 16 + 1)),),
            num_computed_tokens=0,
        )
        for one in new
    ]
    return side.plan_step(
        SimpleNamespace(  # type: ignore[arg-type]
            scheduled_new_reqs=scheduled,
            num_scheduled_tokens={one.request_id: one.num_tokens for one in new},
            scheduled_cached_reqs=SimpleNamespace(req_ids=[], resumed_req_ids=set()),
        )
    )


def done(side: SchedulerSide, ops: Sequence[StoreOp | FetchOp]) -> None:
    marks = dict.fromkeys((op.op for op in ops), 1)
    side._planner.settle(Report(ok=marks, released=dict(marks)))


def store(side: SchedulerSide, one: Any) -> list[StoreOp]:
    side.matched_tokens(one, 0)
    side.load_into(one, [], 0)
    plan = step(side, one)
    ops = [op for stores in plan.stores for op in stores.ops]
    done(side, ops)
    side.request_finished(one)
    return ops


def answers(side: SchedulerSide, monkeypatch: pytest.MonkeyPatch, tier: int = 0) -> None:
    """Let the slow tier have everything, and say so at once."""

    def locate(keys: Sequence[ChunkKey]) -> Future[list[int]]:
        found: Future[list[int]] = Future()
        found.set_result([tier] * len(keys))
        return found

    monkeypatch.setattr(side, "_locate", locate)


# -- what users ask -----------------------------------------------------------------------------


def test_what_cannot_be_read_of_a_request_is_served_without_the_cache(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    side = make()
    assert store(side, request("plain", 3))
    deep: Any = 1
    for _ in range(200_000):
        deep = [deep]
    for number, params in enumerate(({"lmcache.tag.a": deep}, ["lmcache.tag.a"])):
        odd = request(f"odd{number}", 3, kv_transfer_params=params)
        side.new_request(odd)
        assert side.matched_tokens(odd, 0) == (0, False)
        assert store(side, odd) == []
    assert side.matched_tokens(request("again", 3), 0) == (48, False)
    assert caplog.text.count("isn't cached") == 1, "once for many"


# -- what waiting requests may lease -----------------------------------------------------------


def test_waiting_requests_leave_half_of_host_memory_to_those_that_run(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = make(disk=True)
    answers(side, monkeypatch)
    queue = [request(f"r{n}", 8, first=n * 1000) for n in range(50)]
    for one in queue:
        side.new_request(one)
    for _ in range(3):
        assert all(side.matched_tokens(one, 0) == (None, False) for one in queue)
        step(side)
    leased = sum(1 for count in side._planner._use.leases if count)
    assert leased == 16, "two requests of eight chunks, of twenty that may be"
    assert side.counters.snapshot()["lookups_deferred", ()] == 48
    running = request("running", 20, first=10**6)
    assert len(store(side, running)) == 20


def test_those_that_waited_are_looked_up_in_the_order_in_which_they_are_asked_for(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = make(disk=True)
    answers(side, monkeypatch)
    big, small = request("big", 19, first=0), request("small", 1, first=5000)
    first = request("first", 8, first=9000)
    for one in (first, big, small):
        side.new_request(one)
    assert [side.matched_tokens(one, 0)[0] for one in (first, big, small)] == [None] * 3
    done(side, step(side).fetches)
    need = side.matched_tokens(first, 0)[0]
    assert need == 8 * CHUNK
    assert [side.matched_tokens(one, 0)[0] for one in (big, small)] == [None] * 2
    assert side._requests["small"].lookup is None, "it comes after the one that is bigger"
    side.load_into(first, list(range(9)), need)
    step(side)
    for _ in range(2):
        side.matched_tokens(big, 0)
        done(side, step(side).fetches)
    assert side.matched_tokens(big, 0)[0] == 19 * CHUNK


def test_what_was_offered_stays_until_it_is_loaded(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = make(disk=True)
    one = request("one", 8)
    store(side, one)
    answers(side, monkeypatch, tier=-1)
    asking = request("asking", 8)
    assert side.matched_tokens(asking, 0)[0] in (None, 8 * CHUNK)
    assert side.matched_tokens(asking, 0)[0] == 8 * CHUNK
    for n in range(1, 8):
        store(side, request(f"other {n}", 8, first=n * 1000))
    side.load_into(asking, list(range(9)), 8 * CHUNK)
    (load,) = step(side).loads
    assert len(load.ops) == 8
    assert all(side._planner.state(op.key) is ChunkState.READY for op in load.ops)


# -- resets ------------------------------------------------------------------------------------


def test_a_reset_empties_no_tier_and_uses_none_from_then_on(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    side = make(disk=True)
    before = store(side, request("before", 4))
    assert all(op.persist for op in before)
    answers(side, monkeypatch)
    assert side.reset()
    assert side._planner.chunks == 0
    again = request("again", 4)
    side.new_request(again)
    assert side.matched_tokens(again, 0) == (0, False), "the tier's are of other weights"
    side.load_into(again, [], 0)
    ops = [op for stores in step(side, again).stores for op in stores.ops]
    assert len(ops) == 4
    assert not any(op.persist for op in ops), "nobody else could find it, nor this one later"
    assert not {op.key for op in ops} & {op.key for op in before}
    done(side, ops)
    assert side.matched_tokens(request("third", 4), 0) == (4 * CHUNK, False)
    assert "forgot 4 chunks in host memory" in caplog.text
    assert "local_disk keeps its chunks" in caplog.text
    assert "set weights_may_change=false" in caplog.text


def test_two_resets_share_nothing(make: Make) -> None:
    side = make()
    names = []
    for n in range(3):
        names.append({op.key for op in store(side, request(f"r{n}", 4))})
        side.reset()
    assert not names[0] & names[1]
    assert not names[1] & names[2]
    assert side._planner.chunks == 0


def test_what_ran_during_a_reset_is_neither_loaded_nor_stored(make: Make) -> None:
    side = make()
    store(side, request("before", 4))
    running = request("running", 4)
    assert side.matched_tokens(running, 0)[0] == 4 * CHUNK
    side.reset()
    assert side.matched_tokens(running, 0) == (0, False)
    side.load_into(running, [], 0)
    assert step(side, running).stores == []
    assert side._planner.leases == 0


def test_weights_that_never_change_keep_their_tiers_through_a_reset(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    side = make(disk=True, weights_may_change=False)
    before = store(side, request("before", 4))
    assert side.reset()
    assert side._planner.chunks == 0
    answers(side, monkeypatch)
    again = request("again", 4)
    side.new_request(again)
    assert side.matched_tokens(again, 0) == (None, False)
    plan = step(side)
    assert [op.key for op in plan.fetches] == [op.key for op in before]
    done(side, plan.fetches)
    assert side.matched_tokens(again, 0) == (4 * CHUNK, False)
    assert "goes on using them" in caplog.text


def test_without_host_memory_nothing_is_kept_after_a_reset(make: Make) -> None:
    side = make(disk=True, local_cpu=False)
    side.reset()
    assert store(side, request("after", 4)) == []


# -- events ------------------------------------------------------------------------------------


def test_events_have_vllms_medium_and_the_chunks_tokens(make: Make) -> None:
    side = make()
    ops = store(side, request("one", 2))
    stored = list(side.take_events())
    assert [event.medium for event in stored] == [kv_events.MEDIUM_CPU] * 2 == ["CPU"] * 2
    assert [event.token_ids for event in stored] == [list(range(16)), list(range(16, 32))]
    side._planner.forget(ops[0].key)
    gone = list(side.take_events())
    assert [type(event) for event in gone] == [kv_events.BlockRemoved] * 2
    assert {event.medium for event in gone} == {"CPU"}


@pytest.mark.parametrize("unfull", [False, True])
def test_what_comes_from_a_tier_is_an_event_when_it_is_here(
    make: Make, monkeypatch: pytest.MonkeyPatch, unfull: bool
) -> None:
    side = make(disk=True, save_unfull_chunk=unfull)
    answers(side, monkeypatch)
    one = request("one", 3)
    assert side.matched_tokens(one, 0) == (None, False)
    plan = step(side)
    assert len(plan.fetches) == 3 + unfull
    assert list(side.take_events()) == []
    failed = plan.fetches.pop(2)
    done(side, plan.fetches)
    side._planner.settle(Report(bad={failed.op: 1}, released={failed.op: 1}))
    stored = list(side.take_events())
    assert [e.token_ids for e in stored if isinstance(e, kv_events.BlockStored)][:2] == [
        list(range(16)),
        list(range(16, 32)),
    ]
    came = [e.block_hashes for e in stored if isinstance(e, kv_events.BlockStored)]
    assert stored[0].parent_block_hash is None
    assert [stored[1].parent_block_hash] == stored[0].block_hashes
    side.request_finished(one)
    side.reset()
    went = [e.block_hashes for e in side.take_events()]
    went += [e.block_hashes for e in stored if isinstance(e, kv_events.BlockRemoved)]
    assert sorted(went) == sorted(came), "each that came has gone, and no other"
    assert side._events is not None
    assert side._events._planned == {}


# -- what a cache policy hears ------------------------------------------------------------------


class Watching(LRU):
    """Remembers where requests begin and end."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Any] = []

    def requested(self, request: PolicyRequest) -> None:
        self.heard.append(request)

    def finished(self, name: str, tokens: int) -> None:
        self.heard.append((name, tokens))


class WatchingPlugin:
    @hookimpl
    def lmcache_cache_policies(self) -> list[CachePolicyDescriptor]:
        return [CachePolicyDescriptor(name="watching", summary="", create=lambda _: Watching())]


@pytest.mark.parametrize("disk", [False, True])
def test_a_policy_hears_of_each_request_once(
    make: Make, disk: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = make(disk=disk, register=[WatchingPlugin()], cache_policy="watching")
    if disk:
        answers(side, monkeypatch, tier=-1)
    policy: Any = side._planner._order._policy
    first = request("a", chunks=3, priority=2)
    store(side, first)
    told, ended = policy.heard
    assert (told.name, told.tokens, told.hints) == ("a", 49, {"priority": 2})
    assert (len(told.keys), list(told.slots)) == (3, [])
    assert ended == ("a", 49)
    second = request("b", chunks=5)
    for _ in range(3):  # vLLM asks again at each step
        side.matched_tokens(second, 0)
    side.request_finished(second)
    assert [one if isinstance(one, tuple) else one.name for one in policy.heard[2:]] == [
        "b",
        ("b", 81),
    ]
    assert (len(policy.heard[2].keys), len(policy.heard[2].slots)) == (5, 3)


def test_who_does_not_listen_costs_no_digests(make: Make) -> None:
    side = make()
    one = request("a", chunks=5)
    side.matched_tokens(one, 0)
    assert len(side._requests["a"].hasher.digests) == 1, "that of the first miss"
    side.request_finished(one)
