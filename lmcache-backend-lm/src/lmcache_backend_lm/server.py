"""``lmcache_server``: listens, spreads connections over a few threads, and stops when told.

Each thread runs an event loop of its own with its share of the sessions. System calls leave the
interpreter's lock, so copies of several clients go on at the same time.
Knows threads and signals. Where it listens is `listening`'s business, what is said on a connection
`session`'s, and what is held `values`'.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import ssl
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmcache_backend_lm.accepting import Accepting, connections
from lmcache_backend_lm.arena import LEASE_BYTES, Arena
from lmcache_backend_lm.config import is_loopback
from lmcache_backend_lm.credentials import Credentials
from lmcache_backend_lm.disk import Disk
from lmcache_backend_lm.http import MetricsServer
from lmcache_backend_lm.listening import listen, listen_unix, unix_path
from lmcache_backend_lm.mapping import may_share
from lmcache_backend_lm.service import Epochs, Regions, Service
from lmcache_backend_lm.session import SCRATCH_BYTES, Session
from lmcache_backend_lm.values import Values
from lmcache_backend_lm.version import DISTRIBUTION, version_of
from lmcache_backend_lm.wire import Wire
from lmcache_core import ConfigError, Counters, available_bytes

logger = logging.getLogger(__name__)

DEFAULT_MEMORY_BYTES = 8 << 30
DEFAULT_METRICS_HOST = "127.0.0.1"
KEPT_PART = 4
"""One connection in so many is kept for other clients than the one that has all others."""
OVERLAP = 32
"""So many connections may be there instead of ones that are about to be closed."""
_CHECK_S = 1.0
_GRACE_S = 5.0
_DISK_PATIENCE_S = 1.0


@dataclass(frozen=True)
class ServerOptions:
    """What the command line says."""

    host: str = "localhost"
    port: int = 0
    memory_bytes: int | None = None
    """``None``: 8 GiB, or half of what is available if that is less."""
    populate: bool = False
    disk: Path | None = None
    disk_size_gib: float | None = None
    token_file: Path | None = None
    """`None`: the variable ``LMCACHE_SERVER_TOKEN``, if it is set."""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    unix: str = "auto"
    """A path, ``auto``, or ``none``."""
    metrics_host: str = DEFAULT_METRICS_HOST
    metrics_port: int | None = None
    metrics_token_file: Path | None = None
    metrics_tls: bool = False
    """HTTPS, with the certificate of the TCP port."""
    threads: int | None = None
    """``None``: two for each CPU, at most 8: the system spreads busy ones better than we can."""
    max_connections: int | None = None
    """``None``: 4096, or as many as there may be descriptors for."""
    stall_s: float = 30.0


class Server:
    """Made in `start`'s order: memory, disk, listeners, threads. `run` blocks until a signal.

    Raises:
        ConfigError: an option can't be had; the message says which.
    """

    def __init__(self, options: ServerOptions) -> None:
        self._options = options
        self.counters = Counters()
        self._credentials = _credentials(options)
        self._most = connections(options.max_connections)
        self._most_of_one = self._most - self._most // KEPT_PART
        self._clients: Counter[str] = Counter()
        self._listeners = listen(options.host, options.port)
        self.port: int = self._listeners[0].getsockname()[1]
        self._unix: socket.socket | None = None
        self._unix_path = ""
        self._metrics: MetricsServer | None = None
        self._workers: list[_Worker] = []
        self._started_s = time.time()
        arena = self._arena = Arena(_memory_bytes(options), populate=options.populate)
        values = Values(arena, self.counters)
        self.service = Service(
            arena,
            values,
            self.counters,
            Epochs(arena, LEASE_BYTES, self.counters),
            Regions(self.counters),
            instance=secrets.token_bytes(16),
            version=version_of(DISTRIBUTION),
            token=self._credentials.token,
            max_value_bytes=arena.capacity,
            stall_s=options.stall_s,
            facts=self._facts,
        )
        if options.disk is not None:
            self.service.disk = Disk(
                options.disk,
                options.disk_size_gib,
                values=values,
                arena=arena,
                counters=self.counters,
                describe=self.service.descriptions,
            )
            self.service.disk.check()

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT."""
        try:
            self._start()
            asyncio.run(self._accept())
        finally:
            self._close()
        logger.info("stopped")

    def _start(self) -> None:
        options, credentials = self._options, self._credentials
        count = _threads(options)
        self._workers = [_Worker(self.service, index, self._gone) for index in range(count)]
        if options.metrics_port is not None:
            self._metrics = MetricsServer(
                options.metrics_host,
                options.metrics_port,
                self.counters,
                self._totals,
                token=lambda: credentials.metrics_token,
                tls=(lambda: credentials.tls) if options.metrics_tls else None,
            )

    def _open_unix(self) -> None:
        if self._options.unix == "none":
            return
        path = unix_path(self._options.unix, self.port)
        if path is None:
            return
        try:
            self._unix = listen_unix(path)
        except OSError as error:
            if self._options.unix != "auto":
                raise ConfigError(f"--unix {path}: {error.strerror or error}") from error
            logger.warning("no Unix socket at %s: %s", path, error)
            return
        self._unix_path = str(path)
        # With TLS, clients asked for TLS; and other users may not read the socket anyway.
        self.service.unix_path = str(path) if self._credentials.tls is None else ""

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        self._loop = loop
        self._open_unix()  # not before: whoever ends this process now has it removed
        accepting = self._accepting = Accepting(self._take, self._rests)
        for listener in self._listeners:
            accepting.listen(listener, encrypted=self._credentials.tls is not None)
        if self._unix is not None:
            accepting.listen(self._unix, encrypted=False)
        self._announce()
        await stop.wait()
        logger.info("stopping")
        accepting.close()

    def _announce(self) -> None:
        options, arena = self._options, self._arena
        scheme = "lm" if self._credentials.tls is None else "lm+tls"
        host = f"[{options.host}]" if ":" in options.host else options.host
        logger.info(
            "serving %s://%s:%d%s, %.2f GiB of memory%s%s",
            scheme,
            host,
            self.port,
            f" and lm+unix://{self._unix_path}" if self._unix_path else "",
            arena.capacity / 2**30,
            f", files in {options.disk}" if options.disk else "",
            f", metrics on {self._metrics.url}" if self._metrics else "",
        )
        token, metrics_token = self._credentials.token, self._credentials.metrics_token
        addresses = [listener.getsockname()[0] for listener in self._listeners]
        if not token and not all(map(is_loopback, addresses)):
            logger.warning(
                "%s is reachable from other machines, and no token is set: whoever can connect can "
                "read and write every value. Set --token-file, or listen on localhost",
                options.host,
            )
        metrics = self._metrics
        if metrics is not None and not metrics_token and not is_loopback(metrics.host):
            logger.warning(
                "metrics on %s are reachable from other machines, and no token is set: whoever can "
                "connect can read every number. Set --metrics-token-file, or --metrics-host",
                metrics.host,
            )

    def _reload(self) -> None:
        """What clients are asked for from now on; those that are connected stay."""
        self._credentials.reload()
        self.service.token = self._credentials.token

    def _facts(self) -> dict[str, int]:
        return {
            "server_open_connections": sum(worker.sessions for worker in self._workers),
            "server_start_time_seconds": int(self._started_s),
        }

    def _totals(self) -> dict[str, int]:
        """Numbers for operators. On a thread that may wait for the disk."""
        disk = self.service.disk
        on_disk = {} if disk is None else disk.totals_blocking(_DISK_PATIENCE_S)
        return {**self._facts(), **self.service.values.totals(), **on_disk}

    def _take(self, sock: socket.socket, address: Any, encrypted: bool) -> None:
        tls = self._credentials.tls if encrypted else None
        client = address[0] if address else "a Unix socket's client"
        peer = f"{client}:{address[1]}" if address else client
        here = sum(worker.sessions for worker in self._workers)
        if here >= self._most + OVERLAP or self._clients[client] >= self._most_of_one:
            refuse(self.service, sock)
            return
        self._clients[client] += 1
        worker = min(self._workers, key=lambda worker: worker.sessions)
        if here >= self._most:  # where somebody says nothing, most likely
            worker = max(self._workers, key=lambda worker: worker.silent)
        worker.take(sock, client, peer, tls, full=here >= self._most)

    def _rests(self, error: OSError) -> None:
        self.service.counters.add("server_accept_pauses")
        text = "no descriptors for more connections, they wait: %s"
        self.service.seldom.warn("accept", text, error.strerror)

    def _gone(self, client: str) -> None:
        """A connection ended. From any thread."""
        with contextlib.suppress(RuntimeError):  # stopped already
            self._loop.call_soon_threadsafe(self._forget, client)

    def _forget(self, client: str) -> None:
        self._clients[client] -= 1
        if not self._clients[client]:
            del self._clients[client]
        self._accepting.freed()

    def _close(self) -> None:
        for worker in self._workers:
            worker.stop()
        for worker in self._workers:
            worker.join()
        if self._metrics is not None:
            self._metrics.close()
        for listener in self._listeners:
            listener.close()
        if self._unix is not None:
            self._unix.close()
            with contextlib.suppress(OSError):
                os.unlink(self._unix_path)
        if self.service.disk is not None:
            self.service.disk.close(_GRACE_S)
        self.service.epochs.close()
        self._arena.close()


