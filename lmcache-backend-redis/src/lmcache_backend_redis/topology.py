"""Which server has a key, and connections to it.

redis-py opens connections, logs in, does TLS, finds the primary with Sentinel and the node of a
slot with a cluster, and pools what is idle. What travels on a connection afterwards is `resp`'s
business, so the socket is taken from it: by a thread for the time of a call, by an event loop until
the connection fails.

A connection goes back to its pool only after every reply on it was read and none was an error. Any
failure closes it and the idle ones of the same pool, which probably share its fate; the next call
connects anew, and so finds a new primary or a moved slot.

Knows servers. Knows nothing about chunks.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

from redis.cluster import ClusterNode, LoadBalancingStrategy, RedisCluster
from redis.connection import Connection, ConnectionPool
from redis.sentinel import SentinelConnectionPool

from lmcache_backend_redis.blocking import BlockingWire, at_once
from lmcache_backend_redis.config import Address, Form, RedisConfig
from lmcache_backend_redis.failures import CLIENT_ERRORS, is_move, translated
from lmcache_backend_redis.looping import LoopWire
from lmcache_backend_redis.pools import Line, Node, login_options, node_of, shown, tls_options
from lmcache_backend_redis.resp import ReplyError, Wire
from lmcache_core import BackendError, BackendRejected, BackendUnavailable

logger = logging.getLogger(__name__)

REST_S: Final = 2.0
"""How long a cluster's node is left alone after a failure, so that one hung node of several doesn't
cost every call its time."""
_REFRESH_EVERY_S: Final = 0.5


class Topology(ABC):
    """Where keys live. Thread-safe."""

    def __init__(self, config: RedisConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._taken: set[socket.socket] = set()
        self._closed = False

    @abstractmethod
    def groups(self, names: Sequence[bytes], *, read: bool) -> dict[Node, list[int]]:
        """Positions of ``names`` by the node to ask. ``read``: a replica may answer."""

    @abstractmethod
    def primaries(self) -> list[Node]:
        """All nodes that together hold every key."""

    @abstractmethod
    def _pools(self) -> list[ConnectionPool]: ...

    @abstractmethod
    def _failed(self, node: Node, error: BackendError, moved: bool) -> None:
        """Learn from a failed call."""

    @abstractmethod
    def _answered(self, node: Node) -> None:
        """Learn from a call that worked."""

    @abstractmethod
    def loop_node(self, *, read: bool) -> Node | None:
        """The node of every key, if calls to it can be awaited on an event loop; else ``None``."""

    # -- on a thread -----------------------------------------------------------------------

    @contextmanager
    def wire(self, node: Node, until: float) -> Iterator[Wire]:
        """A connection for one call, on a thread.

        Raises:
            BackendError: whatever went wrong, inside the ``with`` too.
        """
        with self._learning(node):
            connection = self._connect(node)
            sock = _socket(connection)
            wire = BlockingWire(sock, node.peer, idle_s=self._config.timeout_s, until=until)
            fine = False
            try:
                self._take(sock)
                yield wire
                fine = wire.at_rest
            finally:
                self._put(sock)
                if not fine:
                    connection.disconnect()
                node.pool.release(connection)

    def add_line(self, node: Node) -> None:
        """Connect, on a thread, for a call that will be awaited on the loop.

        Raises:
            BackendError: whatever went wrong.
        """
        with self._learning(node):
            failures = node.failures
            connection = self._connect(node)
            try:
                sock = _socket(connection)
                wire = LoopWire(sock, node.peer, idle_s=self._config.timeout_s)
                if self._closed:
                    raise BackendUnavailable("the backend is closed")
            except BaseException:
                connection.disconnect()
                node.pool.release(connection)
                raise
            node.idle.append(Line(connection, sock, wire, failures))

    # -- on the loop -----------------------------------------------------------------------

    def has_line(self, node: Node) -> bool:
        """Whether a connection is at hand that still stands; those that don't are closed."""
        while node.idle:
            line = node.idle[-1]
            # Sentinel's pool doesn't own connections to who isn't the primary any more.
            current = line.failures == node.failures and node.pool.owns_connection(line.connection)
            if current and line.wire.is_quiet():
                return True
            node.idle.remove(line)  # not the last: a thread may have added one meanwhile
            _drop(node, line)
        return False

    @contextmanager
    def line(self, node: Node, until: float) -> Iterator[Wire]:
        """A connection for one call that is awaited on the loop; only right after `has_line`.

        Raises:
            BackendError: whatever went wrong, inside the ``with`` too.
        """
        with self._learning(node):
            if not node.idle:
                raise BackendUnavailable(f"{node.peer} closes connections as soon as they are made")
            line = node.idle.pop()
            fine = False
            try:
                self._take(line.sock)
                line.wire.begin(until)
                yield line.wire
                fine = line.wire.at_rest
            finally:
                self._put(line.sock)
                if fine:
                    node.idle.append(line)
                else:
                    _drop(node, line)

    def leave_loop(self) -> None:
        """Close what stays with the loop; nothing is under way there any more."""
        for node in (self.loop_node(read=False), self.loop_node(read=True)):
            while node is not None and node.idle:
                _drop(node, node.idle.pop())

    # -- for both --------------------------------------------------------------------------

    def abort(self) -> None:
        """End what is under way on every connection. Doesn't block."""
        with self._lock:
            self._closed = True
            for sock in self._taken:
                # Not its own method: an SSLSocket's would pull TLS from under its reader.
                with suppress(OSError):
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go of every connection."""
        self.abort()
        for pool in self._pools():
            pool.disconnect()

    @contextmanager
    def _learning(self, node: Node) -> Iterator[None]:
        """Translate what goes wrong, and remember it."""
        try:
            yield
        except (BackendError, ReplyError, *CLIENT_ERRORS) as error:
            moved = is_move(error)
            told = translated(error, node.peer)
            node.failures += 1  # the loop's idle connections are closed there
            node.pool.disconnect(inuse_connections=False)
            self._failed(node, told, moved)
            if told is error:
                raise
            raise told from error
        self._answered(node)

    def _connect(self, node: Node) -> Connection:
        if self._closed:
            raise BackendUnavailable("the backend is closed")
        return node.pool.get_connection()

    def _take(self, sock: socket.socket) -> None:
        with self._lock:
            if self._closed:
                raise BackendUnavailable("the backend is closed")
            self._taken.add(sock)

    def _put(self, sock: socket.socket) -> None:
        with self._lock:
            self._taken.discard(sock)


class _Fixed(Topology):
    """One server, or Sentinel's idea of the primary and its replicas."""

    def __init__(self, config: RedisConfig, address: Address) -> None:
        super().__init__(config)
        self._tls = address.tls
        self._primary = node_of(config, address, primary=True)
        self._reader = (
            node_of(config, address, primary=False) if config.replica_reads else self._primary
        )

    def groups(self, names: Sequence[bytes], *, read: bool) -> dict[Node, list[int]]:
        return {self._reader if read else self._primary: list(range(len(names)))}

    def primaries(self) -> list[Node]:
        return [self._primary]

    def loop_node(self, *, read: bool) -> Node | None:
        # TLS would encrypt on the loop's thread.
        return None if self._tls else self._reader if read else self._primary

    def _failed(self, node: Node, error: BackendError, moved: bool) -> None:
        """Nothing: a pool of Sentinel's asks for the primary whenever it connects."""

    def _answered(self, node: Node) -> None:
        """Nothing either."""

    def _pools(self) -> list[ConnectionPool]:
        pools = [self._primary.pool, self._reader.pool]
        managers = [p.sentinel_manager for p in pools if isinstance(p, SentinelConnectionPool)]
        return pools + [one.connection_pool for m in managers for one in m.sentinels]


