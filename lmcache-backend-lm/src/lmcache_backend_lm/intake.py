"""Values on their way into the arena, of one connection: by socket, staging memory, or region.

What a client announces is checked, and takes memory as it comes: nothing before its first byte.
Nobody sees a value before all of it is there, and what came too late or not at all gives its memory
back. Knows nothing about answers, nor about values on their way out.
"""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from collections.abc import Sequence

from lmcache_backend_lm import greeting, protocol
from lmcache_backend_lm.arena import Arena, trimmed
from lmcache_backend_lm.fence import fence
from lmcache_backend_lm.mapping import ReadOnlyMapping, is_sealed
from lmcache_backend_lm.protocol import Header, Op, ProtocolError
from lmcache_backend_lm.service import Region, Service
from lmcache_backend_lm.values import Held, Value
from lmcache_backend_lm.wire import Wire
from lmcache_core import ChunkKey, StoreOutcome

_CODES = {
    StoreOutcome.STORED: 0,
    StoreOutcome.ALREADY_PRESENT: 1,
    StoreOutcome.NOT_ADMITTED: 2,
}
_TOGETHER_BYTES = 32 << 20
"""So much of a STORE is waited for at a time; nobody sees its first value before its last."""
_TURN_BYTES = 4 << 20
"""After so many bytes of an OFFER, other clients of the same thread have their turn."""


