"""What goes wrong, on real agents: full pools, restarts, short files, servers that aren't there."""

from __future__ import annotations

import asyncio
import mmap
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from nixl_servers import S3, s3_server
from open_ports import documented, open_ports

from lmcache_backend_nixl.agent import Agent, Moves, TransferFailed, address_of
from lmcache_backend_nixl.config import NixlConfig
from lmcache_backend_nixl.files import NixlFileBackend
from lmcache_backend_nixl.objects import NixlObjectBackend
from lmcache_core.chunks.keys import CacheNamespace, ChunkKey
from lmcache_core.contracts.storage import (
    MISS,
    BackendContext,
    BlockingBackend,
    HostRegion,
    StoreOutcome,
)
from lmcache_core.errors import BackendError, BackendRejected, BackendUnavailable
from lmcache_core.testing.loop import Loop
from lmcache_core.testing.storage import LAYOUT, keys, value

NAMESPACE = CacheNamespace("faults", LAYOUT)
PAGE = 4096
VALUE = 3 * PAGE + 100


@pytest.fixture
def run() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


def files(path: Path, **options: object) -> NixlFileBackend:
    return NixlFileBackend(
        NixlConfig.model_validate({"backend": "POSIX", "path": path, "pool_size": 4, **options})
    )


def opened(backend: BlockingBackend, run: Loop, region: HostRegion | None = None) -> None:
    run(backend.open(BackendContext("faults", NAMESPACE, region, max_value_bytes=VALUE)))


def store(backend: BlockingBackend, run: Loop, names: list[ChunkKey]) -> list[StoreOutcome]:
    sources = [memoryview(value(names.index(name), VALUE)) for name in names]
    return run(backend.store(names, sources))


def load(backend: BlockingBackend, run: Loop, names: list[ChunkKey]) -> list[int]:
    into = [bytearray(VALUE) for _ in names]
    sizes = run(backend.load(names, [memoryview(one) for one in into]))
    assert all(
        got == value(i, VALUE)
        for i, (got, size) in enumerate(zip(into, sizes, strict=True))
        if size != MISS
    )
    return sizes


def test_a_store_listens_nowhere(run: Loop, tmp_path: Path) -> None:
    before = open_ports(os.getpid())
    backend = files(tmp_path)
    opened(backend, run)
    found = open_ports(os.getpid()) - before
    run(backend.close())
    assert set(found) == documented("NIXL's stores")


def data_file(path: Path) -> Path:
    (found,) = path.glob("*/pool-*.0.data")
    return found


def index_file(path: Path) -> Path:
    (found,) = path.glob("*/pool-*.index")
    return found


