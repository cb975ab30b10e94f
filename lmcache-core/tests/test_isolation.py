"""Isolated backends: what their processes may do, and what nobody notices of it."""

from __future__ import annotations

import asyncio
import logging
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import unsafe_backend

from lmcache_core.aio.guard import BreakerState, Guard
from lmcache_core.aio.io_loop import IOLoop
from lmcache_core.builtin.filesystem import FilesystemConfig
from lmcache_core.builtin.memory import MemoryConfig
from lmcache_core.builtin.raw import RawSerde
from lmcache_core.cache.cache import Cache
from lmcache_core.chunks.keys import CacheNamespace
from lmcache_core.chunks.layout import DType, KVLayout, full_attention
from lmcache_core.config import load_config
from lmcache_core.contracts.storage import MISS, BackendContext, HostRegion, StoreOutcome
from lmcache_core.errors import BackendUnavailable, ConfigError, PluginError
from lmcache_core.isolation import backend as isolated_backend
from lmcache_core.isolation import process
from lmcache_core.isolation.backend import IsolatedBackend
from lmcache_core.memory.host_memory import PAGE_BYTES, HostArena, allocate_region
from lmcache_core.metrics import Counters
from lmcache_core.plugins.manager import Plugins
from lmcache_core.testing.loop import Loop
from lmcache_core.testing.storage import LAYOUT, buffers, keys, value, views
from lmcache_core.tiers.tier import Tier
from lmcache_core.tiers.tiers import Tiers

LONG_S = 60.0
MIB = 1 << 20
NAMESPACE = CacheNamespace(model="isolated", layout=LAYOUT)
BAD = Path(unsafe_backend.__file__).read_text()


@pytest.fixture
def run() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def options(distribution: Any, tmp_path: Path) -> Callable[..., Any]:
    """Options of the bad backend, which is installed; its files are below the test's folder."""
    distribution("lmcache-backend-bad", BAD, plain=True)
    descriptor = Plugins(environ={}).storage_backend("bad")
    folder = tmp_path / "values"
    folder.mkdir()
    return lambda mode="": descriptor.config(path=folder, mode=mode)


def isolated(options: Any, *, kind: str = "bad", deadline_s: float = LONG_S, **more: Any) -> Any:
    """An isolated backend, and what it counts."""
    return IsolatedBackend(
        kind, options, where="backends.bad", deadline_s=deadline_s, counters=Counters(), **more
    )


def context(region: HostRegion | None = None, **more: Any) -> BackendContext:
    return BackendContext("bad", NAMESPACE, region, **more)


def restarts(backend: IsolatedBackend, reason: str) -> float:
    series = ("isolated_restarts", (("backend", "bad"), ("reason", reason)))
    return backend._counters.snapshot().get(series, 0)


async def until(ready: Callable[[], bool]) -> None:
    """Wait for what nothing announces."""
    await with_deadline(_poll(ready))


async def with_deadline(work: Coroutine[Any, Any, Any]) -> Any:
    return await asyncio.wait_for(work, LONG_S)


async def _poll(ready: Callable[[], bool]) -> None:
    while not ready():
        await asyncio.sleep(0.01)


def runs(backend: IsolatedBackend) -> bool:
    return backend._child is not None and backend._child.alive


