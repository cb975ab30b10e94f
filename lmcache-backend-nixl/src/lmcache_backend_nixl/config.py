"""Options of the nixl backend. Imports nothing of its client."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

FILE_PLUGINS: Final = ("POSIX", "GDS", "GDS_MT", "HF3FS")
_ON_DEVICES: Final = ("GDS", "GDS_MT")
_QUEUES: Final = ("use_uring", "use_aio", "use_posix_aio")
"""What POSIX may hand its work to. Unset: Linux AIO, which copies in the thread that asks."""
_SAME_HOST: Final = ("self", "shm", "sm", "mm", "posix", "sysv", "cma", "knem", "xpmem")
PAGE_BYTES: Final = 4096
"""What O_DIRECT asks of addresses, offsets and lengths."""


class NixlConfig(BaseModel):
    """What stands under ``backends: {NAME: {type: nixl, …}}``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: Literal["POSIX", "GDS", "GDS_MT", "HF3FS", "OBJ"] = Field(
        description="The storage plugin of NIXL."
    )
    path: Path | None = Field(
        None, description="Folder for the pool; made if it isn't there. All but OBJ need it."
    )
    pool_size: int = Field(
        64,
        ge=1,
        description="Slots of the pool, each for one chunk of one rank; with OBJ, objects in one "
        "transfer.",
    )
    backend_params: dict[str, SecretStr] = Field(
        default_factory=dict,
        description="Parameters of the plugin, as NIXL calls them; shown by nothing, since some "
        "are secrets.",
    )
    buffer_bytes: int | None = Field(
        None,
        ge=1,
        description="Registered memory for what doesn't lie in host memory for chunks, such as "
        "compressed values; used as needed. Unset: one chunk for each call.",
    )
    buffer_device: Literal["cpu", "cuda"] = Field(
        "cpu", description="Where that memory lies; `cuda` is for GDS and GDS_MT."
    )
    direct_io: bool = Field(False, description="Past the page cache (O_DIRECT); not with OBJ.")
    fsync: bool = Field(
        False, description="A chunk is there only once it would survive a power cut; not with OBJ."
    )
    persist: bool = Field(
        True,
        description="Keep the pool at the end and use it at the next start; `false` removes it. "
        "Objects always stay.",
    )
    prefix: str = Field(
        "lmcache",
        pattern=r"^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*$",
        max_length=256,
        description="How the name of every object begins.",
    )
    calls: int = Field(4, ge=1, le=64, description="Calls at the same time, a thread each.")

    @field_validator("backend", mode="before")
    @classmethod
    def _upper_case(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value

    @field_validator("backend_params", mode="before")
    @classmethod
    def _as_nixl_writes_them(cls, value: Any) -> Any:
        """NIXL's parameters are texts: ``true`` and ``4`` of a YAML file become ``"true"``, …"""
        if not isinstance(value, Mapping):
            return value
        return {
            str(name): str(one).lower()
            if isinstance(one, bool)
            else str(one)
            if isinstance(one, (int, float))
            else one
            for name, one in value.items()
        }

    @model_validator(mode="after")
    def _fits_together(self) -> NixlConfig:
        if self.buffer_device == "cuda" and self.backend not in _ON_DEVICES:
            raise ValueError(
                f"buffer_device (nixl_buffer_device) is 'cuda', and {self.backend} moves host "
                f"memory only: write 'cpu', or take one of {', '.join(_ON_DEVICES)}"
            )
        if self.backend in FILE_PLUGINS and self.path is None:
            raise ValueError(
                f"path (nixl_path) is missing: {self.backend} keeps chunks in files, so name a "
                "folder for them"
            )
        return self

    def params(self) -> dict[str, str]:
        """The plugin's parameters in plain text."""
        return {name: value.get_secret_value() for name, value in self.backend_params.items()}

    def ways(self) -> list[dict[str, str]]:
        """Parameters to start the plugin with, and others for when NIXL refuses those.

        Through the page cache, io_uring writes with threads of the kernel, a quarter faster; many
        containers forbid it. Past the page cache, both wait for the disk.
        """
        params = self.params()
        if self.backend != "POSIX" or self.direct_io or params.keys() & set(_QUEUES):
            return [params]
        return [{**params, "use_uring": "true"}, params]

    def notices(self) -> list[str]:
        """Options that are set and have no effect, and why."""
        found = []
        if self.buffer_device == "cuda":
            found.append(
                "buffer_device 'cuda' has no effect: chunks come from host memory and go there"
            )
        if self.backend == "OBJ":
            set_here = self.model_fields_set & {"path", "direct_io", "fsync", "persist"}
            found += [f"{name} has no effect: OBJ has no files" for name in sorted(set_here)]
        else:
            found += ["prefix has no effect: files have none"] * ("prefix" in self.model_fields_set)
        return found


class NixlChannelConfig(BaseModel):
    """Options of the ``nixl`` transfer channel."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    devices: str | None = Field(
        None,
        min_length=1,
        description="Network devices, separated by commas, such as `mlx5_0:1` or `lo`. Unset: "
        "`UCX_NET_DEVICES`, or all of them.",
    )
    transport: str | None = Field(
        None,
        pattern=r"^\^?[a-z0-9_]+$",
        description="A transport of UCX or a group of them, such as `tcp`, `rc` or `ib`. Unset: "
        "`UCX_TLS`, which may list several, or all of them.",
    )
    params: dict[str, str] = Field(
        default_factory=dict, description="More parameters of NIXL's UCX plugin."
    )
    calls: int = Field(4, ge=1, le=64, description="Calls to one peer at a time, a thread each.")
    connect_timeout_s: float = Field(
        5.0, gt=0, description="How long to wait for a peer's first sign of life."
    )

    @field_validator("transport")
    @classmethod
    def _reports_errors(cls, value: str | None) -> str | None:
        if value in _SAME_HOST:
            raise ValueError(
                f"{value!r} alone can't tell when a peer dies: take one that leaves the machine, "
                "such as tcp, or leave it out for all of them"
            )
        return value

    def plugin_params(self) -> dict[str, str]:
        """What NIXL's UCX plugin is created with."""
        found = dict(self.params)
        if self.devices is not None:
            found["ucx_devices"] = self.devices
        if self.transport is not None:
            found["engine_config"] = f"TLS={self.transport}"
        return found
