"""Turns values into descriptors of a transfer.

A value that lies in registered memory, as chunks do, moves from where it is. Another one goes
through a lane's slot. Where whole pages are asked for (O_DIRECT), the last one, in part, goes
through a lane's page: nothing behind a buffer is read or written.

Knows alignment and lanes. Knows nothing about what values are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

from lmcache_backend_nixl.agent import Agents, Kind, Lane, Memory, Moves, Op, TransferFailed
from lmcache_backend_nixl.config import PAGE_BYTES
from lmcache_backend_nixl.slots import Places, cut, rounded


class Item(NamedTuple):
    """One value and where it goes or comes from."""

    position: int
    """The caller's."""
    view: memoryview
    """Exactly the value's bytes."""
    places: Places
    """A file or object and an offset; it is cut into a part for each."""
    devices: tuple[int, ...]
    """What NIXL knows files or objects by."""


_Located: TypeAlias = tuple[Item, int | None]
"""An item, and the address of its bytes if they are registered."""


class Batches:
    """Moves items through an agent, as many at a time as a lane has room for."""

    def __init__(self, agents: Agents, memory: Memory, kind: Kind, *, whole_pages: bool) -> None:
        self._agents = agents
        self._memory = memory
        self._kind: Kind = kind
        self._alignment = PAGE_BYTES if whole_pages else 1

    def write(self, items: Sequence[Item], lane: Lane) -> None:
        """Write every item.

        Raises:
            TransferFailed: some, or all, weren't written.
        """
        for part in self._rounds(items, lane):
            parts, _ = self._moves("WRITE", part, lane)
            self._agents.transfer("WRITE", self._kind, parts)

    def read(self, items: Sequence[Item], lane: Lane) -> list[int]:
        """Read what can be read; answer the positions of these items.

        Raises:
            TransferFailed: nothing could.
        """
        done: list[int] = []
        failure: TransferFailed | None = None
        for part in self._rounds(items, lane):
            error = self._try_to_read(part, lane)
            if error is None:
                done += [item.position for item, _ in part]
                continue
            failure = error
            if len(part) > 1:  # NIXL doesn't say which, and one shouldn't cost the others
                done += [one[0].position for one in part if self._try_to_read([one], lane) is None]
        if failure is not None and not done:
            raise failure
        return done

    def _try_to_read(self, items: Sequence[_Located], lane: Lane) -> TransferFailed | None:
        parts, copies = self._moves("READ", items, lane)
        try:
            self._agents.transfer("READ", self._kind, parts)
        except TransferFailed as error:
            return error
        for target, source in copies:
            target[:] = source
        return None

    def _rounds(self, items: Sequence[Item], lane: Lane) -> Iterator[list[_Located]]:
        addresses = self._memory.registered([one.view for one in items], self._alignment)
        current: list[_Located] = []
        staged = 0
        for located in zip(items, addresses, strict=True):
            needs_slot = located[1] is None
            if len(current) == lane.values or staged + needs_slot > lane.slots:
                yield current
                current, staged = [], 0
            current.append(located)
            staged += needs_slot
        if current:
            yield current

    def _moves(
        self, op: Op, items: Sequence[_Located], lane: Lane
    ) -> tuple[list[Moves], list[tuple[memoryview, memoryview]]]:
        """Descriptors for each agent, and what to copy where once a read has ended."""
        parts = [Moves() for _ in range(max(len(one.devices) for one, _ in items))]
        copies: list[tuple[memoryview, memoryview]] = []
        slots = iter(range(lane.slots))

        def through(room: memoryview, part: memoryview) -> None:
            if op == "READ":
                copies.append((part, room[: part.nbytes]))
                return
            room[: part.nbytes] = part
            padded = rounded(part.nbytes, self._alignment)
            room[part.nbytes : padded] = bytes(padded - part.nbytes)

        for number, (one, address) in enumerate(items):
            nbytes = one.view.nbytes
            padded = rounded(nbytes, self._alignment)
            direct = padded  # so much moves between the same memory and the files
            if address is None:
                address, room = lane.slot(next(slots))
                through(room, one.view)
            elif padded != nbytes:
                direct -= self._alignment
            edges = cut(padded, len(one.places))
            for (file, place), (start, end) in zip(one.places, edges, strict=True):
                if start < direct:
                    length = min(end, direct) - start
                    parts[file].add(address + start, place, length, one.devices[file])
                if start <= direct < end:
                    page, room = lane.page(number)
                    through(room, one.view[direct:])
                    at = place + direct - start
                    parts[file].add(page, at, self._alignment, one.devices[file])
        return parts, copies
