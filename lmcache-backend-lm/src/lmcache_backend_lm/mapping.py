"""Memory of another process, mapped for reading, and what to ask of it and its owner before.

Knows descriptors, addresses, seals and who is at the other end of a Unix socket. Knows nothing
about what lies there.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import socket
import struct

from lmcache_backend_lm.protocol import Extent

_CREDENTIALS = struct.Struct("=iII")
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
        # Refuses what can't be written.
        target = ctypes.addressof(ctypes.c_char.from_buffer(into))
        for start, length in parts:
            ctypes.memmove(target, self.address + start, length)
            target += length

    def close(self) -> None:
        """Unmap; nobody may be reading."""
        self._libc.munmap(ctypes.c_void_p(self.address), ctypes.c_size_t(self.nbytes))


class Backing:
    """Which pages of a mapped file are there. Reading one that isn't would make the system take it.

    ``fd`` is duplicated.
    """

    def __init__(self, fd: int, mapping: ReadOnlyMapping) -> None:
        self._fd = os.dup(fd)
        self._mapping = mapping
        self._libc = ctypes.CDLL(None, use_errno=True)

    def holds(self, offset: int, nbytes: int) -> bool:
        """Whether somebody wrote every page of this range; touches none of them."""
        start = offset - offset % mmap.PAGESIZE
        count = -(-(offset + nbytes - start) // mmap.PAGESIZE)
        pages = (ctypes.c_ubyte * count)()
        length = ctypes.c_size_t(offset + nbytes - start)
        if self._libc.mincore(ctypes.c_void_p(self._mapping.address + start), length, pages):
            return False
        resident = bytes(pages)
        at = resident.find(0)
        while at >= 0:  # never written, or on swap
            if self._next_data(start + at * mmap.PAGESIZE) != start + at * mmap.PAGESIZE:
                return False
            at = resident.find(0, at + 1)
        return True

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._fd)

    def _next_data(self, offset: int) -> int:
        try:
            return os.lseek(self._fd, offset, os.SEEK_DATA)
        except OSError as error:
            return -1 if error.errno == errno.ENXIO else offset  # none behind it; or it can't say


def is_sealed(fd: int) -> bool:
    """Whether nobody can shrink this memory: reading behind its end would end the process."""
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:
        return False


def may_share(sock: socket.socket) -> bool:
    """Whether memory may be handed to, and taken from, the other end of a connected Unix socket.

    That is this process's user, who can look into it anyway, or root. Of a listener's process,
    it is the user at the time when it began to listen.
    """
    size = _CREDENTIALS.size
    _, user, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return user in (0, os.geteuid())
