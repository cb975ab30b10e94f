"""The bound of the memory backend; the rest of its contract is the conformance kit's business."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pydantic import ValidationError

from lmcache_core.builtin.memory import MemoryBackend, MemoryConfig
from lmcache_core.chunks.keys import CacheNamespace
from lmcache_core.contracts.storage import BackendContext, StoreOutcome
from lmcache_core.testing.loop import Loop
from lmcache_core.testing.storage import LAYOUT, keys, value

KIB = 1024


@pytest.fixture
def run() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def backend(run: Loop) -> MemoryBackend:
    """Room for three values of a KiB."""
    backend = MemoryBackend(MemoryConfig(max_size_gib=3 * KIB / (1 << 30)))
    run(backend.open(BackendContext("memory", CacheNamespace("model", LAYOUT))))
    return backend


def store(run: Loop, backend: MemoryBackend, count: int, first: int = 0) -> list[StoreOutcome]:
    chunks = [memoryview(value(i, KIB)) for i in range(count)]
    return run(backend.store(keys(first + count)[first:], chunks))


def test_the_least_recently_used_goes(run: Loop, backend: MemoryBackend) -> None:
    store(run, backend, 3)
    run(backend.load(keys(1), [memoryview(bytearray(KIB))]))
    store(run, backend, 1, first=3)
    assert run(backend.contains(keys(4))) == [True, False, True, True]
    assert backend.usage() == (3, 3 * KIB)


def test_storing_again_is_use(run: Loop, backend: MemoryBackend) -> None:
    store(run, backend, 3)
    assert store(run, backend, 1) == [StoreOutcome.ALREADY_PRESENT]
    store(run, backend, 1, first=3)
    assert run(backend.contains(keys(4))) == [True, False, True, True]


def test_a_batch_larger_than_the_bound(run: Loop, backend: MemoryBackend) -> None:
    assert store(run, backend, 5) == [StoreOutcome.STORED] * 5
    assert run(backend.contains(keys(5))) == [False, False, True, True, True]


def test_a_value_above_the_bound(run: Loop, backend: MemoryBackend) -> None:
    store(run, backend, 1)
    huge = memoryview(value(1, 3 * KIB + 1))
    assert backend.capabilities.max_chunk_bytes == 3 * KIB
    assert run(backend.store(keys(2)[1:], [huge])) == [StoreOutcome.NOT_ADMITTED]
    assert run(backend.contains(keys(2))) == [True, False]


def test_what_is_deleted_gives_its_room_back(run: Loop, backend: MemoryBackend) -> None:
    store(run, backend, 3)
    run(backend.delete(keys(2)))
    assert backend.usage() == (1, KIB)
    store(run, backend, 2, first=3)
    assert run(backend.contains(keys(5))) == [False, False, True, True, True]
    run(backend.clear())
    assert backend.usage() == (0, 0)


def test_a_bound_of_nothing_is_refused() -> None:
    with pytest.raises(ValidationError, match="greater than 0"):
        MemoryConfig(max_size_gib=0)