class _Cluster(Topology):
    """A cluster; redis-py knows the slots."""

    def __init__(self, config: RedisConfig, address: Address) -> None:
        super().__init__(config)
        self._address = address
        self._nodes: dict[int, Node] = {}
        self._refreshed = 0.0
        self._stale = False
        options: dict[str, Any] = {**login_options(config), **tls_options(config, address)}
        if config.replica_reads:  # connections then begin with READONLY, which replicas want
            options["load_balancing_strategy"] = LoadBalancingStrategy.ROUND_ROBIN_REPLICAS
        self._client = RedisCluster(
            startup_nodes=[ClusterNode(host, port) for host, port in address.hosts],
            require_full_coverage=False,
            **options,
        )

    def groups(self, names: Sequence[bytes], *, read: bool) -> dict[Node, list[int]]:
        self._refresh()
        manager, now = self._client.nodes_manager, time.monotonic()
        replica = read and self._config.replica_reads
        strategy = self._client.load_balancing_strategy if replica else None
        # One choice of replica a call and primary, not a key: a batch is one round trip to each.
        chosen: dict[str, Node] = {}
        groups: dict[Node, list[int]] = {}
        for position, name in enumerate(names):
            slot = self._client.keyslot(name)
            try:
                primary = manager.get_node_from_slot(slot)
                if primary.name not in chosen:
                    found = manager.get_node_from_slot(slot, replica, strategy)
                    chosen[primary.name] = self._known(found)
                node = chosen[primary.name]
            except CLIENT_ERRORS:
                self._stale = True  # nobody has the slot at present: misses
                continue
            if node.rests_until <= now:
                groups.setdefault(node, []).append(position)
        return groups

    def loop_node(self, *, read: bool) -> None:
        """None: redis-py may have to ask the cluster who has a slot, and blocks meanwhile."""

    def primaries(self) -> list[Node]:
        self._refresh()
        return [self._known(node) for node in self._client.get_primaries()]

    def _failed(self, node: Node, error: BackendError, moved: bool) -> None:
        self._stale = True
        if moved or isinstance(error, BackendRejected):
            return
        if node.rests_until == 0.0:
            logger.warning(
                "%s; chunks on this node of the cluster are misses until it answers", error
            )
        node.rests_until = time.monotonic() + REST_S

    def _answered(self, node: Node) -> None:
        if node.rests_until:
            node.rests_until = 0.0
            logger.info("%s answers again", node.peer)

    def _refresh(self) -> None:
        """Ask the cluster who has which slot, after something failed and not too often."""
        now = time.monotonic()
        with self._lock:
            if not self._stale or now - self._refreshed < _REFRESH_EVERY_S:
                return
            self._refreshed, self._stale = now, False
        try:
            self._client.nodes_manager.initialize()
        except CLIENT_ERRORS as error:
            self._stale = True
            raise translated(error, "the cluster") from error

    def _known(self, found: ClusterNode) -> Node:
        pool = self._client.get_redis_connection(found).connection_pool
        with self._lock:
            node = self._nodes.get(id(pool))
            if node is None or node.pool is not pool:
                node = self._nodes[id(pool)] = Node(pool, f"redis {found.name}")
            return node

    def _pools(self) -> list[ConnectionPool]:
        nodes = self._client.get_nodes()
        return [n.redis_connection.connection_pool for n in nodes if n.redis_connection]


