"""Options of the infinistore backend, and its address. Imports no client.

    infinistore://HOST[:PORT][/][?device=mlx5_0&link_type=Ethernet&connection_type=RDMA…]

A query sets other options; those that stand beside the address win.
"""

from __future__ import annotations

import re
from typing import Any, Final, Literal
from urllib.parse import parse_qsl

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lmcache_backend_infinistore.layout import LEAST_PIECE

SCHEME: Final = "infinistore"
SERVICE_PORT: Final = 22345
_QUERY_NAMES: Final = {"infinistore_link_type": "link_type"}
"""What LMCache calls an option in addresses."""
_SPELLINGS: Final = {
    "connection_type": {"rdma": "RDMA", "tcp": "TCP"},
    "link_type": {"auto": "auto", "ib": "IB", "ethernet": "Ethernet"},
}


class InfinistoreConfig(BaseModel):
    """What stands under ``backends: {NAME: {type: infinistore, …}}``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    url: str = Field(
        description="Address of the server, such as `infinistore://host:22345/?device=mlx5_0`."
    )
    connection_type: Literal["RDMA", "TCP"] = Field(
        "RDMA", description="How values travel. TCP needs no RDMA device."
    )
    device: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9_.:-]{1,63}$",
        description="RDMA device of this machine, as `ibv_devices` shows it; the first if not "
        "said.",
    )
    ib_port: int = Field(1, ge=1, le=254, description="Port of that device.")
    link_type: Literal["auto", "IB", "Ethernet"] = Field(
        "auto",
        description="What the port is linked to: InfiniBand or RoCE. `auto` asks the system.",
    )
    connections: int = Field(
        2,
        ge=1,
        le=16,
        description="Calls that move values at the same time, each over a connection of its own. "
        "With RDMA, each of them registers host memory.",
    )
    piece_bytes: int = Field(
        2 << 20,
        ge=LEAST_PIECE,
        le=256 << 20,
        description="A longer value is stored in pieces of at most this size.",
    )
    staging_bytes: int = Field(
        32 << 20,
        ge=1 << 20,
        le=1 << 30,
        description="With RDMA, memory of each connection for values that don't lie in host memory "
        "for chunks, such as compressed ones. Not less than `piece_bytes`.",
    )
    connect_timeout_s: float = Field(
        2.0, gt=0, description="Seconds until a server that can't be reached is given up."
    )
    log_level: Literal["error", "warning", "info", "debug"] = Field(
        "warning",
        description="What the client library prints; its INFINISTORE_LOG_LEVEL comes first.",
    )
    prefix: str = Field(
        "lmcache",
        pattern=r"^[A-Za-z0-9._-]{1,64}$",
        description="How every key begins; letters, digits and `._-`.",
    )

    @model_validator(mode="before")
    @classmethod
    def _options_in_the_address(cls, values: Any) -> Any:
        url = values.get("url") if isinstance(values, dict) else None
        if not isinstance(url, str):
            return values
        place, mark, query = url.partition("?")
        return {**_query(query if mark else ""), **values, "url": place}

    @field_validator("connection_type", "link_type", mode="before")
    @classmethod
    def _in_any_case(cls, value: Any, info: Any) -> Any:
        if not isinstance(value, str):
            return value
        return _SPELLINGS[info.field_name].get(value.lower(), value)

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        parse_address(url)
        return url

    @model_validator(mode="after")
    def _fits_together(self) -> InfinistoreConfig:
        if self.staging_bytes < self.piece_bytes:
            raise ValueError(
                f"staging_bytes is {self.staging_bytes}, but a piece of {self.piece_bytes} bytes "
                "(piece_bytes) has to fit"
            )
        return self

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        return parse_address(self.url)

    @property
    def without_effect(self) -> list[str]:
        """Options that were set and change nothing, because the connection is TCP."""
        if self.connection_type == "RDMA":
            return []
        only_rdma = ("device", "ib_port", "link_type", "staging_bytes", "log_level")
        return [name for name in only_rdma if name in self.model_fields_set and self._differs(name)]

    def _differs(self, name: str) -> bool:
        # An isolated backend's options arrive with every one of them set.
        return bool(getattr(self, name) != type(self).model_fields[name].default)


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


_ADDRESS = re.compile(r"infinistore://(?P<host>[^\[\]:/@\s]+)(?::(?P<port>\d{1,5}))?/?", re.I)


def parse_address(url: str) -> tuple[str, int]:
    """Host and port of an address without its query.

    Raises:
        ValueError: it isn't one.
    """
    match = _ADDRESS.fullmatch(url)
    if match is None:
        raise ValueError(
            "isn't an address of InfiniStore; write infinistore://HOST:PORT/?device=DEVICE, with "
            "a name or an IPv4 address"
        )
    port = int(match["port"]) if match["port"] else SERVICE_PORT
    if not 0 < port < 65536:
        raise ValueError(f"has the port {port}; ports go from 1 to 65535")
    return match["host"], port
