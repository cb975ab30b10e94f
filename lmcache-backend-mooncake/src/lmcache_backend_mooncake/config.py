"""Options of the mooncake backend, its addresses and Mooncake's own file. Imports no client.

    mooncakestore://HOST:PORT/[?device=NAME]        HOST:PORT is the master's

What the section says wins over its address, and the address over the file that
``MOONCAKE_CONFIG_PATH`` names. Knows nothing about this machine: whether it has the memory or the
device is found out when the backend is opened, by `machine`.
"""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import parse_qsl

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

logger = logging.getLogger(__name__)

SCHEME: Final = "mooncakestore"
PATH_VARIABLE: Final = "MOONCAKE_CONFIG_PATH"
PEER_TO_PEER: Final = "P2PHANDSHAKE"
SEGMENT_BYTES: Final = 3355443200
"""Mooncake's own default, 3.125 GiB."""
PROTOCOLS: Final = ("tcp", "rdma", "efa", "barex", "cxl", "ascend", "hip", "musa", "nvlink", "ub")
"""What the store's client knows, depending on how its wheel was built."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def _size(value: Any) -> Any:
    """Bytes; text as in Mooncake's file, where ``20GB`` are 20 × 2³⁰."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError(f"{value!r} isn't a size; write bytes, or text such as '20GB'")
    return int(float(match[1]) * 1024 ** _POWERS[match[2].lower()])


Size = Annotated[int, BeforeValidator(_size), Field(ge=0)]


