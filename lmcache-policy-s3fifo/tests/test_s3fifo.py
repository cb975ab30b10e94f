"""What S3-FIFO evicts, what it remembers, and how it is configured."""

from __future__ import annotations

from typing import Any

import pytest

from lmcache_core import ChunkKey, ConfigError, Plugins, load_config
from lmcache_core.testing.simulated_memory import SimulatedMemory
from lmcache_policy_s3fifo import plugin
from lmcache_policy_s3fifo.config import S3FifoConfig
from lmcache_policy_s3fifo.policy import S3Fifo
from lmcache_policy_s3fifo.queue import RunQueue


def key(number: int) -> ChunkKey:
    return ChunkKey(number.to_bytes(16, "big"))


def memory(slots: int, **options: Any) -> SimulatedMemory:
    return SimulatedMemory(S3Fifo(S3FifoConfig(**options)), slots)


def here(found: SimulatedMemory, *numbers: int) -> list[int]:
    keys = {found.key(slot) for slot in found.held()}
    return [number for number in numbers if key(number) in keys]


def test_a_scan_passes_what_was_used() -> None:
    """LRU would have lost all of it."""
    found = memory(20)
    for _ in range(3):
        for number in range(10):
            found.request([key(number)])
    for number in range(100, 300):
        found.request([key(number)])
    assert here(found, *range(10)) == list(range(10))


@pytest.mark.parametrize(("promoted_after", "kept"), [(1, [0, 1]), (2, [0])])
def test_new_chunks_move_on_by_their_uses(promoted_after: int, kept: list[int]) -> None:
    found = memory(10, promoted_after=promoted_after)
    for number in (0, 1, 0, 1, 0):
        found.request([key(number)])
    for number in range(100, 140):
        found.request([key(number)])
    assert here(found, 0, 1) == kept


def test_what_comes_back_in_time_is_not_new() -> None:
    found = memory(10)
    for number in range(12):
        found.request([key(number)])
    assert here(found, 0, 1) == []
    found.request([key(0)])  # evicted as new, and remembered
    for number in range(100, 108):
        found.request([key(number)])
    assert here(found, 0) == [0]


@pytest.mark.parametrize("ghost_share", [0, 0.2])
def test_only_so_many_are_remembered(ghost_share: float) -> None:
    found = memory(10, ghost_share=ghost_share)
    for number in range(15):
        found.request([key(number)])
    found.request([key(0)])
    for number in range(100, 112):
        found.request([key(number)])
    assert here(found, 0) == []


def test_what_was_damaged_is_not_remembered() -> None:
    found = memory(10)
    slot = found.store(key(0))
    assert slot is not None
    found.forget(slot)
    for number in range(1, 10):
        found.request([key(number)])
    found.request([key(0)])
    for number in range(100, 112):
        found.request([key(number)])
    assert here(found, 0) == []


def test_the_end_of_a_prefix_goes_in_place_of_its_beginning() -> None:
    found = memory(6)
    found.request([key(number) for number in range(6)])
    found.request([key(9)])
    assert here(found, *range(6)) == [0, 1, 2, 3, 4]


def test_it_is_named_and_configured() -> None:
    plugins = Plugins(disabled=["lmcache-policy-s3fifo"], register=[plugin], environ={})
    wish = ["cache_policy=s3-fifo", "cache_policy_options.small_share=0.25"]
    config = load_config(plugins, environ={}, assignments=wish)
    assert config.core.cache_policy == "S3-FIFO"
    assert config.cache_policy_options == S3FifoConfig(small_share=0.25)
    policy = plugins.make_cache_policy(config.core.cache_policy, config.cache_policy_options)
    assert isinstance(policy, S3Fifo)
    with pytest.raises(ConfigError, match=r"cache_policy_options.small_share = '1'"):
        load_config(
            plugins, environ={}, assignments=[wish[0], "cache_policy_options.small_share=1"]
        )


def test_a_prompt_that_fills_the_small_queue_is_not_stored_to_its_end() -> None:
    """Nor does it push out what was used."""
    found = memory(40)
    for _ in range(3):
        for number in range(30):
            found.request([key(number)])
    found.request([key(number) for number in range(100, 120)])
    assert here(found, *range(30)) == list(range(30))
    assert here(found, *range(100, 120)) == list(range(100, 110))
    assert (found.refused, found.evicted, found.unanswered) == (1, 0, 0)


def test_a_run_leaves_a_queue_end_first() -> None:
    queue = RunQueue()
    queue.put(1)
    queue.put(2, after=1)
    queue.put(3)
    queue.put(4, after=1)  # what 1 no longer ends is a run of its own
    assert (len(queue), queue.runs) == (4, 3)
    order = []
    while len(queue):
        order.append(queue.first())
        queue.take(order[-1])
    assert order == [2, 1, 3, 4]
    queue.put(5)
    queue.put(6)
    queue.postpone()
    assert queue.first() == 6
    with pytest.raises(KeyError):
        queue.take(1)
