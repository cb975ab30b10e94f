"""What goes wrong with InfiniStore costs misses, whatever its client does about it.

Over TCP and over an emulated NIC; the backend lives in a process of its own, as it does by default.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from infini_server import DEVICE, Server, emulated_nic
from open_ports import documented, open_ports

from lmcache_backend_infinistore.backend import InfinistoreBackend
from lmcache_backend_infinistore.layout import MAX_VALUE_BYTES, Head
from lmcache_backend_infinistore.links import TcpLink
from lmcache_core.chunks.keys import CacheNamespace
from lmcache_core.contracts.storage import MISS, BackendContext, HostRegion, StoreOutcome
from lmcache_core.errors import BackendRejected, BackendUnavailable
from lmcache_core.isolation.backend import IsolatedBackend
from lmcache_core.memory.host_memory import allocate_region
from lmcache_core.metrics import Counters
from lmcache_core.testing.loop import Loop
from lmcache_core.testing.storage import LAYOUT, buffers, keys, value, views

MIB = 1 << 20
NAMESPACE = CacheNamespace(model="faults", layout=LAYOUT)
DEADLINE_S = 1.0
NO_HANG_S = 30.0
SIZE = 5 * MIB + 7
"""Several pieces, and a length that they don't divide."""
OVER = {
    "TCP": {"connection_type": "TCP"},
    "emulated NIC": {"connection_type": "RDMA", "device": DEVICE},
}


@pytest.fixture(scope="module")
def nic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulated_nic(tmp_path_factory.mktemp("nic"))


@pytest.fixture(scope="module")
def running(nic: Path) -> Iterator[Server]:
    with Server(nic) as one:
        yield one


