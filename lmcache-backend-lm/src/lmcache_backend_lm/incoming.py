"""Answers on their way into the callers' buffers: by socket, or from the server's memory.

What a server announces is checked against what the call asked for before a byte is written.
Knows nothing about requests on their way out, nor about what becomes of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lmcache_backend_lm import protocol
from lmcache_backend_lm.call import Call
from lmcache_backend_lm.fence import fence
from lmcache_backend_lm.line import Line
from lmcache_backend_lm.protocol import MAX_EXTENTS, MISSING, Header, Op, ProtocolError
from lmcache_backend_lm.shared import SharedMemory

_EXTENTS_BYTES = 4 + MAX_EXTENTS * 16


class Incoming:
    """Receives answers over ``line``. ``shared``: what the server shares, if anything.

    ``begin`` answers a load's buffers, which are in use from then on; none if it was abandoned.
    ``submit`` queues a request whose end nobody waits for.
    """

    def __init__(
        self,
        line: Line,
        shared: SharedMemory | None,
        begin: Callable[[Call], Sequence[memoryview]],
        submit: Callable[[Call], None],
    ) -> None:
        self._line = line
        self._shared = shared
        self._begin = begin
        self._submit = submit

    def answer(self, call: Call, header: Header) -> Any:
        """Receive the rest of what answers ``call``; for a load its values as well.

        Raises:
            ProtocolError: that isn't an answer to this call.
            OSError, EOFError, BackendTimeout: as `Line.fill`.
        """
        limit = call.meta_limit
        if call.op is Op.LOAD:
            limit = 8 * call.count
        elif call.op is Op.BORROW:
            limit = 8 + (8 + _EXTENTS_BYTES) * call.count
        if header.meta > limit:
            raise ProtocolError(f"{header.meta} bytes answer a {call.op.name} of {call.count} keys")
        meta = memoryview(bytearray(header.meta))
        self._line.fill(meta)
        if call.op is Op.LOAD:
            return self._receive(call, header, meta)
        if header.payload:
            raise ProtocolError(f"values answer a {call.op.name}")
        if call.op is Op.BORROW:
            return self._copy(call, meta)
        return call.parse(meta)

    def acknowledged(self, header: Header) -> None:
        """Take a slot of staging memory back.

        Raises:
            ProtocolError: the server hasn't got such a slot, or there is no staging memory.
            OSError, EOFError, BackendTimeout: as `Line.fill`.
        """
        shared = self._shared
        if shared is None or header.meta != 4 or header.payload:
            raise ProtocolError(f"an acknowledgement that makes no sense: {header}")
        data = memoryview(bytearray(4))
        self._line.fill(data)
        index = protocol.parse_slot(data, shared.staging.slots)
        if not shared.staging.give_back(index):
            raise ProtocolError(f"slot {index} is acknowledged, which was given back before")

    def _receive(self, call: Call, header: Header, meta: memoryview) -> tuple[int, ...]:
        sizes, total = protocol.parse_sizes(meta, call.capacities)
        if header.payload != total:
            raise ProtocolError(f"{header.payload} bytes of values, {total} are announced")
        into = self._begin(call)
        if not into:
            self._line.drain(total)
        places = zip(sizes, into, strict=False)
        self._line.fill(*[view[:size] for size, view in places if size != MISSING])
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
        fence()
        kept = shared.arena.number(shared.epoch_at) == epoch
        self._submit(Call(Op.RETURN, meta=protocol.number(call.number)))
        return sizes if kept else (MISSING,) * call.count
