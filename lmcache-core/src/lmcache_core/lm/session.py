"""The server's side of one connection: takes requests one by one and answers them.

What a client announces is checked before anything is allocated for it, values are received into
the arena and sent from it, and whatever a client held is given back when it
goes, however it goes. While one answer waits for a slow client, only that
client waits. Knows nothing about listening, nor about other sessions.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import hmac
import logging
import mmap
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lmcache_core.keys import ChunkKey
from lmcache_core.lm import protocol
from lmcache_core.lm.arena import Arena
from lmcache_core.lm.protocol import (
    HEADER_BYTES,
    MAX_HELLO_BYTES,
    MAX_META_BYTES,
    MISSING,
    Header,
    Op,
    ProtocolError,
    Status,
    Welcome,
)
from lmcache_core.lm.values import Value, Values
from lmcache_core.lm.wire import Wire
from lmcache_core.metrics import Counters
from lmcache_core.storage import StoreOutcome

if TYPE_CHECKING:
    from lmcache_core.lm.disk import Disk

logger = logging.getLogger(__name__)

SCRATCH_BYTES = 256 << 10
HELLO_S = 10.0
MAX_BORROWS = 64
_CODES = {
    StoreOutcome.STORED: 0,
    StoreOutcome.ALREADY_PRESENT: 1,
    StoreOutcome.NOT_ADMITTED: 2,
}


class Leases:
    """The numbers at the arena's beginning: one for each client that reads the arena itself."""

    def __init__(self, arena: Arena, nbytes: int) -> None:
        self._numbers = arena.view[:nbytes].cast("Q")
        self._free = list(range(len(self._numbers)))

    def take(self) -> int | None:
        """An index, or ``None`` if all are in use."""
        return self._free.pop() if self._free else None

    def give_back(self, index: int) -> None:
        """The client is gone; its number is changed, should it still be reading."""
        self.revoke(index)
        self._free.append(index)

    def epoch(self, index: int) -> int:
        """The number now."""
        return self._numbers[index]

    def revoke(self, index: int) -> None:
        """Tell the client that what it is reading doesn't count."""
        self._numbers[index] += 1

    def close(self) -> None:
        """Let go of the arena."""
        self._numbers.release()


@dataclass
class Service:
    """What all sessions of a server share."""

    arena: Arena
    values: Values
    counters: Counters
    leases: Leases
    instance: bytes
    token: bytes = b""
    max_value_bytes: int = 0
    unix_path: str = ""
    stall_s: float = 30.0
    disk: Disk | None = None
    log_times: dict[str, float] = field(default_factory=dict)

    def log(self, kind: str, text: str, *arguments: object) -> None:
        """One line for each ``kind`` in half a minute: peers must not fill a disk with lines."""
        now = time.monotonic()
        if now - self.log_times.get(kind, now - 31.0) > 30.0:
            self.log_times[kind] = now
            logger.warning(text, *arguments)


class Staged:
    """A client's staging memory, mapped here."""

    def __init__(self, fd: int, nbytes: int, piece: int) -> None:
        if os.fstat(fd).st_size < nbytes:
            raise ProtocolError("the staging memory is smaller than announced")
        if not _is_sealed(fd):
            raise ProtocolError("the staging memory can still shrink; it must be sealed")
        self.piece = piece
        self.slots = nbytes // piece
        self._map = mmap.mmap(fd, nbytes)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def copy(self, slot: int, offset: int, target: int, nbytes: int) -> None:
        """Copy from ``offset`` of a slot to an address, without the interpreter's lock."""
        ctypes.memmove(target, self._address + slot * self.piece + offset, nbytes)


