"""`BlockingChannel`: the base for transfer channels whose client blocks.

Knows threads and cancellation. Knows nothing about how bytes move.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any, ClassVar, TypeVar

from lmcache_core.aio.daemon_pool import DaemonPool
from lmcache_core.contracts.transfer import (
    Note,
    Peer,
    PeerDescriptor,
    Range,
    TransferChannel,
    TransferContext,
    check_call,
)
from lmcache_core.errors import BackendUnavailable

_T = TypeVar("_T")
_CONTROL_THREADS = 8


class Stop:
    """Tells a blocking call that nobody waits for it any more: let go of local memory, and end.

    One for each call. Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requested = False
        self._actions: list[Callable[[], object]] = []

    @property
    def requested(self) -> bool:
        """Whether the call should end; it may raise anything then."""
        return self._requested

    def request(self) -> None:
        """Ask for it. From any thread."""
        with self._lock:
            self._requested = True
            for action in self._actions:
                action()

    @contextmanager
    def calls(self, action: Callable[[], object]) -> Iterator[None]:
        """Within, `request` calls ``action``, which doesn't block; at once if it was before."""
        with self._lock:
            self._actions.append(action)
            if self._requested:
                action()
        try:
            yield
        finally:
            with self._lock:
                self._actions.remove(action)


