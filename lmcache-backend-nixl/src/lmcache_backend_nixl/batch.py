"""Turns values into descriptors of a transfer.

A value that lies in registered memory, as chunks do, moves from where it is. Another one goes
through a lane's slot. Where whole pages are asked for (O_DIRECT), the last one, in part, goes
through a lane's page: nothing behind a buffer is read or written.

Knows alignment and lanes. Knows nothing about what values are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias

from lmcache_backend_nixl.agent import Agent, Kind, Lane, Memory, Move, TransferFailed
from lmcache_backend_nixl.config import PAGE_BYTES

Op = Literal["READ", "WRITE"]


class Item(NamedTuple):
    """One value and where it goes or comes from."""

    position: int
    """The caller's."""
    view: memoryview
    """Exactly the value's bytes."""
    place: int
    device: int


_Located: TypeAlias = tuple[Item, int | None]
"""An item, and the address of its bytes if they are registered."""


class Batches:
    """Moves items through an agent, as many at a time as a lane has room for."""

    def __init__(self, agent: Agent, memory: Memory, kind: Kind, *, whole_pages: bool) -> None:
        self._agent = agent
        self._memory = memory
        self._kind: Kind = kind
        self._alignment = PAGE_BYTES if whole_pages else 1

    def write(self, items: Sequence[Item], lane: Lane) -> None:
        """Write every item.

        Raises:
            TransferFailed: some, or all, weren't written.
        """
        for part in self._rounds(items, lane):
            moves, _ = self._moves("WRITE", part, lane)
            self._agent.transfer("WRITE", self._kind, moves)

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
        moves, copies = self._moves("READ", items, lane)
        try:
            self._agent.transfer("READ", self._kind, moves)
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
    ) -> tuple[list[Move], list[tuple[memoryview, memoryview]]]:
        """Descriptors, and what to copy where once a read has ended."""
        moves: list[Move] = []
        copies: list[tuple[memoryview, memoryview]] = []
        slots = iter(range(lane.slots))

        def through(at: int, room: memoryview, part: memoryview, place: int, device: int) -> None:
            length = -(-part.nbytes // self._alignment) * self._alignment
            if op == "WRITE":
                room[: part.nbytes] = part
                room[part.nbytes : length] = bytes(length - part.nbytes)
            else:
                copies.append((part, room[: part.nbytes]))
            moves.append(Move(at, place, length, device))

        for number, (one, address) in enumerate(items):
            if address is None:
                through(*lane.slot(next(slots)), one.view, one.place, one.device)
                continue
            whole = one.view.nbytes // self._alignment * self._alignment
            if whole:
                moves.append(Move(address, one.place, whole, one.device))
            if whole < one.view.nbytes:
                tail = one.view[whole:]
                through(*lane.page(number), tail, one.place + whole, one.device)
        return moves, copies
