"""The part of the transfer kit that needs a second process: moving, dying, hanging.

See `lmcache_core.testing.transfer`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from lmcache_core.contracts.transfer import Range
from lmcache_core.errors import BackendUnavailable
from lmcache_core.testing.loop import Loop
from lmcache_core.testing.transfer_fixtures import (
    HANG_S,
    REGION_BYTES,
    OpenEnd,
    StartProcess,
    TransferFixtures,
)
from lmcache_core.testing.transfer_peer import pattern


class BetweenProcesses(TransferFixtures):
    """Sentences of the contract that one process can't show."""

    def test_read_from_another_process(
        self, opened: OpenEnd, process: StartProcess, run: Loop
    ) -> None:
        size = self.process_bytes
        here, there = opened(1, nbytes=size), process(2, size)
        half = size // 2
        peer = run(here.channel.connect(there.descriptor))
        run(here.channel.read(peer, [Range(half, half, half), Range(0, 0, half)]))
        assert here.digest() == there.digest()

    def test_write_to_another_process(
        self, opened: OpenEnd, process: StartProcess, run: Loop
    ) -> None:
        size = self.process_bytes
        here, there = opened(1, nbytes=size), process(2, size)
        peer = run(here.channel.connect(there.descriptor))
        run(here.channel.write(peer, [Range(0, 0, size)], b"all of it"))
        ((_, data, digest),) = there.notes(1)
        assert (data, digest, there.digest()) == (b"all of it", here.digest(), here.digest())

    def test_another_process_reads_and_writes_here(
        self, opened: OpenEnd, process: StartProcess, run: Loop
    ) -> None:
        here, there = opened(1), process(2)
        whole = [Range(0, 0, REGION_BYTES)]
        run(asyncio.to_thread(there.read, here.channel.descriptor, whole))
        assert there.digest() == here.digest()
        there.fill(3)
        run(asyncio.to_thread(there.write, here.channel.descriptor, whole, b"back"))
        run(here.notes_came(1))
        assert here.view == pattern(3, REGION_BYTES)

    def test_a_process_that_was_killed_is_unavailable(
        self, opened: OpenEnd, process: StartProcess, run: Loop
    ) -> None:
        size = self.process_bytes
        here, there = opened(1, nbytes=size), process(2, size)
        peer = run(here.channel.connect(there.descriptor))

        async def kill_meanwhile(call: Callable[[], Awaitable[None]]) -> None:
            async def again_and_again() -> None:
                while True:
                    await call()

            moving = asyncio.ensure_future(again_and_again())
            await asyncio.wait([moving], timeout=0.05)  # somewhere in the middle
            await asyncio.to_thread(there.end)
            done, _ = await asyncio.wait([moving], timeout=HANG_S)
            assert done, "a call to a process that is gone goes on"
            moving.result()

        with pytest.raises(BackendUnavailable):
            run(kill_meanwhile(lambda: here.channel.read(peer, [Range(0, 0, size)])))
        with pytest.raises(BackendUnavailable):
            run(here.channel.write(peer, [Range(0, 0, 8)]))
        with pytest.raises(BackendUnavailable):
            run(here.channel.connect(there.descriptor))
        other = opened(3)
        run(
            here.channel.read(run(here.channel.connect(other.channel.descriptor)), [Range(0, 0, 8)])
        )
        assert here.view[:8] == other.view[:8]

    def test_a_process_that_hangs_costs_others_nothing(
        self, opened: OpenEnd, process: StartProcess, run: Loop
    ) -> None:
        here, other, hung = opened(1), opened(2), process(3)
        calls = 2 * here.channel.capabilities.max_concurrency

        async def read_from_both() -> bool:
            bad = await here.channel.connect(hung.descriptor)
            good = await here.channel.connect(other.channel.descriptor)
            hung.stop()
            stuck = [
                asyncio.ensure_future(here.channel.read(bad, [Range(i << 12, 0, 1 << 12)]))
                for i in range(1, calls + 1)
            ]
            reading = asyncio.ensure_future(here.channel.read(good, [Range(0, 0, 8)]))
            done, _ = await asyncio.wait([reading], timeout=HANG_S)
            hung.end()
            await asyncio.wait([*stuck, reading])
            for one in stuck:
                one.exception()
            return bool(done)

        assert run(read_from_both())
        assert here.view[:8] == other.view[:8]

    def test_a_cancelled_call_to_a_process_leaves_memory_alone(
        self, opened: OpenEnd, process: StartProcess, run: Loop
    ) -> None:
        here, there = opened(1), process(2)
        mine = b"\xee" * (REGION_BYTES - 4096)

        async def cancel() -> None:
            peer = await here.channel.connect(there.descriptor)
            there.stop()
            reading = asyncio.ensure_future(here.channel.read(peer, [Range(4096, 4096, len(mine))]))
            await asyncio.wait([reading], timeout=0.2)  # asked, and not answered
            reading.cancel()
            done, _ = await asyncio.wait([reading], timeout=2.0)
            if done:  # the memory is free, it said; if not, it is once the peer goes on
                here.view[4096:] = mine
                there.resume()
            else:
                there.resume()
                await asyncio.wait([reading])
                here.view[4096:] = mine
            again = await here.channel.connect(there.descriptor)
            for _ in range(50):
                await here.channel.read(again, [Range(0, 0, 4096)])

        run(cancel())
        assert here.view[4096:] == mine

    def test_close_ends_calls_to_a_process_that_hangs(
        self, opened: OpenEnd, process: StartProcess, run: Loop
    ) -> None:
        here, there = opened(1), process(2)

        async def close_meanwhile() -> None:
            peer = await here.channel.connect(there.descriptor)
            there.stop()
            reading = asyncio.ensure_future(here.channel.read(peer, [Range(0, 0, REGION_BYTES)]))
            done, _ = await asyncio.wait([reading], timeout=0.2)
            await here.channel.close()
            here.view[:] = pattern(4, REGION_BYTES)
            there.resume()
            if not done:  # some can read a process that hangs
                with pytest.raises(BackendUnavailable):
                    await reading

        run(close_meanwhile())
        there.digest()  # it goes on
        assert here.view == pattern(4, REGION_BYTES)
