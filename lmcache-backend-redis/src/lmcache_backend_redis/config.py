"""Options of the redis backend, and the addresses it understands. Imports no client.

    redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE]          also resp:// and valkey://
    rediss://…                                                the same over TLS
    unix://[[USER]:PASSWORD@]/PATH/OF/SOCKET
    redis-sentinel://[[USER]:PASSWORD@]HOST[:PORT],HOST[:PORT]…[/DATABASE or /SERVICE]
    redis-cluster://[[USER]:PASSWORD@]HOST[:PORT],HOST[:PORT]…

A query sets other options: ``?service=cache&ttl_s=3600``. User and password are percent-encoded.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Final, Literal
from urllib.parse import parse_qsl, unquote

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FilePath,
    SecretStr,
    field_validator,
    model_validator,
)

REDIS_PORT: Final = 6379
SENTINEL_PORT: Final = 26379
SERVICE_VARIABLE: Final = "REDIS_SERVICE_NAME"
"""Where LMCache has the name of a Sentinels' service."""


class Form(Enum):
    """How the servers are arranged."""

    SINGLE = "one server"
    UNIX = "a Unix socket"
    SENTINEL = "Sentinel"
    CLUSTER = "a cluster"


_FORMS: Final = {
    "redis": Form.SINGLE,
    "rediss": Form.SINGLE,
    "resp": Form.SINGLE,
    "valkey": Form.SINGLE,
    "unix": Form.UNIX,
    "redis-sentinel": Form.SENTINEL,
    "redis-cluster": Form.CLUSTER,
}
SCHEMES: Final = tuple(_FORMS)
_QUERY_NAMES: Final = {"db": "database"}
"""What redis-py calls an option in addresses."""


@dataclass(frozen=True)
class Address:
    """A parsed URL without its user, password and query."""

    form: Form
    hosts: tuple[tuple[str, int], ...] = ()
    path: str = ""
    database: int | None = None
    tls: bool = False


class RedisConfig(BaseModel):
    """What stands under ``backends: {NAME: {type: redis, …}}``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    url: str = Field(
        description="Address of the server, the Sentinels or some nodes of the cluster, such as "
        "`redis://host:6379`."
    )
    username: str | None = Field(None, description="Redis user; instead of the address's.")
    password: SecretStr | None = Field(None, description="Its password; instead of the address's.")
    database: int | None = Field(
        None, ge=0, description="Number of the database; instead of the address's. A cluster has 0."
    )
    mode: Literal["standalone", "cluster"] | None = Field(
        None,
        description="`cluster`: the address is that of a cluster's node, as with "
        "`redis-cluster://`.",
    )
    service: str = Field(
        default_factory=lambda: os.environ.get(SERVICE_VARIABLE) or "mymaster",
        min_length=1,
        description="What the Sentinels call the primary and its replicas. Not said: "
        f"`{SERVICE_VARIABLE}`, or `mymaster`.",
    )
    sentinel_username: str | None = Field(None, description="User on the Sentinels themselves.")
    sentinel_password: SecretStr | None = Field(None, description="Its password.")
    tls: bool = Field(False, description="TLS to every server, Sentinels too; `rediss://` sets it.")
    tls_ca_file: FilePath | None = Field(
        None, description="Certificates to trust, PEM; the system's if not said."
    )
    tls_cert_file: FilePath | None = Field(None, description="This client's certificate, PEM.")
    tls_key_file: FilePath | None = Field(None, description="This client's private key, PEM.")
    tls_check_hostname: bool = Field(
        True, description="The server's certificate must be for the host of the address."
    )
    ttl_s: int | None = Field(
        None, ge=1, description="Seconds that a chunk is kept. Not said: until it is evicted."
    )
    piece_bytes: int = Field(
        (1 << 20) - 128,
        ge=64 << 10,
        le=64 << 20,
        description="A longer value is stored in pieces of this size. Just below 1 MiB, because "
        "Redis's allocator rounds 1 MiB and a few bytes up to 1.25 MiB.",
    )
    replica_reads: bool = Field(
        False, description="Ask and load from replicas, with Sentinel or a cluster."
    )
    connections: int = Field(
        4,
        ge=1,
        le=64,
        description="Calls at the same time, each with a connection: so many long ones, each on a "
        "thread, and so many short ones.",
    )
    connect_timeout_s: float = Field(
        1.0, gt=0, description="Seconds until a server that can't be reached is given up."
    )
    timeout_s: float = Field(
        2.0, gt=0, description="Seconds that a server may be silent in the middle of a call."
    )
    call_timeout_s: float = Field(
        30.0, gt=0, description="Seconds after which a call ends, whatever the server does."
    )
    prefix: str = Field(
        "lmcache",
        pattern=r"^[A-Za-z0-9._:-]{1,64}$",
        description="How every key begins; letters, digits and `._:-`.",
    )

    @model_validator(mode="before")
    @classmethod
    def _options_in_the_address(cls, values: Any) -> Any:
        """Make options of the address's query, user and password; those set beside it win.

        So the address can be shown: it holds no secret any more.
        """
        url = values.get("url") if isinstance(values, dict) else None
        if not isinstance(url, str):
            return values
        place, mark, query = url.partition("?")
        scheme, separator, rest = place.partition("://")
        if "@" in query and "@" not in rest:
            raise ValueError("url: write '?' in a password as %3F, and '@' in an option as %40")
        login, at, host = rest.rpartition("@")
        options = {**_query(query if mark else ""), **_login(login if at else "")}
        names, _, path = host.partition("/")
        if _FORMS.get(scheme.lower()) is Form.SENTINEL and path and not path.strip("/").isdigit():
            # As LMCache writes it: the service's name, where redis-py has a database's number.
            host, options = names, {"service": unquote(path.strip("/")), **options}
        return {**options, **values, "url": f"{scheme}{separator}{host}"}

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        parse_address(url)
        return url

    @model_validator(mode="after")
    def _fits_together(self) -> RedisConfig:
        address = self.address
        if self.replica_reads and address.form not in (Form.SENTINEL, Form.CLUSTER):
            raise ValueError(
                "replica_reads needs a redis-sentinel:// or redis-cluster:// address; one server "
                "has no replicas that we could know of"
            )
        if address.form not in (Form.SINGLE, Form.CLUSTER) and self.mode == "cluster":
            raise ValueError(f"mode: {address.form.value} isn't a cluster; write redis-cluster://")
        if address.form is Form.CLUSTER and self.mode == "standalone":
            raise ValueError("mode: the address is a cluster's; write redis:// for one server")
        if address.form is Form.CLUSTER and address.database:
            raise ValueError("a cluster has database 0 only; take the number out")
        if address.form is Form.UNIX and self.tls:
            raise ValueError("tls: a Unix socket has no TLS")
        if self.tls_key_file and not self.tls_cert_file:
            raise ValueError("tls_key_file needs tls_cert_file")
        return self

    @property
    def address(self) -> Address:
        """The address, with the options that replace parts of it."""
        found = parse_address(self.url)
        database = self.database if self.database is not None else found.database
        cluster = self.mode == "cluster" and found.form is Form.SINGLE
        form = Form.CLUSTER if cluster else found.form
        return replace(found, form=form, database=database, tls=found.tls or self.tls)


def _query(query: str) -> dict[str, str]:
    """The options in an address's query."""
    if not query:
        return {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True)
    except ValueError:
        raise ValueError("url: what follows '?' must look like name=value&name=value") from None
    options = {_QUERY_NAMES.get(name, name): value for name, value in pairs}
    if len(options) < len(pairs):
        raise ValueError("url: an option stands in it twice")
    if "url" in options:
        raise ValueError("url: it can't hold another url")
    return options


