"""One connection of the client: requests of many calls under way at once, two threads.

The writer connects, then sends requests in the order they were made; the reader takes
answers apart and receives values straight into the callers' buffers. Threads rather
than asyncio because a thread can leave a whole value to one system call: in a process
whose other threads keep the interpreter busy, each wake-up of an event loop may
cost 5 ms, and 32 MiB cost a hundred of them.

A connection fails as a whole, once, and for good; `lmcache_core.lm.backend` makes the next one.
Knows nothing about deadlines, retries or what the bytes mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from queue import Empty, SimpleQueue
from typing import Any

from lmcache_core.errors import (
    BackendError,
    BackendRejected,
    BackendTimeout,
    BackendUnavailable,
)
from lmcache_core.lm import protocol
from lmcache_core.lm.config import LmConfig
from lmcache_core.lm.mapping import ReadOnlyMapping
from lmcache_core.lm.protocol import HEADER_BYTES, MISSING, Op, ProtocolError, Status, Welcome
from lmcache_core.lm.shared import (
    PIECE_BYTES,
    STAGING_BYTES,
    SharedMemory,
    Staging,
    open_for_reading,
)
from lmcache_core.lm.stream import TICK_S, Plain, Stream, Tls, dial, dial_unix
from lmcache_core.storage import HostRegion
from lmcache_core.tls import client_context

logger = logging.getLogger(__name__)

_SHARED_FROM_BYTES = 64 << 10
"""Below this, two more messages cost more than a copy through the socket."""
_SCRATCH_BYTES = 256 << 10
_EXTENTS_BYTES = 4 + protocol.MAX_EXTENTS * 16
_REJECTED = (Status.DENIED, Status.VERSION, Status.UNSUPPORTED, Status.MALFORMED)


class Stage(Enum):
    """Where a call is, which decides what its cancellation takes."""

    QUEUED = auto()
    SENDING = auto()
    SENT = auto()
    RECEIVING = auto()
    ANSWERED = auto()
    """Before the writer's last system call came back: the writer settles it."""
    OVER = auto()


@dataclass(eq=False)
class Call:
    """One request, and where its answer goes. A load has ``into``, a store has ``payload``."""

    op: Op
    count: int = 0
    meta: bytes = b""
    parse: Callable[[memoryview], Any] = bytes
    """Makes the answer from its meta. Raises `ProtocolError`."""
    meta_limit: int = 0
    payload: Sequence[memoryview] = ()
    into: Sequence[memoryview] = ()
    number: int = 0
    stage: Stage = Stage.QUEUED
    abandoned: bool = False
    answer: Any = None
    capacities: list[int] = field(default_factory=list)
    future: asyncio.Future[Any] | None = None

    def settle(self, answer: Any, error: BackendError | None) -> None:
        """Tell the caller, whose buffers nobody touches any more. From any thread."""
        self.stage, self.payload, self.into = Stage.OVER, (), ()
        # Let go of: once the caller raised, its traceback leads to the buffers.
        future, self.future = self.future, None
        if future is None or self.abandoned:
            return

        def tell() -> None:
            if future.done():
                return
            if error is None:
                future.set_result(answer)
            else:
                future.set_exception(error)

        try:
            future.get_loop().call_soon_threadsafe(tell)
        except RuntimeError:
            logger.debug("the event loop ended before a call did")


