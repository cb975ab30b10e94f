"""What a server, a network or a neighbour does wrong costs misses, and nothing else.

``REDIS_FAULTS=10000 pytest test_redis_faults.py -k random`` runs the random faults for long.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from faulty_link import FaultyLink, Traffic
from open_ports import documented, open_ports
from redis_servers import Server, cluster, replicated, running, until

from lmcache_backend_redis.backend import RedisBackend
from lmcache_backend_redis.config import RedisConfig
from lmcache_backend_redis.layout import HEAD, Names
from lmcache_backend_redis.storing import Store
from lmcache_core.aio.guard import Guard
from lmcache_core.builtin.raw import RawSerde
from lmcache_core.chunks.keys import CacheNamespace, ChunkKey
from lmcache_core.contracts.storage import MISS, BackendContext, StoreOutcome
from lmcache_core.errors import BackendError, BackendRejected, BackendUnavailable
from lmcache_core.metrics import Counters
from lmcache_core.testing.loop import Loop
from lmcache_core.testing.ports import free_port
from lmcache_core.testing.storage import LAYOUT, buffers, keys, value, views
from lmcache_core.tiers.tier import Tier

NAMESPACE = CacheNamespace("faults", LAYOUT)
PIECE = 64 << 10
LONG = 5 * PIECE + 77
FAULTS = int(os.environ.get("REDIS_FAULTS", "200"))
QUICK: dict[str, Any] = {
    "piece_bytes": PIECE,
    "timeout_s": 0.3,
    "connect_timeout_s": 0.3,
    "call_timeout_s": 2.0,
}


@pytest.fixture
def run() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "redis")
    with running(server):
        yield server


@pytest.fixture(params=["on the loop", "on threads"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes all calls, however long, in one of the two places."""
    where = str(request.param)
    most = 1 << 30 if where == "on the loop" else -1
    monkeypatch.setattr("lmcache_backend_redis.backend.ON_LOOP_BYTES", most)
    return where


def test_it_listens_nowhere(server: Server, run: Loop) -> None:
    before = open_ports(os.getpid())
    backend = RedisBackend(RedisConfig(url=server.url))
    run(backend.open(BackendContext("far", NAMESPACE)))
    found = open_ports(os.getpid()) - before
    run(backend.close())
    assert set(found) == documented("engine with `redis://`")


everywhere = pytest.mark.usefixtures("where")


@contextmanager
def opened(run: Loop, url: str, **options: Any) -> Iterator[RedisBackend]:
    backend = RedisBackend(RedisConfig.model_validate({"url": url, **QUICK, **options}))
    run(backend.open(BackendContext("faults", NAMESPACE)))
    try:
        yield backend
    finally:
        run(backend.close())


def put(run: Loop, backend: RedisBackend, key: ChunkKey, source: bytearray) -> StoreOutcome:
    (outcome,) = run(backend.store([key], views([source])))
    return outcome


def get(run: Loop, backend: RedisBackend, key: ChunkKey, size: int = LONG) -> bytearray | None:
    (target,) = buffers(1, size)
    (got,) = run(backend.load([key], [memoryview(target)]))
    return None if got == MISS else target[:got]


def names_in(server: Server) -> list[bytes]:
    with server.client() as client:
        return sorted(client.keys("*"))


HEAD_NAME = Names("lmcache", NAMESPACE.fingerprint).head
(KEY,) = keys(1)


# -- opening -------------------------------------------------------------------------------


def refusal(run: Loop, url: str, **options: Any) -> BackendError:
    with pytest.raises(BackendError) as caught, opened(run, url, **options):
        pass
    return caught.value


def test_nobody_is_there(run: Loop) -> None:
    error = refusal(run, f"redis://127.0.0.1:{free_port()}")
    assert isinstance(error, BackendUnavailable)
    assert "refused" in str(error)


@pytest.mark.parametrize("scheme", ["redis-sentinel", "redis-cluster"])
def test_nobody_of_several_is_there(run: Loop, scheme: str) -> None:
    error = refusal(run, f"{scheme}://127.0.0.1:{free_port()},127.0.0.1:{free_port()}")
    assert isinstance(error, BackendUnavailable)


