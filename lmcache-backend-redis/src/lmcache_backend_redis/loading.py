"""Chunks on their way in from one node, piece by piece into the caller's buffers.

Knows which replies belong where. Knows nothing about keys, nor about other nodes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from lmcache_backend_redis.commands import is_whole
from lmcache_backend_redis.layout import HEAD, Head
from lmcache_backend_redis.resp import Wire, commands

IN_FLIGHT_BYTES: Final = 4 << 20
"""How much is asked for before the first of it has been read. Enough to keep both sides busy, and
little enough that the server's replies stay in its processor's cache. Tuned with
bench/redis_store.py on two cores over loopback."""


@dataclass
class _Value:
    """One chunk on its way in."""

    position: int
    into: memoryview
    nbytes: int = 0
    missing: int = 0
    """Pieces that haven't been read yet."""
    lost: bool = False


@dataclass
class _Ask:
    """One GET: the head of ``value``, or the piece that belongs at ``place``."""

    name: bytes
    expected_bytes: int
    value: _Value
    place: slice | None = None


class Load:
    """One batch from one node, at most `IN_FLIGHT_BYTES` of it on the way at a time.

    Heads are asked for in order; a long value's pieces are asked for as soon as its head has come.
    """

    def __init__(self, wire: Wire, piece_bytes: int) -> None:
        self._wire = wire
        self._piece_bytes = piece_bytes
        self._asked: deque[_Ask] = deque()
        self._waiting: deque[_Ask] = deque()
        self._in_flight = 0

    async def run(
        self,
        positions: Iterable[int],
        names: Sequence[bytes],
        into: Sequence[memoryview],
        sizes: list[int],
    ) -> None:
        values = [_Value(i, into[i]) for i in positions]
        for value in values:
            # A chunk that fills a large buffer is in pieces, and its head is short.
            capacity = value.into.nbytes
            expected = HEAD.size + (capacity if capacity <= self._piece_bytes else 0)
            self._waiting.append(_Ask(names[value.position], expected, value))
        while self._waiting or self._asked:
            await self._ask()
            one = self._asked.popleft()
            self._in_flight -= one.expected_bytes
            if one.place is None:
                await self._read_head(one)
            else:
                await self._read_piece(one, one.place)
        for value in values:
            if not (value.lost or value.missing):
                sizes[value.position] = value.nbytes

    async def _ask(self) -> None:
        if self._asked and self._in_flight > IN_FLIGHT_BYTES // 2:
            return  # soon, for several at once
        asked: list[bytes] = []
        while self._waiting:
            one = self._waiting[0]
            if one.place is not None and one.value.lost:
                self._waiting.popleft()
                continue
            full = self._in_flight + one.expected_bytes > IN_FLIGHT_BYTES
            if full and self._asked:
                break
            self._asked.append(self._waiting.popleft())
            self._in_flight += one.expected_bytes
            asked.append(one.name)
        await self._wire.send([commands(b"GET", asked)])

    async def _read_head(self, one: _Ask) -> None:
        wire, value = self._wire, one.value
        length = await wire.bulk_length()
        if length is None:
            value.lost = True
            return
        whole, room = length >= HEAD.size, value.into.nbytes
        head = Head.unpack(await wire.take(HEAD.size), room) if whole else None
        follows = length - HEAD.size if whole else length
        if head is None or not is_whole(head, follows):
            value.lost = True
            await wire.skip(follows)
        else:
            value.nbytes = head.value_bytes
            if follows:
                await wire.read_into(value.into[:follows])
            pieces = head.pieces(one.name)
            value.missing = len(pieces)
            for name, place in pieces:
                self._waiting.append(_Ask(name, place.stop - place.start, value, place))
        await wire.end_bulk()

    async def _read_piece(self, one: _Ask, place: slice) -> None:
        length = await self._wire.bulk_length()
        if length is None:
            one.value.lost = True
            return
        if length == place.stop - place.start:
            await self._wire.read_into(one.value.into[place])
            one.value.missing -= 1
        else:
            one.value.lost = True
            await self._wire.skip(length)
        await self._wire.end_bulk()
