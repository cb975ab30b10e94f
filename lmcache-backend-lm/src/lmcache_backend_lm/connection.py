"""One connection of the client: requests of many calls under way at once, two threads.

The writer connects, then sends requests in the order they were made; the reader takes
answers apart and receives values straight into the callers' buffers. Threads rather
than asyncio because a thread can leave a whole value to one system call: in a process
whose other threads keep the interpreter busy, each wake-up of an event loop may
cost 5 ms, and 32 MiB cost a hundred of them.

A connection fails as a whole, once, and for good; `lmcache_backend_lm.backend` makes the next one.
Knows which calls are under way and who holds their buffers. How it begins is `handshake`'s
business, how values travel is `outgoing`'s and `incoming`'s.
Knows nothing about deadlines, retries or what the bytes mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

from lmcache_backend_lm import protocol
from lmcache_backend_lm.call import Call, Stage
from lmcache_backend_lm.config import LmConfig
from lmcache_backend_lm.greeting import Welcome
from lmcache_backend_lm.handshake import Handshake
from lmcache_backend_lm.incoming import Incoming
from lmcache_backend_lm.line import Line
from lmcache_backend_lm.outgoing import Outgoing
from lmcache_backend_lm.protocol import HEADER_BYTES, Op, ProtocolError, Status
from lmcache_backend_lm.shared import SharedMemory
from lmcache_core import BackendError, BackendUnavailable, HostRegion, settle_soon


class Connection:
    """Connects at once, in the background; `call` waits for that too."""

    def __init__(
        self,
        config: LmConfig,
        fingerprint: str,
        token: bytes,
        name: str,
        region: HostRegion | None,
        notice: Callable[[str], None],
    ) -> None:
        self.address = config.address
        self.welcome: Welcome | None = None
        self.waiting_bytes = 0
        """Of values in calls that aren't over: a measure of how busy this connection is."""
        self._line = Line(config, lambda: bool(self._pending))
        self._handshake = Handshake(config, self._line, fingerprint, token, region, notice)
        self._shared: SharedMemory | None = None
        self._queue: SimpleQueue[Call | None] = SimpleQueue()
        self._pending: dict[int, Call] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._error: BackendError | None = None
        self._threads = [
            threading.Thread(target=self._write, name=f"{name}-writer", daemon=True),
            threading.Thread(target=self._read, name=f"{name}-reader", daemon=True),
        ]
        self._running = len(self._threads)
        self._connected = threading.Event()
        self._ended: list[asyncio.Future[None]] = []
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
        nbytes = call.nbytes
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

    def tell(self, call: Call) -> None:
        """Send a request that has no answer, after those before it. Nobody learns its end."""
        self._queue.put(call)

    def end(self) -> None:
        """Fail what is under way; both threads will end. Idempotent."""
        self._fail(BackendUnavailable(f"{self.address}: the backend was closed"))

    async def close(self) -> None:
        """`end`, and wait for the threads."""
        self.end()
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        with self._lock:
            if self._running:
                self._ended.append(ended)
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
                    self._line.moved()
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
            shared = self._shared
        self._queue.put(None)
        if shared is not None:
            shared.staging.wake()
        self._line.cut()
        self._connected.set()

    def _leave(self) -> None:
        """The end of a thread; the last one tells everybody."""
        with self._lock:
            self._running -= 1
            if self._running:
                return
            calls, self._pending = list(self._pending.values()), {}
            shared, self._shared = self._shared, None
            ended, error = self._ended, self._error
            if shared is not None:  # the server may be copying still
                shared.staging.withdraw_all()
        self._line.close()
        if shared is not None:
            shared.close()
        assert error is not None  # noqa: S101  threads end for no other reason
        for call in calls:
            call.settle(None, type(error)(str(error)))
        for future in ended:
            settle_soon(future)

    # -- the writer's thread ---------------------------------------------------------------

    def _write(self) -> None:
        try:
            outgoing = self._connect()
            while (call := self._queue.get()) is not None:
                try:
                    self._send(call, outgoing)
                finally:
                    self._sent(call)
                    del call
        except Exception as error:  # noqa: BLE001 - whatever it is ends the connection, not the process
            self._fail(self._line.explained(error, greeted=self.welcome is not None))
        finally:
            self._leave()

    def _connect(self) -> Outgoing:
        welcome, shared = self._handshake.run()
        with self._lock:
            self._shared = shared
        self.welcome = welcome
        self._connected.set()
        return Outgoing(self._line, shared)

    def _send(self, call: Call, outgoing: Outgoing) -> None:
        with self._lock:
            if call.abandoned:
                return
            call.stage = Stage.SENDING
            values = outgoing.choose_way(call)
        outgoing.send(call, values)

    def _sent(self, call: Call) -> None:
        """The writer holds nothing of ``call`` any more."""
        with self._lock:
            answered = call.stage is Stage.ANSWERED
            if call.stage is Stage.SENDING:
                call.stage = Stage.SENT
        if answered:
            call.settle(call.answer, None)

    # -- the reader's thread ---------------------------------------------------------------

    def _read(self) -> None:
        try:
            self._connected.wait()
            incoming = Incoming(self._line, self._shared, self._begin, self._queue.put)
            head = memoryview(bytearray(HEADER_BYTES))
            while self._error is None:
                self._line.fill(head)
                self._receive(protocol.parse_header(head), incoming)
        except Exception as error:  # noqa: BLE001 - as in `_write`
            self._fail(self._line.explained(error, greeted=self.welcome is not None))
        finally:
            self._leave()

    def _receive(self, header: protocol.Header, incoming: Incoming) -> None:
        if header.status is not Status.OK:
            raise self._line.refusal(header)
        call = self._pending.get(header.request)
        if header.op is Op.ACK:
            incoming.acknowledged(header)
            return
        if call is None or call.op is not header.op or call.stage is Stage.QUEUED:
            raise ProtocolError(f"an answer that nobody asked for: {header}")
        answer = incoming.answer(call, header)
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
