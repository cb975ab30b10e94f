"""One end of a transfer channel for tests: here, or in a process of its own that a test commands.

`End` is a channel on a region of its own; `Process` starts this module as a program, which opens
one, and asks it for things over a socket, a line of JSON each way. Knows nothing about what is
tested.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import xxhash

from lmcache_core.contracts.storage import HostRegion
from lmcache_core.contracts.transfer import Note, Range, TransferChannel, TransferContext
from lmcache_core.contracts.transfer import TransferChannelDescriptor as Descriptor
from lmcache_core.errors import LMCacheError
from lmcache_core.memory.host_memory import allocate_region
from lmcache_core.plugins.manager import Plugins
from lmcache_core.tiers.peers import make_channel

_START_S = 60.0


def descriptor_of(channel: str) -> Descriptor:
    """What is installed as ``channel``, or a descriptor that lies at ``module:attribute``."""
    module, colon, attribute = channel.partition(":")
    if not colon:
        return Plugins().transfer_channel(channel)
    found = getattr(import_module(module), attribute)
    if not isinstance(found, Descriptor):
        raise TypeError(f"{channel} is {found!r:.80}, not a TransferChannelDescriptor")
    return found


def pattern(seed: int, nbytes: int) -> bytes:
    """``nbytes`` bytes (a multiple of 8) that differ from those of any other ``seed``."""
    step = (2 * seed + 1) * 0x9E3779B97F4A7C15 % 2**64
    whole = b"".join((step * i % 2**64).to_bytes(8, "little") for i in range(1, 8193))
    return (whole * (nbytes // len(whole) + 1))[:nbytes]


class End:
    """A channel, its region, and the notes that came: each with a digest of the region by then."""

    def __init__(self, channel: TransferChannel, nbytes: int) -> None:
        self.channel = channel
        self.nbytes = nbytes
        self._owned = allocate_region(nbytes, shared=True)
        self._fd = self._owned.region.fd
        # A mapping of our own, because it can tell whether anybody still has a view of it.
        self.memory = mmap.mmap(self._fd or -1, nbytes)
        self.view = memoryview(self.memory)
        self.notes: list[Note] = []
        self.digests: list[str] = []
        self.came = asyncio.Event()
        self.on_note: Callable[[], object] = lambda: None

    async def open(self, *, writable: bool = False) -> None:
        """Open the channel on the region."""
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        region = HostRegion(address, self.nbytes, self.view, self._fd)
        await self.channel.open(TransferContext("test", region, writable, self._on_note))

    async def notes_came(self, count: int) -> None:
        """Wait until there are ``count``."""
        while len(self.notes) < count:
            self.came.clear()
            await self.came.wait()

    def digest(self) -> str:
        """Of the whole region."""
        return xxhash.xxh3_128_hexdigest(self.view)

    def _on_note(self, note: Note) -> None:
        self.on_note()
        self.notes.append(note)
        self.digests.append(self.digest())
        self.came.set()


class Process:
    """An end in a process of its own. Every method blocks until it has answered."""

    def __init__(
        self,
        channel: str,
        options: Mapping[str, Any],
        nbytes: int,
        *,
        writable: bool = False,
        isolated: bool | None = None,
    ) -> None:
        self._socket, other = socket.socketpair()
        told = json.dumps([channel, dict(options), nbytes, writable, isolated])
        # Whatever a client library prints goes nowhere near the answers.
        with other:
            self.process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(other.fileno()), told],
                pass_fds=[other.fileno()],
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self._socket.settimeout(_START_S)
        self._answers = self._socket.makefile("rb")
        try:
            self.descriptor = bytes.fromhex(self._answer())
        except BaseException:
            self.end()
            raise

    def fill(self, seed: int) -> None:
        """Put `pattern` all over its region."""
        self._ask("fill", seed)

    def digest(self) -> str:
        """Of its region."""
        return str(self._ask("digest"))

    def notes(self, count: int) -> list[tuple[str, bytes, str]]:
        """Wait for so many; sender, data, and the digest of the region when each came."""
        return [(name, bytes.fromhex(data), had) for name, data, had in self._ask("notes", count)]

    def read(self, descriptor: bytes, ranges: Sequence[Range]) -> None:
        """Connect and read.

        Raises:
            RuntimeError: it says what it raised.
        """
        self._ask("read", descriptor.hex(), ranges)

    def write(self, descriptor: bytes, ranges: Sequence[Range], note: bytes = b"") -> None:
        """Connect and write.

        Raises:
            RuntimeError: it says what it raised.
        """
        self._ask("write", descriptor.hex(), ranges, note.hex())

    def stop(self) -> None:
        """Let it hang, as on a machine that swaps."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        """Let it go on."""
        self.process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        """End it as a crash does. Idempotent."""
        self.process.kill()
        self.process.wait()
        self._answers.close()
        self._socket.close()

    def _ask(self, *request: object) -> Any:
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        return self._answer()

    def _answer(self) -> Any:
        line = self._answers.readline()
        if not line:
            raise RuntimeError(f"the peer's process ended: {self.process.wait()}")
        status, answer = json.loads(line)
        if status != "ok":
            raise RuntimeError(f"the peer's process: {answer}")
        return answer


async def _answered(end: End, request: list[Any]) -> Any:
    do, *rest = request
    if do == "fill":
        end.view[:] = pattern(rest[0], end.nbytes)
    elif do == "digest":
        return end.digest()
    elif do == "notes":
        await end.notes_came(rest[0])
        return [
            (note.sender, note.data.hex(), digest)
            for note, digest in zip(end.notes, end.digests, strict=True)
        ]
    else:
        peer = await end.channel.connect(bytes.fromhex(rest[0]))
        ranges = [Range(*one) for one in rest[1]]
        if do == "read":
            await end.channel.read(peer, ranges)
        else:
            await end.channel.write(peer, ranges, bytes.fromhex(rest[2]))
        await end.channel.disconnect(peer)
    return None


async def _tried(end: End, request: list[Any]) -> tuple[str, Any]:
    try:
        return "ok", await _answered(end, request)
    except LMCacheError as error:
        return "error", f"{type(error).__name__}: {error}"


async def _serve(sock: socket.socket, told: str) -> None:
    name, options, nbytes, writable, isolated = json.loads(told)
    found = descriptor_of(name)
    config = found.config.model_validate(options)
    end = End(make_channel(found, config, isolated=isolated), nbytes)
    requests, answers = await asyncio.open_connection(sock=sock)

    async def answer(status: str, said: object) -> None:
        answers.write(json.dumps([status, said]).encode() + b"\n")
        await answers.drain()

    await end.open(writable=writable)
    await answer("ok", end.channel.descriptor.hex())
    while line := await requests.readline():
        await answer(*await _tried(end, json.loads(line)))
    answers.close()
    await end.channel.close()


if __name__ == "__main__":
    asyncio.run(_serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2]))
