"""A link between a client and its server that does everything that a network or a peer may do.

It cuts connections, lets them fall silent, flips bits, and stands for a hostile server to the
client; and it is a hostile client to the server, with what genuine ones have said before: halves of
messages, changed ones, lengths that are announced and never sent.
"""

from __future__ import annotations

import random
import socket
import threading
import time
from collections import Counter, deque
from contextlib import suppress
from pathlib import Path
from weakref import WeakSet

from faulty_link import FaultyLink, _shut

CUTS = (3_000, 30_000, 300_000, 3_000_000)
HOLDS_S = 1.0
"""So long a hostile peer says nothing."""


class Link(FaultyLink):
    """`FaultyLink` that damages, and remembers what was said. ``counts`` says what it did."""

    def __init__(self, target: int | Path, chance: random.Random, at: Path | None = None) -> None:
        self.counts: Counter[str] = Counter()
        self._said: dict[bool, deque[bytes]] = {
            True: deque([b"*1\r\n$4\r\nPING\r\n"], maxlen=32),
            False: deque([b"+PONG\r\n"], maxlen=32),
        }
        """Beginnings of what clients (True) and servers said."""
        self._heard: WeakSet[socket.socket] = WeakSet()
        self._guests: list[threading.Thread] = []
        super().__init__(target, chance, at=at, cuts=CUTS)

    def close(self) -> None:
        super().close()
        for guest in self._guests:
            guest.join()

    def assail(self) -> None:
        """Be a hostile client of the server, once."""
        try:
            server = super()._connect()
        except OSError:
            return  # it is down
        self.counts["hostile client"] += 1
        self._guest(server, True)

    def calm_down(self) -> None:
        """End what is broken, and pass everything on from now on."""
        self.breaks = False
        with self._lock:
            for one in self._open:
                _shut(one)

    def _connect(self) -> socket.socket:
        if not self.breaks or self._chance.random() > 0.05:
            return super()._connect()
        ours, theirs = socket.socketpair()
        self.counts["hostile server"] += 1
        self._guest(theirs, False)
        return ours

    def _guest(self, peer: socket.socket, client: bool) -> None:
        self._guests = [guest for guest in self._guests if guest.is_alive()]
        seed = self._chance.random()
        guest = threading.Thread(
            target=self._misbehave, args=(peer, client, random.Random(seed)), name="harness-guest"
        )
        self._guests.append(guest)
        guest.start()

    def _misbehave(self, peer: socket.socket, client: bool, chance: random.Random) -> None:
        """Say something wrong, wait, and hang up."""
        said = chance.choice(list(self._said[client]))
        kind = chance.randrange(4)
        if kind == 0:
            said = chance.randbytes(chance.randint(1, 4096))
        elif kind == 1:
            said = said[: chance.randrange(1, len(said) + 1)]
        elif kind == 2:
            said = spoilt(said, chance, flips=8)
        else:  # a length is in here somewhere
            place = chance.randrange(len(said))
            said = said[:place] + b"\xff" * 4 + said[place + 4 :]
        peer.settimeout(HOLDS_S)
        with suppress(OSError), peer:
            peer.sendall(said)
            until = time.monotonic() + chance.uniform(0, HOLDS_S)
            while time.monotonic() < until and peer.recv(1 << 16):
                pass

    def _passed(self, source: socket.socket, data: bytes) -> bytes:
        if data and source not in self._heard:
            self._heard.add(source)
            client = source.getsockname() == self._listener.getsockname()
            self._said[client].append(data[:4096])
        if self.breaks and data and self._chance.random() < 0.002:
            self.counts["bit flipped on the way"] += 1
            return spoilt(data, self._chance, flips=1)
        return data

    def _broke(self, silent: bool) -> None:
        self.counts["fell silent" if silent else "cut"] += 1


def spoilt(data: bytes, chance: random.Random, flips: int) -> bytes:
    """``data`` with some bits flipped."""
    changed = bytearray(data)
    for _ in range(flips):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)