@pytest.fixture
def server(running: Server, nic: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("LD_PRELOAD", str(nic))  # for backends, which are processes of their own
    running.kill()
    running.start()
    return running


@pytest.fixture(params=list(OVER))
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return OVER[request.param]


@pytest.fixture
def run() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


class Opened:
    """An open backend, and what is counted about it."""

    def __init__(
        self,
        run: Loop,
        server: Server,
        region: HostRegion | None,
        options: Any,
        kind: str = "infinistore",
    ) -> None:
        self._run = run
        self._counters = Counters()
        self.backend = IsolatedBackend(
            kind,
            server.config(**options),
            where="backends.far",
            deadline_s=DEADLINE_S,
            counters=self._counters,
        )
        run(self.backend.open(BackendContext("far", NAMESPACE, region, 64 * MIB)))

    def store(self, *values: bytearray | memoryview) -> list[StoreOutcome]:
        sources = [memoryview(one) for one in values]
        return self._run(self.backend.store(keys(len(values)), sources))

    def load(self, count: int = 1) -> list[bytes | None]:
        """Each value; ``None`` for a miss."""
        room = buffers(count, SIZE)
        sizes = self._run(self.backend.load(keys(count), views(room)))
        return [
            None if size == MISS else bytes(one[:size])
            for size, one in zip(sizes, room, strict=True)
        ]

    def contains(self, count: int = 1) -> list[bool]:
        return self._run(self.backend.contains(keys(count)))

    def restarts(self) -> float:
        found = self._counters.snapshot()
        return sum(n for (name, _), n in found.items() if name == "isolated_restarts")

    def fails(self, call: Callable[[], Any]) -> None:
        """``call`` raises what core makes a miss of, and soon."""
        began = time.monotonic()
        with pytest.raises(BackendUnavailable):
            call()
        assert time.monotonic() - began < NO_HANG_S

    async def answers(self) -> bool:
        try:
            await self.backend.contains(keys(1))
        except BackendUnavailable:
            return False
        return True

    def works(self) -> None:
        """After some time, it stores and loads again."""

        async def awaited() -> None:
            until = time.monotonic() + NO_HANG_S
            while not await self.answers():
                assert time.monotonic() < until
                await asyncio.sleep(0.1)

        self._run(awaited())
        assert self.store(value(3, SIZE)) != [StoreOutcome.NOT_ADMITTED]
        assert self.load() == [bytes(value(3, SIZE))]


@pytest.fixture
def opened(run: Loop, server: Server, options: dict[str, Any]) -> Iterator[Callable[..., Opened]]:
    made: list[Opened] = []

    def one(region: HostRegion | None = None, **more: Any) -> Opened:
        made.append(Opened(run, server, region, {**options, **more}))
        return made[-1]

    yield one
    for each in made:
        run(each.backend.close())


def test_it_listens_nowhere(opened: Callable[..., Opened]) -> None:
    before = open_ports(os.getpid())
    opened()
    found = {one for one in open_ports(os.getpid()) - before if one[0] == "TCP"}  # not the NIC's
    assert found == documented("engine with `infinistore://`")


def forget(server: Server, *names: str) -> int:
    """Take keys away, as an eviction does; from another connection."""
    client = connected(server.port)
    count: int = client.delete_keys(list(names))
    client.close()
    return count


def test_values_in_host_memory_are_moved_in_place(run: Loop, opened: Callable[..., Opened]) -> None:
    region = allocate_region(32 * MIB, shared=True).region
    one = opened(region)
    source, target = region.view[4096 : 4096 + SIZE], region.view[16 * MIB : 16 * MIB + SIZE + 9]
    source[:] = value(5, SIZE)
    target[:] = b"\xee" * target.nbytes
    assert one.store(source) == [StoreOutcome.STORED]
    assert run(one.backend.load(keys(1), [target])) == [SIZE]
    assert target[:SIZE] == source
    assert target[SIZE:] == b"\xee" * 9
    region.view[: 16 * MIB] = bytes(16 * MIB)


def test_a_server_that_dies_costs_misses(server: Server, opened: Callable[..., Opened]) -> None:
    one = opened()
    one.store(value(3, SIZE))
    server.kill()
    one.fails(one.load)
    one.fails(one.contains)
    one.fails(lambda: one.store(value(3, SIZE)))
    server.start()
    one.works()
    assert one.restarts() == 0  # noticed before the client was asked


def test_a_server_killed_in_the_middle(
    run: Loop, server: Server, opened: Callable[..., Opened]
) -> None:
    one = opened()
    one.store(*[value(i, SIZE) for i in range(4)])

    async def loads_while_it_dies() -> None:
        room = buffers(4, SIZE)

        async def load_on() -> None:
            while True:
                await one.backend.load(keys(4), views(room))

        loading = asyncio.ensure_future(load_on())
        await asyncio.sleep(0.2)
        server.kill()
        with pytest.raises(BackendUnavailable):
            await asyncio.wait_for(loading, NO_HANG_S)

    run(loads_while_it_dies())
    server.start()
    one.works()


def test_a_server_that_hangs(server: Server, opened: Callable[..., Opened]) -> None:
    one = opened()
    one.store(value(3, SIZE))
    server.stop()
    one.fails(one.load)
    assert one.restarts() == 1
    server.go_on()
    one.works()


def test_a_server_that_restarts_empty(
    run: Loop, server: Server, opened: Callable[..., Opened]
) -> None:
    one = opened()
    one.store(value(3, SIZE))
    server.kill()
    server.start()
    run(one.answers())  # the old connection may fail; then there is a new one
    assert one.contains() == [False]
    with contextlib.suppress(BackendUnavailable):
        assert one.load() == [None]
    one.works()
    assert one.restarts() == 0


def test_nobody_answers_at_the_start(server: Server, opened: Callable[..., Opened]) -> None:
    server.kill()
    with pytest.raises(BackendUnavailable, match=r"can't be reached: .*refused"):
        opened()


def test_a_piece_that_was_evicted_makes_a_miss(
    server: Server, opened: Callable[..., Opened], options: dict[str, Any]
) -> None:
    one = opened()
    one.store(value(3, SIZE), value(4, SIZE))
    name = key_of(0, options)
    head = head_of(server, name)
    assert head.nbytes == SIZE
    assert forget(server, head.names(name)[1]) == 1
    before = server.chunks()
    assert one.load(2) == [None, bytes(value(4, SIZE))]
    # The rest of it is gone, so that the next store doesn't take it for present.
    assert server.chunks() == before - len(parts_of(name, head, options)) + 1
    assert one.contains() == [False]
    assert one.store(value(5, SIZE)) == [StoreOutcome.STORED]
    assert one.load() == [bytes(value(5, SIZE))]
    assert one.restarts() == 0


def test_what_is_deleted_leaves_nothing(
    run: Loop, server: Server, opened: Callable[..., Opened]
) -> None:
    one = opened()
    one.store(value(3, SIZE), value(4, 100))
    assert run(one.backend.delete(keys(3))) == 2  # type: ignore[attr-defined]
    assert server.chunks() == 0


def key_of(i: int, options: dict[str, Any]) -> str:
    means = options["connection_type"].lower()
    return f"lmcache:1:{means}:{NAMESPACE.fingerprint}:{keys(i + 1)[i].hex()}"


def parts_of(name: str, head: Head, options: dict[str, Any]) -> list[str]:
    """What a value has in the server."""
    mark = [f"{name}:complete"] if options["connection_type"] == "TCP" else []
    return [name, *head.names(name), *mark]


def head_of(server: Server, name: str) -> Head:
    client = connected(server.port)
    head = Head.unpack(memoryview(client.tcp_read_cache(name)), MAX_VALUE_BYTES)
    client.close()
    assert head is not None
    return head


def connected(port: int) -> Any:
    import infinistore

    config = infinistore.ClientConfig(
        host_addr="127.0.0.1", service_port=port, connection_type=infinistore.TYPE_TCP
    )
    client = infinistore.InfinityConnection(config)
    client.connect()
    return client


EVICTING = """
from dataclasses import replace
from lmcache_backend_infinistore import links, plugin
from lmcache_core.contracts.hookspecs import hookimpl

class Evicting(links.TcpLink):
    def exist(self, names):
        there = super().exist(names)
        self._wire.delete([name for name, one in zip(names, there) if one])
        return there

def create(config):
    from lmcache_backend_infinistore import backend
    backend.TcpLink = Evicting
    return backend.InfinistoreBackend(config)

@hookimpl
def lmcache_storage_backends():
    (one,) = plugin.lmcache_storage_backends()
    return [replace(one, name="evicting", create=create, url_schemes=(), extra_config_keys={})]
"""


def test_a_key_evicted_between_check_and_read(
    server: Server, run: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mark was there; the head isn't any more."""
    facts = tmp_path / "evicting-1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: evicting\nVersion: 1\n")
    (facts / "entry_points.txt").write_text("[lmcache.plugins]\nevicting = evicting\n")
    (tmp_path / "evicting.py").write_text(EVICTING)
    monkeypatch.syspath_prepend(str(tmp_path))
    one = Opened(run, server, None, OVER["TCP"], kind="evicting")
    one.store(value(3, SIZE))
    assert one.load() == [None]
    assert one.contains() == [False]  # the mark is gone, too
    run(one.backend.close())
    assert one.restarts() == 0


def test_a_full_pool(server: Server, opened: Callable[..., Opened]) -> None:
    """It evicts; and what is larger than the whole pool isn't admitted."""
    one = opened()
    large = allocate_region(64 * MIB, shared=True).region.view
    outcomes = []
    for round_ in range(24):
        ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(large)), round_, large.nbytes)
        names = keys(1, seed=100 + round_)
        outcomes += one._run(one.backend.store(names, [large]))
    assert StoreOutcome.STORED in outcomes[16:]
    assert one.contains() == [False]
    one.works()
    assert one.restarts() == 0


