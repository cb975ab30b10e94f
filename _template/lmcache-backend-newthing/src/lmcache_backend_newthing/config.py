"""Options of the newthing backend. Imports nothing of its client."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class NewthingConfig(BaseModel):
    """What stands under ``backends: {NAME: {type: newthing, …}}``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_chunks: int = Field(10_000, ge=1, description="Most chunks that are kept.")