def test_no_socket(run: Loop, tmp_path: Path) -> None:
    assert isinstance(refusal(run, f"unix://{tmp_path}/none.sock"), BackendUnavailable)


def test_credentials(run: Loop, tmp_path: Path) -> None:
    locked = Server(tmp_path, arguments=["--requirepass", "right"])
    locked.client_options = {"password": "right"}
    with running(locked):
        for login in ("", ":wrong@", "nobody:right@"):
            error = refusal(run, f"redis://{login}127.0.0.1:{locked.port}")
            assert isinstance(error, BackendRejected), error
            assert "wrong" not in str(error)
        with opened(run, f"redis://:right@127.0.0.1:{locked.port}") as backend:
            assert put(run, backend, KEY, value(1)) is StoreOutcome.STORED


def test_a_database_that_is_not_there(run: Loop, server: Server) -> None:
    assert isinstance(refusal(run, f"{server.url}/99"), BackendRejected)


def test_a_server_that_is_no_cluster(run: Loop, server: Server) -> None:
    error = refusal(run, f"redis-cluster://127.0.0.1:{server.port}")
    assert isinstance(error, BackendRejected)
    assert "luster" in str(error)


def test_a_service_that_sentinels_do_not_know(run: Loop, tmp_path: Path) -> None:
    primary = Server(tmp_path / "primary")
    text = f"sentinel monitor other 127.0.0.1 {primary.port} 1\n"
    sentinel = Server(tmp_path / "sentinel", sentinel=text)
    with running(primary, sentinel):
        error = refusal(run, f"redis-sentinel://127.0.0.1:{sentinel.port}")
        assert isinstance(error, BackendUnavailable)
        assert "mymaster" in str(error)
        with opened(run, f"redis-sentinel://127.0.0.1:{sentinel.port}?service=other") as backend:
            assert put(run, backend, KEY, value(1)) is StoreOutcome.STORED


@contextmanager
def talking(answer: bytes) -> Iterator[int]:
    """A server of something else, which says ``answer`` to whatever comes."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.05)
    stop = threading.Event()
    held: list[socket.socket] = []

    def serve() -> None:
        while not stop.is_set():
            try:
                one, _ = listener.accept()
            except TimeoutError:
                continue
            held.append(one)
            one.settimeout(5)
            one.recv(1 << 16)
            if answer:
                one.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        stop.set()
        thread.join()
        for one in (*held, listener):
            one.close()


def test_another_protocol(run: Loop) -> None:
    with talking(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n") as port:
        error = refusal(run, f"redis://127.0.0.1:{port}")
    assert not isinstance(error, BackendUnavailable)


def test_a_server_that_accepts_and_says_nothing(run: Loop) -> None:
    with talking(b"") as port:
        refusal(run, f"redis://127.0.0.1:{port}")


def test_tls_where_there_is_none_and_the_other_way_round(run: Loop, server: Server) -> None:
    refusal(run, f"rediss://127.0.0.1:{server.port}")


# -- what stands in the server -------------------------------------------------------------


def test_the_key_scheme(run: Loop, server: Server) -> None:
    """As README.md has it."""
    with opened(run, server.url) as backend:
        put(run, backend, KEY, value(1, LONG))
    head, *pieces = sorted(names_in(server), key=len)
    assert head == b"lmcache:1:%b:{%b}" % (NAMESPACE.fingerprint.encode(), KEY.hex().encode())
    assert len(pieces) == 6
    assert all(name.startswith(head + b":") for name in pieces)
    with server.client() as client:
        assert client.strlen(head) == HEAD.size
        assert {client.ttl(name) for name in (head, *pieces)} == {-1}


def test_ttl_covers_all_pieces(run: Loop, server: Server) -> None:
    with opened(run, server.url, ttl_s=100) as backend:
        put(run, backend, KEY, value(1, LONG))
        put(run, backend, keys(1, 2)[0], value(1))
    with server.client() as client:
        for name in names_in(server):
            lasting = client.ttl(name)
            assert 90 < lasting <= 100 if Names.is_head(name) else 150 < lasting <= 160


def test_what_is_not_committed_expires(
    run: Loop, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the process had died after the pieces were written."""

    def died(self: object, puts: object, outcomes: object) -> None:
        raise BackendUnavailable("killed")

    with opened(run, server.url) as backend:
        monkeypatch.setattr(Store, "_commit", died)
        with pytest.raises(BackendUnavailable):
            put(run, backend, KEY, value(1, LONG))
        assert run(backend.contains([KEY])) == [False]
        assert get(run, backend, KEY) is None
        with server.client() as client:
            left = names_in(server)
            assert len(left) == 6
            assert all(0 < client.ttl(name) <= 100 for name in left)
        monkeypatch.undo()
        assert put(run, backend, KEY, value(1, LONG)) is StoreOutcome.STORED
        assert get(run, backend, KEY) == value(1, LONG)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda client, head, piece: client.delete(piece), id="evicted piece"),
        pytest.param(lambda client, head, piece: client.set(piece, b"short"), id="short piece"),
        pytest.param(lambda client, head, piece: client.append(piece, b"x"), id="long piece"),
        pytest.param(lambda client, head, piece: client.set(head, b"x" * 24), id="other version"),
        pytest.param(lambda client, head, piece: client.set(head, b"x"), id="tiny head"),
        pytest.param(lambda client, head, piece: client.set(head, bytes(9 << 20)), id="huge head"),
        pytest.param(lambda client, head, piece: client.append(head, b"x"), id="long head"),
        pytest.param(
            lambda client, head, piece: client.setrange(head, 8, b"\xff" * 8), id="absurd length"
        ),
        pytest.param(
            lambda client, head, piece: client.setrange(head, 4, b"\1\0\0\0"), id="absurd pieces"
        ),
    ],
)
def test_a_damaged_value_is_a_miss_and_is_replaced(
    run: Loop, server: Server, damage: Callable[[Any, bytes, bytes], object]
) -> None:
    other = keys(1, 5)[0]
    with opened(run, server.url) as backend, server.client() as client:
        put(run, backend, KEY, value(1, LONG))
        put(run, backend, other, value(2, LONG))
        head = HEAD_NAME(KEY)
        piece = next(name for name in names_in(server) if name.startswith(head + b":"))
        damage(client, head, piece)
        targets = buffers(2, LONG)
        assert run(backend.load([KEY, other], views(targets))) == [MISS, LONG]
        assert targets[1] == value(2, LONG)
        assert put(run, backend, KEY, value(3, LONG)) is StoreOutcome.STORED
        assert get(run, backend, KEY) == value(3, LONG)


