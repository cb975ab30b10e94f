"""Requests of the client on their way out, and the way that their values take.

Small values go through the socket. Of larger ones the server copies those that lie in the region
that it has mapped (OFFER), and those that lie anywhere from staging memory (STAGE).
Knows nothing about answers, nor about what becomes of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from queue import Empty

from lmcache_backend_lm import protocol
from lmcache_backend_lm.call import Call
from lmcache_backend_lm.line import Line
from lmcache_backend_lm.protocol import Op
from lmcache_backend_lm.shared import PIECE_BYTES, SharedMemory, Staging
from lmcache_core import TICK_S

_SHARED_FROM_BYTES = 64 << 10
"""Below this, two more messages cost more than a copy through the socket."""


class Outgoing:
    """Sends calls over ``line``. ``shared``: what the server maps, if it is on this machine."""

    def __init__(self, line: Line, shared: SharedMemory | None) -> None:
        self._line = line
        self._shared = shared

    def choose_way(self, call: Call) -> Sequence[memoryview]:
        """Decide how the values of ``call`` go; answer those that `send` has to move.

        With the connection's lock held: a cancellation goes by ``call.op``.
        """
        shared = self._shared
        if shared is not None and call.nbytes >= _SHARED_FROM_BYTES:
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
        return () if call.op is Op.OFFER else call.payload

    def send(self, call: Call, values: Sequence[memoryview]) -> None:
        """Send ``call`` with ``values``, as `choose_way` said.

        Raises:
            OSError, EOFError, BackendTimeout: as `Line.send`.
        """
        payload = sum(view.nbytes for view in values)
        if call.op is Op.STAGE:
            payload = 4 * sum(-(-view.nbytes // PIECE_BYTES) for view in values)
        head = protocol.header(
            call.op, call.number, count=call.count, meta=len(call.meta), payload=payload
        )
        message = memoryview(head + call.meta)
        if call.op is Op.STAGE and self._shared is not None:
            self._line.send([message])
            self._send_staged(values, self._shared.staging)
        else:
            self._line.send([message, *values])

    def _send_staged(self, values: Sequence[memoryview], staging: Staging) -> None:
        for value in values:
            for start in range(0, value.nbytes, PIECE_BYTES):
                index = self._free_slot(staging)
                staging.fill(index, value[start : start + PIECE_BYTES])
                self._line.send([memoryview(protocol.slot(index))])

    def _free_slot(self, staging: Staging) -> int:
        while True:
            try:
                index = staging.take(TICK_S)
            except Empty:
                self._line.tick()
                continue
            if index is None:
                raise EOFError
            return index
