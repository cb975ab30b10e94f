"""The options of the ``tcp`` transfer channel. Imports no client."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator


class TcpChannelConfig(BaseModel):
    """Options of the ``tcp`` transfer channel."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field(
        "127.0.0.1", min_length=1, description="The address of this machine to listen on."
    )
    port: int = Field(0, ge=0, le=65535, description="The port to listen on; 0: a free one.")
    advertise: str | None = Field(
        None,
        min_length=1,
        description="The name or address that peers reach this machine by, if it isn't `host`.",
    )
    tls_cert: Path | None = Field(
        None, description="Speak TLS, with this certificate (PEM), for the advertised name."
    )
    tls_key: Path | None = Field(None, description="Its key, if it isn't in the same file.")
    ca_file: Path | None = Field(
        None, description="Certificates (PEM) that may sign peers'. Unset: the system's."
    )
    calls: int = Field(
        4, ge=1, le=64, description="Calls to one peer at a time, a connection each."
    )
    max_connections: int = Field(
        256, ge=1, description="Connections of peers; more are turned away."
    )
    connect_timeout_s: float = Field(
        2.0, gt=0, description="How long to wait for a connection and its greeting."
    )
    stall_timeout_s: float = Field(
        10.0, gt=0, description="Give a connection up where nothing moves for so long in a call."
    )

    @model_validator(mode="after")
    def _fits_together(self) -> TcpChannelConfig:
        if self.host in ("0.0.0.0", "::") and self.advertise is None:  # noqa: S104
            raise ValueError(
                f"host {self.host} isn't an address that peers can use: set advertise to the name "
                "that they reach this machine by"
            )
        if self.tls_key is not None and self.tls_cert is None:
            raise ValueError("tls_key is set without tls_cert")
        return self
