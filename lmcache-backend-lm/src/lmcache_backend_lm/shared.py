"""The client's side of shared memory: the server's arena, staging memory, and our own region.

Knows mappings, slots and vouchers. Knows nothing about messages.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Sequence
from queue import SimpleQueue

from lmcache_backend_lm.fence import fence
from lmcache_backend_lm.mapping import ReadOnlyMapping
from lmcache_core import HostRegion, address_of, keep_writers_out, memfd, reader_of

PIECE_BYTES = 1 << 20
"""Small enough to be in the second-level cache still when the server copies it on."""
_SLOTS = 8
_VOUCHERS = 512
STAGING_BYTES = _SLOTS * PIECE_BYTES + 8 * _VOUCHERS


class Staging:
    """Memory of ours that the server maps: slots of `PIECE_BYTES`, and vouchers behind them.

    ``fd`` is for the server, who can't write by it.

    A voucher is the number of an OFFER for as long as the offered buffers don't change. Two numbers
    that share a place can only cost the earlier one its store.
    """

    def __init__(self) -> None:
        self.fd = memfd("lmcache-staging", STAGING_BYTES)
        try:
            self._map = mmap.mmap(self.fd, STAGING_BYTES)
        except BaseException:
            os.close(self.fd)
            raise
        with contextlib.suppress(OSError):  # an old kernel: then the next line has to do
            keep_writers_out(self.fd)
        reader = reader_of(self.fd)
        if reader is not None:
            os.close(self.fd)
            self.fd = reader
        self._view = memoryview(self._map)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._vouchers = self._view[_SLOTS * PIECE_BYTES :].cast("Q")
        self.slots = _SLOTS
        self._free: SimpleQueue[int | None] = SimpleQueue()
        self._taken: set[int] = set()
        for index in range(self.slots):
            self._free.put(index)

    def take(self, timeout_s: float) -> int | None:
        """A slot that is the server's until `give_back`; ``None``: somebody called `wake`.

        Raises:
            Empty: none was free within ``timeout_s``.
        """
        index = self._free.get(timeout=timeout_s)
        if index is not None:
            self._taken.add(index)
        return index

    def give_back(self, index: int) -> bool:
        """Whether the server had the slot: one given back twice would soon hold two pieces."""
        if index not in self._taken:
            return False
        self._taken.remove(index)
        self._free.put(index)
        return True

    def wake(self) -> None:
        """Don't let anybody wait for a slot any more."""
        self._free.put(None)

    def fill(self, index: int, piece: memoryview) -> None:
        """Copy ``piece`` into a slot, without the interpreter's lock where it is writable."""
        start = index * PIECE_BYTES
        if piece.readonly:
            self._view[start : start + piece.nbytes] = piece
        else:
            ctypes.memmove(self._address + start, address_of(piece), piece.nbytes)

    def vouch(self, number: int) -> None:
        """From now on the buffers of this OFFER stay as they are."""
        self._vouchers[number % _VOUCHERS] = number

    def withdraw(self, number: int) -> None:
        """They may change from now on. Before the server read this, it doesn't keep a copy."""
        if self._vouchers[number % _VOUCHERS] == number:
            self._vouchers[number % _VOUCHERS] = 0
            fence()

    def withdraw_all(self) -> None:
        """The same for every OFFER."""
        for index in range(_VOUCHERS):
            self._vouchers[index] = 0
        fence()

    def close(self) -> None:
        """Give the memory back; nobody may be writing."""
        os.close(self.fd)
        self._vouchers.release()
        self._view.release()
        with contextlib.suppress(BufferError):
            self._map.close()


class SharedMemory:
    """What a connection shares. ``region``: ours, which the server maps for reading, if any."""

    def __init__(
        self, arena: ReadOnlyMapping, epoch_at: int, staging: Staging, region: HostRegion | None
    ) -> None:
        self.arena = arena
        self.epoch_at = epoch_at
        self.staging = staging
        self._region = region

    def offsets(self, values: Sequence[memoryview]) -> list[int] | None:
        """Where ``values`` lie in the region; ``None`` unless all of them do."""
        region = self._region
        if region is None:
            return None
        found: list[int] = []
        for view in values:
            offset = address_of(view) - region.address
            if not 0 <= offset <= region.nbytes - view.nbytes:
                return None
            found.append(offset)
        return found

    def close(self) -> None:
        """Unmap what is the connection's own."""
        self.arena.close()
        self.staging.close()


def open_for_reading(region: HostRegion) -> int | None:
    """A descriptor that others can map ``region`` by, but not write it; ``None``: there is none."""
    return None if region.fd is None else reader_of(region.fd)
