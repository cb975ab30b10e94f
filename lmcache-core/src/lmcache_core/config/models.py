"""What a valid configuration is: the options, typed, with what the reference says of them.

Knows what options mean; doesn't know how they are checked, where values come from or what LMCache
calls them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    SecretBytes,
    SecretStr,
    field_validator,
)

from lmcache_core.redaction import HIDDEN, without_password

POLICY_OPTIONS = "cache_policy_options"
"""The mapping of a policy's own options, beside `CoreConfig`'s."""


class CoreConfig(BaseModel):
    """Options that core itself reads. Plugins own everything under ``backends``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    chunk_size: PositiveInt = Field(
        256, description="Tokens in one chunk, the unit in which prefixes are kept and found."
    )
    local_cpu: bool = Field(True, description="Keep recently used chunks in host memory.")
    max_local_cpu_size: float = Field(
        5.0,
        gt=0,
        description="Host memory for chunks, in GiB for each rank. With `local_cpu: false` it is "
        "only a staging buffer.",
    )
    local_cpu_use_hugepages: bool = Field(
        False,
        description="Take that memory from reserved 2 MiB huge pages; where there aren't enough, "
        "from transparent ones.",
    )
    local_cpu_populate: bool = Field(
        False, description="Touch all of that memory at the start instead of on first use."
    )
    numa_mode: Literal["auto"] | None = Field(
        None, description="`auto` binds that memory to the NUMA node of this process's CPUs."
    )
    cache_policy: str = Field(
        "LRU", description="Which chunks leave host memory first; the name of an eviction policy."
    )
    serde: str = Field(
        "raw",
        description="How chunks are encoded for backends that don't say so themselves; `+` chains.",
    )
    save_decode_cache: bool = Field(False, description="Also store the KV of generated tokens.")
    save_unfull_chunk: bool = Field(
        False, description="Also store a prompt's last chunk when it isn't full."
    )
    use_layerwise: bool = Field(
        False, description="Load and store layer by layer, overlapped with the model's computation."
    )
    enable_async_loading: bool = Field(
        False, description="Load while the request waits in the queue, not when it is scheduled."
    )
    min_retrieve_tokens: int = Field(
        0, ge=0, description="Load nothing for a hit of fewer tokens; computing those is faster."
    )
    priority_limit: int | None = Field(
        None, description="Store only requests whose priority is at most this."
    )
    blocking_timeout_secs: float = Field(
        10.0,
        gt=0,
        description="Deadline in seconds for one load, all slow tiers together, and for closing.",
    )
    lookup_timeout_ms: PositiveInt = Field(
        3000, description="Deadline in milliseconds for asking slow tiers what they have."
    )
    store_queue_chunks: PositiveInt = Field(
        256,
        description="Chunks that may wait to be written to slow tiers; beyond that new ones are "
        "dropped and counted.",
    )
    pin_timeout_sec: float = Field(
        300.0, gt=0, description="Seconds after which a pinned chunk may be evicted again."
    )
    enable_kv_events: bool = Field(
        False, description="Tell the engine which blocks were stored, for routers."
    )
    weights_may_change: bool = Field(
        True,
        description="Whether an engine's weights may be replaced while it runs. After each reset "
        "of its prefix cache it then uses its own host memory only.",
    )
    lmcache_instance_id: str | None = Field(
        None, description="Name of this instance in logs and metrics."
    )
    engine_connector: str | None = Field(
        None, description="Connector for own applications; an engine that loads us brings its own."
    )

    @field_validator("numa_mode", mode="before")
    @classmethod
    def _no_manual_numa(cls, value: object) -> object:
        if value == "manual":
            raise ValueError(
                "isn't available in this version; use auto, or start each rank under numactl"
            )
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: object, info: Any) -> object:
        """``chunk_size: yes`` isn't a chunk of one token."""
        annotation = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and annotation is not bool:
            raise ValueError("true and false aren't values for this option")
        return value


