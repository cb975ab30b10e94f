"""redis-py's connection pools, made as a configuration says: login, TLS, Sentinel.

Its retries are switched off: core's guard decides about them. Knows options. Knows nothing about
keys and calls.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

from pydantic import SecretStr
from redis.backoff import NoBackoff
from redis.connection import (
    Connection,
    ConnectionPool,
    SSLConnection,
    UnixDomainSocketConnection,
)
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelConnectionPool

from lmcache_backend_redis.config import Address, Form, RedisConfig
from lmcache_backend_redis.looping import LoopWire


@dataclass(frozen=True)
class Line:
    """A connection that stays with the event loop."""

    connection: Connection
    sock: socket.socket
    wire: LoopWire
    failures: int
    """How many its node had when it was connected."""


class Node:
    """One connection pool, and whether its server is worth a try."""

    def __init__(self, pool: ConnectionPool, peer: str) -> None:
        self.pool = pool
        self.peer = peer
        self.rests_until = 0.0
        self.failures = 0
        self.idle: list[Line] = []


def node_of(config: RedisConfig, address: Address, *, primary: bool) -> Node:
    """The pool for one server, or for what Sentinel says it is."""
    options: dict[str, Any] = {**login_options(config), "db": address.database or 0}
    if address.form is Form.UNIX:
        del options["socket_keepalive"]
        pool = ConnectionPool(
            connection_class=UnixDomainSocketConnection, path=address.path, **options
        )
        return Node(pool, shown(address))
    options |= tls_options(config, address)
    if address.form is Form.SENTINEL:
        login = {"username": config.sentinel_username, "password": _plain(config.sentinel_password)}
        sentinel = Sentinel(
            address.hosts,
            sentinel_kwargs={
                **_timeouts(config),
                **login,
                **tls_options(config, address),
            },
        )
        pool = SentinelConnectionPool(config.service, sentinel, is_master=primary, **options)
        role = "primary" if primary else "replicas"
        return Node(pool, f"the {role} of {config.service!r} at {shown(address)}")
    ((host, port),) = address.hosts
    kind = SSLConnection if options.pop("ssl", False) else Connection
    return Node(
        ConnectionPool(connection_class=kind, host=host, port=port, **options), shown(address)
    )


def _timeouts(config: RedisConfig) -> dict[str, Any]:
    return {
        "socket_timeout": config.timeout_s,
        "socket_connect_timeout": config.connect_timeout_s,
        "socket_keepalive": True,
        "retry": Retry(NoBackoff(), 0),
    }


def login_options(config: RedisConfig) -> dict[str, Any]:
    """redis-py's, for every connection to a server of chunks."""
    return {
        **_timeouts(config),
        "username": config.username,
        "password": _plain(config.password),
        "protocol": 2,  # no messages that nobody asked for between replies
    }


def tls_options(config: RedisConfig, address: Address) -> dict[str, Any]:
    """redis-py's, for a cluster and for Sentinel's pools; ``ssl`` isn't for a pool."""
    if not address.tls:
        return {}
    files = {
        "ssl_ca_certs": config.tls_ca_file,
        "ssl_certfile": config.tls_cert_file,
        "ssl_keyfile": config.tls_key_file,
    }
    given = {name: str(path) for name, path in files.items() if path is not None}
    return {"ssl": True, **given, "ssl_check_hostname": config.tls_check_hostname}


def _plain(secret: SecretStr | None) -> str | None:
    return secret.get_secret_value() if secret else None


def shown(address: Address) -> str:
    """What messages call a server, or several; without secrets."""
    places = address.path or ",".join(f"{host}:{port}" for host, port in address.hosts)
    return f"redis {places}"
