"""The client's side of shared memory: the server's arena, and staging memory for stores.

Knows mappings and slots. Knows nothing about messages.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
from queue import SimpleQueue

from lmcache_core.lm.protocol import Extent

PIECE_BYTES = 1 << 20
"""Small enough to be in the second-level cache still when the server copies it on."""
STAGING_BYTES = 8 << 20
_FAILED = ctypes.c_void_p(-1).value


class ReadOnlyMapping:
    """``nbytes`` of a file, mapped for reading. Python's own mmap hides its address if read-only.

    Raises:
        OSError: it can't be mapped.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        if os.fstat(fd).st_size < nbytes:  # reading behind the end would be SIGBUS
            raise OSError(f"the shared memory has less than {nbytes} bytes")
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        arguments = (None, ctypes.c_size_t(nbytes), mmap.PROT_READ, mmap.MAP_SHARED, fd)
        address = libc.mmap(*arguments, ctypes.c_long(0))
        if address is None or address == _FAILED:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self.address: int = address
        self.nbytes = nbytes
        self._libc = libc

    def number(self, offset: int) -> int:
        """The u64 at ``offset``, as it is now."""
        return int(ctypes.c_uint64.from_address(self.address + offset).value)

    def copy(self, parts: list[Extent], into: memoryview) -> None:
        """Copy ``parts`` to the start of ``into``, without the interpreter's lock."""
        target = ctypes.addressof(ctypes.c_char.from_buffer(into))
        for start, length in parts:
            ctypes.memmove(target, self.address + start, length)
            target += length

    def close(self) -> None:
        """Unmap; nobody may be reading."""
        self._libc.munmap(ctypes.c_void_p(self.address), ctypes.c_size_t(self.nbytes))


class Staging:
    """Memory that the server reads stores from, cut into slots of `PIECE_BYTES`."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("lmcache-staging", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, STAGING_BYTES)
        # Without this seal, a server that maps it could be made to die by truncating it.
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self._map = mmap.mmap(self.fd, STAGING_BYTES)
        self._view = memoryview(self._map)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.slots = STAGING_BYTES // PIECE_BYTES
        self.free: SimpleQueue[int | None] = SimpleQueue()
        for index in range(self.slots):
            self.free.put(index)

    def fill(self, index: int, piece: memoryview) -> None:
        """Copy ``piece`` into a slot, without the interpreter's lock where it is writable."""
        start = index * PIECE_BYTES
        if piece.readonly:
            self._view[start : start + piece.nbytes] = piece
        else:
            source = ctypes.addressof(ctypes.c_char.from_buffer(piece))
            ctypes.memmove(self._address + start, source, piece.nbytes)

    def close(self) -> None:
        """Give the memory back; nobody may be writing."""
        os.close(self.fd)
        self._view.release()
        with contextlib.suppress(BufferError):
            self._map.close()


class SharedMemory:
    """Both, of one connection."""

    def __init__(self, arena: ReadOnlyMapping, epoch_at: int, staging: Staging) -> None:
        self.arena = arena
        self.epoch_at = epoch_at
        self.staging = staging

    def close(self) -> None:
        """Unmap both."""
        self.arena.close()
        self.staging.close()