class Session:
    """One client."""

    def __init__(self, service: Service, wire: Wire, peer: str, scratch: memoryview) -> None:
        self.peer = peer
        self.is_unix = wire.sock.family == socket.AF_UNIX
        self.wire = wire
        self.stopping = False
        self._service = service
        self._scratch = scratch
        self._space = ""
        self._staged: Staged | None = None
        self._lease: int | None = None
        self._borrowed: dict[int, tuple[float, list[Value | None]]] = {}
        self._head = memoryview(bytearray(HEADER_BYTES))

    async def run(self) -> None:
        """Serve until the client goes, breaks the rules or makes no progress."""
        service = self._service
        try:
            await asyncio.wait_for(self._greet(), HELLO_S)
            service.counters.add("server_connections")
            while not self.stopping:
                await self.wire.read_first(self._head)
                await self._serve(protocol.parse_header(self._head))
        except ProtocolError as error:
            service.counters.add("server_refused", reason=error.status.name.lower())
            service.log(error.status.name, "%s: %s; connection closed", self.peer, error)
            await self._refuse(error)
        except (asyncio.TimeoutError, TimeoutError):
            service.counters.add("server_refused", reason="silent")
        except EOFError:
            if not self.wire.idle:
                service.counters.add("server_broken_connections")
        except OSError as error:
            service.counters.add("server_broken_connections")
            logger.debug("%s: %s", self.peer, error)
        finally:
            self._give_back()
            self.wire.close()

    def check(self) -> bool:
        """Whether to go on with this client; takes back what it read for too long."""
        service = self._service
        until = time.monotonic() - service.stall_s
        if self._borrowed and next(iter(self._borrowed.values()))[0] < until:
            service.counters.add("server_revoked_leases")
            service.log("lease", "%s: reads for too long; it gets a miss", self.peer)
            self._revoke()
        if self.wire.is_stalled(service.stall_s):
            service.counters.add("server_stalled_connections")
            service.log("stall", "%s: makes no progress; connection closed", self.peer)
            return False
        return True

    # -- the beginning and the end ---------------------------------------------------------

    async def _greet(self) -> None:
        await self.wire.handshake()
        await self.wire.read_first(self._head)
        header = protocol.parse_header(self._head)
        if header.op is not Op.HELLO or header.payload or header.meta > MAX_HELLO_BYTES:
            raise ProtocolError("the first message isn't a hello")
        meta = memoryview(bytearray(header.meta))
        await self.wire.read(meta)
        hello = protocol.parse_hello(meta)
        service = self._service
        if not hmac.compare_digest(hello.token, service.token):
            what = "the token is wrong" if hello.token else "a token is needed"
            raise ProtocolError(f"{what}; set token_file to the server's", Status.DENIED)
        self._space = hello.fingerprint
        reply = Welcome(
            service.instance,
            self.is_unix and service.arena.reader is not None,
            service.max_value_bytes,
            service.values.usage(self._space),
            "" if self.is_unix else service.unix_path,
        )
        await self._answer(header, protocol.welcome(reply))

    async def _refuse(self, error: ProtocolError) -> None:
        text = str(error).encode()[: protocol.MAX_MESSAGE_BYTES]
        head = protocol.header(Op.HELLO, 0, meta=len(text), status=error.status)
        try:
            await asyncio.wait_for(self.wire.write([head, text]), 1.0)
            # A close with unread bytes would be a reset, and the client would never read why.
            await asyncio.wait_for(self._drain(64 << 20), 1.0)
        except (OSError, EOFError, asyncio.TimeoutError, TimeoutError):
            pass

    def _give_back(self) -> None:
        self._revoke()
        if self._lease is not None:
            self._service.leases.give_back(self._lease)
            self._lease = None
        self._staged = None

    def _revoke(self) -> None:
        if self._lease is not None and self._borrowed:
            self._service.leases.revoke(self._lease)
        borrowed, self._borrowed = self._borrowed, {}
        for _, values in borrowed.values():
            self._service.values.release(values)

    # -- requests --------------------------------------------------------------------------

    async def _serve(self, header: Header) -> None:
        if header.meta > MAX_META_BYTES or header.status is not Status.OK:
            raise ProtocolError(f"a request that makes no sense: {header}")
        if header.payload and header.op not in (Op.STORE, Op.STAGE):
            raise ProtocolError(f"values come with {header.op.name}")
        meta = memoryview(bytearray(header.meta))
        await self.wire.read(meta)
        self._service.counters.add("server_requests", op=header.op.name.lower())
        match header.op:
            case Op.CONTAINS | Op.COUNT | Op.DELETE:
                keys, rest = protocol.parse_names(meta, header.keys)
                if rest:
                    raise ProtocolError(f"{len(rest)} bytes follow the keys")
                await self._about_keys(header, keys)
            case Op.LOAD | Op.BORROW:
                await self._load(header, *self._parsed(header, meta))
            case Op.STORE | Op.STAGE:
                await self._store(header, *self._parsed(header, meta))
            case Op.CLEAR:
                await self._answer(header, self._usage(), protocol.number(await self._clear()))
            case Op.USAGE:
                await self._answer(header, self._usage())
            case Op.SHARE:
                await self._share(header, meta)
            case Op.RETURN:
                borrowed = self._borrowed.pop(protocol.parse_number(meta), None)
                if borrowed is not None:  # it may have been taken back
                    self._service.values.release(borrowed[1])
            case _:
                raise ProtocolError(f"{header.op.name} isn't a request", Status.UNSUPPORTED)

    def _parsed(self, header: Header, meta: memoryview) -> tuple[list[ChunkKey], tuple[int, ...]]:
        keys, rest = protocol.parse_names(meta, header.keys)
        return keys, protocol.parse_numbers(rest, header.keys)

    async def _about_keys(self, header: Header, keys: list[ChunkKey]) -> None:
        values, disk, space = self._service.values, self._service.disk, self._space
        if header.op is Op.DELETE:
            count = values.delete(space, keys)
            if disk is not None:
                count = max(count, await disk.delete(space, keys))
            await self._answer(header, self._usage(), protocol.number(count))
        elif header.op is Op.COUNT and disk is None:
            await self._answer(header, protocol.number(values.leading(space, keys)))
        else:
            found = values.contains(space, keys)
            if disk is not None and not all(found):
                absent = [key for key, hit in zip(keys, found, strict=True) if not hit]
                on_disk = iter(await disk.contains(space, absent))
                found = [hit or next(on_disk) for hit in found]
            if header.op is Op.CONTAINS:
                await self._answer(header, bytes(found))
            else:
                hits = found.index(False) if False in found else len(found)
                await self._answer(header, protocol.number(hits))

    async def _clear(self) -> int:
        count = self._service.values.clear(self._space)
        if self._service.disk is not None:
            count = max(count, await self._service.disk.clear(self._space))
        return count

    # -- values out ------------------------------------------------------------------------

    async def _load(
        self, header: Header, keys: list[ChunkKey], capacities: tuple[int, ...]
    ) -> None:
        service = self._service
        found = service.values.acquire(self._space, keys, capacities)
        kept = False
        try:
            if service.disk is not None and None in found:
                await self._fetch(service.disk, keys, capacities, found)
            there = [value for value in found if value is not None]
            service.counters.add("server_load_hits", len(there))
            service.counters.add("server_load_misses", len(found) - len(there))
            service.counters.add("server_load_bytes", sum(value.nbytes for value in there))
            if header.op is Op.BORROW:
                await self._lend(header, found)
                kept = True
            else:
                sizes = [MISSING if value is None else value.nbytes for value in found]
                views = [
                    view
                    for value in there
                    for view in service.arena.views(value.parts, value.nbytes)
                ]
                await self._answer(header, protocol.numbers(sizes), payload=views)
        finally:
            if not kept:
                service.values.release(found)

    async def _fetch(
        self,
        disk: Disk,
        keys: list[ChunkKey],
        capacities: tuple[int, ...],
        found: list[Value | None],
    ) -> None:
        absent = [i for i, value in enumerate(found) if value is None]
        names, room = [keys[i] for i in absent], [capacities[i] for i in absent]
        there = await disk.contains(self._space, names)
        absent = [i for i, hit in zip(absent, there, strict=True) if hit]
        names, room = [keys[i] for i in absent], [capacities[i] for i in absent]
        if not names:
            return
        fetched = await disk.fetch(self._space, names, room)
        for i, value in zip(absent, fetched, strict=True):
            found[i] = value

    async def _lend(self, header: Header, found: list[Value | None]) -> None:
        if self._lease is None or len(self._borrowed) >= MAX_BORROWS:
            raise ProtocolError("BORROW without SHARE, or without ever a RETURN")
        if header.request in self._borrowed:
            raise ProtocolError(f"two BORROWs have the number {header.request}")
        epoch = self._service.leases.epoch(self._lease)
        sizes = [MISSING if value is None else value.nbytes for value in found]
        parts = [protocol.extents(value.extents()) for value in found if value is not None]
        self._borrowed[header.request] = (time.monotonic(), found)
        await self._answer(header, protocol.number(epoch), protocol.numbers(sizes), *parts)

    # -- values in -------------------------------------------------------------------------

    async def _store(self, header: Header, keys: list[ChunkKey], sizes: tuple[int, ...]) -> None:
        service = self._service
        staged = self._staged
        expected = sum(sizes)
        if header.op is Op.STAGE:
            if staged is None:
                raise ProtocolError("STAGE without SHARE")
            expected = 4 * sum(-(-size // staged.piece) for size in sizes)
        if header.payload != expected:
            raise ProtocolError(f"{header.payload} bytes of values, {expected} are announced")
        outcomes = bytearray()
        stored: list[ChunkKey] = []
        for key, size in zip(keys, sizes, strict=True):
            outcome = await self._store_one(header, key, size)
            if outcome is StoreOutcome.STORED:
                stored.append(key)
                service.counters.add("server_store_bytes", size)
            service.counters.add("server_stores", outcome=outcome.name.lower())
            outcomes.append(_CODES[outcome])
        if service.disk is not None and stored:
            service.disk.write_behind(self._space, stored)
        await self._answer(header, self._usage(), bytes(outcomes))

    async def _store_one(self, header: Header, key: ChunkKey, size: int) -> StoreOutcome:
        values = self._service.values
        value: Value | StoreOutcome = StoreOutcome.NOT_ADMITTED
        if size <= self._service.max_value_bytes:
            value = values.reserve(self._space, key, size)
        if header.op is Op.STAGE:
            receive = self._receive_staged(header, size, value)
        else:
            receive = self._receive(size, value)
        if not isinstance(value, Value):
            await receive
            return value
        try:
            await receive
        except BaseException:
            values.release([value])
            raise
        return values.commit(value)

    async def _receive(self, size: int, value: Value | StoreOutcome) -> None:
        if not isinstance(value, Value):
            await self._drain(size)
            return
        for view in self._service.arena.views(value.parts, size):
            await self.wire.read(view)

    async def _receive_staged(self, header: Header, size: int, value: Value | StoreOutcome) -> None:
        staged = self._staged
        if staged is None:
            raise ProtocolError("STAGE without SHARE")
        data = memoryview(bytearray(4))
        head = protocol.header(Op.ACK, header.request, meta=4)
        parts = value.extents() if isinstance(value, Value) else []
        target = _Target(self._service.arena, parts)
        for start in range(0, size, staged.piece):
            await self.wire.read(data)
            slot = protocol.parse_slot(data, staged.slots)
            length = min(staged.piece, size - start)
            if parts:
                target.take(staged, slot, length)
            await self.wire.write([head + data])

    async def _drain(self, nbytes: int) -> None:
        while nbytes > 0:
            length = min(nbytes, len(self._scratch))
            await self.wire.read(self._scratch[:length])
            nbytes -= length

    # -- shared memory ---------------------------------------------------------------------

    async def _share(self, header: Header, meta: memoryview) -> None:
        service = self._service
        nbytes, piece = protocol.parse_share(meta)
        fds, self.wire.received_fds = self.wire.received_fds, []
        try:
            if len(fds) != 1 or self._staged is not None or service.arena.reader is None:
                raise ProtocolError("SHARE comes once, with a descriptor, on a Unix socket")
            try:
                self._staged = Staged(fds[0], nbytes, piece)
            except OSError as error:
                raise ProtocolError(f"the staging memory can't be mapped: {error}") from error
        finally:
            for fd in fds:
                os.close(fd)
        self._lease = service.leases.take()
        if self._lease is None:
            raise ProtocolError("too many clients read the shared memory", Status.BUSY)
        answer = protocol.shared(service.arena.nbytes, 8 * self._lease)
        head = protocol.header(Op.SHARE, header.request, meta=len(answer))
        await self.wire.write_with_fd(head + answer, service.arena.reader)

    # -- answers ---------------------------------------------------------------------------

    def _usage(self) -> bytes:
        return protocol.usage(*self._service.values.usage(self._space))

    async def _answer(
        self, header: Header, *meta: bytes, payload: Sequence[memoryview] = ()
    ) -> None:
        joined = b"".join(meta)
        head = protocol.header(
            header.op,
            header.request,
            count=header.keys,
            meta=len(joined),
            payload=sum(view.nbytes for view in payload),
        )
        await self.wire.write([head + joined, *payload])


class _Target:
    """Where the next staged piece of a value goes: parts of the arena, one after the other."""

    def __init__(self, arena: Arena, parts: list[protocol.Extent]) -> None:
        self._arena = arena
        self._parts = list(reversed(parts))

    def take(self, staged: Staged, slot: int, length: int) -> None:
        """Copy the first ``length`` bytes of ``slot`` to the next place."""
        offset = 0
        while length:
            start, room = self._parts.pop()
            some = min(room, length)
            staged.copy(slot, offset, self._arena.address + start, some)
            if some < room:
                self._parts.append((start + some, room - some))
            offset += some
            length -= some


def _is_sealed(fd: int) -> bool:
    """Whether nobody can shrink this memory: reading behind its end would end the server."""
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:
        return False
