"""A network that fails: for tests of clients, whatever they speak."""

from __future__ import annotations

import random
import socket
import threading
from contextlib import suppress


class FaultyLink:
    """A proxy whose connections break or fall silent after a random number of bytes."""

    def __init__(self, port: int, chance: random.Random) -> None:
        self.faults = 0
        self._target = ("127.0.0.1", port)
        self._chance = chance
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        """Break everything and wait for every thread."""
        with self._lock:
            for one in (self._listener, *self._open):
                _shut(one)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._target)
            except OSError:  # the server is down
                client.close()
                continue
            with self._lock:
                self._open |= {client, server}
            left = [self._chance.choice([0, 50, 500, 5_000, 500_000, 5_000_000])]
            left[0] = self._chance.randint(0, left[0])
            silent = self._chance.random() < 0.05
            pumps = [
                threading.Thread(target=self._pump, args=(*ends, left, silent))
                for ends in ((client, server), (server, client))
            ]
            self._threads = [t for t in self._threads if t.is_alive()] + pumps
            for pump in pumps:
                pump.start()

    def _pump(
        self, source: socket.socket, sink: socket.socket, left: list[int], silent: bool
    ) -> None:
        """Both directions share ``left``; the last bytes before the fault are passed on."""
        try:
            while data := source.recv(1 << 16):
                if len(data) > left[0]:
                    with self._lock:
                        self.faults += 1
                    sink.sendall(data[: left[0]])
                    left[0] = 0
                    while silent and source.recv(1 << 16):
                        pass  # until somebody gives up
                    break
                left[0] -= len(data)
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for one in (source, sink):
                _shut(one)
            with self._lock:
                self._open.discard(source)
            source.close()


def _shut(one: socket.socket) -> None:
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
