"""What the hardware does when there is nothing of ours around it: the other half of every ratio.

    Memcpy       ctypes.memmove on one or more threads; ctypes lets go of the GIL
    SocketPeer   the same bytes through a socket, to and from another process
    RawFiles     the same bytes into a new file and out of it, buffered or with O_DIRECT

Each moves bytes with as few calls as there are, from buffers that exist and are touched already.
Knows nothing about what is compared with it. Linux.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PAGE_BYTES = 4096


def aligned(nbytes: int) -> memoryview:
    """``nbytes`` of touched memory that starts at a page, in huge pages where they are to be had.

    Rounded up to whole pages, as O_DIRECT wants it.
    """
    mapping = mmap.mmap(-1, -(-nbytes // PAGE_BYTES) * PAGE_BYTES)
    with contextlib.suppress(OSError):
        mapping.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(mapping)
    ctypes.memset(address(view), 1, len(view))
    return view


def address(buffer: memoryview) -> int:
    """Where a writable buffer starts."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


class Memcpy:
    """Copies on ``threads`` threads, the calling one among them."""

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(max(threads - 1, 1), thread_name_prefix="memcpy")

    def __call__(self, to: int, source: int, nbytes: int) -> None:
        """Copy between two addresses that don't overlap."""
        part = -(-nbytes // self.threads // PAGE_BYTES) * PAGE_BYTES
        rest = [
            self._pool.submit(ctypes.memmove, to + at, source + at, min(part, nbytes - at))
            for at in range(part, nbytes, part)
        ]
        ctypes.memmove(to, source, min(part, nbytes))
        for piece in rest:
            piece.result()

    def copy(self, to: memoryview, source: memoryview) -> None:
        """Copy a writable buffer into another one of its size."""
        self(address(to), address(source), source.nbytes)

    def close(self) -> None:
        self._pool.shutdown()

    def __enter__(self) -> Memcpy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SocketPeer:
    """A process at the other end of a socket, which sends and receives as many bytes as asked.

    ``kind`` is ``tcp`` (over loopback) or ``unix`` (a socket pair). One request at a time: take a
    peer for each thread. Use as a context manager.
    """

    _REQUEST = struct.Struct("<?Q")

    def __init__(self, max_bytes: int, kind: str = "tcp") -> None:
        self._socket, other = _tcp_pair() if kind == "tcp" else socket.socketpair()
        with other:
            command = [sys.executable, __file__, str(other.fileno()), str(max_bytes)]
            self._process = subprocess.Popen(command, pass_fds=[other.fileno()])
        self._max_bytes = max_bytes
        self.receive(aligned(PAGE_BYTES)[:1])  # it is there

    def receive(self, into: memoryview) -> None:
        """Fill ``into`` with bytes from the peer."""
        self._request(False, into.nbytes)
        _receive(self._socket, into)

    def send(self, source: memoryview) -> None:
        """Send ``source``; return when the peer has all of it."""
        self._request(True, source.nbytes)
        self._socket.sendall(source)
        _receive(self._socket, memoryview(bytearray(1)))

    def close(self) -> None:
        self._socket.close()  # which ends it
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> SocketPeer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(self, sent: bool, nbytes: int) -> None:
        if nbytes > self._max_bytes:
            raise ValueError(f"{nbytes} bytes: this peer was made for {self._max_bytes}")
        self._socket.sendall(self._REQUEST.pack(sent, nbytes))

    @classmethod
    def serve(cls, connection: socket.socket, max_bytes: int) -> None:
        """The other end: answer requests until there are no more."""
        memory, request = aligned(max_bytes), memoryview(bytearray(cls._REQUEST.size))
        with contextlib.suppress(ConnectionError):
            while True:
                _receive(connection, request)
                sent, nbytes = cls._REQUEST.unpack(request)
                if sent:
                    _receive(connection, memory[:nbytes])
                    connection.sendall(b"\x01")
                else:
                    connection.sendall(memory[:nbytes])


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    for one in (ours, theirs):
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return ours, theirs


def _receive(connection: socket.socket, into: memoryview) -> None:
    done = 0
    while done < into.nbytes:
        got = connection.recv_into(into[done:], 0, socket.MSG_WAITALL)
        if not got:
            raise ConnectionResetError("the other end is gone")
        done += got


class RawFiles:
    """New files in ``folder``, written and read with nothing but open, write or read, and close.

    ``direct``: O_DIRECT; buffers are page-aligned and whole pages long (`aligned`). ``sync``: each
    file is on the disk before it counts as written, and its name isn't waited for. Use as a context
    manager: the files go at its end.
    """

    def __init__(self, folder: Path, *, direct: bool, sync: bool = False) -> None:
        self._folder = folder
        self._flags = os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
        self._sync = sync
        self._written: set[Path] = set()

    def write(self, name: str, source: memoryview) -> None:
        """Create or replace a file."""
        path = self._folder / name
        fd = os.open(path, self._flags | os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        self._written.add(path)
        try:
            done = 0
            while done < source.nbytes:
                done += os.pwritev(fd, [source[done:]], done)
            if self._sync:
                os.fdatasync(fd)
        finally:
            os.close(fd)

    def read(self, name: str, into: memoryview) -> None:
        """Fill ``into`` with the start of a file."""
        fd = os.open(self._folder / name, self._flags | os.O_RDONLY)
        try:
            done = 0
            while done < into.nbytes:
                got = os.preadv(fd, [into[done:]], done)
                if not got:
                    raise EOFError(f"{name} has {done} bytes, not {into.nbytes}")
                done += got
        finally:
            os.close(fd)

    def remove(self, name: str) -> None:
        path = self._folder / name
        path.unlink()
        self._written.discard(path)

    def __enter__(self) -> RawFiles:
        return self

    def __exit__(self, *_: object) -> None:
        for path in self._written:
            path.unlink(missing_ok=True)


def _main(arguments: Sequence[str]) -> None:
    descriptor, max_bytes = map(int, arguments)
    with socket.socket(fileno=descriptor) as connection:
        SocketPeer.serve(connection, max_bytes)


if __name__ == "__main__":
    _main(sys.argv[1:])