class Connection:
    """Connects at once, in the background; `call` waits for that too."""

    def __init__(
        self,
        config: LmConfig,
        fingerprint: str,
        token: bytes,
        name: str,
        region: HostRegion | None = None,
    ) -> None:
        self.address = config.address
        self.welcome: Welcome | None = None
        self.waiting_bytes = 0
        """Of values in calls that aren't over: a measure of how busy this connection is."""
        self._config = config
        self._fingerprint = fingerprint
        self._token = token
        self._region = region
        self._stream: Stream | None = None
        self._shared: SharedMemory | None = None
        self._queue: SimpleQueue[Call | None] = SimpleQueue()
        self._pending: dict[int, Call] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._error: BackendError | None = None
        self._moved_at = time.monotonic()
        self._scratch: memoryview | None = None
        self._threads = [
            threading.Thread(target=self._write, name=f"{name}-writer", daemon=True),
            threading.Thread(target=self._read, name=f"{name}-reader", daemon=True),
        ]
        self._running = len(self._threads)
        self._connected = threading.Event()
        self._ended: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        for thread in self._threads:
            thread.start()

    @property
    def alive(self) -> bool:
        """False once something went wrong: every call fails then."""
        return self._error is None

    @property
    def ended(self) -> bool:
        """Whether both threads have let go of everything."""
        return not self._running

    @property
    def shares_memory(self) -> bool:
        """Whether values go through shared memory."""
        return self._shared is not None

    # -- on the event loop -----------------------------------------------------------------

    async def call(self, call: Call) -> Any:
        """Send a request and wait for what its ``parse`` makes of the answer.

        Cancelling is safe at any time: when it raises, nobody touches the buffers any more.

        Raises:
            BackendError: the connection failed, or the server refused.
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        call.future = future
        call.capacities = [view.nbytes for view in call.into]
        nbytes = sum(call.capacities) + sum(view.nbytes for view in call.payload)
        self.waiting_bytes += nbytes
        try:
            self._submit(call)
            await asyncio.wait([future])
            return future.result()
        except asyncio.CancelledError:
            if not self._abandon(call):
                self._fail(BackendUnavailable(f"{self.address}: a call was cancelled half-way"))
                while not future.done():  # until both threads have let go: they were woken
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.wait([future])
            # Its end may be on its way here from a thread: nobody asks for it any more.
            if not future.cancel() and not future.cancelled():
                future.exception()
            raise
        finally:
            self.waiting_bytes -= nbytes

    async def close(self) -> None:
        """Fail what is under way and end both threads. Idempotent."""
        self._fail(BackendUnavailable(f"{self.address}: the backend was closed"))
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        with self._lock:
            if self._running:
                self._ended.append((loop, ended))
            else:
                ended.set_result(None)
        await ended
        for thread in self._threads:
            thread.join(1.0)  # past their last statement

    def _submit(self, call: Call) -> None:
        with self._lock:
            error = self._error
            if error is None:
                call.number = next(self._numbers)
                if not self._pending:
                    self._moved_at = time.monotonic()
                self._pending[call.number] = call
                self._queue.put(call)
        if error is not None:
            raise type(error)(str(error))

    def _abandon(self, call: Call) -> bool:
        """Forget a call; ``False`` if its buffers are in use at this moment."""
        with self._lock:
            if call.stage in (Stage.SENDING, Stage.RECEIVING, Stage.ANSWERED):
                return False
            call.abandoned, call.payload, call.into = True, (), ()
            if call.op is Op.OFFER and self._shared is not None:
                self._shared.staging.withdraw(call.number)
            if call.stage is Stage.QUEUED:
                self._pending.pop(call.number, None)
            return True

    # -- failing ---------------------------------------------------------------------------

    def _fail(self, error: BackendError) -> None:
        """Remember the first error, and make both threads end."""
        with self._lock:
            if self._error is not None:
                return
            self._error = error.with_traceback(None)  # its frames hold buffers
            stream, shared = self._stream, self._shared
        self._queue.put(None)
        if shared is not None:
            shared.staging.free.put(None)
        if stream is not None:
            stream.shutdown()
        self._connected.set()

    def _leave(self) -> None:
        """The end of a thread; the last one tells everybody."""
        with self._lock:
            self._running -= 1
            if self._running:
                return
            calls, self._pending = list(self._pending.values()), {}
            stream, self._stream = self._stream, None
            shared, self._shared = self._shared, None
            ended, error = self._ended, self._error
            if shared is not None:  # the server may be copying still
                shared.staging.withdraw_all()
        if stream is not None:
            stream.close()
        if shared is not None:
            shared.close()
        assert error is not None  # noqa: S101  threads end for no other reason
        for call in calls:
            call.settle(None, type(error)(str(error)))
        for loop, future in ended:
            with contextlib.suppress(RuntimeError):  # the loop ended before
                loop.call_soon_threadsafe(future.set_result, None)

    def _explained(self, error: Exception) -> BackendError:
        """What went wrong on the wire, in a sentence."""
        if isinstance(error, BackendError):
            return error
        where = self.address
        if isinstance(error, ProtocolError):
            hint = "; is it an lmcache_server?" if self.welcome is None else ""
            rejected = self.welcome is None
            kind = BackendRejected if rejected else BackendUnavailable
            return kind(f"{where}: {error}{hint}")
        if isinstance(error, EOFError):
            return BackendUnavailable(f"{where}: the server closed the connection")
        if isinstance(error, ssl.SSLCertVerificationError):
            return BackendRejected(
                f"{where}: its certificate isn't trusted: {error.verify_message}; set ca_file"
            )
        if isinstance(error, ssl.SSLError):
            return BackendRejected(f"{where}: no TLS connection: {error.reason or error}")
        if isinstance(error, TimeoutError):
            return BackendTimeout(f"{where}: no connection within its time ({error})")
        if isinstance(error, PermissionError):
            return BackendRejected(f"{where}: {error.strerror}: this user may not connect")
        if isinstance(error, OSError):
            why = error.strerror or str(error)
            hint = "; is lmcache_server running there?" if self.welcome is None else ""
            return BackendUnavailable(f"{where}: {why}{hint}")
        return BackendUnavailable(f"{where}: {error!r}")

    def _tick(self) -> None:
        """Called when nothing moved for a while.

        Raises:
            BackendError: for too long, or somebody gave the connection up.
        """
        if self._error is not None:
            raise EOFError  # not that error itself: it would collect tracebacks
        quiet_s = time.monotonic() - self._moved_at
        if self._pending and quiet_s > self._config.stall_timeout_s:
            raise BackendTimeout(f"{self.address}: nothing moved for {quiet_s:.0f} s")

    # -- the writer's thread ---------------------------------------------------------------

    def _write(self) -> None:
        try:
            self._connect()
            while (call := self._queue.get()) is not None:
                try:
                    self._send_call(call)
                finally:
                    self._sent(call)
                    del call
        except Exception as error:  # noqa: BLE001 - whatever it is ends the connection, not the process
            self._fail(self._explained(error))
        finally:
            self._leave()

    def _send_call(self, call: Call) -> None:
        with self._lock:
            if call.abandoned:
                return
            call.stage = Stage.SENDING
            shared = self._shared
            if shared is not None:
                self._choose_way(call, shared)
            values = () if call.op is Op.OFFER else call.payload
        payload = sum(view.nbytes for view in values)
        if call.op is Op.STAGE:
            payload = 4 * sum(-(-view.nbytes // PIECE_BYTES) for view in values)
        head = protocol.header(
            call.op, call.number, count=call.count, meta=len(call.meta), payload=payload
        )
        message = memoryview(head + call.meta)
        if call.op is Op.STAGE and shared is not None:
            self._send([message])
            self._send_staged(values, shared.staging)
        else:
            self._send([message, *values])

    def _choose_way(self, call: Call, shared: SharedMemory) -> None:
        """Let large values go through shared memory; with one copy where that is possible."""
        nbytes = sum(call.capacities) + sum(view.nbytes for view in call.payload)
        if nbytes < _SHARED_FROM_BYTES:
            return
        if call.op is Op.LOAD:
            call.op = Op.BORROW
        elif call.op is Op.STORE:
            offsets = shared.offsets(call.payload)
            if offsets is None:
                call.op = Op.STAGE
            else:
                call.op = Op.OFFER
                call.meta += protocol.numbers(offsets)
                shared.staging.vouch(call.number)

    def _sent(self, call: Call) -> None:
        """The writer holds nothing of ``call`` any more."""
        with self._lock:
            answered = call.stage is Stage.ANSWERED
            if call.stage is Stage.SENDING:
                call.stage = Stage.SENT
        if answered:
            call.settle(call.answer, None)

    def _send_staged(self, payload: Sequence[memoryview], staging: Staging) -> None:
        for value in payload:
            for start in range(0, value.nbytes, PIECE_BYTES):
                index = self._free_slot(staging)
                staging.fill(index, value[start : start + PIECE_BYTES])
                self._send([memoryview(protocol.slot(index))])

    def _free_slot(self, staging: Staging) -> int:
        while True:
            try:
                index = staging.free.get(timeout=TICK_S)
            except Empty:
                self._tick()
                continue
            if index is None:
                raise EOFError
            return index

    def _send(self, views: list[memoryview]) -> None:
        views = [view for view in views if view.nbytes]
        at = 0
        stream = self._stream
        while at < len(views):
            if stream is None:
                raise EOFError
            try:
                sent = stream.send(views[at:] if at else views)
            except BlockingIOError:
                self._tick()
                continue
            self._moved_at = time.monotonic()
            while at < len(views) and sent >= views[at].nbytes:
                sent -= views[at].nbytes
                at += 1
            if sent:
                views[at] = views[at][sent:]

    # -- connecting ------------------------------------------------------------------------

    def _connect(self) -> None:
        config = self._config
        if config.path is not None:
            stream: Stream = Plain(dial_unix(config.path, config.connect_timeout_s))
        else:
            sock = dial(config.host, config.port, config.connect_timeout_s)
            stream = self._encrypted(sock) if config.tls else Plain(sock)
        welcome = self._greet(stream)
        if config.same_host and config.path is None and stream.same_host and welcome.unix_path:
            stream, welcome = self._nearer(stream, welcome)
        if config.same_host and welcome.shares_memory and isinstance(stream, Plain):
            self._share(stream)
        self.welcome = welcome
        self._connected.set()

    def _encrypted(self, sock: socket.socket) -> Stream:
        config = self._config
        try:
            context = client_context(config.ca_file)
            return Tls(sock, context, config.host, config.connect_timeout_s)
        except BaseException:
            sock.close()
            raise

    def _use(self, stream: Stream) -> None:
        """Make ``stream`` the one that `_fail` shuts down."""
        with self._lock:
            self._stream, before = stream, self._stream
            error = self._error
        if before is not None and before is not stream:
            before.close()
        if error is not None:
            raise EOFError

    def _greet(self, stream: Stream) -> Welcome:
        """Say hello on ``stream``, which is used from now on."""
        self._use(stream)
        return protocol.parse_welcome(
            self._ask(Op.HELLO, protocol.hello(self._fingerprint, self._token))
        )

    def _ask(self, op: Op, meta: bytes) -> memoryview:
        self._send([memoryview(protocol.header(op, 0, meta=len(meta)) + meta)])
        return self._told(op)

    def _told(self, op: Op) -> memoryview:
        """The answer's meta, before there is a reader."""
        until = time.monotonic() + self._config.connect_timeout_s
        head = memoryview(bytearray(HEADER_BYTES))
        self._fill(head, until)
        answer = protocol.parse_header(head)
        if answer.status is not Status.OK:
            raise self._refusal(answer)
        if answer.op is not op or answer.meta > protocol.MAX_HELLO_BYTES or answer.payload:
            raise ProtocolError(f"{op.name} was answered with {answer}")
        meta = memoryview(bytearray(answer.meta))
        self._fill(meta, until)
        return meta

    def _nearer(self, stream: Stream, welcome: Welcome) -> tuple[Stream, Welcome]:
        """The same server's Unix socket, if it can be had; otherwise what there is."""
        try:
            nearer = Plain(dial_unix(welcome.unix_path, self._config.connect_timeout_s))
        except OSError as error:
            logger.debug("%s: stays on TCP: %s: %s", self.address, welcome.unix_path, error)
            return stream, welcome
        with self._lock:
            self._stream = None  # keeps `_use` from closing the first
        try:
            again = self._greet(nearer)
        except (BackendError, ProtocolError, OSError, EOFError) as error:
            again = None
            logger.debug("%s: stays on TCP: %s: %s", self.address, welcome.unix_path, error)
        if again is not None and again.instance == welcome.instance:
            stream.close()
            return nearer, again
        # Another server has the socket's name, in another container for instance.
        self._use(stream)
        return stream, welcome

    def _share(self, stream: Plain) -> None:
        """Exchange shared memory with the server; without it, values go through the socket."""
        staging = Staging()
        region = self._region
        region_fd = None if region is None else open_for_reading(region)
        if region_fd is None:
            region = None
        try:
            size = 0 if region is None else region.nbytes
            meta = protocol.share(STAGING_BYTES, PIECE_BYTES, size)
            message = protocol.header(Op.SHARE, 0, meta=len(meta)) + meta
            fds = [staging.fd] if region_fd is None else [staging.fd, region_fd]
            socket.send_fds(stream.sock, [message], fds)
            arena, epoch_at = self._shared_arena(stream)
        except BaseException:
            staging.close()
            raise
        finally:
            if region_fd is not None:
                os.close(region_fd)
        with self._lock:
            self._shared = SharedMemory(arena, epoch_at, staging, region)

    def _shared_arena(self, stream: Plain) -> tuple[ReadOnlyMapping, int]:
        """What SHARE is answered with: the server's memory, and where our epoch is in it."""
        head, fds, _, _ = socket.recv_fds(
            stream.sock, HEADER_BYTES, 1, socket.MSG_WAITALL | socket.MSG_CMSG_CLOEXEC
        )
        try:
            answer = protocol.parse_header(head.ljust(HEADER_BYTES, b"\0"))
            if answer.status is not Status.OK:
                raise self._refusal(answer)
            if answer.meta != 16 or len(fds) != 1:
                raise ProtocolError("SHARE wasn't answered with a descriptor")
            data = memoryview(bytearray(16))
            self._fill(data, time.monotonic() + self._config.connect_timeout_s)
            nbytes, epoch_at = protocol.parse_shared(data)
            return ReadOnlyMapping(fds[0], nbytes), epoch_at
        finally:
            for fd in fds:
                os.close(fd)

    # -- the reader's thread ---------------------------------------------------------------

    def _read(self) -> None:
        try:
            self._connected.wait()
            head = memoryview(bytearray(HEADER_BYTES))
            while self._error is None:
                self._fill(head)
                self._read_message(protocol.parse_header(head))
        except Exception as error:  # noqa: BLE001 - as in `_write`
            self._fail(self._explained(error))
        finally:
            self._leave()

    def _read_message(self, header: protocol.Header) -> None:
        if header.status is not Status.OK:
            raise self._refusal(header)
        call = self._pending.get(header.request)
        if header.op is Op.ACK:
            self._acknowledged(header)
            return
        if call is None or call.op is not header.op or call.stage is Stage.QUEUED:
            raise ProtocolError(f"an answer that nobody asked for: {header}")
        limit = call.meta_limit
        if call.op is Op.LOAD:
            limit = 8 * call.count
        elif call.op is Op.BORROW:
            limit = 8 + (8 + _EXTENTS_BYTES) * call.count
        if header.meta > limit:
            raise ProtocolError(f"{header.meta} bytes answer a {call.op.name} of {call.count} keys")
        meta = memoryview(bytearray(header.meta))
        self._fill(meta)
        answer: Any
        if call.op is Op.LOAD:
            answer = self._receive(call, header, meta)
        elif header.payload:
            raise ProtocolError(f"values answer a {call.op.name}")
        elif call.op is Op.BORROW:
            answer = self._copy(call, meta)
        else:
            answer = call.parse(meta)
        with self._lock:
            del self._pending[header.request]
            sending = call.stage is Stage.SENDING
            if sending:  # the writer still holds the values, and settles it
                call.stage, call.answer = Stage.ANSWERED, answer
        if not sending:
            call.settle(answer, None)

    def _begin(self, call: Call) -> Sequence[memoryview]:
        """The buffers, which are in use from now on; none if the call was abandoned."""
        with self._lock:
            call.stage = Stage.RECEIVING
            return call.into

    def _receive(self, call: Call, header: protocol.Header, meta: memoryview) -> tuple[int, ...]:
        sizes, total = protocol.parse_sizes(meta, call.capacities)
        if header.payload != total:
            raise ProtocolError(f"{header.payload} bytes of values, {total} are announced")
        into = self._begin(call)
        if not into:
            self._drain(total)
        for size, view in zip(sizes, into, strict=False):
            if size != MISSING:
                self._fill(view[:size])
        return sizes

    def _copy(self, call: Call, meta: memoryview) -> tuple[int, ...]:
        shared = self._shared
        if shared is None:
            raise ProtocolError("BORROW was answered without shared memory")
        epoch = protocol.parse_number(meta[:8])
        end = 8 + 8 * call.count
        sizes, _ = protocol.parse_sizes(meta[8:end], call.capacities)
        parts = protocol.parse_extents(meta[end:], sizes, shared.arena.nbytes)
        for part, view in zip(parts, self._begin(call), strict=False):
            shared.arena.copy(part, view)
        kept = shared.arena.number(shared.epoch_at) == epoch
        self._queue.put(Call(Op.RETURN, meta=protocol.number(call.number)))
        return sizes if kept else (MISSING,) * call.count

    def _acknowledged(self, header: protocol.Header) -> None:
        shared = self._shared
        if shared is None or header.meta != 4 or header.payload:
            raise ProtocolError(f"an acknowledgement that makes no sense: {header}")
        data = memoryview(bytearray(4))
        self._fill(data)
        shared.staging.free.put(protocol.parse_slot(data, shared.staging.slots))

    def _refusal(self, header: protocol.Header) -> BackendError:
        text = memoryview(bytearray(min(header.meta, protocol.MAX_MESSAGE_BYTES)))
        self._fill(text, time.monotonic() + self._config.connect_timeout_s)
        said = bytes(text).decode(errors="replace")
        kind = BackendRejected if header.status in _REJECTED else BackendUnavailable
        return kind(f"{self.address}: the server refused: {said}")

    def _fill(self, view: memoryview, until: float | None = None) -> None:
        stream = self._stream
        if stream is None:
            raise EOFError
        at, end = 0, view.nbytes
        while at < end:
            try:
                got = stream.recv_into(view[at:] if at else view)
            except BlockingIOError:
                if until is not None and time.monotonic() > until:
                    raise BackendTimeout(
                        f"{self.address}: connected, but no greeting came within "
                        f"{self._config.connect_timeout_s:g} s; is it an lmcache_server?"
                    ) from None
                self._tick()
                continue
            if not got:
                raise EOFError
            at += got
            self._moved_at = time.monotonic()

    def _drain(self, nbytes: int) -> None:
        if self._scratch is None:
            self._scratch = memoryview(bytearray(_SCRATCH_BYTES))
        while nbytes > 0:
            length = min(nbytes, _SCRATCH_BYTES)
            self._fill(self._scratch[:length])
            nbytes -= length