class BlockingChannel(TransferChannel):
    """Base for clients that block.

    What core guarantees: the ``*_blocking`` methods are never called on the event loop. Each peer
    has ``capabilities.max_concurrency`` threads of its own, so one that hangs doesn't keep calls
    to others waiting. Ranges and notes were checked (`check_call`). ``close_blocking`` is called
    once, when no other call is under way, also after an ``open_blocking`` that raised.

    What a subclass owes is as in `TransferChannel`, without the ``async``. A call whose ``stop`` is
    requested ends as soon as it can, having let go of local memory.
    """

    kind: ClassVar[str]
    """The name in this kind's descriptor."""

    _context: TransferContext | None = None
    _descriptor: bytes = b""

    def __init__(self) -> None:
        self.name = uuid.uuid4().hex
        """Goes into the descriptor, and with every note."""
        self._control: DaemonPool | None = None
        self._pools: dict[Peer, DaemonPool] = {}
        self._under_way: dict[Stop, asyncio.Future[Any]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def descriptor(self) -> bytes:
        return self._descriptor

    @property
    def context(self) -> TransferContext:
        """What `open` was given.

        Raises:
            BackendUnavailable: the channel isn't open.
        """
        if self._context is None:
            raise BackendUnavailable(f"the {self.kind} channel isn't open")
        return self._context

    async def open(self, context: TransferContext) -> None:
        self._context, self._loop = context, asyncio.get_running_loop()
        self._control = DaemonPool(_CONTROL_THREADS, f"lmcache-{context.name}")
        try:
            body = await self._run(self._control, self.open_blocking, context)
            self._descriptor = PeerDescriptor(
                self.kind, self.name, context.region.nbytes, context.writable, body
            ).encode()
        except BaseException:
            await self.close()
            raise

    async def connect(self, descriptor: bytes) -> Peer:
        found = PeerDescriptor.decode(descriptor, self.kind)
        made: list[Peer] = []

        def connect(stop: Stop) -> None:
            made.append(self.connect_blocking(found, stop))

        try:
            await self._run(self._opened(), connect)
        except BaseException:
            for peer in made:  # nobody will ever disconnect it
                with suppress(BackendUnavailable):
                    await self._run(self._opened(), self._disconnect, peer)
            raise
        threads = self.capabilities.max_concurrency
        self._pools[made[0]] = DaemonPool(threads, f"lmcache-{self.context.name}-peer")
        return made[0]

    async def read(self, peer: Peer, ranges: Sequence[Range]) -> None:
        if check_call(peer, ranges, self.context.region.nbytes, writes=False):
            await self._run(self._pool(peer), self.read_blocking, peer, ranges)

    async def write(self, peer: Peer, ranges: Sequence[Range], note: bytes = b"") -> None:
        total = check_call(peer, ranges, self.context.region.nbytes, writes=True, note=note)
        if total or note:
            await self._run(self._pool(peer), self.write_blocking, peer, ranges, note)

    async def disconnect(self, peer: Peer) -> None:
        pool = self._pools.pop(peer, None)
        if pool is not None and self._control is not None:
            await self._run(self._control, self._disconnect, peer)
            await _ended([pool], self._control)

    async def close(self) -> None:
        control, self._control = self._control, None
        if control is None:
            return
        for stop in list(self._under_way):
            stop.request()
        closing, pools = DaemonPool(1, "lmcache-closing"), [control]
        closed: Future[None] | None = None
        try:
            await asyncio.wrap_future(closing.submit(self.interrupt_blocking))
            while self._under_way:
                await asyncio.wait(list(self._under_way.values()))
                await asyncio.sleep(0)  # whoever awaited them takes them out
            closed = closing.submit(self.close_blocking)
            await asyncio.wrap_future(closed)
            pools += self._pools.values()
            self._pools = {}
            await _ended(pools, closing)
            for thread in closing.shutdown():
                await asyncio.wrap_future(thread)
        finally:  # also where nobody waits for it any more
            if closed is None and not self._under_way:
                closing.submit(self.close_blocking)
            for pool in (*pools, *self._pools.values(), closing):
                pool.shutdown()  # threads end after what they are doing
        closing.join(1.0)  # past its last statement
        self._context = None

    def hand_over(self, note: Note) -> Future[None]:
        """Give core a note that came. From any thread; the future is done once core has it."""
        taken: Future[None] = Future()
        context, loop = self._context, self._loop

        def give() -> None:
            try:
                if context is not None and context.on_note is not None and self._control:
                    context.on_note(note)
            finally:
                taken.set_result(None)

        try:
            if loop is None or context is None or context.on_note is None:
                raise RuntimeError
            loop.call_soon_threadsafe(give)
        except RuntimeError:  # also where the loop has ended
            taken.set_result(None)
        return taken

    def _opened(self) -> DaemonPool:
        if self._control is None:
            raise BackendUnavailable(f"the {self.kind} channel isn't open")
        return self._control

    def _pool(self, peer: Peer) -> DaemonPool:
        self._opened()
        pool = self._pools.get(peer)
        if pool is None:
            raise BackendUnavailable(f"{peer.name}: the peer isn't connected")
        return pool

    def _disconnect(self, peer: Peer, stop: Stop) -> None:  # noqa: ARG002
        self.disconnect_blocking(peer)

    async def _run(self, pool: DaemonPool, call: Callable[..., _T], *args: Any) -> _T:
        """Run ``call(*args, stop)`` on a thread; ends when the thread is done, cancelled or not."""
        stop = Stop()
        submitted = pool.submit(_untraced, call, *args, stop)
        done = asyncio.ensure_future(asyncio.wrap_future(submitted))
        self._under_way[stop] = done
        try:
            await asyncio.wait([done])
        except asyncio.CancelledError:
            stop.request()
            submitted.cancel()  # where it hasn't begun
            while not done.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([done])
            if not done.cancelled():
                done.exception()  # retrieved, or asyncio logs that nobody did
            raise
        finally:
            del self._under_way[stop]
        result: _T = done.result()
        return result

    # -- for subclasses --------------------------------------------------------------------

    @abstractmethod
    def open_blocking(self, context: TransferContext, stop: Stop) -> bytes:
        """Make the region reachable; answer the descriptor's body. See `TransferChannel.open`."""

    @abstractmethod
    def connect_blocking(self, descriptor: PeerDescriptor, stop: Stop) -> Peer:
        """See `TransferChannel.connect`; the descriptor is whole, and of this kind."""

    @abstractmethod
    def read_blocking(self, peer: Any, ranges: Sequence[Range], stop: Stop) -> None:
        """See `TransferChannel.read`."""

    @abstractmethod
    def write_blocking(self, peer: Any, ranges: Sequence[Range], note: bytes, stop: Stop) -> None:
        """See `TransferChannel.write`."""

    @abstractmethod
    def disconnect_blocking(self, peer: Any) -> None:
        """Make calls to the peer fail, and let go of it. Other threads may be in such calls."""

    def interrupt_blocking(self) -> None:
        """Make calls end whose ``stop`` alone doesn't. Called once, when closing begins."""

    @abstractmethod
    def close_blocking(self) -> None:
        """Make the region unreachable, disconnect everybody, let go of everything."""


def _untraced(call: Callable[..., _T], *args: Any) -> _T:
    """``call(*args)``; errors lose their tracebacks, whose frames hold views of the region."""
    try:
        return call(*args)
    except BaseException as raised:
        error: BaseException | None = raised
        while error is not None:
            error.__traceback__ = None
            error = error.__cause__ or error.__context__
        raise


async def _ended(pools: Sequence[DaemonPool], by: DaemonPool) -> None:
    """Wait until all threads of ``pools`` have ended, on one of another pool's."""
    for pool in pools:
        for thread in pool.shutdown():
            await asyncio.wrap_future(thread)
        await asyncio.wrap_future(by.submit(pool.join, 1.0))
