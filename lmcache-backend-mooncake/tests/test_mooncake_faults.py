"""A master that is gone, hangs or forgot everything; segments that are full or lost their owner.

Backends run in processes of their own, as by default, and share an arena with this one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
from mooncake_master import MIB, Holder, Master, MetadataServer, need_libraries
from open_ports import documented, open_ports

from lmcache_backend_mooncake import machine
from lmcache_backend_mooncake.backend import MooncakeBackend
from lmcache_backend_mooncake.config import MooncakeConfig
from lmcache_core.chunks.keys import CacheNamespace, ChunkKey, chunk_key
from lmcache_core.contracts.storage import MISS, BackendContext, HostRegion, StoreOutcome
from lmcache_core.errors import BackendError, BackendRejected, BackendUnavailable
from lmcache_core.isolation.backend import IsolatedBackend
from lmcache_core.memory.host_memory import allocate_region
from lmcache_core.metrics import Counters
from lmcache_core.testing.loop import Loop
from lmcache_core.testing.storage import LAYOUT

NAMESPACE = CacheNamespace(model="faults", layout=LAYOUT)
VALUE = MIB
VALUES = 16
PATIENCE_S = 30.0
STORED, FULL = StoreOutcome.STORED, StoreOutcome.NOT_ADMITTED
_T = TypeVar("_T")


@pytest.fixture
def run() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def arena() -> Iterator[HostRegion]:
    """Sources in the first half, targets in the second."""
    owned = allocate_region(2 * VALUES * VALUE, shared=True)
    owned.region.view[: VALUES * VALUE] = os.urandom(VALUES * VALUE)
    yield owned.region
    owned.close()


@dataclass
class Opened:
    """A backend with its buffers in the arena."""

    backend: Any
    arena: HostRegion
    run: Loop

    def _cut(self, start: int, count: int) -> list[memoryview]:
        view = self.arena.view
        return [view[(start + i) * VALUE : (start + i + 1) * VALUE] for i in range(count)]

    def store(self, names: list[ChunkKey]) -> list[StoreOutcome]:
        outcomes: list[StoreOutcome] = self.run(self.backend.store(names, self._cut(0, len(names))))
        return outcomes

    def load(self, names: list[ChunkKey]) -> list[int]:
        """Sizes; what was loaded is what was stored at the same position."""
        into = self._cut(VALUES, len(names))
        for one in into:
            one[:] = bytes(VALUE)
        sizes: list[int] = self.run(self.backend.load(names, into))
        for size, one, source in zip(sizes, into, self._cut(0, len(names)), strict=True):
            assert size == MISS or (size == VALUE and one == source)
        return sizes

    def contains(self, names: list[ChunkKey]) -> list[bool]:
        found: list[bool] = self.run(self.backend.contains(names))
        return found


def names(count: int, seed: int = 0) -> list[ChunkKey]:
    return [chunk_key((seed * 100 + i).to_bytes(16, "little")) for i in range(count)]


def isolated(config: MooncakeConfig) -> IsolatedBackend:
    return IsolatedBackend(
        "mooncake", config, where="backends.test", deadline_s=15.0, counters=Counters()
    )


@pytest.fixture
def opened(run: Loop, arena: HostRegion) -> Iterator[Callable[..., Opened]]:
    """Opens one more backend; all are closed at the end."""
    backends: list[Any] = []

    def open_one(
        config: MooncakeConfig, *, in_process: bool = False, lookup_only: bool = False
    ) -> Opened:
        backend: Any = MooncakeBackend(config) if in_process else isolated(config)
        context = BackendContext("test", NAMESPACE, arena, VALUE, lookup_only=lookup_only)
        run(backend.open(context))
        backends.append(backend)
        return Opened(backend, arena, run)

    yield open_one
    closing = [backend.close() for backend in backends]

    async def close_all() -> None:
        await asyncio.gather(*closing)

    run(close_all())


@pytest.fixture
def master() -> Iterator[Master]:
    with Master("--client_ttl=3") as running:
        yield running


def eventually(call: Callable[[], _T], wanted: _T) -> None:
    """``call`` answers ``wanted`` sooner or later; until then it may fail as backends may."""
    until = time.monotonic() + PATIENCE_S
    seen: object = None
    while time.monotonic() < until:
        try:
            seen = call()
        except BackendError as error:
            seen = error
        if seen == wanted:
            return
        time.sleep(0.1)
    pytest.fail(f"still {seen!r}, not {wanted!r}")


def refused(run: Loop, opening: Awaitable[None], kind: type[BackendError], said: str) -> None:
    async def wait() -> None:
        await opening

    with pytest.raises(kind, match=said):
        run(wait())


def test_two_clients_share_the_arena_s_values(
    master: Master, opened: Callable[..., Opened]
) -> None:
    writer = opened(master.config(prefer_local_alloc=True))
    reader = opened(master.config(global_segment_size=0), in_process=True)
    scheduler = opened(master.config(), lookup_only=True)
    assert scheduler.contains(names(2)) == [False, False]
    assert writer.store(names(3)) == [STORED] * 3
    assert scheduler.contains(names(4)) == [True, True, True, False]
    assert reader.load(names(4)) == [VALUE, VALUE, VALUE, MISS]
    assert reader.store(names(3)) == [STORED] * 3  # a second time: the old values are kept
    assert writer.load(names(3)) == [VALUE] * 3


def test_it_listens_where_the_security_page_says(
    master: Master, opened: Callable[..., Opened]
) -> None:
    before = open_ports(os.getpid())
    opened(master.config())
    found = open_ports(os.getpid()) - before
    assert set(found) == documented("Mooncake client")


def test_no_master_at_the_start(run: Loop, arena: HostRegion) -> None:
    need_libraries()
    absent = Master()
    backend = isolated(absent.config())
    opening = backend.open(BackendContext("test", NAMESPACE, arena))
    refused(run, opening, BackendUnavailable, rf"127.0.0.1:{absent.port}.*master_server_address")


def test_no_metadata_server_at_the_start(run: Loop, arena: HostRegion, master: Master) -> None:
    backend = isolated(master.config(metadata_server="http://127.0.0.1:1/metadata"))
    opening = backend.open(BackendContext("test", NAMESPACE, arena))
    refused(run, opening, BackendUnavailable, r"127.0.0.1:1/metadata \(metadata_server\)")


def test_a_master_that_dies_and_comes_back_empty(
    master: Master, opened: Callable[..., Opened]
) -> None:
    one = opened(master.config())
    assert one.store(names(4)) == [STORED] * 4
    master.kill()
    for call in (one.load, one.store, one.contains, one.load):
        with pytest.raises(BackendError, match=r"master|127.0.0.1"):
            call(names(4))
    master.start()
    eventually(lambda: one.contains(names(4)), [False] * 4)
    assert one.load(names(4)) == [MISS] * 4
    eventually(lambda: one.store(names(4)), [STORED] * 4)  # the segment is there again
    assert one.load(names(4)) == [VALUE] * 4


def test_a_master_that_is_killed_while_chunks_are_loaded(
    master: Master, opened: Callable[..., Opened], run: Loop, arena: HostRegion
) -> None:
    one = opened(master.config())
    assert one.store(names(VALUES)) == [STORED] * VALUES
    into = [arena.view[(VALUES + i) * VALUE : (VALUES + i + 1) * VALUE] for i in range(VALUES)]

    async def load(i: int) -> int:
        (size,) = await one.backend.load([names(VALUES)[i]], [into[i]])
        return int(size)

    async def kill_meanwhile() -> list[int | BaseException]:
        loads = [asyncio.create_task(load(i % VALUES)) for i in range(VALUES)]
        await asyncio.wait(loads, return_when=asyncio.FIRST_COMPLETED)
        master.kill()
        return await asyncio.gather(*loads, return_exceptions=True)

    answers = run(kill_meanwhile())
    assert all(one in (VALUE, MISS) or isinstance(one, BackendError) for one in answers), answers
    assert VALUE in answers
    for answer, target, i in zip(answers, into, range(VALUES), strict=True):
        assert answer != VALUE or target == arena.view[i * VALUE : (i + 1) * VALUE]


def test_a_master_that_hangs(master: Master, opened: Callable[..., Opened]) -> None:
    one = opened(master.config())
    assert one.store(names(1)) == [STORED]
    master.pause()
    try:
        with pytest.raises(BackendError, match="didn't answer within 1 s"):
            one.store(names(2, seed=1))
    finally:
        master.resume()
    eventually(lambda: one.store(names(2, seed=1)), [STORED] * 2)


def test_a_metadata_server_that_is_gone(master: Master, opened: Callable[..., Opened]) -> None:
    server = MetadataServer()
    try:
        holder = Holder(master, 64 * MIB, server.url)
        try:
            options = {"metadata_server": server.url, "global_segment_size": 0}
            before = opened(master.config(**options))
            assert before.store(names(2)) == [STORED] * 2
            server.kill()
            assert before.load(names(2)) == [VALUE] * 2  # who knows the way needs nobody to ask
        finally:
            holder.kill()
    finally:
        server.kill()


def test_whoever_holds_the_chunks_dies(master: Master, opened: Callable[..., Opened]) -> None:
    holder = Holder(master, 64 * MIB)
    try:
        one = opened(master.config(global_segment_size=0))
        assert one.store(names(2)) == [STORED] * 2
    finally:
        holder.kill()
    with pytest.raises(BackendUnavailable, match="the Mooncake client that holds the bytes"):
        one.load(names(2))
    eventually(lambda: one.load(names(2)), [MISS] * 2)
    assert one.store(names(2)) == [FULL] * 2  # nobody gives memory


def test_whoever_holds_the_chunks_hangs(master: Master, opened: Callable[..., Opened]) -> None:
    """The transfer fails after ``transfer_timeout``, and the process with our own segment stays."""
    holder = Holder(master, 64 * MIB)
    try:
        one = opened(master.config(global_segment_size=0))
        assert one.store(names(2)) == [STORED] * 2
        holder.pause()
        with pytest.raises(BackendUnavailable, match="the Mooncake client that holds the bytes"):
            one.load(names(2))
    finally:
        holder.kill()


def test_a_full_segment_evicts(opened: Callable[..., Opened]) -> None:
    flags = ("--default_kv_lease_ttl=200", "--eviction_high_watermark_ratio=0.8")
    with Master(*flags, "--eviction_ratio=0.3") as master:
        one = opened(master.config(global_segment_size=32 * MIB))
        stored = 0
        for seed in range(1, 9):
            outcomes = one.store(names(8, seed))
            assert set(outcomes) <= {STORED, FULL}
            stored += outcomes.count(STORED)
            # The master evicts in the background, and not what was just read.
            eventually(lambda seed=seed: FULL in one.store(names(8, seed)), False)  # type: ignore[misc]
        kept = sum(sum(one.contains(names(8, seed))) for seed in range(1, 9))
        assert 0 < kept < 64
        assert stored > 0


def test_a_value_that_no_segment_can_hold(master: Master, run: Loop) -> None:
    backend = MooncakeBackend(master.config(global_segment_size=32 * MIB))

    async def store_and_load() -> tuple[list[StoreOutcome], list[int]]:
        await backend.open(BackendContext("test", NAMESPACE))
        try:
            large, small = bytearray(48 * MIB), bytearray(MIB)
            views = [memoryview(large), memoryview(small), memoryview(b"").cast("B")]
            outcomes = await backend.store(names(3), views)
            return outcomes, await backend.load(names(3), [memoryview(large)] * 1 + views[1:])
        finally:
            await backend.close()

    outcomes, sizes = run(store_and_load())
    assert outcomes == [FULL, STORED, FULL]
    # A put that finds no room makes the master evict, sometimes the small one at once.
    assert sizes in ([MISS, MIB, MISS], [MISS, MISS, MISS])


def test_more_memory_than_there_is(master: Master, run: Loop) -> None:
    available = machine.available_bytes()
    assert available is not None
    for changed in (
        {"global_segment_size": available + (1 << 40)},
        {"global_segment_size": 0, "local_buffer_size": available + (1 << 40)},
    ):
        backend = isolated(master.config(**changed))
        opening = backend.open(BackendContext("test", NAMESPACE))
        refused(run, opening, BackendRejected, r"this machine has \d+\.\d GiB of memory available")


def test_who_only_looks_things_up_gives_no_memory(master: Master, opened: Any) -> None:
    """A scheduler process has the workers' configuration, and not their memory as well."""
    opened(master.config(global_segment_size="1024TB"), lookup_only=True)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"local_hostname": "no-such-host.invalid"}, "local_hostname: no-such-host.invalid"),
        ({"protocol": "rdma"}, "no RDMA device"),
        ({"storage_root_dir": "/proc/nowhere"}, "storage_root_dir: /proc/nowhere"),
    ],
)
def test_options_that_do_not_fit_this_machine(
    master: Master, run: Loop, changed: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "rdma_devices", list)
    backend = MooncakeBackend(master.config(**changed))
    opening = backend.open(BackendContext("test", NAMESPACE))
    refused(run, opening, BackendRejected, said)


