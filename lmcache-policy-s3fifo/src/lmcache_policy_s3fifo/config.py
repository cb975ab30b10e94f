"""Options of the policy."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class S3FifoConfig(BaseModel):
    """What stands under ``cache_policy_options``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    small_share: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="Share of the slots that new chunks have until they prove useful.",
    )
    ghost_share: float = Field(
        0.9,
        ge=0,
        le=16,
        description="Evicted chunks whose keys are remembered, for each slot: one that comes back "
        "in time proved useful.",
    )
    promoted_after: int = Field(
        2, ge=1, le=3, description="Uses after the first one by which a new chunk proves useful."
    )