def test_without_io_uring_it_takes_what_nixl_takes(
    run: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[dict[str, str]] = []

    class Sandboxed(Agent):
        def __init__(self, plugin: str, params: dict[str, str]) -> None:
            asked.append(params)
            if "use_uring" in params:  # as NIXL does where the kernel refuses
                raise BackendRejected("NIXL_ERR_BACKEND")
            super().__init__(plugin, params)

    monkeypatch.setattr("lmcache_backend_nixl.files.Agent", Sandboxed)
    backend, names = files(tmp_path), keys(1)
    with caplog.at_level("INFO"):
        opened(backend, run)
    assert asked == [{"use_uring": "true"}, {}, {}]
    assert "io_uring" in caplog.text
    assert store(backend, run, names) == [StoreOutcome.STORED]
    assert load(backend, run, names) == [VALUE]
    run(backend.close())


@pytest.mark.parametrize("queue", ["use_uring", "use_aio"])
def test_a_transfer_that_failed_spoils_no_other(tmp_path: Path, queue: str) -> None:
    """One of four writes can't be done; an agent of NIXL's stays, so it has to go on."""
    agent = Agent("POSIX", {queue: "true"})
    memory = mmap.mmap(-1, 4 * PAGE)
    address = address_of(memoryview(memory))
    agent.register("DRAM", [(address, 4 * PAGE, 0, "")])
    file = tmp_path / "data"
    file.write_bytes(bytes(4 * PAGE))
    fds = [os.open(file, flags) for flags in (os.O_RDWR, os.O_RDONLY)]
    for fd in fds:
        agent.register("FILE", [(0, 4 * PAGE, fd, "")])

    def moves(*to: int) -> Moves:
        made = Moves()
        for i, fd in enumerate(to):
            made.add(address + i * PAGE, i * PAGE, PAGE, fd)
        return made

    good, bad = fds
    for round_ in range(1, 4):
        with pytest.raises(TransferFailed):
            agent.transfer("WRITE", "FILE", moves(good, bad, good, good))
        memory[:] = bytes([round_]) * (4 * PAGE)
        agent.transfer("WRITE", "FILE", moves(good, good, good, good))
        assert file.read_bytes() == memory[:]
    agent.close()
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("direct", [False, True])
def test_a_full_pool_evicts_what_was_used_least_recently(
    tmp_path: Path, run: Loop, direct: bool
) -> None:
    backend = files(tmp_path, direct_io=direct)
    opened(backend, run)
    names = keys(5)
    store(backend, run, names[:4])
    assert all(run(backend.contains([names[0], *names[2:4]])))
    assert run(backend.store(names[4:], [memoryview(value(9, VALUE))])) == [StoreOutcome.STORED]
    assert run(backend.contains(names)) == [True, False, True, True, True]
    assert backend.usage() == (4, 4 * VALUE)
    run(backend.close())


def test_a_batch_larger_than_the_pool_keeps_its_beginning(tmp_path: Path, run: Loop) -> None:
    backend = files(tmp_path)
    opened(backend, run)
    outcomes = store(backend, run, keys(6))
    assert outcomes == [StoreOutcome.STORED] * 4 + [StoreOutcome.NOT_ADMITTED] * 2
    assert load(backend, run, keys(6)) == [VALUE] * 4 + [MISS] * 2
    run(backend.close())


def test_many_rounds_through_a_small_pool(tmp_path: Path, run: Loop) -> None:
    """Every slot is written many times, by several calls at once, and nothing is ever mixed up."""
    backend = files(tmp_path)
    opened(backend, run)

    async def one(seed: int) -> None:
        names = keys(2, seed)
        sources = [memoryview(value(seed + i, VALUE)) for i in range(2)]
        await backend.store(names, sources)
        into = [bytearray(VALUE) for _ in names]
        sizes = await backend.load(names, [memoryview(one) for one in into])
        for size, got, source in zip(sizes, into, sources, strict=True):
            assert size == MISS or got == source

    async def all_of_them() -> None:
        for start in range(0, 120, 6):
            await asyncio.gather(*(one(seed) for seed in range(start, start + 6)))

    run(all_of_them())
    assert backend.usage()[0] <= 4
    run(backend.close())


@pytest.mark.parametrize("direct", [False, True])
def test_chunks_survive_a_restart(tmp_path: Path, run: Loop, direct: bool) -> None:
    for outcome in (StoreOutcome.STORED, StoreOutcome.ALREADY_PRESENT):
        backend = files(tmp_path, direct_io=direct)
        opened(backend, run)
        assert store(backend, run, keys(3)) == [outcome] * 3
        assert load(backend, run, keys(3)) == [VALUE] * 3
        assert backend.usage() == (3, 3 * VALUE)
        run(backend.close())
    assert len(list(tmp_path.glob("*/pool-*.0.data"))) == 1


def test_nothing_survives_when_it_should_not(tmp_path: Path, run: Loop) -> None:
    backend = files(tmp_path, persist=False)
    opened(backend, run)
    store(backend, run, keys(3))
    run(backend.close())
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == []


def test_a_smaller_pool_keeps_what_fits(tmp_path: Path, run: Loop) -> None:
    first = files(tmp_path)
    opened(first, run)
    store(first, run, keys(4))
    run(first.close())
    second = files(tmp_path, pool_size=2)
    opened(second, run)
    assert second.usage()[0] == 2
    assert load(second, run, keys(4)) == [VALUE, VALUE, MISS, MISS]
    run(second.close())


def test_an_interrupted_store_is_a_miss(tmp_path: Path, run: Loop) -> None:
    """What a crash in the middle leaves: bytes in a slot, and half a record that names them."""
    first = files(tmp_path)
    opened(first, run)
    store(first, run, keys(1))
    run(first.close())
    with data_file(tmp_path).open("r+b") as file:
        file.seek(4 * PAGE)
        file.write(value(1, VALUE // 2))
    with index_file(tmp_path).open("r+b") as file:
        file.seek(2 * 64)
        file.write(b"\x77" * 40)
    second = files(tmp_path)
    opened(second, run)
    assert run(second.contains(keys(2))) == [True, False]
    assert load(second, run, keys(2)) == [VALUE, MISS]
    assert store(second, run, keys(2)) == [StoreOutcome.ALREADY_PRESENT, StoreOutcome.STORED]
    run(second.close())


def test_two_processes_have_a_pool_each_and_read_both(tmp_path: Path, run: Loop) -> None:
    one, two = files(tmp_path), files(tmp_path)
    opened(one, run)
    opened(two, run)
    assert store(one, run, keys(3)) == [StoreOutcome.STORED] * 3
    assert store(two, run, keys(4)) == [StoreOutcome.ALREADY_PRESENT] * 3 + [StoreOutcome.STORED]
    assert load(one, run, keys(4)) == [VALUE] * 4
    assert load(two, run, keys(4)) == [VALUE] * 4
    run(one.close())
    run(two.close())


def test_files_of_a_pool_that_vanished_are_closed(tmp_path: Path, run: Loop) -> None:
    """They take room on disk as long as anybody has them open."""

    one, two = files(tmp_path, persist=False), files(tmp_path)
    opened(one, run)
    opened(two, run)
    store(one, run, keys(2))
    assert load(two, run, keys(2)) == [VALUE] * 2
    run(one.close())
    assert load(two, run, keys(2)) == [MISS] * 2
    fds = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert [fd for fd in fds if fd.startswith(str(tmp_path)) and fd.endswith("(deleted)")] == []
    assert store(two, run, keys(2)) == [StoreOutcome.STORED] * 2
    assert load(two, run, keys(2)) == [VALUE] * 2
    run(two.close())


def test_a_file_that_was_cut_short_costs_what_was_in_it(tmp_path: Path, run: Loop) -> None:
    backend = files(tmp_path)
    opened(backend, run)
    store(backend, run, keys(3))
    os.truncate(data_file(tmp_path), 5 * PAGE)  # the first slot, and a part of the third
    assert load(backend, run, keys(3)) == [VALUE, VALUE, MISS]
    with pytest.raises(BackendUnavailable, match=r"can't read from the pools in .*cut short"):
        run(backend.load(keys(3)[2:], [memoryview(bytearray(VALUE))]))
    run(backend.close())


def test_values_move_between_host_memory_and_slots(tmp_path: Path, run: Loop) -> None:
    """From arena to pool and back with O_DIRECT, and not a byte beyond a buffer is touched."""
    with mmap.mmap(-1, 16 * PAGE) as arena:
        view = memoryview(arena)
        region = HostRegion(address_of(view), len(arena), view)
        backend = files(tmp_path, direct_io=True)
        opened(backend, run, region)
        view[:VALUE] = value(0, VALUE)
        run(backend.store(keys(1), [view[:VALUE]]))
        view[4 * PAGE :] = b"\xee" * (12 * PAGE)
        target = view[8 * PAGE : 8 * PAGE + VALUE]
        assert run(backend.load(keys(1), [target])) == [VALUE]
        assert target == value(0, VALUE)
        assert bytes(view[8 * PAGE + VALUE :]) == b"\xee" * (8 * PAGE - VALUE)
        stored = data_file(tmp_path).read_bytes()
        assert stored[:VALUE] == value(0, VALUE)
        assert not any(stored[VALUE : 4 * PAGE])
        run(backend.close())
        target.release()
        view.release()


LONG = 9 * (1 << 20) + 100
"""Cut into two parts, each worth a thread."""


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("in_arena", [False, True])
def test_long_values_are_cut_and_put_together(
    tmp_path: Path, run: Loop, direct: bool, in_arena: bool
) -> None:
    room = -(-LONG // PAGE) * PAGE
    with mmap.mmap(-1, 4 * room) as arena:
        view = memoryview(arena)
        region = HostRegion(address_of(view), len(arena), view) if in_arena else None
        backend = files(tmp_path, direct_io=direct)
        run(backend.open(BackendContext("faults", NAMESPACE, region, max_value_bytes=LONG)))
        lengths = [LONG, 5 << 20]
        sources = [view[i * room : i * room + nbytes] for i, nbytes in enumerate(lengths)]
        for index, source in enumerate(sources):
            source[:] = value(index, source.nbytes)
        targets = [view[(2 + i) * room : (2 + i) * room + n] for i, n in enumerate(lengths)]
        assert run(backend.store(keys(2), sources)) == [StoreOutcome.STORED] * 2
        assert run(backend.load(keys(2), targets)) == lengths
        assert targets == sources
        first, second = (path.read_bytes() for path in sorted(tmp_path.glob("*/pool-*.data")))
        half = -(-LONG // PAGE // 2) * PAGE
        assert first[:half] + second[: LONG - half] == sources[0]
        run(backend.close())
        again = files(tmp_path, direct_io=direct)
        run(again.open(BackendContext("faults", NAMESPACE, region, max_value_bytes=LONG)))
        targets[0][:] = bytes(LONG)
        assert run(again.load(keys(1), targets[:1])) == lengths[:1]
        assert targets[0] == sources[0]
        run(again.close())
        for one in (*sources, *targets, view):
            one.release()


def test_a_part_that_can_not_be_read_costs_its_value_only(tmp_path: Path, run: Loop) -> None:
    """Threads of two agents: nobody returns while the other one still uses the buffers."""
    backend = files(tmp_path)
    run(backend.open(BackendContext("faults", NAMESPACE, None, max_value_bytes=LONG)))
    sources = [memoryview(value(i, LONG)) for i in range(2)]
    run(backend.store(keys(2), sources))
    _, second = sorted(tmp_path.glob("*/pool-*.data"))
    os.truncate(second, LONG // 2 + (1 << 20))  # some of the second value's second part
    into = [memoryview(bytearray(LONG)) for _ in range(2)]
    assert run(backend.load(keys(2), into)) == [LONG, MISS]
    assert into[0] == sources[0]
    run(backend.close())


# -- what is refused at the start -------------------------------------------------------------


def refused(backend: BlockingBackend, run: Loop) -> str:
    with pytest.raises(BackendRejected) as caught:
        opened(backend, run)
    return str(caught.value)


def test_an_unknown_plugin(run: Loop) -> None:
    with pytest.raises(BackendRejected, match=r"no plugin NONESUCH; it has .*POSIX"):
        Agent("NONESUCH", {})


@pytest.mark.parametrize("backend", ["HF3FS", "GDS"])
def test_a_plugin_that_this_machine_can_not_start(tmp_path: Path, run: Loop, backend: str) -> None:
    message = refused(files(tmp_path, backend=backend), run)
    assert backend in message
    assert not list(tmp_path.iterdir())


def test_a_folder_that_can_not_be_made(tmp_path: Path, run: Loop) -> None:
    (tmp_path / "file").write_text("")
    message = refused(files(tmp_path / "file" / "cache"), run)
    assert str(tmp_path / "file" / "cache") in message
    assert "nixl_path" in message


def test_a_folder_that_can_not_be_written(run: Loop) -> None:
    message = refused(files(Path("/proc/lmcache")), run)
    assert "/proc/lmcache" in message


def test_no_room(tmp_path: Path, run: Loop) -> None:
    message = refused(files(tmp_path, pool_size=1 << 38), run)
    assert "nixl_pool_size" in message
    assert not list(tmp_path.glob("*/pool-*"))


def test_a_buffer_smaller_than_a_chunk(tmp_path: Path, run: Loop) -> None:
    assert "nixl_buffer_size" in refused(files(tmp_path, buffer_bytes=PAGE), run)


# -- objects ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with s3_server() as server:
        yield server


def objects(params: dict[str, str], **options: object) -> NixlObjectBackend:
    return NixlObjectBackend(
        NixlConfig.model_validate({"backend": "OBJ", "backend_params": params, **options})
    )


def test_a_bucket_that_is_not_there(server: S3, run: Loop) -> None:
    message = refused(objects(server.params(bucket="none-such")), run)
    assert "'none-such'" in message
    assert "access_key" in message


def test_no_bucket(server: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_DEFAULT_BUCKET", raising=False)
    params = server.params()
    del params["bucket"]
    with pytest.raises(BackendRejected, match="names no `bucket`"):
        objects(params)


def test_nobody_answers(server: S3, run: Loop) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(BackendUnavailable, match=endpoint):
            opened(objects(server.params(endpoint_override=endpoint)), run)


def test_more_objects_than_one_transfer_takes(server: S3, run: Loop) -> None:
    server.empty()
    backend = objects(server.params(), pool_size=2)
    opened(backend, run)
    assert store(backend, run, keys(5)) == [StoreOutcome.STORED] * 5
    assert load(backend, run, keys(7)) == [VALUE] * 5 + [MISS] * 2
    run(backend.close())


def test_a_value_that_is_gone_costs_only_itself(server: S3, run: Loop) -> None:
    server.empty()
    backend = objects(server.params())
    opened(backend, run)
    store(backend, run, keys(3))
    server.delete(f"lmcache/{NAMESPACE.fingerprint}/{keys(3)[1].hex()}")
    assert load(backend, run, keys(3)) == [VALUE, MISS, VALUE]
    run(backend.close())


def test_a_server_that_goes_away(run: Loop) -> None:
    with s3_server() as own:
        backend = objects(own.params())
        opened(backend, run)
        store(backend, run, keys(1))
    with pytest.raises(BackendError, match="nothing answers"):
        load(backend, run, keys(1))
    run(backend.close())
