"""Conformance tests for storage backends.

In your plugin::

    from lmcache_core.testing.storage import StorageBackendTests

    class TestMyBackend(StorageBackendTests):
        @pytest.fixture
        def make_backend(self, tmp_path):
            return lambda: MyBackend(MyConfig(path=tmp_path))

``make_backend`` makes backends that reach the same store, which is empty when
the test starts and has room for 64 MiB. Subclass it once for each configuration
that you support. What a backend doesn't claim in its capabilities, and optional
methods that it doesn't have, aren't asked of it.

Two fixtures are optional: ``make_unreachable``, a function that makes a backend
whose store isn't there or refuses it, and ``make_small``, one whose store has
room for less than 256 values of `VALUE_BYTES`. After a test that hangs, the
rest of its class is skipped.
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import pytest

from lmcache_core.chunks.keys import CacheNamespace, ChunkKey, chunk_key
from lmcache_core.chunks.layout import AttentionKind, DType, KVLayout, LayerGroup
from lmcache_core.contracts.storage import (
    MISS,
    BackendContext,
    ReportsUsage,
    StorageBackend,
    StoreOutcome,
    SupportsClear,
    SupportsDelete,
    SupportsPrefixLookup,
)
from lmcache_core.errors import BackendError
from lmcache_core.testing.loop import Loop, watched

MakeBackend = Callable[[], StorageBackend]
_Optional = TypeVar("_Optional")

TOKENS = 16
GROUP = LayerGroup((0, 1), AttentionKind.FULL, planes=2, heads=2, head_size=8, dtype=DType.BF16)
LAYOUT = KVLayout(TOKENS, (GROUP,))
VALUE_BYTES = GROUP.chunk_bytes(TOKENS)
LARGE_BYTES = 8 << 20
STORED_OR_KEPT = (StoreOutcome.STORED, StoreOutcome.ALREADY_PRESENT)


def keys(count: int, seed: int = 0) -> list[ChunkKey]:
    """``count`` keys that no other ``seed`` has."""
    return [chunk_key((seed * 1000 + i).to_bytes(16, "little")) for i in range(count)]


def value(fill: int, nbytes: int = VALUE_BYTES) -> bytearray:
    """``nbytes`` bytes that differ from those of any other ``fill`` below 251."""
    pattern = bytes((fill + i) % 251 for i in range(251))
    return bytearray((pattern * (nbytes // 251 + 1))[:nbytes])


def views(values: Sequence[bytearray]) -> list[memoryview]:
    """What core hands to a backend."""
    return [memoryview(one) for one in values]


def buffers(count: int, nbytes: int = VALUE_BYTES) -> list[bytearray]:
    """Room for ``count`` values."""
    return [bytearray(nbytes) for _ in range(count)]


class StorageBackendTests:
    """The contract of `StorageBackend`, one test for each sentence of it."""

    @pytest.fixture
    def make_backend(self) -> MakeBackend:
        """Override it."""
        raise NotImplementedError("override make_backend: return a function that makes a backend")

    @pytest.fixture
    def make_unreachable(self) -> MakeBackend | None:
        """Override it, to have errors of ``open`` checked."""
        return None

    @pytest.fixture
    def make_small(self) -> MakeBackend | None:
        """Override it, to have a full store checked."""
        return None

    @pytest.fixture
    def namespace(self) -> CacheNamespace:
        return CacheNamespace(model="conformance", layout=LAYOUT)

    hung: ClassVar[str] = ""
    """The test of this class that a hang has ended."""

    @pytest.fixture
    def run(self, request: pytest.FixtureRequest) -> Iterator[Loop]:
        if self.hung:
            pytest.skip(f"{self.hung} hangs: the others of this class aren't tried")
        loop = Loop()
        yield loop
        if loop.hung:
            type(self).hung = request.node.name
        loop.close()

    @pytest.fixture
    def opened(
        self, make_backend: MakeBackend, namespace: CacheNamespace, run: Loop
    ) -> Iterator[Callable[..., StorageBackend]]:
        """Opens one more backend; all are closed at the end."""
        opened: list[StorageBackend] = []

        def open_one(
            namespace: CacheNamespace = namespace, *, lookup_only: bool = False
        ) -> StorageBackend:
            backend = make_backend()
            run(backend.open(BackendContext("conformance", namespace, lookup_only=lookup_only)))
            opened.append(backend)
            return backend

        yield open_one
        for backend in opened:
            run(backend.close())

    @pytest.fixture
    def backend(self, opened: Callable[..., StorageBackend]) -> StorageBackend:
        return opened()

    # -- load and store --------------------------------------------------------------------

    def test_load_returns_what_was_stored(self, backend: StorageBackend, run: Loop) -> None:
        stored = [value(i) for i in range(3)]
        assert run(backend.store(keys(3), views(stored))) == [StoreOutcome.STORED] * 3
        loaded = buffers(3)
        assert run(backend.load(keys(3), views(loaded))) == [VALUE_BYTES] * 3
        assert loaded == stored

    def test_answers_are_positional(self, backend: StorageBackend, run: Loop) -> None:
        present, absent = keys(2, seed=1), keys(1, seed=2)
        run(backend.store(present, views([value(1), value(2)])))
        asked = [present[1], absent[0], present[0]]
        assert run(backend.contains(asked)) == [True, False, True]
        loaded = buffers(3)
        assert run(backend.load(asked, views(loaded))) == [VALUE_BYTES, MISS, VALUE_BYTES]
        assert (loaded[0], loaded[2]) == (value(2), value(1))

    def test_empty_batches(self, backend: StorageBackend, run: Loop) -> None:
        assert run(backend.contains([])) == []
        assert run(backend.load([], [])) == []
        assert run(backend.store([], [])) == []

    def test_a_missing_chunk_is_a_miss_not_an_error(
        self, backend: StorageBackend, run: Loop
    ) -> None:
        assert run(backend.contains(keys(2))) == [False, False]
        assert run(backend.load(keys(2), views(buffers(2)))) == [MISS, MISS]

    def test_a_shorter_value_is_reported_with_its_length(
        self, backend: StorageBackend, run: Loop
    ) -> None:
        short = value(3, VALUE_BYTES // 2 + 1)
        run(backend.store(keys(1), views([short])))
        (loaded,) = buffers(1)
        assert run(backend.load(keys(1), [memoryview(loaded)])) == [len(short)]
        assert loaded[: len(short)] == short

    def test_a_longer_value_is_a_miss(self, backend: StorageBackend, run: Loop) -> None:
        run(backend.store(keys(2), views([value(3), value(4, VALUE_BYTES - 1)])))
        sizes = run(backend.load(keys(2), views(buffers(2, VALUE_BYTES - 1))))
        assert sizes == [MISS, VALUE_BYTES - 1]

    def test_nothing_is_written_outside_the_buffer(
        self, backend: StorageBackend, run: Loop
    ) -> None:
        run(backend.store(keys(2), views([value(5), value(6, 2 * VALUE_BYTES)])))
        around = bytearray(b"\xee") * (3 * VALUE_BYTES)
        middle = memoryview(around)[VALUE_BYTES : 2 * VALUE_BYTES]
        for key in keys(2):
            run(backend.load([key], [middle]))
        assert around[:VALUE_BYTES] + around[2 * VALUE_BYTES :] == b"\xee" * (2 * VALUE_BYTES)

    def test_store_keeps_a_copy(self, backend: StorageBackend, run: Loop) -> None:
        source = value(7)
        run(backend.store(keys(1), views([source])))
        source[:] = bytes(VALUE_BYTES)
        (loaded,) = buffers(1)
        run(backend.load(keys(1), [memoryview(loaded)]))
        assert loaded == value(7)

    def test_a_source_is_not_changed(self, backend: StorageBackend, run: Loop) -> None:
        source = value(8)
        run(backend.store(keys(1), views([source])))
        assert source == value(8)

    def test_buffers_are_released(self, backend: StorageBackend, run: Loop) -> None:
        source, target = value(9), bytearray(VALUE_BYTES)
        run(backend.store(keys(1), views([source])))
        run(backend.load(keys(1), views([target])))
        for held in (source, target):
            held.append(0)  # raises BufferError while anything still exports the buffer

    def test_storing_twice(self, backend: StorageBackend, run: Loop) -> None:
        run(backend.store(keys(1), views([value(10)])))
        (again,) = run(backend.store(keys(1), views([value(10)])))
        assert again in STORED_OR_KEPT
        (loaded,) = buffers(1)
        assert run(backend.load(keys(1), [memoryview(loaded)])) == [VALUE_BYTES]
        assert loaded == value(10)

    def test_large_values(self, backend: StorageBackend, run: Loop) -> None:
        size = min(LARGE_BYTES, backend.capabilities.max_chunk_bytes or LARGE_BYTES)
        stored = [value(11, size), value(12, size - 1)]
        assert run(backend.store(keys(2), views(stored))) == [StoreOutcome.STORED] * 2
        loaded = buffers(2, size)
        assert run(backend.load(keys(2), views(loaded))) == [size, size - 1]
        assert loaded[0] == stored[0]
        assert loaded[1][: size - 1] == stored[1]

    def test_keys_of_later_layer_groups(self, backend: StorageBackend, run: Loop) -> None:
        names = [chunk_key(keys(1)[0], group) for group in (b"", b"\1" * 8, bytes(range(8)))]
        stored = [value(i) for i in range(3)]
        run(backend.store(names, views(stored)))
        loaded = buffers(3)
        assert run(backend.load(names, views(loaded))) == [VALUE_BYTES] * 3
        assert loaded == stored

    def test_batches_of_any_size(self, backend: StorageBackend, run: Loop) -> None:
        """Core keeps to ``preferred_batch`` where it can; others needn't."""
        count = 200
        names, stored = keys(count, 50), [value(i) for i in range(count)]
        outcomes = run(backend.store(names, views(stored)))
        assert len(outcomes) == count
        assert all(outcome in STORED_OR_KEPT for outcome in outcomes)
        backwards = names[::-1]
        assert run(backend.contains(backwards)) == [True] * count
        loaded = buffers(count)
        assert run(backend.load(backwards, views(loaded))) == [VALUE_BYTES] * count
        assert loaded == stored[::-1]

    def test_each_of_a_batch_is_answered(self, backend: StorageBackend, run: Loop) -> None:
        """Whatever becomes of the others."""
        run(backend.store(keys(2, 51), views([value(0), value(1)])))
        mixed = [keys(1, 52)[0], *keys(2, 51), keys(2, 52)[1]]
        outcomes = run(backend.store(mixed, views([value(i) for i in (7, 0, 1, 8)])))
        assert len(outcomes) == 4
        assert all(outcome in STORED_OR_KEPT for outcome in outcomes)
        asked = [*mixed, *keys(2, 53)]
        assert run(backend.contains(asked)) == [True] * 4 + [False] * 2
        rooms = [bytearray(VALUE_BYTES - (i == 1)) for i in range(6)]
        sizes = run(backend.load(asked, views(rooms)))
        assert sizes == [VALUE_BYTES, MISS, VALUE_BYTES, VALUE_BYTES, MISS, MISS]
        assert (rooms[0], rooms[2], rooms[3]) == (value(7), value(1), value(8))

    def test_a_full_store_admits_or_makes_room(
        self, make_small: MakeBackend | None, namespace: CacheNamespace, run: Loop
    ) -> None:
        """It is no error; what is there is right."""
        if make_small is None:
            pytest.skip("make_small isn't given")
        backend = make_small()
        run(backend.open(BackendContext("small", namespace)))
        try:
            count = 0
            for seed in range(16):
                names, stored = keys(32, 60 + seed), [value(seed + i) for i in range(32)]
                outcomes = run(backend.store(names, views(stored)))
                assert all(isinstance(outcome, StoreOutcome) for outcome in outcomes)
                assert len(outcomes) == 32
            for seed in range(16):
                names, loaded = keys(32, 60 + seed), buffers(32)
                for i, size in enumerate(run(backend.load(names, views(loaded)))):
                    assert size == MISS or loaded[i] == value(seed + i)
                    count += size != MISS
            assert 0 < count < 256, "make_small's store has too much room"
        finally:
            run(backend.close())

    # -- who sees what ---------------------------------------------------------------------

    def test_namespaces_do_not_mix(self, opened: Callable[..., StorageBackend], run: Loop) -> None:
        one, two = (opened(CacheNamespace(model=name, layout=LAYOUT)) for name in "ab")
        run(one.store(keys(1), views([value(13)])))
        assert run(two.contains(keys(1))) == [False]
        assert run(two.load(keys(1), views(buffers(1)))) == [MISS]
        run(two.store(keys(1), views([value(14)])))
        (loaded,) = buffers(1)
        run(one.load(keys(1), [memoryview(loaded)]))
        assert loaded == value(13)

    def test_two_backends_at_once(self, opened: Callable[..., StorageBackend], run: Loop) -> None:
        """Each works, whatever becomes of the other."""
        one, two = opened(), opened()
        run(one.store(keys(1, 70), views([value(70)])))
        run(two.store(keys(1, 71), views([value(71)])))
        run(one.close())
        run(two.store(keys(1, 72), views([value(72)])))
        loaded = buffers(2)
        names = [*keys(1, 71), *keys(1, 72)]
        assert run(two.load(names, views(loaded))) == [VALUE_BYTES] * 2
        assert loaded == [value(71), value(72)]

    def test_what_is_shared_is_seen_by_others(
        self, opened: Callable[..., StorageBackend], run: Loop
    ) -> None:
        writer, reader = opened(), opened()
        _claimed(writer, "shared")
        run(writer.store(keys(1), views([value(15)])))
        assert run(reader.contains(keys(1))) == [True]
        (loaded,) = buffers(1)
        assert run(reader.load(keys(1), [memoryview(loaded)])) == [VALUE_BYTES]
        assert loaded == value(15)

    def test_lookup_only_sees_what_others_store(
        self, opened: Callable[..., StorageBackend], run: Loop
    ) -> None:
        asking, writer = opened(lookup_only=True), opened()
        _claimed(writer, "shared")
        assert run(asking.contains(keys(2))) == [False, False]
        run(writer.store(keys(1), views([value(16)])))
        assert run(asking.contains(keys(2))) == [True, False]

    def test_what_is_persistent_outlives_the_backend(
        self, opened: Callable[..., StorageBackend], run: Loop
    ) -> None:
        first = opened()
        _claimed(first, "persistent")
        run(first.store(keys(1), views([value(17)])))
        run(first.close())
        (loaded,) = buffers(1)
        assert run(opened().load(keys(1), [memoryview(loaded)])) == [VALUE_BYTES]
        assert loaded == value(17)

    # -- many at once ----------------------------------------------------------------------

    def test_concurrent_batches(self, backend: StorageBackend, run: Loop) -> None:
        async def one(seed: int) -> bool:
            names, stored = keys(4, seed), [value(seed + i) for i in range(4)]
            await backend.store(names, views(stored))
            loaded = buffers(4)
            sizes = await backend.load(names, views(loaded))
            return sizes == [VALUE_BYTES] * 4 and loaded == stored

        async def many() -> list[bool]:
            return await asyncio.gather(*(one(seed) for seed in range(10, 26)))

        assert run(many()) == [True] * 16

    def test_readers_never_see_a_part(
        self, opened: Callable[..., StorageBackend], run: Loop
    ) -> None:
        """A value is all there or not there, while it is being stored too."""
        writer = opened()
        reader = opened() if writer.capabilities.shared else writer
        size = min(1 << 20, writer.capabilities.max_chunk_bytes or 1 << 20)
        wrong: list[str] = []

        async def read(key: ChunkKey, expected: bytearray, stored: asyncio.Event) -> None:
            last = False
            while not last:
                last = stored.is_set()
                loaded = bytearray(size)
                (got,) = await reader.load([key], [memoryview(loaded)])
                if got not in (size, MISS) or (got == size and loaded != expected):
                    wrong.append(f"{got} bytes of {size}, equal: {loaded == expected}")
                await asyncio.sleep(0)

        async def write(key: ChunkKey, source: bytearray, stored: asyncio.Event) -> None:
            try:
                await writer.store([key], [memoryview(source)])
            finally:
                stored.set()

        async def race(round_: int) -> None:
            (key,), source, stored = keys(1, 100 + round_), value(1 + round_, size), asyncio.Event()
            await asyncio.gather(read(key, source, stored), write(key, source, stored))

        for round_ in range(12):
            run(race(round_))
        assert not wrong

    @pytest.mark.parametrize("steps", [0, 1, 2, 5])
    def test_a_cancelled_call_ends_and_lets_go(
        self, backend: StorageBackend, run: Loop, steps: int
    ) -> None:
        _claimed(backend, "cancellable")
        run(backend.store(keys(1, 40), views([value(40)])))
        size = min(LARGE_BYTES, backend.capabilities.max_chunk_bytes or LARGE_BYTES)

        async def cancelled(call: Coroutine[Any, Any, object]) -> None:
            task = asyncio.get_running_loop().create_task(call)
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])

        sources = [value(41 + i, size) for i in range(4)]
        run(cancelled(backend.store(keys(4, 41), views(sources))))
        for source in sources:
            source[:] = bytes(size)
            source.append(0)  # raises BufferError while anything still exports the buffer
        loaded = buffers(4, size)
        sizes = run(backend.load(keys(4, 41), views(loaded)))
        for i, found in enumerate(sizes):
            assert found == MISS or loaded[i] == value(41 + i, size)
        target = bytearray(VALUE_BYTES)
        run(cancelled(backend.load(keys(1, 40), views([target]))))
        target[:] = bytes(VALUE_BYTES)
        target.append(0)
        assert run(backend.contains(keys(1, 40))) == [True]
        assert not any(target)

    def test_the_event_loop_is_never_blocked(self, backend: StorageBackend, run: Loop) -> None:
        names, sources, loaded = keys(64, 30), [value(i) for i in range(64)], buffers(64)

        async def once(count: int) -> None:
            await backend.store(names[:count], views(sources[:count]))
            await backend.contains(names[:count])
            await backend.load(names[:count], views(loaded[:count]))

        async def together() -> None:
            await asyncio.gather(once(64), backend.contains(keys(64, 31)))

        run(once(1))  # whatever is imported or connected at the first call
        _, blocked = watched(run, together)
        assert not blocked, blocked[0]

    # -- the end ---------------------------------------------------------------------------

    def test_close_twice_and_leave_no_thread(
        self, make_backend: MakeBackend, namespace: CacheNamespace, run: Loop
    ) -> None:
        before = set(threading.enumerate())
        backend = make_backend()
        run(backend.open(BackendContext("closing", namespace)))
        run(backend.store(keys(1), views([value(18)])))
        run(backend.close())
        run(backend.close())
        run.stop_own_threads()
        left = [t.name for t in threading.enumerate() if t not in before and t.is_alive()]
        assert left == []

    def test_close_leaves_no_socket(
        self, make_backend: MakeBackend, namespace: CacheNamespace, run: Loop
    ) -> None:
        async def use() -> None:
            backend = make_backend()
            await backend.open(BackendContext("sockets", namespace))
            await backend.store(keys(1), views([value(19)]))
            await backend.contains(keys(1))
            await backend.close()

        run(use())  # whatever the process has only once
        before = _sockets()
        for _ in range(3):
            run(use())
        _eventually(lambda: len(_sockets()) <= len(before))
        assert len(_sockets()) <= len(before)

    def test_a_call_after_close_ends(
        self, make_backend: MakeBackend, namespace: CacheNamespace, run: Loop
    ) -> None:
        """With an error, or an answer of the right length; and nothing is begun for it."""
        backend = make_backend()
        run(backend.open(BackendContext("closed", namespace)))
        run(backend.close())
        before = set(threading.enumerate())
        calls: list[tuple[Callable[[], Any], int]] = [
            (lambda: backend.contains(keys(2)), 2),
            (lambda: backend.load(keys(2), views(buffers(2))), 2),
            (lambda: backend.store(keys(1), views([value(20)])), 1),
        ]
        for call, length in calls:
            try:
                answer = run(call())
            except asyncio.TimeoutError:
                raise
            except Exception:  # noqa: BLE001, S112  whatever it raises is a miss
                continue
            assert len(answer) == length
        run(backend.close())
        run.stop_own_threads()
        left = [t.name for t in threading.enumerate() if t not in before and t.is_alive()]
        assert left == []

    def test_an_open_that_fails_says_so(
        self, make_unreachable: MakeBackend | None, namespace: CacheNamespace, run: Loop
    ) -> None:
        """With a `BackendError`; and it leaves nothing."""
        if make_unreachable is None:
            pytest.skip("make_unreachable isn't given")
        before = set(threading.enumerate())
        backend = make_unreachable()
        with pytest.raises(BackendError):
            run(backend.open(BackendContext("unreachable", namespace, deadline_s=5.0)))
        run(backend.close())
        run.stop_own_threads()
        left = [t.name for t in threading.enumerate() if t not in before and t.is_alive()]
        assert left == []

    # -- optional methods ------------------------------------------------------------------

    def test_delete(self, backend: StorageBackend, run: Loop) -> None:
        able = _optional(backend, SupportsDelete)  # type: ignore[type-abstract]
        run(backend.store(keys(2), views([value(1), value(2)])))
        assert run(able.delete([*keys(1), *keys(1, seed=99)])) == 1
        assert run(backend.contains(keys(2))) == [False, True]
        assert run(backend.load(keys(1), views(buffers(1)))) == [MISS]
        assert run(able.delete([])) == 0

    def test_a_deleted_chunk_can_be_stored_again(self, backend: StorageBackend, run: Loop) -> None:
        able = _optional(backend, SupportsDelete)  # type: ignore[type-abstract]
        run(backend.store(keys(1), views([value(1)])))
        run(able.delete(keys(1)))
        assert run(backend.store(keys(1), views([value(2)]))) == [StoreOutcome.STORED]
        (loaded,) = buffers(1)
        run(backend.load(keys(1), [memoryview(loaded)]))
        assert loaded == value(2)

    def test_count_leading_hits(self, backend: StorageBackend, run: Loop) -> None:
        able = _optional(backend, SupportsPrefixLookup)  # type: ignore[type-abstract]
        names = keys(5)
        run(backend.store(names[:2] + names[3:], views([value(i) for i in range(4)])))
        assert run(able.count_leading_hits(names)) == 2
        assert run(able.count_leading_hits(names[3:])) == 2
        assert run(able.count_leading_hits(names[2:])) == 0
        assert run(able.count_leading_hits([])) == 0

    def test_clear(self, opened: Callable[..., StorageBackend], run: Loop) -> None:
        one, two = (opened(CacheNamespace(model=name, layout=LAYOUT)) for name in "ab")
        able = _optional(one, SupportsClear)  # type: ignore[type-abstract]
        for backend in (one, two):
            run(backend.store(keys(3), views([value(i) for i in range(3)])))
        assert run(able.clear()) == 3
        assert run(one.contains(keys(3))) == [False] * 3
        assert run(two.contains(keys(3))) == [True] * 3

    def test_usage(self, backend: StorageBackend, run: Loop) -> None:
        able = _optional(backend, ReportsUsage)  # type: ignore[type-abstract]
        assert able.usage() == (0, 0)
        run(backend.store(keys(2), views([value(1), value(2, VALUE_BYTES // 2)])))
        run(backend.store(keys(1), views([value(1)])))
        chunks, nbytes = able.usage()
        assert chunks == 2
        assert nbytes >= VALUE_BYTES + VALUE_BYTES // 2


def _sockets() -> set[str]:
    """The sockets that this process has open."""
    gc.collect()
    found: set[str] = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found


def _eventually(condition: Callable[[], bool]) -> None:
    """Wait until it is so, for a server in this process may close its ends later; or give up."""
    for _ in range(100):
        if condition():
            return
        time.sleep(0.05)


def _claimed(backend: StorageBackend, capability: str) -> None:
    if not getattr(backend.capabilities, capability):
        pytest.skip(f"capabilities.{capability} is False: the backend doesn't claim it")


def _optional(backend: Any, protocol: type[_Optional]) -> _Optional:
    if not isinstance(backend, protocol):
        pytest.skip(f"not a {protocol.__name__}: the backend doesn't claim it")
    return backend