class SectionHead(BaseModel):
    """What every section under ``backends`` may say beside its plugin's own options."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    type: str | None = Field(
        None, description="The backend; only needed if the section is called something else."
    )
    serde: str | None = Field(
        None,
        description="How chunks are encoded for this backend; the top level's `serde` if not said.",
    )
    deadline_s: float | None = Field(
        None,
        gt=0,
        description="Deadline in seconds for one call; `blocking_timeout_secs` if not said.",
    )
    isolated: bool | None = Field(
        None,
        description="Run the backend in a process of its own, so that a client library that "
        "crashes, hangs or leaks takes nothing else with it. What the plugin asks for, if not "
        "said.",
    )
    isolated_memory_gib: float | None = Field(
        None,
        gt=0,
        description="Restart that process when it takes more memory than this, in GiB, host "
        "memory for chunks not counted.",
    )


@dataclass(frozen=True)
class BackendSection:
    """One configured backend: an instance name, what it is, and its own options."""

    name: str
    type: str
    options: BaseModel
    serde: str | None = None
    """``None``: `CoreConfig.serde`."""
    deadline_s: float | None = None
    """``None``: `CoreConfig.blocking_timeout_secs`."""
    isolated: bool = False
    isolated_memory_gib: float | None = None
    maps_region: bool = False
    """Another process than an isolated backend's wants to map host memory."""


@dataclass(frozen=True)
class Config:
    """A valid configuration."""

    core: CoreConfig
    backends: tuple[BackendSection, ...]
    """In the order of tiers, nearest first."""
    notices: tuple[str, ...] = ()
    """What the user should know: keys without effect, renamed keys. To be logged once."""
    serdes: Mapping[str, BaseModel] = field(default_factory=dict)
    """Options of the serdes that backends use, by the serde's proper name."""
    cache_policy_options: BaseModel | None = None
    """Options of what `CoreConfig.cache_policy` names; ``None``: its defaults."""
    origins: Mapping[str, str] = field(default_factory=dict)
    """Dotted option → where it was set, for every option in `rows`."""

    @property
    def shares_region(self) -> bool:
        """Whether host memory must be such that another process can map it: an isolated backend's,
        or a server's that copies from it."""
        return any(section.isolated or section.maps_region for section in self.backends)

    def rows(self) -> Iterator[tuple[str, Any, str]]:
        """Every effective option as (dotted name, plain value with secrets hidden, origin)."""
        for path, value in options_of(
            self.core, self.backends, self.serdes, self.cache_policy_options
        ):
            name = ".".join(path)
            yield name, hidden(value), self.origins.get(name, "default")


def options_of(
    core: CoreConfig,
    backends: tuple[BackendSection, ...],
    serdes: Mapping[str, BaseModel],
    policy: BaseModel | None,
) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield from _fields(core, ())
    if policy is not None:
        yield from _fields(policy, (POLICY_OPTIONS,))
    for name, options in serdes.items():
        yield from _fields(options, ("serdes", name))
    for section in backends:
        here = ("backends", section.name)
        yield (*here, "type"), section.type
        yield (*here, "serde"), section.serde or core.serde
        yield (*here, "deadline_s"), section.deadline_s or core.blocking_timeout_secs
        yield (*here, "isolated"), section.isolated
        if section.isolated:
            yield (*here, "isolated_memory_gib"), section.isolated_memory_gib
        yield from _fields(section.options, here)


def _fields(model: BaseModel, prefix: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from _fields(value, (*prefix, name))
        else:
            yield (*prefix, name), value


def hidden(value: Any) -> Any:
    """``value`` as plain data that may be shown."""
    if isinstance(value, (SecretStr, SecretBytes)):
        return HIDDEN if value.get_secret_value() else ""
    if isinstance(value, BaseModel):
        return {name: hidden(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        return {str(key): hidden(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [hidden(item) for item in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return without_password(str(value))