def _login(login: str) -> dict[str, str]:
    """User and password of an address."""
    if not login:
        return {}
    user, colon, password = login.partition(":")
    if not colon:
        raise ValueError(
            "url: there is a user without a password before '@'; write USER:PASSWORD@, or "
            ":PASSWORD@ for a password alone"
        )
    return {"password": unquote(password), **({"username": unquote(user)} if user else {})}


def parse_address(url: str) -> Address:
    """Read a URL without user, password and query.

    Raises:
        ValueError: it isn't one of the forms above.
    """
    scheme, separator, rest = url.partition("://")
    form = _FORMS.get(scheme.lower()) if separator else None
    if form is None:
        known = ", ".join(f"{one}://" for one in SCHEMES)
        raise ValueError(f"isn't an address of Redis; those begin with one of {known}")
    if form is Form.UNIX:
        if not rest.startswith("/"):
            raise ValueError("names no socket; write unix:///PATH/OF/SOCKET")
        return Address(form, path=unquote(rest))
    names, _, path = rest.partition("/")
    port = SENTINEL_PORT if form is Form.SENTINEL else REDIS_PORT
    hosts = tuple(_host(one.strip(), port) for one in names.split(","))
    if form is Form.SINGLE and len(hosts) > 1:
        raise ValueError(
            "names several hosts; write redis-sentinel:// or redis-cluster:// if they are one"
        )
    database = _database(path.strip("/"))
    return Address(form, hosts, "", database, tls=scheme.lower() == "rediss")


_HOST = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.%]+)\]|(?P<name>[^\[\]:\s/]+))(?::(?P<port>\d{1,5}))?")


def _host(text: str, default_port: int) -> tuple[str, int]:
    match = _HOST.fullmatch(text)
    if match is None:
        raise ValueError(
            f"has {text!r} where HOST:PORT belongs" if text else "names no host; write HOST:PORT"
        )
    port = int(match["port"]) if match["port"] else default_port
    if not 0 < port < 65536:
        raise ValueError(f"has the port {port}; ports go from 1 to 65535")
    return match["v6"] or match["name"], port


def _database(text: str) -> int | None:
    if not text:
        return None
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"has {text!r} where the number of a database belongs, as in /0")
    return int(text)
