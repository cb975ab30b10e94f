"""The options of the ``lm`` backend, and how its addresses say them. Imports no client."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from lmcache_backend_lm.protocol import MAX_TOKEN_BYTES
from lmcache_core import BackendRejected, remark_if_public

DEFAULT_PORT = 65432
TOKEN_VARIABLE = "LMCACHE_SERVER_TOKEN"  # noqa: S105  a name
SCHEMES = ("lm", "lm+tls", "lm+unix")


class LmConfig(BaseModel):
    """Options of the ``lm`` backend."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field("localhost", min_length=1, description="Where `lmcache_server` runs.")
    port: int = Field(DEFAULT_PORT, ge=1, le=65535, description="Its port.")
    path: Path | None = Field(
        None, description="Its Unix socket, on this machine; used instead of host and port."
    )
    token: SecretStr | None = Field(
        None, description=f"What the server asks for. Unset: token_file, or `{TOKEN_VARIABLE}`."
    )
    token_file: Path | None = Field(None, description="A file whose content is the token.")
    tls: bool = Field(False, description="Encrypt, and check the server's certificate.")
    ca_file: Path | None = Field(
        None, description="Certificates (PEM) that may sign the server's. Unset: the system's."
    )
    same_host: bool = Field(
        True,
        description="Go on over the server's Unix socket and its shared memory where it runs on "
        "this machine, which maps this process's host memory for reading. Never with tls.",
    )
    connections: int = Field(
        2, ge=1, le=64, description="Connections for values; questions have one of their own."
    )
    connect_timeout_s: float = Field(
        2.0, gt=0, description="How long to wait for a connection and its greeting."
    )
    stall_timeout_s: float = Field(
        10.0,
        gt=0,
        description="Give a connection up where nothing moves for so long while answers are due.",
    )

    @field_validator("host")
    @classmethod
    def _only_a_host(cls, host: str) -> str:
        if "@" in host or "/" in host:
            raise ValueError("isn't a name or an address; a token belongs into token_file")
        return host

    @model_validator(mode="after")
    def _consistent(self) -> LmConfig:
        if self.token is not None and self.token_file is not None:
            raise ValueError("token and token_file are both set; keep one of the two")
        if self.path is not None and self.tls:
            raise ValueError("tls is for TCP; a Unix socket (path) doesn't leave this machine")
        if self.ca_file is not None and not self.tls:
            raise ValueError("ca_file has no effect without tls: true (or lm+tls://)")
        if self.token_file is not None:
            remark_if_public(self.token_file, "token_file")
        return self

    @property
    def is_near(self) -> bool:
        """Whether the server is on this machine for sure, and values go through shared memory."""
        near = self.path is not None or self.host.lower() == "localhost" or is_loopback(self.host)
        return near and self.same_host and not self.tls

    @property
    def address(self) -> str:
        """For messages."""
        if self.path is not None:
            return f"lm+unix://{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"lm{'+tls' if self.tls else ''}://{host}:{self.port}"


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach ``address``; a name is none."""
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def read_token(token: SecretStr | None, file: Path | None) -> bytes:
    """The token, from where it is; empty if there is none.

    Raises:
        BackendRejected: the file can't be read, is empty, or the token is too long.
    """
    if token is not None:
        found, origin = token.get_secret_value().encode(), "token"
    elif file is not None:
        try:
            found, origin = file.read_bytes().strip(), f"token_file {file}"
        except OSError as error:
            raise BackendRejected(f"can't read token_file {file}: {error.strerror}") from error
        if not found:
            raise BackendRejected(f"token_file {file} is empty; write the token into it")
    else:
        found, origin = os.environ.get(TOKEN_VARIABLE, "").strip().encode(), TOKEN_VARIABLE
    if len(found) > MAX_TOKEN_BYTES:
        raise BackendRejected(f"{origin}: a token has at most {MAX_TOKEN_BYTES} bytes")
    return found


def config_from_url(url: str) -> dict[str, Any]:
    """Options from ``lm://HOST[:PORT]``, ``lm+tls://HOST[:PORT]`` or ``lm+unix:///PATH``.

    A query sets other options: ``lm://cache:65432?connections=4``.

    Raises:
        ValueError: it isn't such an address.
    """
    parts = urlsplit(url)
    options: dict[str, Any] = dict(
        parse_qsl(parts.query, strict_parsing=bool(parts.query), keep_blank_values=True)
    )
    if "token" in options or parts.username or parts.password:
        raise ValueError("an address is no place for a token: set token_file")
    if parts.scheme.lower() == "lm+unix":
        if parts.netloc or not parts.path.strip("/"):
            raise ValueError("write lm+unix:///PATH, with three slashes")
        return {**options, "path": unquote(parts.path)}
    if not parts.hostname:
        raise ValueError(f"there is no host in it; write {parts.scheme}://HOST:{DEFAULT_PORT}")
    if parts.path.strip("/"):
        raise ValueError(f"{parts.path!r} after the port means nothing here")
    if parts.scheme.lower() == "lm+tls":
        options["tls"] = True
    return {**options, "host": parts.hostname, "port": parts.port or DEFAULT_PORT}
