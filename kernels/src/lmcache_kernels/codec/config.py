"""The options of the codecs' serdes.

Imports neither the native module nor any library but pydantic.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

STEPS = {"fine": 0.15, "safe": 0.3, "small": 0.6}
"""Quantisation steps by name: those of keys, as a share of their layer's rms."""

VALUES_BY_KEYS = 7 / 6
"""A value's step by a key's. On SmolLM2-135M .35 beside .3 makes chunks 3 % smaller (4.26 to 4.39
times) at the same KL divergence (.0029 and .0030)."""


class CodecConfig(BaseModel):
    """What all of them have."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    threads: int | None = Field(
        None,
        ge=1,
        le=256,
        description="Threads for one chunk; LMCACHE_KERNEL_THREADS, or 2, if not said.",
    )


class CacheGenConfig(CodecConfig):
    """Options of ``cachegen``."""

    step: Literal["fine", "safe", "small"] | float = Field(
        "safe",
        description="How coarsely K and V are rounded: fine, safe, small, or a share of a head's "
        "rms such as 0.3.",
    )
    profile: Literal["auto", "none"] | Path = Field(
        "auto",
        description="What calibration found out about the model: a file; auto looks in `profiles` "
        "for one of the model's weights; none encodes without.",
    )
    profiles: Path | None = Field(
        None,
        description="Folder of profiles; LMCACHE_PROFILES, or lmcache/profiles in the user's "
        "cache, if not said.",
    )


class AesGcmConfig(BaseModel):
    """Options of ``aesgcm``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key_file: Path | None = Field(
        None,
        description="File of keys; LMCACHE_AESGCM_KEY_FILE or LMCACHE_AESGCM_KEYS if not said.",
    )