def test_replacing_a_damaged_value_leaves_nothing_of_it(run: Loop, server: Server) -> None:
    with opened(run, server.url) as backend, server.client() as client:
        put(run, backend, KEY, value(1, LONG))
        client.delete(next(n for n in names_in(server) if n.endswith(b":3")))
        put(run, backend, KEY, value(1, LONG))
        assert len(names_in(server)) == 7
        assert run(backend.delete([KEY])) == 1
        assert names_in(server) == []


@everywhere
def test_two_writers_leave_one_value(run: Loop, server: Server) -> None:
    with opened(run, server.url) as one, opened(run, server.url) as two:

        async def both() -> list[list[StoreOutcome]]:
            calls = [
                backend.store([KEY], views([value(fill, LONG)]))
                for fill, backend in ((1, one), (2, two))
            ]
            return await asyncio.gather(*calls)

        for _ in range(20):
            outcomes = {outcome for (outcome,) in run(both())}
            assert StoreOutcome.STORED in outcomes
            assert get(run, one, KEY) in (value(1, LONG), value(2, LONG))
            assert len(names_in(server)) == 7, "the slower one's pieces are left"
            run(one.delete([KEY]))


def test_clear_takes_what_was_never_finished_too(run: Loop, server: Server) -> None:
    with opened(run, server.url) as backend, server.client() as client:
        put(run, backend, KEY, value(1, LONG))
        client.set(HEAD_NAME(keys(1, 3)[0]) + b":0011223344556677:0", b"left over")
        client.set("somebody's", b"else")
        assert run(backend.clear()) == 1
        assert names_in(server) == [b"somebody's"]


