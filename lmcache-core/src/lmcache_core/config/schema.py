"""The typed configuration, and how it is built from merged layers.

The models are also where the configuration reference comes from. Knows what
options mean and which go together; doesn't know where values come from or what
LMCache calls them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    SecretBytes,
    SecretStr,
    ValidationError,
    field_validator,
)
from pydantic.fields import FieldInfo

from lmcache_core.config.layers import Merged
from lmcache_core.config.lmcache_keys import known_names
from lmcache_core.config.problem import HIDDEN, describe, suggest, without_password
from lmcache_core.errors import ConfigError, PluginError
from lmcache_core.plugins import Plugins

_Model = TypeVar("_Model", bound=BaseModel)
_NAMES = ("serde", "engine_connector", "cache_policy")
_SECTION_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


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
        10.0, gt=0, description="Deadline in seconds for one load from a slow tier."
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


@dataclass(frozen=True)
class Config:
    """A valid configuration."""

    core: CoreConfig
    backends: tuple[BackendSection, ...]
    """In the order of tiers, nearest first."""
    notices: tuple[str, ...] = ()
    """What the user should know: keys without effect, renamed keys. To be logged once."""
    origins: Mapping[str, str] = field(default_factory=dict)
    """Dotted option → where it was set, for every option in `rows`."""

    @property
    def isolates(self) -> bool:
        """Whether a backend runs in a process of its own, so that host memory must be shared."""
        return any(section.isolated for section in self.backends)

    def rows(self) -> Iterator[tuple[str, Any, str]]:
        """Every effective option as (dotted name, plain value with secrets hidden, origin)."""
        for path, value in _options(self.core, self.backends):
            name = ".".join(path)
            yield name, hidden(value), self.origins.get(name, "default")


def _options(
    core: CoreConfig, backends: tuple[BackendSection, ...]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield from _fields(core, ())
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


def validate(merged: Merged, plugins: Plugins, problems: list[str], notices: list[str]) -> Config:
    """Check everything at once and report everything that is wrong.

    ``problems`` holds what was wrong before; ``notices`` goes into the answer.

    Raises:
        ConfigError: one paragraph for each problem, naming the value and its origin.
    """
    return _Validation(merged, plugins, problems).run(notices)


class _Validation:
    """One run of `validate`: what all its steps share."""

    def __init__(self, merged: Merged, plugins: Plugins, problems: list[str]) -> None:
        self.merged = merged
        self.plugins = plugins
        self.problems = problems
        self.cause: PluginError | None = None

    def run(self, notices: list[str]) -> Config:
        values = dict(self.merged.values)
        sections = values.pop("backends", None)
        core = self._check(CoreConfig, values, (), (*CoreConfig.model_fields, *known_names()))
        policy = self._named(values)
        backends = self._backends(sections)
        if core is not None:
            core = core.model_copy(update={"cache_policy": policy or core.cache_policy})
            if not (core.local_cpu or backends or self.problems):
                origin = self.merged.origin(("local_cpu",))
                text = "and no backend is configured: nothing would be cached"
                self.problems.append(describe(("local_cpu",), False, origin, text))
        if self.problems or core is None:
            found = list(dict.fromkeys(self.problems))
            count = f"{len(found)} problem" + "s" * (len(found) != 1)
            text = "\n  ".join(found)
            raise ConfigError(f"{count} in the LMCache configuration:\n  {text}") from self.cause
        origins = {".".join(path): self.merged.origin(path) for path, _ in _options(core, backends)}
        for section in backends:
            self._inherited(section, origins)
        return Config(core, backends, tuple(notices), origins)

    def _named(self, values: Mapping[str, Any]) -> str | None:
        """Check that what ``values`` name is installed; the answer is the policy's proper name.

        Looks at the raw values, so that one wrong number doesn't hide a wrong name.
        """
        names = {key: values.get(key, CoreConfig.model_fields[key].default) for key in _NAMES}
        for key in ("serde", "engine_connector"):
            if isinstance(names[key], str):
                (self._serde if key == "serde" else self._find)((key,), names[key])
        policy = names["cache_policy"]
        return self._find(("cache_policy",), policy) if isinstance(policy, str) else None

    def _find(self, path: tuple[str, ...], name: str) -> str | None:
        """The proper name of what the option at ``path`` calls ``name``."""
        try:
            if path[-1] == "cache_policy":
                return self.plugins.cache_policy(name).name
            if path[-1] == "engine_connector":
                return self.plugins.engine_connector(name).name
            if path[-1] == "serde":
                return self.plugins.serde(name).name
            return self.plugins.storage_backend(name).name
        except PluginError as error:
            self.cause = self.cause or error
            self.problems.append(describe(path, name, self.merged.origin(path), str(error)))
            return None

    def _serde(self, path: tuple[str, ...], chain: str) -> None:
        for name in chain.split("+"):
            self._find(path, name.strip())

    def _backends(self, sections: Any) -> tuple[BackendSection, ...]:
        if sections is None:
            return ()
        if not isinstance(sections, dict):
            text = "must be a mapping from a name to its options, such as {redis: {url: …}}"
            origin = self.merged.origin(("backends",))
            self.problems.append(describe(("backends",), sections, origin, text))
            return ()
        found = [self._section(str(name), raw) for name, raw in sections.items()]
        return tuple(section for section in found if section is not None)

    def _section(self, name: str, raw: Any) -> BackendSection | None:
        here = ("backends", name)
        wrong = "" if _SECTION_NAME.fullmatch(name) else "isn't a name: use letters, digits, _ . -"
        if raw is not None and not isinstance(raw, dict):
            wrong = f"must be a mapping of options, such as {{{name}: {{type: …}}}}"
        if wrong:
            self.problems.append(describe(here, raw, self.merged.origin(here), wrong))
            return None
        options = dict(raw or {})
        head_values = {key: options.pop(key) for key in SectionHead.model_fields if key in options}
        head = self._check(SectionHead, head_values, here)
        if head is None:
            return None
        path = (*here, "type") if head.type else here
        kind = self._find(path, head.type or name)
        if head.serde is not None:
            self._serde((*here, "serde"), head.serde)
        if kind is None:
            return None
        descriptor = self.plugins.storage_backend(kind)
        model = descriptor.config
        checked = self._check(
            model, options, here, (*model.model_fields, *SectionHead.model_fields)
        )
        if checked is None:
            return None
        return BackendSection(
            name,
            kind,
            checked,
            head.serde,
            head.deadline_s,
            descriptor.isolated if head.isolated is None else head.isolated,
            head.isolated_memory_gib,
        )

    def _inherited(self, section: BackendSection, origins: dict[str, str]) -> None:
        """A section's origin isn't that of what it takes over from the top level."""
        here = f"backends.{section.name}"
        for path in [p for p in origins if p.startswith(f"{here}.")]:
            if tuple(path.split(".")) not in self.merged.origins:
                origins[path] = "default"
        if section.serde is None:
            origins[f"{here}.serde"] = "serde"
        if section.deadline_s is None:
            origins[f"{here}.deadline_s"] = "blocking_timeout_secs"

    def _check(
        self,
        model: type[_Model],
        values: Mapping[str, Any],
        prefix: tuple[str, ...],
        known: tuple[str, ...] = (),
    ) -> _Model | None:
        try:
            return model.model_validate(values)
        except ValidationError as error:
            for item in error.errors(include_url=False, include_context=False):
                location = tuple(map(str, item["loc"]))
                path = (*prefix, *location)
                value, text = item["input"], item["msg"].removeprefix("Value error, ")
                if item["type"] == "extra_forbidden":
                    # Not shown: a mistyped `password` holds a password.
                    value = None
                    text = suggest(path[-1], known if len(location) == 1 else ())
                elif item["type"] == "missing" or _is_secret(model, location):
                    value = None
                origin = self.merged.origin(path)
                self.problems.append(describe(path, value, origin, text))
            return None


def _is_secret(model: type[BaseModel], location: tuple[str, ...]) -> bool:
    """Whether a secret may stand at ``location``, or anywhere in the option around it."""
    info: FieldInfo | None = model.model_fields.get(location[0]) if location else None
    return info is not None and _holds_secret(info.annotation, ())


def _holds_secret(annotation: Any, seen: tuple[Any, ...]) -> bool:
    if annotation in (SecretStr, SecretBytes):
        return True
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if annotation in seen:
            return False
        return any(
            _holds_secret(info.annotation, (*seen, annotation))
            for info in annotation.model_fields.values()
        )
    return any(_holds_secret(part, seen) for part in getattr(annotation, "__args__", ()))
