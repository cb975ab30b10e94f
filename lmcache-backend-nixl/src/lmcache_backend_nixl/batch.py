"""Turns values into descriptors of a transfer.

A value that lies in registered memory, as chunks do, moves from where it is. Another one goes
through a lane's slot. Where whole pages are asked for (O_DIRECT), the last one, in part, goes
through a lane's page: nothing behind a buffer is read or written.

Knows alignment and lanes. Knows nothing about what values are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lmcache_backend_nixl.agent import Agent, Kind, Lane, Memory, Move, TransferFailed
from lmcache_backend_nixl.config import PAGE_BYTES

Op = Literal["READ", "WRITE"]


@dataclass(frozen=True)
class Item:
    """One value and where it goes or comes from."""

    index: int
    """The caller's."""
    view: memoryview
    """Exactly the value's bytes."""
    place: int
    device: int


@dataclass
class _Round:
    """What fits a lane at one time."""

    items: list[Item] = field(default_factory=list)
    staged: int = 0


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
        """Read what can be read; answer the indices of these items.

        Raises:
            TransferFailed: nothing could.
        """
        done: list[int] = []
        failure: TransferFailed | None = None
        for part in self._rounds(items, lane):
            error = self._try_to_read(part, lane)
            if error is None:
                done += [one.index for one in part]
                continue
            failure = error
            if len(part) > 1:  # NIXL doesn't say which, and one shouldn't cost the others
                done += [one.index for one in part if self._try_to_read([one], lane) is None]
        if failure is not None and not done:
            raise failure
        return done

    def _try_to_read(self, items: Sequence[Item], lane: Lane) -> TransferFailed | None:
        moves, copies = self._moves("READ", items, lane)
        try:
            self._agent.transfer("READ", self._kind, moves)
        except TransferFailed as error:
            return error
        for target, source in copies:
            target[:] = source
        return None

    def _rounds(self, items: Sequence[Item], lane: Lane) -> Iterator[list[Item]]:
        current = _Round()
        for one in items:
            staged = self._memory.registered(one.view, self._alignment) is None
            if len(current.items) == lane.values or current.staged + staged > lane.slots:
                yield current.items
                current = _Round()
            current.items.append(one)
            current.staged += staged
        if current.items:
            yield current.items

    def _moves(
        self, op: Op, items: Sequence[Item], lane: Lane
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

        for number, one in enumerate(items):
            address = self._memory.registered(one.view, self._alignment)
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
