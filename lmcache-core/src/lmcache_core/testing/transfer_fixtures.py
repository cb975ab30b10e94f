"""What the tests of transfer channels need: ends here and in other processes, and ranges.

Knows nothing about what is tested.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import pytest

from lmcache_core.contracts.transfer import Range, TransferChannel
from lmcache_core.testing.loop import Loop
from lmcache_core.testing.transfer_peer import End, Process, descriptor_of, pattern
from lmcache_core.tiers.peers import make_channel

REGION_BYTES = 4 << 20
HANG_S = 10.0
"""What takes longer waits for somebody who hangs. No correct channel comes near it."""
OpenEnd = Callable[..., End]
StartProcess = Callable[..., Process]


def scattered(count: int, nbytes: int, seed: int = 1) -> list[Range]:
    """``count`` ranges of ``nbytes`` each, in no order, that don't overlap on either side."""
    rng = random.Random(seed)  # noqa: S311
    places = range(REGION_BYTES // nbytes)
    local, remote = rng.sample(places, count), rng.sample(places, count)
    return [Range(a * nbytes, b * nbytes, nbytes) for a, b in zip(local, remote, strict=True)]


def moved(into: bytes, source: bytes, ranges: Sequence[tuple[int, int, int]]) -> bytes:
    """``into``, once ranges (at, from, length) of ``source`` were moved there."""
    after = bytearray(into)
    for at, origin, nbytes in ranges:
        after[at : at + nbytes] = source[origin : origin + nbytes]
    return bytes(after)


class TransferFixtures:
    """Opens ends; subclasses are tests."""

    channel: ClassVar[str] = ""
    options: ClassVar[Mapping[str, Any]] = {}
    isolated: ClassVar[bool | None] = None
    """Whether it runs in a process of its own; ``None``: as its descriptor says."""
    process_bytes: ClassVar[int] = 64 << 20
    """Moved between two processes."""

    @pytest.fixture
    def run(self) -> Iterator[Loop]:
        loop = Loop()
        yield loop
        loop.close()

    @pytest.fixture
    def make(self) -> Callable[[], TransferChannel]:
        assert self.channel, "set `channel` to the name that it is installed under"
        found = descriptor_of(self.channel)
        config = found.config.model_validate(dict(self.options))
        return lambda: make_channel(found, config, isolated=self.isolated)

    @pytest.fixture
    def opened(self, make: Callable[[], TransferChannel], run: Loop) -> Iterator[OpenEnd]:
        """Opens one more end, filled with ``seed``'s pattern; all are closed at the end."""
        ends: list[End] = []

        def open_one(seed: int, *, nbytes: int = REGION_BYTES, writable: bool = True) -> End:
            end = End(make(), nbytes)
            end.view[:] = pattern(seed, nbytes)
            run(end.open(writable=writable))
            ends.append(end)
            return end

        yield open_one
        for end in ends:
            run(end.channel.close())

    @pytest.fixture
    def process(self) -> Iterator[StartProcess]:
        """Starts one more process with an end; all are ended at the end."""
        started: list[Process] = []

        def start(seed: int, nbytes: int = REGION_BYTES, *, writable: bool = True) -> Process:
            one = Process(
                self.channel, self.options, nbytes, writable=writable, isolated=self.isolated
            )
            started.append(one)
            one.fill(seed)
            return one

        yield start
        for one in started:
            one.end()

    def kind(self) -> str:
        """The name in the descriptor of the channel under test."""
        return descriptor_of(self.channel).name