class MooncakeConfig(BaseModel):
    """What stands under ``backends: {NAME: {type: mooncake, …}}``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    url: str | None = Field(
        None,
        description="`mooncakestore://HOST:PORT/` of the master, where `master_server_address` "
        "isn't set; `?device=NAME` is a `device_name`.",
    )
    master_server_address: str = Field(
        description="HOST:PORT of the master; what a highly available cluster has instead, such as "
        "`etcd://…`, is passed on."
    )
    metadata_server: str = Field(
        PEER_TO_PEER,
        min_length=1,
        description="Where clients find each other: `http://HOST:PORT/metadata`, or "
        "`P2PHANDSHAKE`, which needs no server. The same for all clients of a cluster.",
    )
    local_hostname: str | None = Field(
        None,
        min_length=1,
        description="Name or address that other clients reach this machine by. Not said: its "
        "address on the way to the master.",
    )
    protocol: str = Field(
        "tcp", description="`tcp` or `rdma`, or what else the wheel was built for."
    )
    device_name: str = Field(
        "", description="RDMA devices, separated by commas. Empty: all that fit."
    )
    global_segment_size: Size = Field(
        SEGMENT_BYTES,
        description="Bytes of this machine's memory that each worker gives to the cluster, or text "
        "such as `20GB`. 0: it only uses what others give.",
    )
    local_buffer_size: Size = Field(
        0,
        description="Bytes that the client allocates for copies of its own. Chunks don't need it: "
        "they go straight from and to host memory.",
    )
    transfer_timeout: int = Field(
        2, ge=1, le=3600, description="Seconds without progress after which a transfer has failed."
    )
    master_timeout_s: float = Field(
        2.0, gt=0, le=3600, description="Seconds to wait for the master's answer."
    )
    prefer_local_alloc: bool = Field(
        False, description="Store in this worker's own segment as long as it has room."
    )
    storage_root_dir: Path | None = Field(
        None,
        description="Folder for chunks that leave this worker's segment; the master has to run "
        "with `--enable_offload=true`.",
    )
    config_path: Path | None = Field(
        None,
        description="Mooncake's JSON file, for what isn't set here; not said: what the variable "
        f"`{PATH_VARIABLE}` names.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """Add what the address says, and then the file."""
        if not isinstance(values, dict):
            return values
        # As in LMCache, empty text is as good as nothing; for a device it means any.
        said = {
            k: v for k, v in values.items() if (v is not None and v != "") or k == "device_name"
        }
        filled = {**_from_url(said.get("url")), **said}
        # A model that is written and read again is complete, and needs no file any more.
        path = filled.get("config_path") or os.environ.get(PATH_VARIABLE)
        if path and not values.keys() >= set(_FILE_OPTIONS):
            filled = {**_from_file(Path(path)), **filled, "config_path": path}
        if "master_server_address" not in filled:
            raise ValueError(
                "no master: set master_server_address to HOST:PORT, or an address like "
                f"{SCHEME}://HOST:PORT/, or {PATH_VARIABLE}"
            )
        return filled

    @field_validator("master_server_address")
    @classmethod
    def _has_a_port(cls, value: str) -> str:
        if "://" not in value:
            host_and_port(value)
        return value

    @field_validator("protocol")
    @classmethod
    def _is_known(cls, value: str) -> str:
        name = value.strip().lower()
        if name not in PROTOCOLS:
            raise ValueError(f"{value!r} isn't one of {', '.join(PROTOCOLS)}")
        return name

    @property
    def url_master(self) -> str | None:
        """The master that ``url`` names."""
        return _from_url(self.url).get("master_server_address")


_FILE_OPTIONS = (
    "local_hostname",
    "metadata_server",
    "master_server_address",
    "protocol",
    "device_name",
    "global_segment_size",
    "local_buffer_size",
    "transfer_timeout",
    "storage_root_dir",
)


def host_and_port(address: str) -> tuple[str, int]:
    """The two parts of ``HOST:PORT``; an IPv6 address stands in brackets.

    Raises:
        ValueError: it isn't that.
    """
    host, _, port = address.strip().rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{address!r} isn't HOST:PORT, such as localhost:50051")
    return host, int(port)


def _from_url(url: Any) -> dict[str, Any]:
    """Options in an address.

    Raises:
        ValueError: it isn't an address of a master.
    """
    if url is None:
        return {}
    place, mark, query = str(url).partition("?")
    scheme, separator, rest = place.partition("://")
    if not separator or scheme.lower() != SCHEME:
        raise ValueError(f"url: {url!r} isn't {SCHEME}://HOST:PORT/")
    master, _, path = rest.partition("/")
    if path.strip("/"):
        raise ValueError(f"url: {url!r} has a path; write {SCHEME}://{master}/")
    host_and_port(master)
    options: dict[str, Any] = {"master_server_address": master}
    if mark and query:
        pairs = parse_qsl(query, keep_blank_values=True)
        if [name for name, _ in pairs] != ["device"]:
            raise ValueError(f"url: only ?device=NAME may follow the address, not ?{query}")
        options["device_name"] = pairs[0][1]
    return options


def _from_file(path: Path) -> dict[str, Any]:
    """Options in Mooncake's own JSON file, which other programs may read too.

    Raises:
        ValueError: it can't be read, or asks for what would change where chunks go.
    """
    where = f"{path} ({PATH_VARIABLE} or config_path)"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{where} can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} isn't JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where} isn't a JSON object")
    if found.get("tenant_id", "default") not in ("", "default", None):
        raise ValueError(f"{where} has a tenant_id; tenants aren't available here, remove it")
    if _is_true(found.get("enable_ssd_offload")) and found.get("ssd_offload_path"):
        found.setdefault("storage_root_dir", found["ssd_offload_path"])
    known = {name: found[name] for name in _FILE_OPTIONS if found.get(name) is not None}
    read = {*known, "tenant_id", "enable_ssd_offload", "ssd_offload_path"}
    if unread := [name for name in found if name not in read]:
        logger.info("%s: %s: no effect here", where, ", ".join(unread))
    return {name: value for name, value in known.items() if value != "" or name == "device_name"}


def _is_true(value: Any) -> bool:
    return str(value).strip().lower() in ("true", "1", "yes", "on", "enable")