def connect(config: RedisConfig) -> Topology:
    """Make the topology and see that it answers.

    Raises:
        BackendUnavailable: nothing answers, or nobody is the primary.
        BackendRejected: the credentials or options are refused, or it isn't Redis.
    """
    address = config.address
    peer = shown(address)
    try:
        topology = (_Cluster if address.form is Form.CLUSTER else _Fixed)(config, address)
    except (*CLIENT_ERRORS, ValueError) as error:
        raise translated(error, peer) from error
    try:
        for node in topology.primaries():
            with topology.wire(node, time.monotonic() + config.call_timeout_s) as wire:
                at_once(_ping(wire))
    except BaseException:
        topology.close()
        raise
    return topology


async def _ping(wire: Wire) -> None:
    await wire.send([b"*1\r\n$4\r\nPING\r\n"])
    reply = await wire.reply()
    if isinstance(reply, ReplyError):
        raise reply
    if reply != b"PONG":
        raise BackendRejected(f"{wire.peer} answered PING with {reply!r}; it isn't Redis")


def _drop(node: Node, line: Line) -> None:
    line.wire.leave()
    line.connection.disconnect()
    node.pool.release(line.connection)


def _socket(connection: Connection) -> socket.socket:
    # redis-py has no public name for it; every release up to 8 has this one.
    sock = connection._sock
    if not isinstance(sock, socket.socket):
        raise BackendUnavailable("redis-py gave a connection without a socket")
    return sock