def is_dead(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    ended, _, _ = select.select([fd], [], [], 0)
    os.close(fd)
    return bool(ended)


# -- a thousand requests -------------------------------------------------------------------


def test_a_client_that_crashes_hangs_and_leaks_costs_misses_only(
    run: Loop, options: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its 100th call is a segmentation fault, its 200th never returns, each takes 128 KiB."""
    monkeypatch.setattr(isolated_backend, "LONGEST_DELAY_S", 0.5)
    counters = Counters()
    backend = IsolatedBackend(
        "bad",
        options("all"),
        where="backends.bad",
        deadline_s=3.0,
        counters=counters,
        memory_gib=0.15,
        grace_s=0.5,
    )
    guard = Guard("bad", deadline_s=3.0, breaker_cooldown_s=0.01, counters=counters)
    tier = Tier("bad", backend, RawSerde(), guard=guard, counters=counters, deadline_s=3.0)
    region = allocate_region(4 * MIB, shared=True).region
    arena = HostArena(region, PAGE_BYTES)
    free = list(range(arena.slots))
    names = keys(1000)
    unsettled: list[asyncio.Task[Any]] = []

    async def request(number: int) -> bool:
        """Store a value and load it; False for a miss."""
        expected = bytes(value(number % 251, PAGE_BYTES))
        source, target = free.pop(0), free.pop(0)
        arena.slot(source)[:] = expected
        stored = await tier.store(names[number : number + 1], [arena.slot(source)])
        arena.slot(target)[:] = bytes(PAGE_BYTES)
        answer = await tier.load(names[number : number + 1], [arena.slot(target)])
        if answer.sizes == [PAGE_BYTES]:
            assert bytes(arena.slot(target)) == expected
        else:
            assert answer.sizes == [MISS]
        for slot, task in ((source, stored.unsettled), (target, answer.unsettled)):
            if task is None:
                free.append(slot)
            else:  # nobody else may have it yet
                unsettled.append(task)
        return answer.sizes != [MISS]

    async def serve() -> int:
        await backend.open(context(region))
        tier.opened(backend, backend.capabilities)
        hits = 0
        for number in range(len(names)):
            hit = await request(number)
            hits += hit
            if not hit:  # or the rest would all be asked while there is no process
                await until(lambda: runs(backend))
        if unsettled:
            await asyncio.wait(unsettled, timeout=LONG_S)
        await until(lambda: restarts(backend, "memory") > 0)  # looked at once a second
        return hits

    hits = run(serve())
    assert hits >= 950
    assert unsettled
    assert all(task.done() for task in unsettled)
    assert restarts(backend, "died") == 1
    assert restarts(backend, "hung") == 1
    run(backend.close())


# -- what ends a child ---------------------------------------------------------------------


def test_a_crash_is_one_line_with_the_signal_and_the_last_words(
    run: Loop, options: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lmcache_core.isolation")
    backend = isolated(options("contains"))
    run(backend.open(context()))
    first = backend._child.pid
    caplog.clear()
    with pytest.raises(BackendUnavailable, match=r"bad: contains: its process was killed by SIG"):
        run(backend.contains(keys(1)))
    run(until(lambda: runs(backend)))
    assert backend._child.pid != first
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "bad: its process was killed by SIGSEGV" in line
    assert "Its chunks are misses until it runs again; starting it in 0.1 s" in line
    printed = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    assert "bad: the client says goodbye" in printed
    assert "bad: runs again" in printed
    run(backend.close())


def test_an_exit_code_is_named(run: Loop, options: Callable[..., Any]) -> None:
    backend = isolated(options("exit in load"))
    run(backend.open(context()))
    with pytest.raises(BackendUnavailable, match="its process ended with exit code 3"):
        run(backend.load(keys(1), views(buffers(1))))
    run(backend.close())


def test_buffers_belong_to_a_late_call_until_its_process_is_dead(
    run: Loop, options: Callable[..., Any]
) -> None:
    region = allocate_region(MIB, shared=True).region
    counters = Counters()
    backend = isolated(options("hang in load"), deadline_s=0.2, grace_s=2.0)
    guard = Guard("bad", deadline_s=0.2, counters=counters)
    tier = Tier("bad", backend, RawSerde(), guard=guard, counters=counters, deadline_s=0.2)

    async def late() -> None:
        await backend.open(context(region))
        tier.opened(backend, backend.capabilities)
        pid = backend._child.pid
        answer = await tier.load(keys(1), [region.view[:PAGE_BYTES]])
        assert answer.sizes == [MISS]
        assert answer.unsettled is not None
        assert not answer.unsettled.done()
        assert not is_dead(pid)
        await asyncio.wait([answer.unsettled])
        assert is_dead(pid)

    run(late())
    run(until(lambda: restarts(backend, "hung") == 1))
    run(backend.close())


def test_a_blocked_event_loop_is_noticed_by_pings(
    run: Loop, options: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "PING_EVERY_S", 0.05)
    monkeypatch.setattr(process, "PING_PATIENCE_S", 3.0)
    backend = isolated(options("loop"))
    run(backend.open(context()))
    with pytest.raises(BackendUnavailable, match="its event loop didn't run for 3 s"):
        run(backend.contains(keys(1)))
    run(until(lambda: restarts(backend, "hung") == 1))
    run(backend.close())


def test_a_child_that_doesnt_come_back_is_tried_less_and_less_often(
    run: Loop, options: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "lmcache_core.isolation.backend")
    backend = isolated(options("die in later opens"))
    run(backend.open(context()))
    os.kill(backend._child.pid, signal.SIGKILL)
    run(until(lambda: "starting it in 0.4 s" in caplog.text))
    told = [r for r in caplog.records if "starting it in" in r.getMessage()]
    assert [r.levelno for r in told] == [logging.WARNING, logging.WARNING, logging.DEBUG]
    assert "killed by SIGKILL" in told[0].getMessage()
    assert "the master is gone" in told[1].getMessage()
    with pytest.raises(BackendUnavailable, match="its process isn't running"):
        run(backend.contains(keys(1)))
    run(backend.close())


def guarded(backend: IsolatedBackend) -> Tier:
    """A tier whose circuit, once it is open, stays so for an hour."""
    guard = Guard("bad", deadline_s=LONG_S, breaker_cooldown_s=3600.0, counters=Counters())
    tier = Tier("bad", backend, RawSerde(), guard=guard, counters=Counters(), deadline_s=LONG_S)
    tier.opened(backend, backend.capabilities)
    return tier


def test_a_tier_serves_again_as_soon_as_the_new_process_runs(
    run: Loop, options: Callable[..., Any]
) -> None:
    backend = isolated(options())
    run(backend.open(context()))
    tier = guarded(backend)
    region = allocate_region(MIB, shared=True).region
    page = [region.view[:PAGE_BYTES]]
    stored = run(tier.store(keys(1), page))
    assert stored.outcomes == [StoreOutcome.STORED]
    os.kill(backend._child.pid, signal.SIGKILL)
    run(until(lambda: not runs(backend)))
    for _ in range(9):  # more than open the circuit
        assert run(tier.load(keys(1), page)).sizes == [MISS]
    run(until(lambda: runs(backend)))
    assert run(tier.load(keys(1), page)).sizes == [PAGE_BYTES]
    assert tier.guard.state is BreakerState.CLOSED
    run(backend.close())


def test_a_child_that_crashes_in_each_call_is_started_less_and_less_often(
    run: Loop, options: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    backend = isolated(options("load"))
    run(backend.open(context()))
    tier = guarded(backend)
    region = allocate_region(MIB, shared=True).region
    for delay in ("0.1", "0.2", "0.4"):
        run(until(lambda: runs(backend)))
        answer = run(tier.load(keys(1), [region.view[:PAGE_BYTES]]))
        assert answer.sizes == [MISS]
        line = f"starting it in {delay} s"
        run(until(lambda line=line: line in caplog.text))
    run(backend.close())


def test_closing_ends_the_child_whatever_it_does(run: Loop, options: Callable[..., Any]) -> None:
    backend = isolated(options("hang in load"))

    async def close_while_it_hangs() -> int:
        await backend.open(context())
        pid = backend._child.pid
        load = asyncio.ensure_future(backend.load(keys(1), views(buffers(1))))
        await until(lambda: (backend._options.path / "calls").exists())
        closing = asyncio.ensure_future(backend.close())
        await asyncio.sleep(0.1)
        closing.cancel()  # as core does at its deadline
        await asyncio.wait([closing])
        with pytest.raises(BackendUnavailable):
            await load
        return pid

    assert is_dead(run(close_while_it_hangs()))
    run(backend.close())


def test_a_close_that_is_cancelled_twice_ends_its_threads(run: Loop) -> None:
    """At its deadline, and when the loop is closed, which may not wait for the child's end."""
    backend = isolated(MemoryConfig(), kind="memory")

    async def close_twice() -> None:
        closing = asyncio.ensure_future(backend.close())
        for _ in range(2):
            await asyncio.sleep(0)  # it waits for the child's answer, and then for its end
            closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing

    run(backend.open(context()))
    pool, child = backend._copies, backend._child
    run(backend.store(keys(1), views([bytearray(b"copied")])))
    run(close_twice())
    with pytest.raises(RuntimeError, match="shut down"):
        pool.submit(print)
    assert pool.join(LONG_S)
    run(asyncio.wait_for(asyncio.shield(child.gone), LONG_S))
    child.join()


def test_opening_that_is_cancelled_leaves_no_process(
    run: Loop, options: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    children: list[process.Child] = []

    class Noted(process.Child):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            children.append(self)

    monkeypatch.setattr(isolated_backend, "Child", Noted)

    async def cancelled() -> None:
        for pause_s in (0.0, 0.05):
            opening = asyncio.ensure_future(isolated(options()).open(context()))
            await asyncio.sleep(pause_s)
            opening.cancel()
            await asyncio.wait([opening])
        for child in children:
            await asyncio.wait_for(child.gone, LONG_S)

    run(cancelled())
    assert len(children) == 2
    assert all(child.pid is None or is_dead(child.pid) for child in children)


@pytest.mark.parametrize("pause_s", [0.0, 0.15, 0.4])
def test_closing_ends_a_restart(run: Loop, options: Callable[..., Any], pause_s: float) -> None:
    """While it waits, while the new process starts, or after that."""
    backend = isolated(options())

    async def close_meanwhile() -> None:
        await backend.open(context())
        first = backend._child
        os.kill(first.pid, signal.SIGKILL)
        await asyncio.shield(first.gone)
        await asyncio.sleep(pause_s)
        await backend.close()
        assert backend._restarting.done()

    run(close_meanwhile())
    assert backend._child is None


def test_restarts_leak_no_descriptor_and_no_thread(
    run: Loop, options: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolated_backend, "FIRST_DELAY_S", 0.01)
    backend = isolated(options())

    async def die_and_come_back() -> None:
        child = backend._child
        os.kill(child.pid, signal.SIGKILL)
        await until(lambda: child.gone.done() and runs(backend))
        child.join()

    run(backend.open(context()))
    run(die_and_come_back())
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(3):
        run(die_and_come_back())
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
    run(backend.close())


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "loop blocked"])
def test_a_child_dies_with_its_parent(options: Callable[..., Any], busy: bool) -> None:
    code = f"""
import asyncio, sys
from lmcache_core.isolation.backend import IsolatedBackend
from lmcache_core.chunks.layout import DType, KVLayout, full_attention
from lmcache_core.metrics import Counters
from lmcache_core.plugins.manager import Plugins
from lmcache_core.contracts.storage import BackendContext
from lmcache_core.chunks.keys import CacheNamespace
from lmcache_core.testing.storage import LAYOUT, keys

async def main():
    options = Plugins().storage_backend("bad").config(path={str(options().path)!r}, mode="loop")
    backend = IsolatedBackend(
        "bad", options, where="", deadline_s=1000, counters=Counters()
    )
    await backend.open(BackendContext("bad", CacheNamespace("m", LAYOUT)))
    call = asyncio.ensure_future(backend.contains(keys(1))) if {busy} else None
    await asyncio.sleep(0.2)
    print(backend._child.pid, flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=environ
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        fd = os.pidfd_open(pid)
        assert not is_dead(pid)
        parent.kill()
    ended, _, _ = select.select([fd], [], [], LONG_S)
    os.close(fd)
    assert ended


# -- opening, as without isolation ---------------------------------------------------------


class Section:
    def __init__(self, options: Any, isolated: bool, type: str = "bad") -> None:
        self.name, self.type, self.options, self.isolated = "mine", type, options, isolated
        self.serde = self.deadline_s = self.isolated_memory_gib = None


@pytest.fixture
def open_tiers() -> Iterator[Callable[..., Tiers]]:
    loop = IOLoop("test")
    opened: list[Tiers] = []

    def open_(section: Section, **more: Any) -> Tiers:
        facts: dict[str, Any] = {
            "namespace": NAMESPACE,
            "region": None,
            "loop": loop,
            "counters": Counters(),
            "default_deadline_s": LONG_S,
            "open_deadline_s": LONG_S,
            "reopen_after_s": 0.01,
            **more,
        }
        opened.append(Tiers.open([section], Plugins(environ={}), **facts))
        return opened[-1]

    yield open_
    for tiers in opened:
        tiers.close(LONG_S)
    loop.close(LONG_S)


@pytest.mark.parametrize(
    ("mode", "kind", "says"),
    [
        ("import", PluginError, "Install what it needs: pip install throwaway"),
        ("create", ConfigError, "`path` is on the moon"),
        ("rejected", ConfigError, "the password is wrong"),
    ],
)
def test_what_the_user_must_know_is_said_in_the_same_words(
    options: Callable[..., Any],
    open_tiers: Callable[..., Tiers],
    mode: str,
    kind: type[Exception],
    says: str,
) -> None:
    texts: list[str] = []
    for isolated in (False, True):
        with pytest.raises(kind) as caught:
            open_tiers(Section(options(mode), isolated))
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    assert says in texts[0]


def test_a_mistake_of_the_plugin_is_an_error_at_start(
    options: Callable[..., Any], open_tiers: Callable[..., Tiers]
) -> None:
    with pytest.raises(PluginError, match=r"backends.mine: .*ValueError: boom"):
        open_tiers(Section(options("value error"), True))


@pytest.mark.parametrize("mode", ["crash in create", "die once in open"])
def test_a_crash_while_opening_is_tried_again(
    options: Callable[..., Any],
    open_tiers: Callable[..., Tiers],
    caplog: pytest.LogCaptureFixture,
    mode: str,
) -> None:
    tiers = open_tiers(Section(options(mode), True))
    assert not tiers.tiers[0].ready
    assert "backends.mine isn't available: mine: its process was killed by SIGSEGV" in caplog.text
    if mode == "die once in open":
        tiers._loop.run(until(lambda: tiers.tiers[0].ready), LONG_S)


def test_a_scheduler_sees_what_its_workers_stored(
    open_tiers: Callable[..., Tiers], tmp_path: Path
) -> None:
    section = Section(FilesystemConfig(path=tmp_path, min_free_gib=0), True, "filesystem")
    asking = open_tiers(section, lookup_only=True)
    region = allocate_region(MIB, shared=True).region
    working = open_tiers(section, region=region)
    run = working._loop.run
    assert run(asking.locate(keys(2)), LONG_S) == [-1, -1]
    answer = run(working.tiers[0].store(keys(1), [region.view[:PAGE_BYTES]]), LONG_S)
    assert answer.outcomes == [StoreOutcome.STORED]
    assert run(asking.locate(keys(2)), LONG_S) == [0, -1]


def test_no_torch_in_the_child(run: Loop, options: Callable[..., Any]) -> None:
    backend = isolated(options("torch"))
    run(backend.open(context()))
    assert run(backend.contains(keys(1))) == [False]
    run(backend.close())


def test_nothing_of_this_is_imported_when_nobody_isolates(tmp_path: Path) -> None:
    code = """
import sys
from lmcache_core import Cache, DType, KVLayout, full_attention
from lmcache_core.config import load_config
from lmcache_core.plugins.manager import Plugins
plugins = Plugins()
settings = ["chunk_size=16", "max_local_cpu_size=0.01", "backends.memory.type=memory"]
config = load_config(plugins, environ={}, assignments=settings)
group = full_attention(layers=1, heads=1, head_size=8, dtype=DType.BF16)
with Cache.open(model="m", layout=KVLayout(16, (group,)), config=config, plugins=plugins) as cache:
    cache.store(range(16), bytearray(group.chunk_bytes(16)))
print([name for name in sys.modules if "isolation" in name])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.strip() == "[]"


# -- memory --------------------------------------------------------------------------------


def test_values_in_host_memory_arent_copied(run: Loop, options: Callable[..., Any]) -> None:
    region = allocate_region(MIB, shared=True).region
    backend = isolated(options())
    run(backend.open(context(region)))
    source, target = region.view[64 : 64 + 999], region.view[PAGE_BYTES : PAGE_BYTES + 999]
    source[:] = value(3, 999)
    run(backend.store(keys(1), [source]))
    assert run(backend.load(keys(1), [target])) == [999]
    assert target == source
    assert not any(backend._scratch.region.view[: 4 * PAGE_BYTES])
    run(backend.close())


def test_a_region_that_cant_be_shared_costs_a_copy_and_a_warning(
    run: Loop, options: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    region = allocate_region(MIB).region
    backend = isolated(options())
    run(backend.open(context(region)))
    assert "host memory can't be shared with its process" in caplog.text
    region.view[:999] = value(4, 999)
    run(backend.store(keys(1), [region.view[:999]]))
    assert run(backend.load(keys(1), [region.view[PAGE_BYTES : 2 * PAGE_BYTES]])) == [999]
    assert region.view[PAGE_BYTES : PAGE_BYTES + 999] == value(4, 999)
    run(backend.close())


def test_more_than_scratch_memory_holds_goes_in_parts(
    run: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolated_backend, "SCRATCH_BYTES", 4 * PAGE_BYTES)
    backend = isolated(MemoryConfig(), kind="memory")
    run(backend.open(context()))
    stored = [value(i, PAGE_BYTES + i) for i in range(8)]

    async def twice() -> None:
        await asyncio.gather(
            *(backend.store(keys(8, seed), views(stored)) for seed in range(2)),
        )

    run(twice())
    for seed in range(2):
        loaded = buffers(8, 2 * PAGE_BYTES)
        assert run(backend.load(keys(8, seed), views(loaded))) == [len(one) for one in stored]
        assert [one[: len(two)] for one, two in zip(loaded, stored, strict=True)] == stored
    run(backend.close())


def test_a_value_that_never_fits_is_not_admitted(
    run: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolated_backend, "SCRATCH_BYTES", 4 * PAGE_BYTES)
    backend = isolated(MemoryConfig(), kind="memory")
    run(backend.open(context()))
    large = [value(1), value(2, 5 * PAGE_BYTES), value(3)]
    outcomes = run(backend.store(keys(3), views(large)))
    stored, refused = StoreOutcome.STORED, StoreOutcome.NOT_ADMITTED
    assert outcomes == [stored, refused, stored]
    assert run(backend.load(keys(3), views(buffers(3, 5 * PAGE_BYTES))))[1] == MISS
    run(backend.close())


def test_read_only_sources_can_be_stored(run: Loop) -> None:
    backend = isolated(MemoryConfig(), kind="memory")
    run(backend.open(context()))
    assert run(backend.store(keys(1), [memoryview(b"read only")])) == [StoreOutcome.STORED]
    (loaded,) = buffers(1)
    assert run(backend.load(keys(1), [memoryview(loaded)])) == [9]
    assert loaded[:9] == b"read only"
    run(backend.close())


def test_answers_that_make_no_sense_are_errors(run: Loop, options: Callable[..., Any]) -> None:
    backend = isolated(options("nonsense"))
    run(backend.open(context()))
    with pytest.raises(Exception, match="TypeError"):
        run(backend.contains(keys(1)))
    with pytest.raises(Exception, match="answered store with"):
        run(backend.store(keys(1), views([value(1)])))
    run(backend.close())


def test_a_call_before_open_and_after_close_is_unavailable(run: Loop) -> None:
    backend = isolated(MemoryConfig(), kind="memory")
    with pytest.raises(BackendUnavailable):
        run(backend.contains(keys(1)))
    run(backend.open(context()))
    run(backend.close())
    with pytest.raises(BackendUnavailable):
        run(backend.contains(keys(1)))


def test_the_kernel_kills_the_child_first(run: Loop) -> None:
    backend = isolated(MemoryConfig(), kind="memory")
    run(backend.open(context()))
    score = int(Path(f"/proc/{backend._child.pid}/oom_score_adj").read_text())
    assert score == 1000
    run(backend.close())


def test_a_cache_over_an_isolated_tier(tmp_path: Path) -> None:
    """Through the public API, without a copy; the process is killed in the middle."""
    plugins = Plugins(environ={})
    settings = ["chunk_size=16", "local_cpu=false", "max_local_cpu_size=0.01"]
    settings += [f"backends.filesystem.path={tmp_path}", "backends.filesystem.min_free_gib=0"]
    settings += ["backends.filesystem.isolated=true", "local_cpu_populate=true"]
    config = load_config(plugins, environ={}, assignments=settings)
    layout = KVLayout(16, (full_attention(layers=2, heads=1, head_size=64, dtype=DType.BF16),))
    tokens = list(range(64))
    kv = bytearray(os.urandom(4 * layout.chunk_bytes()))
    with Cache.open(model="m", layout=layout, config=config, plugins=plugins) as cache:
        assert cache.store(tokens, kv) == 64
        assert cache.flush()
        tiers, loop = cache._running.tiers, cache._running.loop
        assert tiers is not None
        assert loop is not None
        backend = tiers.tiers[0].backend
        assert isinstance(backend, IsolatedBackend)
        for _ in range(2):
            loaded = bytearray(len(kv))
            assert cache.load(tokens, loaded) == 64
            assert loaded == kv
            first = backend._child
            assert first is not None
            os.kill(first.pid or 0, signal.SIGKILL)
            loop.run(until(lambda child=first: child.gone.done() and runs(backend)), LONG_S)
        assert backend._scratch is not None
        assert not any(backend._scratch.region.view[: 64 * PAGE_BYTES])


def test_a_cache_serves_a_thousand_requests_around_a_bad_client(
    options: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the public API: what is loaded is what was stored, or nothing."""
    monkeypatch.setattr(isolated_backend, "LONGEST_DELAY_S", 0.5)
    settings = ["chunk_size=16", "local_cpu=false", "max_local_cpu_size=0.01"]
    settings += [f"backends.bad.path={options().path}", "backends.bad.mode=all"]
    settings += ["backends.bad.deadline_s=2", "backends.bad.isolated_memory_gib=0.15"]
    plugins = Plugins(environ={})
    config = load_config(plugins, environ={}, assignments=settings)
    layout = KVLayout(16, (full_attention(layers=2, heads=1, head_size=64, dtype=DType.BF16),))
    hits = 0
    with Cache.open(model="m", layout=layout, config=config, plugins=plugins) as cache:
        assert cache._running.tiers is not None
        assert cache._running.loop is not None
        backend = cache._running.tiers.tiers[0].backend
        assert isinstance(backend, IsolatedBackend)
        for number in range(1000):
            tokens, kv = range(number, number + 16), os.urandom(layout.chunk_bytes())
            loaded = bytearray(len(kv))
            cache.store(tokens, bytearray(kv))
            assert cache.flush(LONG_S)
            if cache.load(tokens, loaded) == 16:
                assert loaded == kv
                hits += 1
            else:  # or the rest would all be asked while there is no process
                cache._running.loop.run(until(lambda: runs(backend)), LONG_S)
        cache._running.loop.run(until(lambda: restarts(backend, "memory") > 0), LONG_S)
        assert restarts(backend, "died") == 1
        assert restarts(backend, "hung") == 1
    assert hits >= 950