def test_calls_after_close_are_errors(master: Master, run: Loop) -> None:
    backend = MooncakeBackend(master.config(global_segment_size=0))

    async def use_after_close() -> list[BaseException | Any]:
        await backend.open(BackendContext("test", NAMESPACE))
        under_way = [asyncio.create_task(backend.contains(names(4))) for _ in range(8)]
        await backend.close()
        late = [backend.contains(names(1)), backend.delete(names(1)), backend.clear()]
        return await asyncio.gather(*under_way, *late, return_exceptions=True)

    answers = run(use_after_close())
    assert all(a == [False] * 4 or isinstance(a, BackendUnavailable) for a in answers[:8]), answers
    assert all(isinstance(a, BackendUnavailable) for a in answers[8:])


def test_variables_that_are_set_are_left_alone(
    master: Master, opened: Callable[..., Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MC_RPC_TIMEOUT_MS", "1500")
    before = dict(os.environ)
    opened(master.config(global_segment_size=0), in_process=True)
    assert {name: os.environ.get(name) for name in before} == before
    assert all(name.startswith("MC_") for name in os.environ.keys() - before.keys())


def test_a_second_master_in_the_address_is_told(
    master: Master, opened: Callable[..., Opened], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        opened(
            master.config(url="mooncakestore://other:1/", global_segment_size=0), in_process=True
        )
    assert "not other:1 (url)" in caplog.text


def test_chunks_that_leave_memory_go_to_a_folder(
    opened: Callable[..., Opened], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOONCAKE_OFFLOAD_BUCKET_KEYS_LIMIT", "4")
    with Master("--enable_offload=true") as master:
        folder = tmp_path / "chunks"
        one = opened(master.config(storage_root_dir=str(folder)))
        assert one.store(names(VALUES)) == [STORED] * VALUES

        def offloaded() -> bool:
            files = [path for path in folder.rglob("*") if path.is_file()]
            return sum(path.stat().st_size for path in files) >= VALUES * VALUE

        eventually(offloaded, True)