class Intake:
    """Takes what STORE, STAGE and OFFER bring."""

    def __init__(self, service: Service, wire: Wire, scratch: memoryview) -> None:
        self._service = service
        self._wire = wire
        self._scratch = scratch
        self._staged: Staged | None = None
        self._region: Region | None = None

    def share(self, meta: memoryview, fds: Sequence[int]) -> None:
        """Map what the client shares; whoever calls closes ``fds``.

        Raises:
            ProtocolError: it isn't what was announced, or can't be mapped.
        """
        nbytes, piece, region = greeting.parse_share(meta)
        if self._staged is not None or len(fds) != (2 if region else 1):
            raise ProtocolError("SHARE comes once, with its descriptors, on a Unix socket")
        if not all(map(is_sealed, fds)):
            raise ProtocolError("the shared memory can still shrink; it must be sealed")
        try:
            self._staged = Staged(fds[0], nbytes, piece)
            if region:
                self._region = self._service.regions.attach(fds[1], region)
        except OSError as error:
            raise ProtocolError(f"the shared memory can't be mapped: {error}") from error

    def close(self) -> None:
        """Let go of the client's memory. No call may be under way. Idempotent."""
        staged, self._staged = self._staged, None
        if staged is not None:
            staged.close()
        region, self._region = self._region, None
        if region is not None:
            region.release()

    async def store(self, space: str, header: Header, meta: memoryview) -> bytes:
        """Take the values of one message; the answer is an outcome for each.

        Raises:
            ProtocolError, EOFError, OSError: nothing of an unfinished value stays.
        """
        service = self._service
        keys, rest = protocol.parse_names(meta, header.keys)
        if header.op is Op.OFFER:
            sizes, outcomes = await self._take_offers(space, header, keys, rest)
        else:
            sizes, outcomes = await self._take_values(space, header, keys, rest)
        stored: list[ChunkKey] = []
        nbytes = 0
        for key, size, outcome in zip(keys, sizes, outcomes, strict=True):
            if outcome is StoreOutcome.STORED:
                stored.append(key)
                nbytes += size
        if stored:
            service.counters.add("server_store_bytes", nbytes)
            if service.disk is not None:
                service.disk.write_behind(space, stored)
        for outcome, count in Counter(outcomes).items():
            service.counters.add("server_stores", count, outcome=outcome.name.lower())
        return bytes([_CODES[outcome] for outcome in outcomes])

    def _expect(self, coming: Held, space: str, key: ChunkKey, size: int) -> Value | StoreOutcome:
        if size > self._service.max_value_bytes:
            return StoreOutcome.NOT_ADMITTED
        return coming.expect(space, key, size)

    # -- from the region -------------------------------------------------------------------

    async def _take_offers(
        self, space: str, header: Header, keys: list[ChunkKey], rest: memoryview
    ) -> tuple[Sequence[int], list[StoreOutcome]]:
        region, staged = self._region, self._staged
        if region is None or staged is None or header.payload:
            raise ProtocolError("OFFER without a region in SHARE, or with values")
        sizes, offsets = protocol.parse_offers(rest, header.keys, region.nbytes)
        outcomes: list[StoreOutcome] = []
        with self._service.values.hold() as coming:
            for key, size, offset in zip(keys, sizes, offsets, strict=True):
                if not self._is_there(region, offset, size):
                    outcomes.append(StoreOutcome.NOT_ADMITTED)
                    continue
                value = coming.reserve(space, key, size)
                if not isinstance(value, Value):
                    outcomes.append(value)
                    continue
                await self._copy(region.address + offset, value)
                fence()
                if staged.vouches_for(header.request):
                    outcomes += coming.commit()
                else:
                    coming.drop()
                    outcomes.append(StoreOutcome.NOT_ADMITTED)
        return sizes, outcomes

    def _is_there(self, region: Region, offset: int, size: int) -> bool:
        """Whether a value can be read without making the system take memory for it."""
        service = self._service
        if size > service.max_value_bytes:
            return False
        for at in range(offset, offset + size, _TURN_BYTES):
            if not region.backing.holds(at, min(_TURN_BYTES, offset + size - at)):
                service.seldom.warn("sparse", "a client offers memory that nobody has written to")
                return False
        return True

    async def _copy(self, source: int, value: Value) -> None:
        """Fill ``value`` from an address, without the interpreter's lock, others having turns."""
        for start, length in value.extents():
            for at in range(0, length, _TURN_BYTES):
                some = min(_TURN_BYTES, length - at)
                ctypes.memmove(self._service.arena.address + start + at, source, some)
                source += some
                await self._wire.took(some)

    # -- from the socket and from staging memory -------------------------------------------

    async def _take_values(
        self, space: str, header: Header, keys: list[ChunkKey], rest: memoryview
    ) -> tuple[Sequence[int], list[StoreOutcome]]:
        sizes = protocol.parse_numbers(rest, header.keys)
        expected = sum(sizes)
        if header.op is Op.STAGE:
            if self._staged is None:
                raise ProtocolError("STAGE without SHARE")
            expected = 4 * sum(-(-size // self._staged.piece) for size in sizes)
        if header.payload != expected:
            raise ProtocolError(f"{header.payload} bytes of values, {expected} are announced")
        with self._service.values.hold() as coming:
            if header.op is Op.STAGE:
                outcomes: list[StoreOutcome] = []
                for key, size in zip(keys, sizes, strict=True):
                    outcomes.append(await self._receive_staged(header, coming, space, key, size))
            else:
                outcomes = await self._receive(coming, space, keys, sizes)
        return sizes, outcomes

    async def _receive(
        self, coming: Held, space: str, keys: list[ChunkKey], sizes: Sequence[int]
    ) -> list[StoreOutcome]:
        """Values from the socket, some at a time: one system call may fill several of them."""
        outcomes: list[StoreOutcome] = []
        nbytes = 0
        for key, size in zip(keys, sizes, strict=True):
            if size and not coming.values:
                await self._wire.begun()
            value = self._expect(coming, space, key, size)
            if size and value is StoreOutcome.NOT_ADMITTED and coming.values:
                # What is still coming can't be evicted, and counts as ahead of what came.
                outcomes += await self._finish(coming)
                nbytes = 0
                await self._wire.begun()
                value = self._expect(coming, space, key, size)
            if isinstance(value, Value):
                nbytes += size
                if nbytes >= _TOGETHER_BYTES or value.room < size:
                    outcomes += await self._finish(coming)
                    nbytes = 0
            else:
                outcomes += await self._finish(coming)
                nbytes = 0
                await self._wire.drain(size, self._scratch)
                outcomes.append(value)
        return outcomes + await self._finish(coming)

    async def _finish(self, coming: Held) -> list[StoreOutcome]:
        """Receive and commit the values of ``coming``, which is empty then.

        Only the last one may lack some of its memory, which it gets as it comes.
        """
        arena = self._service.arena
        values = [value for value in coming.values if value is not None]
        views = [view for value in values for view in arena.views(value.parts, value.room)]
        await self._wire.read(*views)
        for value in values[-1:]:
            while value.room < value.nbytes:
                await self._wire.begun()
                parts = coming.grow(value)
                if not parts:
                    coming.discard(value)
                    outcomes = coming.commit()
                    await self._wire.drain(value.nbytes - value.room, self._scratch)
                    return [*outcomes, StoreOutcome.NOT_ADMITTED]
                await self._wire.read(*arena.views(parts, value.nbytes))
        return coming.commit()

    async def _receive_staged(
        self, header: Header, coming: Held, space: str, key: ChunkKey, size: int
    ) -> StoreOutcome:
        staged = self._staged
        if staged is None:
            raise ProtocolError("STAGE without SHARE")
        data = memoryview(bytearray(4))
        head = protocol.header(Op.ACK, header.request, meta=4)
        filling: _Filling | StoreOutcome | None = None
        for start in range(0, size, staged.piece):
            await self._wire.read(data)
            slot = protocol.parse_slot(data, staged.slots)
            length = min(staged.piece, size - start)
            if filling is None:
                value = self._expect(coming, space, key, size)
                if isinstance(value, Value):
                    filling = _Filling(self._service.arena, coming, value)
                else:
                    filling = value
            if isinstance(filling, _Filling) and not filling.take(staged, slot, length):
                coming.drop()
                filling = StoreOutcome.NOT_ADMITTED
            await self._wire.write([head + data])
        if isinstance(filling, _Filling):
            return coming.commit()[0]
        return filling or StoreOutcome.NOT_ADMITTED  # a value of no bytes


class Staged:
    """A client's staging memory, mapped here.

    Raises:
        ProtocolError: it is smaller than announced.
        OSError: it can't be mapped.
    """

    def __init__(self, fd: int, nbytes: int, piece: int) -> None:
        if os.fstat(fd).st_size < nbytes:
            raise ProtocolError("the staging memory is smaller than announced")
        self.piece = piece
        self.slots = nbytes // piece
        self._map = ReadOnlyMapping(fd, nbytes)
        self._address = self._map.address
        self._vouchers = nbytes % piece // 8

    def copy(self, slot: int, offset: int, target: int, nbytes: int) -> None:
        """Copy from ``offset`` of a slot to an address, without the interpreter's lock."""
        ctypes.memmove(target, self._address + slot * self.piece + offset, nbytes)

    def close(self) -> None:
        """Unmap it; nobody may be copying."""
        self._map.close()

    def vouches_for(self, request: int) -> bool:
        """Whether the client says that what this OFFER points to hasn't changed."""
        if not self._vouchers:
            return False
        at = self.slots * self.piece + request % self._vouchers * 8
        return bool(ctypes.c_uint64.from_address(self._address + at).value == request)


class _Filling:
    """A value that comes piece by piece: parts of the arena, one after the other, and then more."""

    def __init__(self, arena: Arena, coming: Held, value: Value) -> None:
        self._arena = arena
        self._coming = coming
        self._value = value
        self._parts = list(reversed(trimmed(value.parts, value.room)))

    def take(self, staged: Staged, slot: int, length: int) -> bool:
        """Copy the first ``length`` bytes of ``slot`` to the next place; whether there is one."""
        offset = 0
        while offset < length:
            if not self._parts:
                self._parts = list(reversed(self._coming.grow(self._value)))
                if not self._parts:
                    return False
            start, room = self._parts.pop()
            some = min(room, length - offset)
            staged.copy(slot, offset, self._arena.address + start, some)
            if some < room:
                self._parts.append((start + some, room - some))
            offset += some
        return True