@everywhere
def test_a_full_server_admits_nothing(run: Loop, tmp_path: Path) -> None:
    full = ["--maxmemory", "3mb", "--maxmemory-policy", "noeviction"]
    server = Server(tmp_path, arguments=full)
    with running(server), opened(run, server.url) as backend:
        outcomes = [put(run, backend, key, value(1, 1 << 20)) for key in keys(6)]
        assert StoreOutcome.NOT_ADMITTED in outcomes
        for key, outcome in zip(keys(6), outcomes, strict=True):
            loaded = get(run, backend, key, 1 << 20)
            assert loaded == (value(1, 1 << 20) if outcome is StoreOutcome.STORED else None)


def test_a_server_that_evicts(run: Loop, tmp_path: Path) -> None:
    evicting = ["--maxmemory", "6mb", "--maxmemory-policy", "allkeys-random"]
    server = Server(tmp_path, arguments=evicting)
    with running(server), opened(run, server.url) as backend:
        hits = 0
        for i in range(60):
            (key,) = keys(1, i)
            put(run, backend, key, value(i % 250, 1 << 20))
            loaded = get(run, backend, keys(1, i // 2)[0], 1 << 20)
            hits += loaded is not None
            assert loaded in (None, value(i // 2 % 250, 1 << 20))
        assert hits


def test_a_read_only_server(run: Loop, server: Server, tmp_path: Path) -> None:
    replica = Server(tmp_path / "r", arguments=["--replicaof", f"127.0.0.1 {server.port}"])
    with running(replica), opened(run, replica.url) as backend:
        with pytest.raises(BackendUnavailable, match="READONLY"):
            put(run, backend, KEY, value(1, LONG))
        assert run(backend.contains([KEY])) == [False]


def test_values_that_are_too_large_are_refused_at_the_start(run: Loop, server: Server) -> None:
    backend = RedisBackend(RedisConfig(url=server.url))
    context = BackendContext("faults", NAMESPACE, max_value_bytes=(512 << 20) + 1)
    with pytest.raises(BackendRejected, match="chunk_size"):
        run(backend.open(context))


# -- servers that go away ------------------------------------------------------------------


@everywhere
def test_a_hung_server_costs_its_time_limit(run: Loop, server: Server) -> None:
    with opened(run, server.url) as backend:
        put(run, backend, KEY, value(1, LONG))
        server.pause()
        try:
            for call in (
                lambda: backend.contains([KEY]),
                lambda: backend.load([KEY], views(buffers(1, LONG))),
                lambda: backend.store(keys(1, 7), views([value(2, LONG)])),
            ):
                with pytest.raises(BackendError):
                    run(call())
        finally:
            server.resume()
        assert get(run, backend, KEY) == value(1, LONG)


@everywhere
def test_a_server_that_restarts_empty(run: Loop, server: Server) -> None:
    with opened(run, server.url) as backend:
        put(run, backend, KEY, value(1, LONG))
        server.kill()
        with pytest.raises(BackendUnavailable):
            run(backend.contains([KEY]))
        server.start()
        assert run(backend.contains([KEY])) == [False]
        assert put(run, backend, KEY, value(1, LONG)) is StoreOutcome.STORED
        assert get(run, backend, KEY) == value(1, LONG)


@everywhere
@pytest.mark.parametrize("what", ["load", "store"])
def test_a_server_killed_in_the_middle(run: Loop, server: Server, what: str) -> None:
    size = 64 << 20
    source, target = bytearray(size), bytearray(size)
    with opened(run, server.url, timeout_s=2.0, call_timeout_s=20.0) as backend:
        if what == "load":
            put(run, backend, KEY, source)

        async def killed() -> Any:
            if what == "load":
                call = asyncio.ensure_future(backend.load([KEY], [memoryview(target)]))
            else:
                call = asyncio.ensure_future(backend.store([KEY], [memoryview(source)]))
            await asyncio.sleep(0.005)
            server.kill()
            return await call

        with pytest.raises(BackendError):
            run(killed())
        server.start()
        assert run(backend.contains([KEY])) == [False]


def test_a_close_that_is_cancelled_ends_its_threads(run: Loop, server: Server) -> None:
    """At its deadline, while a call doesn't end."""
    backend = RedisBackend(RedisConfig(url=server.url, **QUICK))

    async def cut_short() -> None:
        await backend._turns.acquire()  # as a call does
        closing = asyncio.ensure_future(backend.close())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing

    run(backend.open(BackendContext("redis", NAMESPACE, None)))
    pool = backend._pool
    run(cut_short())
    assert pool is not None
    with pytest.raises(RuntimeError, match="shut down"):
        pool.submit(print)
    backend._turns.release()


def test_a_cancelled_load_leaves_its_buffer_alone(run: Loop, server: Server) -> None:
    (target,) = buffers(1, LONG)
    before = bytes(target)
    with opened(run, server.url, timeout_s=60.0) as backend:
        put(run, backend, KEY, value(1, LONG))

        async def cancelled() -> None:
            server.pause()
            call = asyncio.ensure_future(backend.load([KEY], [memoryview(target)]))
            await asyncio.sleep(0.1)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            server.resume()
            await asyncio.sleep(0.1)

        run(cancelled())
        assert target == before
        assert get(run, backend, KEY) == value(1, LONG), "on another connection"


@everywhere
def test_closing_does_not_wait_for_a_hung_server(run: Loop, server: Server) -> None:
    patient = {"timeout_s": 3600.0, "call_timeout_s": 3600.0}
    with opened(run, server.url, **patient) as backend:
        server.pause()
        try:

            async def abandoned() -> None:
                call = asyncio.ensure_future(backend.contains([KEY]))
                await asyncio.sleep(0.1)
                await backend.close()
                with pytest.raises(BackendError):
                    await call

            run(abandoned())
        finally:
            server.resume()


# -- several servers -----------------------------------------------------------------------


@everywhere
def test_the_primary_is_killed_during_requests(run: Loop, tmp_path: Path) -> None:
    """Sentinel makes the replica the primary; until then there are misses, and no wrong bytes."""
    with replicated(tmp_path) as servers, opened(run, servers.url) as backend:
        put(run, backend, KEY, value(1, LONG))
        with servers.primary.client() as client:
            client.execute_command("WAIT", 1, 5000)
        servers.primary.kill()
        deadline, failed = time.monotonic() + 30, 0
        while True:
            assert time.monotonic() < deadline
            try:
                loaded = get(run, backend, KEY)
                stored = put(run, backend, keys(1, 9)[0], value(2, LONG))
                break
            except BackendError:
                failed += 1
        assert failed
        assert loaded == value(1, LONG)
        assert stored is StoreOutcome.STORED
        assert servers.primary_port() == servers.replica.port


def test_replicas_answer_reads(run: Loop, tmp_path: Path) -> None:
    with (
        replicated(tmp_path) as servers,
        opened(run, servers.url, replica_reads=True) as backend,
    ):
        put(run, backend, KEY, value(1, LONG))
        with servers.primary.client() as client:
            client.execute_command("WAIT", 1, 5000)
        assert get(run, backend, KEY) == value(1, LONG)
        with servers.replica.client() as client:
            served = client.info("commandstats")
        assert served["cmdstat_get"]["calls"] == 7
        servers.replica.kill()
        until(lambda: _loads(run, backend), "the primary to answer instead", 30)


def _loads(run: Loop, backend: RedisBackend) -> bool:
    try:
        return get(run, backend, KEY) == value(1, LONG)
    except BackendError:
        return False


def test_one_hung_node_of_a_cluster_costs_its_own_keys(run: Loop, tmp_path: Path) -> None:
    with cluster(tmp_path) as nodes:
        url = f"redis-cluster://127.0.0.1:{nodes[0].port}"
        with opened(run, url) as backend:
            many = keys(40)
            for key in many:
                assert put(run, backend, key, value(1)) is StoreOutcome.STORED
            assert run(backend.contains(many)) == [True] * 40
            nodes[1].pause()
            try:
                found = run(backend.contains(many))
                assert 0 < sum(found) < 40
                again = run(backend.contains(many))
                assert again == found
                sizes = run(backend.load(many, views(buffers(40))))
                assert [size != MISS for size in sizes] == found
            finally:
                nodes[1].resume()
            until(lambda: run(backend.contains(many)) == [True] * 40, "the node to be used again")


def test_a_slot_that_moves_costs_a_miss(run: Loop, tmp_path: Path) -> None:
    with (
        cluster(tmp_path) as nodes,
        opened(run, f"redis-cluster://127.0.0.1:{nodes[0].port}") as backend,
    ):
        clients = [node.client() for node in nodes]
        slot = clients[0].execute_command("CLUSTER", "KEYSLOT", HEAD_NAME(KEY))
        owner = min(slot // -(-16384 // 3), 2)
        target = (owner + 1) % 3
        identity = clients[target].execute_command("CLUSTER", "MYID")
        for client in (clients[target], clients[owner], clients[3 - owner - target]):
            client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", identity)

        def stored() -> bool:
            try:
                put(run, backend, KEY, value(1, LONG))
                return get(run, backend, KEY) == value(1, LONG)
            except BackendError:
                return False

        until(stored, "the new owner of the slot to be used")
        with clients[target]:
            assert len(clients[target].keys("*")) == 7
        for client in clients:
            client.close()


def test_replicas_of_a_cluster_answer_reads(run: Loop, tmp_path: Path) -> None:
    with (
        cluster(tmp_path, replicas=True) as nodes,
        opened(run, f"redis-cluster://127.0.0.1:{nodes[0].port}", replica_reads=True) as backend,
    ):
        for key in keys(9):
            put(run, backend, key, value(1, LONG))
        until(lambda: run(backend.contains(keys(9))) == [True] * 9, "replication")
        targets = buffers(9, LONG)
        assert run(backend.load(keys(9), views(targets))) == [LONG] * 9
        assert targets == [value(1, LONG)] * 9
        served = 0
        for node in nodes[3:]:
            with node.client() as client:
                served += client.info("commandstats").get("cmdstat_get", {}).get("calls", 0)
        assert served == 9 * 7


# -- at random -----------------------------------------------------------------------------

DEADLINE_S = 1.0
SLACK_S = 3.0
"""What a loaded machine may add. A call that hangs doesn't end within it either."""


@everywhere
def test_random_faults(run: Loop, server: Server) -> None:
    """Cuts, silence, kills and hangs: no wrong byte, no late answer, no thread that is stuck."""
    chance = random.Random(FAULTS)
    before = set(threading.enumerate())
    link = FaultyLink(server.port, chance)
    url = f"redis://127.0.0.1:{link.port}"
    backend = RedisBackend(RedisConfig.model_validate({"url": url, **QUICK}))
    _open_somehow(run, backend)
    guard = Guard(
        # A breaker that never opens: every operation meets the faults.
        "faults",
        deadline_s=DEADLINE_S,
        breaker_threshold=1 << 30,
        counters=Counters(),
    )
    tier = Tier(
        "faults", backend, RawSerde(), guard=guard, counters=Counters(), deadline_s=DEADLINE_S
    )
    tier.opened(backend, backend.capabilities)
    many = keys(40)
    contents = {key: value(i, chance.choice([100, PIECE, LONG])) for i, key in enumerate(many)}
    traffic = Traffic(tier, contents, chance, DEADLINE_S + SLACK_S)
    seen = traffic.seen
    harmed = 0

    def going_on() -> bool:
        return link.faults < FAULTS

    async def harm() -> None:
        nonlocal harmed
        loop = asyncio.get_running_loop()
        while going_on():
            await asyncio.sleep(chance.uniform(0.2, 1.5))
            harmed += 1
            if chance.random() < 0.5:
                server.pause()
                await asyncio.sleep(chance.uniform(0.05, 0.6))
                server.resume()
            else:
                await loop.run_in_executor(None, server.kill)
                await asyncio.sleep(chance.uniform(0, 0.1))
                await loop.run_in_executor(None, server.start)

    async def together() -> None:
        await asyncio.wait_for(
            asyncio.gather(harm(), *(traffic.flow(going_on) for _ in range(6))), 600 + FAULTS / 5
        )

    run._loop.run_until_complete(together())
    run(backend.close())
    link.close()
    run.stop_own_threads()
    left = [t.name for t in threading.enumerate() if t not in before and t.is_alive()]
    assert (seen["wrong"], seen["late"], left) == (0, 0, [])
    assert seen["hits"]
    print(seen, "faults of the link:", link.faults, "kills and hangs:", harmed)


def _open_somehow(run: Loop, backend: RedisBackend) -> None:
    """As core does: again until it works."""

    def opened() -> bool:
        with suppress(BackendError):
            run(backend.open(BackendContext("faults", NAMESPACE)))
            return True
        return False

    until(opened, "a connection without a fault")
