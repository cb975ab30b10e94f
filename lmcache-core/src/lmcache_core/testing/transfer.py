"""Conformance tests for transfer channels.

In your plugin::

    from lmcache_core.testing.transfer import TransferChannelTests

    class TestMyChannel(TransferChannelTests):
        channel = "mine"                 # as it is installed, or "module:descriptor"
        options = {"device": "lo"}

Both ends are opened with these options, in one process and in two, on this machine. Subclass it
once for each configuration that you support. What a channel doesn't claim in its capabilities isn't
asked of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest

from lmcache_core.contracts.transfer import MAX_NOTE_BYTES, PeerDescriptor, Range, TransferChannel
from lmcache_core.errors import BackendError, BackendRejected, BackendUnavailable
from lmcache_core.testing.loop import Loop, watched
from lmcache_core.testing.transfer_fixtures import REGION_BYTES, OpenEnd, moved, scattered
from lmcache_core.testing.transfer_peer import End, pattern
from lmcache_core.testing.transfer_processes import BetweenProcesses

OUTSIDE = (
    Range(0, REGION_BYTES - 1, 2),
    Range(REGION_BYTES - 1, 0, 2),
    Range(0, REGION_BYTES, 1),
    Range(0, -1, 2),
    Range(-1, 0, 2),
    Range(64, 64, -32),
    Range(0, 0, 1 << 63),
    Range(0, (1 << 64) - 8, 16),
)


class TransferChannelTests(BetweenProcesses):
    """The contract of `TransferChannel`, one test for each sentence of it."""

    # -- moving bytes ----------------------------------------------------------------------

    def test_read_fills_the_ranges_and_nothing_else(self, opened: OpenEnd, run: Loop) -> None:
        here, there = opened(1), opened(2)
        before, source, ranges = bytes(here.view), bytes(there.view), scattered(7, 65_537)
        peer = run(here.channel.connect(there.channel.descriptor))
        run(here.channel.read(peer, ranges))
        assert bytes(here.view) == moved(before, source, ranges)
        assert bytes(there.view) == source

    def test_write_fills_the_ranges_and_nothing_else(self, opened: OpenEnd, run: Loop) -> None:
        here, there = opened(1), opened(2)
        before, source, ranges = bytes(there.view), bytes(here.view), scattered(7, 65_537)
        peer = run(here.channel.connect(there.channel.descriptor))
        run(here.channel.write(peer, ranges))
        assert bytes(there.view) == moved(before, source, [(b, a, n) for a, b, n in ranges])
        assert bytes(here.view) == source

    def test_many_small_ranges(self, opened: OpenEnd, run: Loop) -> None:
        here, there = opened(1), opened(2)
        before, source, ranges = bytes(here.view), bytes(there.view), scattered(5000, 48)
        peer = run(here.channel.connect(there.channel.descriptor))
        run(here.channel.read(peer, ranges))
        assert bytes(here.view) == moved(before, source, ranges)

    def test_first_and_last_byte(self, opened: OpenEnd, run: Loop) -> None:
        here, there = opened(1), opened(2)
        before, source, last = bytes(here.view), bytes(there.view), REGION_BYTES - 1
        ranges = [Range(0, last, 1), Range(last, 0, 1)]
        peer = run(here.channel.connect(there.channel.descriptor))
        run(here.channel.read(peer, ranges))
        assert bytes(here.view) == moved(before, source, ranges)

    def test_nothing_to_move(self, opened: OpenEnd, run: Loop) -> None:
        here, there = opened(1), opened(2)
        before = here.digest(), there.digest()
        peer = run(here.channel.connect(there.channel.descriptor))
        for ranges in ([], [Range(0, 0, 0), Range(REGION_BYTES, REGION_BYTES, 0)]):
            run(here.channel.read(peer, ranges))
            run(here.channel.write(peer, ranges))
        assert (here.digest(), there.digest()) == before
        assert there.notes == []

    def test_concurrent_calls(self, opened: OpenEnd, run: Loop) -> None:
        """Also in both directions, and more than have a connection."""
        here, there = opened(1), opened(2)
        before, source = bytes(here.view), bytes(there.view)
        ranges = [Range(i << 16, (31 - i) << 16, 1 << 16) for i in range(32)]
        upper = [(REGION_BYTES // 2 + a, REGION_BYTES // 2 + b, n) for a, b, n in ranges]

        async def both() -> None:
            peer = await here.channel.connect(there.channel.descriptor)
            back = await there.channel.connect(here.channel.descriptor)
            reads = [here.channel.read(peer, [one]) for one in ranges]
            # `there` writes into the upper half of `here`, which `here` doesn't touch.
            writes = [there.channel.write(back, [Range(b, a, n)]) for a, b, n in upper]
            await asyncio.gather(*reads, *writes)

        run(both())
        assert bytes(here.view) == moved(before, source, [*ranges, *upper])

    def test_regions_of_different_sizes(self, opened: OpenEnd, run: Loop) -> None:
        here, there = opened(1, nbytes=1 << 16), opened(2)
        peer = run(here.channel.connect(there.channel.descriptor))
        run(here.channel.read(peer, [Range(0, REGION_BYTES - (1 << 16), 1 << 16)]))
        assert here.view == there.view[-(1 << 16) :]

    # -- what is refused -------------------------------------------------------------------

    @pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
    def test_a_range_outside_is_refused_and_nothing_moves(
        self, opened: OpenEnd, run: Loop, write: bool
    ) -> None:
        here, there = opened(1), opened(2)
        before = here.digest(), there.digest()
        peer = run(here.channel.connect(there.channel.descriptor))
        call = here.channel.write if write else here.channel.read
        for outside in OUTSIDE:
            with pytest.raises(BackendRejected):
                run(call(peer, [Range(0, 0, 4096), outside]))
            assert (here.digest(), there.digest()) == before, outside
        run(call(peer, [Range(0, 0, 4096)]))  # the peer is none the worse for it

    def test_a_region_that_is_not_writable(self, opened: OpenEnd, run: Loop) -> None:
        here, there = opened(1), opened(2, writable=False)
        before = there.digest()
        peer = run(here.channel.connect(there.channel.descriptor))
        assert not peer.writable
        with pytest.raises(BackendRejected):
            run(here.channel.write(peer, [Range(0, 0, 4096)]))
        assert there.digest() == before
        run(here.channel.read(peer, [Range(0, 0, 4096)]))
        run(here.channel.write(peer, [], b"a note alone"))
        run(there.notes_came(1))

    # -- notes -----------------------------------------------------------------------------

    def test_a_note_comes_after_its_bytes(self, opened: OpenEnd, run: Loop) -> None:
        here, there = opened(1), opened(2)
        peer = run(here.channel.connect(there.channel.descriptor))
        expected = bytes(there.view)
        for number in range(20):
            ranges = scattered(3, 100_000, seed=number)
            run(here.channel.write(peer, ranges, b"%d" % number))
            run(there.notes_came(number + 1))
            expected = moved(expected, here.view.tobytes(), [(b, a, n) for a, b, n in ranges])
            assert bytes(there.view) == expected
            assert there.digests[-1] == there.digest()
        run(here.channel.write(peer, [], b"the last"))
        run(there.notes_came(21))
        assert [note.data for note in there.notes] == [*(b"%d" % i for i in range(20)), b"the last"]

    def test_notes_are_whole_in_order_and_say_who_sent_them(
        self, opened: OpenEnd, run: Loop
    ) -> None:
        here, there = opened(1), opened(2)
        name = PeerDescriptor.decode(here.channel.descriptor, self.kind()).name
        peer = run(here.channel.connect(there.channel.descriptor))
        sent = [bytes([i]) * (1 + i * 7) for i in range(40)] + [b"\0" * MAX_NOTE_BYTES]

        async def send() -> None:
            for note in sent:
                await here.channel.write(peer, [], note)
            await here.channel.write(peer, [Range(0, 0, 8)])  # without one
            await there.notes_came(len(sent))

        run(send())
        assert [note.data for note in there.notes] == sent
        assert {note.sender for note in there.notes} == {name}
        assert here.notes == []

    def test_notes_come_on_the_event_loop(self, opened: OpenEnd, run: Loop) -> None:
        here, there = opened(1), opened(2)
        threads: list[threading.Thread] = []
        there.on_note = lambda: threads.append(threading.current_thread())
        peer = run(here.channel.connect(there.channel.descriptor))
        run(here.channel.write(peer, [], b"where?"))
        run(there.notes_came(1))
        assert threads == [threading.current_thread()]

    def test_a_note_that_is_too_long_is_refused(self, opened: OpenEnd, run: Loop) -> None:
        here, there = opened(1), opened(2)
        peer = run(here.channel.connect(there.channel.descriptor))
        with pytest.raises(BackendRejected):
            run(here.channel.write(peer, [Range(0, 0, 8)], bytes(MAX_NOTE_BYTES + 1)))
        run(here.channel.write(peer, [], b"the next one"))
        run(there.notes_came(1))
        assert [note.data for note in there.notes] == [b"the next one"]

    # -- descriptors -----------------------------------------------------------------------

    def test_a_damaged_descriptor_is_refused(self, opened: OpenEnd, run: Loop) -> None:
        here, there = opened(1), opened(2)
        whole = there.channel.descriptor
        damaged = [b"", b"LMPD", whole[:-1], whole + b"\0", bytes(len(whole))]
        damaged += [
            whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :]
            for at in range(0, len(whole), 5)
        ]
        for one in damaged:
            with pytest.raises(BackendRejected):
                run(here.channel.connect(one))

    def test_another_kind_of_channels_descriptor_is_refused(
        self, opened: OpenEnd, run: Loop
    ) -> None:
        here, there = opened(1), opened(2)
        found = PeerDescriptor.decode(there.channel.descriptor, self.kind())
        with pytest.raises(BackendRejected, match="another-kind"):
            run(here.channel.connect(replace(found, channel="another-kind").encode()))

    def test_a_forged_descriptor_leads_nowhere(self, opened: OpenEnd, run: Loop) -> None:
        """Two real ones, mixed: what an attacker who knows one region makes up for another."""
        here, one, two = opened(1), opened(2), opened(3)
        if not here.channel.capabilities.protected:
            pytest.skip("capabilities.protected is False: the channel doesn't claim it")
        first, second = (
            PeerDescriptor.decode(end.channel.descriptor, self.kind()) for end in (one, two)
        )
        real = {first.body, second.body}
        for at in range(1, len(first.body), 3):
            body = first.body[:at] + second.body[at:]
            if body in real:
                continue
            with pytest.raises(BackendError):
                run(here.channel.connect(replace(first, body=body).encode()))

    def test_descriptors_name_each_channel_differently(self, opened: OpenEnd) -> None:
        ends = [opened(seed) for seed in range(3)]
        found = [PeerDescriptor.decode(end.channel.descriptor, self.kind()) for end in ends]
        assert len({one.name for one in found}) == 3

    # -- peers that go ---------------------------------------------------------------------

    def test_a_channel_that_was_closed_is_unavailable(self, opened: OpenEnd, run: Loop) -> None:
        here, there = opened(1), opened(2)
        peer = run(here.channel.connect(there.channel.descriptor))
        descriptor = there.channel.descriptor
        run(there.channel.close())
        opened(3)  # perhaps where the other one was
        with pytest.raises(BackendUnavailable):
            run(here.channel.read(peer, [Range(0, 0, 4096)]))
        with pytest.raises(BackendUnavailable):
            run(here.channel.connect(descriptor))

    def test_after_close_nobody_touches_the_region(self, opened: OpenEnd, run: Loop) -> None:
        here, there = opened(1), opened(2)
        peer = run(here.channel.connect(there.channel.descriptor))

        async def write_until_it_fails() -> None:
            while True:
                await here.channel.write(peer, [Range(0, 0, REGION_BYTES)])

        async def close_meanwhile() -> bytes:
            writing = asyncio.ensure_future(write_until_it_fails())
            await here.channel.read(peer, [Range(0, 0, 8)])
            await there.channel.close()
            there.view[:] = pattern(9, REGION_BYTES)
            with pytest.raises(BackendUnavailable):
                await writing
            return bytes(there.view)

        assert run(close_meanwhile()) == pattern(9, REGION_BYTES)

    def test_disconnect(self, opened: OpenEnd, run: Loop) -> None:
        here, there = opened(1), opened(2)
        peer = run(here.channel.connect(there.channel.descriptor))
        run(here.channel.disconnect(peer))
        run(here.channel.disconnect(peer))
        with pytest.raises(BackendUnavailable):
            run(here.channel.read(peer, [Range(0, 0, 8)]))
        again = run(here.channel.connect(there.channel.descriptor))
        run(here.channel.read(again, [Range(0, 0, 8)]))
        assert here.view[:8] == there.view[:8]

    # -- manners ---------------------------------------------------------------------------

    def test_the_event_loop_is_never_blocked(self, opened: OpenEnd, run: Loop) -> None:
        here, there = opened(1), opened(2)

        async def everything() -> None:
            peer = await here.channel.connect(there.channel.descriptor)
            await asyncio.gather(
                *(here.channel.read(peer, [Range(i << 18, 0, 1 << 18)]) for i in range(8))
            )
            await here.channel.write(peer, [Range(0, 0, REGION_BYTES)], b"note")
            await there.notes_came(1)
            await here.channel.disconnect(peer)

        run(everything())  # whatever is imported or started at the first call
        there.notes.clear()
        _, blocked = watched(run, everything)
        assert not blocked, blocked[0]

    def test_close_leaves_no_thread_and_no_view(
        self, make: Callable[[], TransferChannel], run: Loop
    ) -> None:
        before = set(threading.enumerate())
        here, there = End(make(), REGION_BYTES), End(make(), REGION_BYTES)
        for end in (here, there):
            run(end.open(writable=True))
        peer = run(here.channel.connect(there.channel.descriptor))
        run(here.channel.write(peer, [Range(0, 0, REGION_BYTES)], b"note"))
        run(there.notes_came(1))
        with contextlib.suppress(BackendError):
            run(here.channel.read(peer, [Range(0, REGION_BYTES, 1)]))
        for end in (there, here):
            run(end.channel.close())
            run(end.channel.close())
        run.stop_own_threads()
        left = [t.name for t in threading.enumerate() if t not in before and t.is_alive()]
        assert left == []
        for end in (here, there):
            end.view.release()
            end.memory.close()  # raises BufferError while anything still exports it