class _Worker:
    """A thread with an event loop and some of the sessions. ``gone`` is told whose ended."""

    def __init__(self, service: Service, index: int, gone: Callable[[str], None]) -> None:
        self.sessions = 0
        """Including those that are on their way to this thread."""
        self._service = service
        self._gone = gone
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._open: dict[asyncio.Task[None], Session] = {}
        self._silent: deque[tuple[asyncio.Task[None], Session]] = deque()
        """As they came; the first of them isn't greeted."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._run, name=f"lmcache-server-{index}", daemon=True
        )
        self._thread.start()

    @property
    def silent(self) -> int:
        """About how many sessions weren't greeted yet. From any thread."""
        return len(self._silent)

    def take(
        self,
        sock: socket.socket,
        client: str,
        peer: str,
        tls: ssl.SSLContext | None,
        *,
        full: bool,
    ) -> None:
        """Serve a connection; ``full``: only instead of one that says nothing.

        From the accepting thread.
        """
        self.sessions += 1
        self._loop.call_soon_threadsafe(self._begin, sock, client, peer, tls, full)

    def stop(self) -> None:
        """Let sessions finish what they are at, and end."""
        self._loop.call_soon_threadsafe(lambda: self._loop.create_task(self._end()))

    def join(self) -> None:
        """Wait for that."""
        self._thread.join(2 * _GRACE_S)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        checking = self._loop.create_task(self._check())
        self._loop.run_forever()
        checking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(checking)
        self._loop.close()

    def _begin(
        self, sock: socket.socket, client: str, peer: str, tls: ssl.SSLContext | None, full: bool
    ) -> None:
        if full and not self._drop_silent():
            refuse(self._service, sock)
            self._end_of(client)
            return
        try:
            sock.setblocking(False)
            is_unix = sock.family == socket.AF_UNIX
            if not is_unix:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if tls is not None:
                sock = tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            wire = Wire(sock, passes_descriptors=is_unix and may_share(sock))
        except OSError as error:
            logger.debug("%s: %s", peer, error)
            sock.close()
            self._end_of(client)
            return
        session = Session(self._service, wire, peer, self._scratch, client)
        task = self._loop.create_task(session.run())
        self._open[task] = session
        self._silent.append((task, session))
        self._forget_greeted()
        task.add_done_callback(self._ended)

    def _drop_silent(self) -> bool:
        """Close the session that has said nothing for the longest time; whether there is one."""
        self._forget_greeted()
        if not self._silent:
            return False
        self._service.counters.add("server_refused", reason="silent")
        self._silent.popleft()[0].cancel()
        return True

    def _forget_greeted(self) -> None:
        silent = self._silent
        while silent and (silent[0][1].greeted or silent[0][0].done()):
            silent.popleft()

    def _ended(self, task: asyncio.Task[None]) -> None:
        session = self._open.pop(task)
        session.end()  # a task that was cancelled before it began did nothing
        self._end_of(session.client)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a session ended with an error of ours", exc_info=error)

    def _end_of(self, client: str) -> None:
        self.sessions -= 1
        self._gone(client)

    async def _check(self) -> None:
        while True:
            await asyncio.sleep(min(_CHECK_S, self._service.stall_s / 4))
            for task, session in list(self._open.items()):
                if not session.check():
                    task.cancel()

    async def _end(self) -> None:
        for task, session in self._open.items():
            session.stopping = True
            if session.wire.idle:
                task.cancel()
        if self._open:
            await asyncio.wait(list(self._open), timeout=_GRACE_S)
        for task in list(self._open):
            task.cancel()
        if self._open:
            await asyncio.wait(list(self._open), timeout=1.0)
        self._loop.stop()


def refuse(service: Service, sock: socket.socket) -> None:
    """Close a connection that is one too many."""
    service.counters.add("server_refused", reason="too_many")
    service.seldom.warn("many", "too many connections, no more are accepted (--max-connections)")
    sock.close()


def _memory_bytes(options: ServerOptions) -> int:
    if options.memory_bytes is not None:
        return options.memory_bytes
    return min(DEFAULT_MEMORY_BYTES, available_bytes() // 2)


def _credentials(options: ServerOptions) -> Credentials:
    if options.tls_cert is None:
        for name, given in (("--tls-key", options.tls_key), ("--metrics-tls", options.metrics_tls)):
            if given:
                raise ConfigError(f"{name} is set without --tls-cert")
    return Credentials(
        token_file=options.token_file,
        metrics_token_file=options.metrics_token_file,
        tls_cert=options.tls_cert,
        tls_key=options.tls_key,
    )


def _threads(options: ServerOptions) -> int:
    return options.threads or min(8, 2 * len(os.sched_getaffinity(0)))
