"""The server's side of one connection: takes requests one by one and answers them.

What a client announces is checked before anything is allocated for it, values are received into
the arena and sent from it, and whatever a client held is given back when it
goes, however it goes. While one answer waits for a slow client, only that
client waits. Knows nothing about listening, nor about other sessions.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmcache_backend_lm import greeting, holdings, inventory, protocol
from lmcache_backend_lm.greeting import Welcome
from lmcache_backend_lm.intake import Intake
from lmcache_backend_lm.mapping import may_share
from lmcache_backend_lm.proof import NONCE_BYTES, PROOF_BYTES, Side, Transcript
from lmcache_backend_lm.protocol import (
    HEADER_BYTES,
    MAX_HELLO_BYTES,
    MAX_META_BYTES,
    MISSING,
    Header,
    Op,
    ProtocolError,
    Status,
)
from lmcache_backend_lm.service import Epoch, Service
from lmcache_backend_lm.values import Held
from lmcache_backend_lm.wire import Wire
from lmcache_core import ChunkKey, binding_of

if TYPE_CHECKING:
    from lmcache_backend_lm.disk import Disk

logger = logging.getLogger(__name__)

SCRATCH_BYTES = 256 << 10
META_BYTES = 4 << 10
"""So much meta every request may have: 160 keys to load. What is more is shared between clients."""
HELLO_S = 10.0
MAX_BORROWS = 64


class _NoTls(Exception):
    """The greeting of TLS failed, before anything was said."""


class Session:
    """One connection. ``client``: what all connections of one client have in common."""

    def __init__(
        self, service: Service, wire: Wire, peer: str, scratch: memoryview, client: str = ""
    ) -> None:
        self.peer = peer
        self.client = client
        self.greeted = False
        self.is_unix = wire.sock.family == socket.AF_UNIX
        self._shares = self.is_unix and may_share(wire.sock) and service.arena.reader is not None
        self.wire = wire
        self.stopping = False
        self._service = service
        self._scratch = scratch
        self._space = ""
        self._intake = Intake(service, wire, scratch)
        self._epoch: Epoch | None = None
        self._borrowed: dict[int, tuple[float, Held]] = {}
        self._head = memoryview(bytearray(HEADER_BYTES))

    async def run(self) -> None:
        """Serve until the client goes, breaks the rules or makes no progress."""
        service = self._service
        try:
            await asyncio.wait_for(self._greet(), HELLO_S)
            self.greeted = True
            service.counters.add("server_connections")
            while not self.stopping:
                await self._serve(await self._next())
        except ProtocolError as error:
            service.counters.add("server_refused", reason=error.status.name.lower())
            service.seldom.warn(error.status.name, "%s: %s; connection closed", self.peer, error)
            await self._refuse(error)
        except (asyncio.TimeoutError, TimeoutError):
            service.counters.add("server_refused", reason="silent")
        except EOFError:
            if not self.wire.idle:
                service.counters.add("server_broken_connections")
        except _NoTls as error:
            service.counters.add("server_refused", reason="tls")
            service.seldom.warn("tls", "%s: no TLS connection: %s", self.peer, error)
        except OSError as error:
            if self.greeted or not self.wire.idle:
                service.counters.add("server_broken_connections")
            logger.debug("%s: %s", self.peer, error)
        finally:
            self.end()

    def end(self) -> None:
        """Give back what the client held. Idempotent; nothing of this session may run after it."""
        self._revoke()
        epoch, self._epoch = self._epoch, None
        if epoch is not None:
            epoch.release()
        self._intake.close()
        self.wire.close()

    def check(self) -> bool:
        """Whether to go on with this client; takes back what it read for too long."""
        service = self._service
        until = time.monotonic() - service.stall_s
        if self._borrowed and next(iter(self._borrowed.values()))[0] < until:
            service.counters.add("server_revoked_leases")
            service.seldom.warn("lease", "%s: reads for too long; it gets a miss", self.peer)
            self._revoke()
        if self.wire.is_stalled(service.stall_s):
            service.counters.add("server_stalled_connections")
            service.seldom.warn("stall", "%s: makes no progress; connection closed", self.peer)
            return False
        return True

    # -- the beginning and the end ---------------------------------------------------------

    async def _next(self) -> Header:
        """The next message's header; its descriptors stay open only where they mean something."""
        await self.wire.read_first(self._head)
        header = protocol.parse_header(self._head)
        if header.op is not Op.SHARE:
            self.wire.drop_fds()
        if self.wire.lost_fds:
            raise ProtocolError("more descriptors come with a message than any needs")
        return header

    async def _greet(self) -> None:
        try:
            await self.wire.handshake()
        except OSError as error:  # a stranger, or one who doesn't trust the certificate
            raise _NoTls(getattr(error, "reason", None) or error) from error
        header, meta = await self._opening(Op.HELLO)
        hello = greeting.parse_hello(meta)
        service = self._service
        if service.token and not hello.proves:
            raise ProtocolError("a token is needed; set token_file to the server's", Status.DENIED)
        if hello.proves and not service.token:
            raise ProtocolError(
                "the client has a token and this server has none; start it with --token-file, or "
                "remove the client's token",
                Status.DENIED,
            )
        self._space = hello.fingerprint
        proof = bytes(PROOF_BYTES)
        if service.token:
            header, proof = await self._prove(header, bytes(meta))
        reply = Welcome(
            service.instance,
            self._shares,
            service.max_value_bytes,
            service.values.usage(self._space),
            "" if self.is_unix else service.unix_path,
            proof,
        )
        await self._answer(header, greeting.welcome(reply))

    async def _opening(self, op: Op) -> tuple[Header, memoryview]:
        header = await self._next()
        if header.op is not op or header.payload or header.meta > MAX_HELLO_BYTES:
            raise ProtocolError(f"this message isn't a {op.name}, which comes first")
        meta = memoryview(bytearray(header.meta))
        await self.wire.read(meta)
        return header, meta

    async def _prove(self, header: Header, hello: bytes) -> tuple[Header, bytes]:
        """Let the client prove the token; the request to answer, and our own proof for that."""
        token = self._service.token
        challenge = greeting.challenge(secrets.token_bytes(NONCE_BYTES))
        spoken = Transcript(hello, challenge, binding_of(self.wire.sock))
        await self._answer(header, challenge)
        header, said = await self._opening(Op.PROVE)
        guesses, address = self._service.guesses, self.peer.rpartition(":")[0]
        if (wait_s := guesses.wait_s(address)) > 0:
            self._service.counters.add("server_guesses_refused")
            what = f"too many wrong tokens came from this address; try again in {wait_s:.0f} s"
            raise ProtocolError(what, Status.BUSY)
        if not spoken.proves(greeting.parse_proof(said), token, Side.CLIENT):
            guesses.wrong(address)
            self._service.counters.add("server_wrong_tokens")
            what = "the token is wrong; set token_file to the server's"
            raise ProtocolError(what, Status.DENIED)
        return header, spoken.proof(token, Side.SERVER)

    async def _refuse(self, error: ProtocolError) -> None:
        text = str(error).encode()[: protocol.MAX_MESSAGE_BYTES]
        head = protocol.header(Op.HELLO, 0, meta=len(text), status=error.status)
        try:
            await asyncio.wait_for(self.wire.write([head, text]), 1.0)
            # A close with unread bytes would be a reset, and the client would never read why.
            await asyncio.wait_for(self.wire.drain(64 << 20, self._scratch), 1.0)
        except (OSError, EOFError, asyncio.TimeoutError, TimeoutError):
            pass

    def _revoke(self) -> None:
        if self._epoch is not None and self._borrowed:
            self._epoch.revoke()
        borrowed, self._borrowed = self._borrowed, {}
        for _, held in borrowed.values():
            held.release()

    # -- requests --------------------------------------------------------------------------

    async def _serve(self, header: Header) -> None:
        if header.meta > MAX_META_BYTES or header.status is not Status.OK:
            raise ProtocolError(f"a request that makes no sense: {header}")
        if header.payload and header.op not in (Op.STORE, Op.STAGE):
            raise ProtocolError(f"values come with {header.op.name}")
        meta = memoryview(bytearray(min(header.meta, META_BYTES)))
        if header.payload and header.meta <= META_BYTES:
            await self.wire.read_along(meta)
        else:
            await self.wire.read(meta)
        if header.meta <= META_BYTES:
            await self._do(header, meta)
        else:
            await self._do_long(header, meta)

    async def _do_long(self, header: Header, begin: memoryview) -> None:
        """The same for a request with much meta, of which as much is awaited as came."""
        budget, taken = self._service.requests, 0
        parts = [begin]
        try:
            while (left := header.meta - META_BYTES - taken) > 0:
                some = min(META_BYTES + taken, left)
                if not budget.take(self.client, some):
                    raise ProtocolError("too many long requests are under way", Status.BUSY)
                taken += some
                parts.append(memoryview(bytearray(some)))
                await self.wire.read(parts[-1])
            meta = memoryview(b"".join(parts))
            parts.clear()
            await self._do(header, meta)
        finally:
            budget.give(self.client, taken)

    async def _do(self, header: Header, meta: memoryview) -> None:
        self._service.counters.add("server_requests", op=header.op.name.lower())
        match header.op:
            case Op.CONTAINS | Op.COUNT | Op.DELETE:
                keys, rest = protocol.parse_names(meta, header.keys)
                if rest:
                    raise ProtocolError(f"{len(rest)} bytes follow the keys")
                await self._about_keys(header, keys)
            case Op.LOAD | Op.BORROW:
                await self._load(header, *self._parsed(header, meta))
            case Op.STORE | Op.STAGE | Op.OFFER:
                await self._store(header, meta)
            case Op.CLEAR:
                await self._answer(header, self._usage(), protocol.number(await self._clear()))
            case Op.USAGE:
                await self._answer(header, self._usage())
            case Op.SHARE:
                await self._share(header, meta)
            case Op.RETURN:
                borrowed = self._borrowed.pop(protocol.parse_number(meta), None)
                if borrowed is not None:  # it may have been taken back
                    borrowed[1].release()
            case Op.DESCRIBE:
                service = self._service
                service.descriptions.learn(self._space, inventory.parse_description(meta))
            case Op.LIST | Op.STATUS | Op.PURGE:
                await self._answer(header, await self._operate(header.op, meta))
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

    async def _operate(self, op: Op, meta: memoryview) -> bytes:
        """What an operator asks for, who has the token as every client has."""
        service = self._service
        if op is Op.LIST:
            return inventory.page(await holdings.page(service, inventory.parse_after(meta)))
        if op is Op.PURGE:
            return inventory.purged(await holdings.purge(service, protocol.parse_space(meta)))
        return inventory.status({"version": service.version, **await holdings.numbers(service)})

    # -- values out ------------------------------------------------------------------------

    async def _load(
        self, header: Header, keys: list[ChunkKey], capacities: tuple[int, ...]
    ) -> None:
        service = self._service
        with service.values.acquire(self._space, keys, capacities) as found:
            if service.disk is not None and None in found.values:
                await self._fetch(service.disk, keys, capacities, found)
            there = [value for value in found.values if value is not None]
            service.counters.add("server_load_hits", len(there))
            service.counters.add("server_load_misses", len(keys) - len(there))
            service.counters.add("server_load_bytes", sum(value.nbytes for value in there))
            if header.op is Op.BORROW:
                await self._lend(header, found)
                return
            sizes = [MISSING if value is None else value.nbytes for value in found.values]
            views = [
                view for value in there for view in service.arena.views(value.parts, value.nbytes)
            ]
            await self._answer(header, protocol.numbers(sizes), payload=views)

    async def _fetch(
        self, disk: Disk, keys: list[ChunkKey], capacities: tuple[int, ...], found: Held
    ) -> None:
        absent = [i for i, value in enumerate(found.values) if value is None]
        sizes = await disk.sizes(self._space, [keys[i] for i in absent])
        there = zip(absent, sizes, strict=True)
        which = {i: size for i, size in there if 0 < size <= capacities[i]}
        if which:
            names = [keys[i] for i in which]
            await disk.fetch(self._space, names, list(which.values()), found, list(which))

    async def _lend(self, header: Header, found: Held) -> None:
        if self._epoch is None or len(self._borrowed) >= MAX_BORROWS:
            raise ProtocolError("BORROW without SHARE, or without ever a RETURN")
        if header.request in self._borrowed:
            raise ProtocolError(f"two BORROWs have the number {header.request}")
        number = self._epoch.number
        sizes = [MISSING if value is None else value.nbytes for value in found.values]
        parts = [protocol.extents(value.extents()) for value in found.values if value is not None]
        # The client may read from now on, whatever becomes of the answer: it is the connection that
        # holds them, not the request.
        self._borrowed[header.request] = (time.monotonic(), found.handed_on())
        await self._answer(header, protocol.number(number), protocol.numbers(sizes), *parts)

    # -- values in -------------------------------------------------------------------------

    async def _store(self, header: Header, meta: memoryview) -> None:
        outcomes = await self._intake.store(self._space, header, meta)
        await self._answer(header, self._usage(), outcomes)

    async def _share(self, header: Header, meta: memoryview) -> None:
        service = self._service
        fds, self.wire.received_fds = self.wire.received_fds, []
        try:
            if not self._shares or service.arena.reader is None:
                raise ProtocolError("the memory of this server isn't shared here", Status.DENIED)
            self._intake.share(meta, fds)
        finally:
            for fd in fds:
                os.close(fd)
        self._epoch = service.epochs.take()
        if self._epoch is None:
            raise ProtocolError("too many clients read the shared memory", Status.BUSY)
        answer = greeting.shared(service.arena.nbytes, self._epoch.offset)
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