def test_a_device_that_isnt_there(server: Server, run: Loop) -> None:
    with pytest.raises(BackendRejected, match=r"no RDMA device 'mlx5_7'; it has mlx5_1"):
        Opened(run, server, None, {"device": "mlx5_7"})


def test_a_machine_without_rdma(server: Server, run: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_PRELOAD")
    with pytest.raises(BackendRejected, match=r"no RDMA device .*connection_type: TCP"):
        Opened(run, server, None, {})


def test_a_value_over_tcp_without_its_mark(server: Server, run: Loop) -> None:
    """It isn't there and isn't touched, as while another one writes it; it can be stored anew."""
    over = OVER["TCP"]
    one = Opened(run, server, None, over)
    one.store(value(3, SIZE), value(4, SIZE))
    name = key_of(0, over)
    parts = parts_of(name, head_of(server, name), over)
    assert forget(server, f"{name}:complete") == 1
    before = server.chunks()
    assert one.contains(2) == [False, True]
    assert one.load(2) == [None, bytes(value(4, SIZE))]
    assert run(one.backend.delete(keys(1))) == 0  # type: ignore[attr-defined]
    assert server.chunks() == before
    assert forget(server, *parts) == len(parts) - 1  # the head and every piece: none was touched
    assert one.store(value(5, SIZE)) == [StoreOutcome.STORED]
    assert one.load() == [bytes(value(5, SIZE))]
    run(one.backend.close())
    assert one.restarts() == 0


@pytest.fixture
def here(server: Server) -> Iterator[Callable[..., InfinistoreBackend]]:
    """Backends over TCP in this process, which that doesn't endanger."""
    made: list[InfinistoreBackend] = []

    def one(**more: Any) -> InfinistoreBackend:
        made.append(InfinistoreBackend(server.config(**OVER["TCP"], **more)))
        made[-1].open_blocking(BackendContext("far", NAMESPACE, None, 256 * MIB))
        return made[-1]

    yield one
    for each in made:
        each.close_blocking()


def test_another_writer_over_tcp_was_faster(
    server: Server,
    here: Callable[..., InfinistoreBackend],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is complete isn't written again, and the slower one leaves nothing."""
    slow, fast = here(), here()
    values = [memoryview(value(i, SIZE)) for i in range(3)]
    exist = TcpLink.exist
    asked = 0

    def overtaken(link: TcpLink, names: Sequence[str]) -> list[bool]:
        nonlocal asked
        asked += 1
        found = exist(link, names)
        if asked == 1:
            stored = fast.store_blocking(keys(3)[1:], values[1:])
            assert stored == [StoreOutcome.STORED] * 2
        return found

    monkeypatch.setattr(TcpLink, "exist", overtaken)
    assert slow.store_blocking(keys(3), values) == [
        StoreOutcome.STORED,
        StoreOutcome.ALREADY_PRESENT,
        StoreOutcome.ALREADY_PRESENT,
    ]
    name = key_of(0, OVER["TCP"])
    assert server.chunks() == 3 * len(parts_of(name, head_of(server, name), OVER["TCP"]))
    room = [memoryview(one) for one in buffers(3, SIZE)]
    assert slow.load_blocking(keys(3), room) == [SIZE] * 3
    assert room == values


def test_no_room_over_tcp(server: Server, here: Callable[..., InfinistoreBackend]) -> None:
    """What has all its pieces there is stored; of the rest, nothing stays.

    A quarter of the pool each: the server evicts at 95 % only, and refuses the fourth before that.
    """
    one = here(piece_bytes=256 * MIB, staging_bytes=256 * MIB)
    large = memoryview(bytes(256 * MIB))
    sources = [memoryview(value(1, SIZE)), *[large] * 5]
    outcomes = one.store_blocking(keys(6), sources)
    stored = [outcome == StoreOutcome.STORED for outcome in outcomes]
    assert stored == [True] * 4 + [False] * 2
    assert outcomes[-1] == StoreOutcome.NOT_ADMITTED
    assert one.contains_blocking(keys(6)) == stored
    assert one._delete(keys(6)) == 4
    assert server.chunks() == 0
    assert one.store_blocking(keys(1), sources[:1]) == [StoreOutcome.STORED]
