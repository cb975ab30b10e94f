"""How merged layers become the one valid configuration, or a list of all that is wrong.

Knows which options go together and what must be installed; the models are `models`', where values
come from is `layers`' business.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, SecretBytes, SecretStr, ValidationError
from pydantic.fields import FieldInfo

from lmcache_core.config.layers import Merged
from lmcache_core.config.models import (
    POLICY_OPTIONS,
    BackendSection,
    Config,
    CoreConfig,
    SectionHead,
    options_of,
)
from lmcache_core.config.problem import describe, suggest
from lmcache_core.errors import ConfigError, PluginError
from lmcache_core.plugins.manager import Plugins

_Model = TypeVar("_Model", bound=BaseModel)
_NAMES = ("serde", "engine_connector", "cache_policy")
_SECTION_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


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
        sections, serdes = values.pop("backends", None), values.pop("serdes", None)
        tuning = values.pop(POLICY_OPTIONS, None)
        others = (name for dialect in self.plugins.dialects() for name in dialect.names)
        core = self._check(
            CoreConfig, values, (), (*CoreConfig.model_fields, POLICY_OPTIONS, *others)
        )
        policy = self._named(values)
        chosen = self._policy_options(policy, tuning)
        backends = self._backends(sections)
        default = values.get("serde", CoreConfig.model_fields["serde"].default)
        options = self._serdes(serdes, self._used_serdes(backends, default), notices)
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
        rows = options_of(core, backends, options, chosen)
        origins = {".".join(path): self.merged.origin(path) for path, _ in rows}
        self._defaults("serdes", origins)
        self._defaults(POLICY_OPTIONS, origins)
        for section in backends:
            self._inherited(section, origins)
        return Config(core, backends, tuple(notices), options, chosen, origins)

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
            if path[-1] == "serde" or path[0] == "serdes":
                return self.plugins.serde(name).name
            return self.plugins.storage_backend(name).name
        except PluginError as error:
            self.cause = self.cause or error
            self.problems.append(describe(path, name, self.merged.origin(path), str(error)))
            return None

    def _policy_options(self, policy: str | None, raw: Any) -> BaseModel | None:
        """The options of ``policy``, a proper name; ``None`` where that is wrong, or they are."""
        here = (POLICY_OPTIONS,)
        if raw is not None and not isinstance(raw, dict):
            text = "must be a mapping of the policy's own options, such as {small_share: 0.1}"
            self.problems.append(describe(here, raw, self.merged.origin(here), text))
            return None
        if policy is None:
            return None
        model = self.plugins.cache_policy(policy).config
        return self._check(model, raw or {}, here, tuple(model.model_fields))

    def _serde(self, path: tuple[str, ...], chain: str) -> None:
        for name in chain.split("+"):
            self._find(path, name.strip())

    def _used_serdes(self, backends: tuple[BackendSection, ...], default: Any) -> list[str]:
        """The proper names of serdes that backends encode with. Unknown ones were reported."""
        chains = [section.serde or default for section in backends]
        names = [n.strip() for chain in chains if isinstance(chain, str) for n in chain.split("+")]
        installed = {d.name: d for d in self.plugins.serdes()}
        aliases = {alias: d.name for d in installed.values() for alias in d.aliases}
        return list(dict.fromkeys(p for n in names if (p := aliases.get(n, n)) in installed))

    def _serdes(self, raw: Any, used: list[str], notices: list[str]) -> dict[str, BaseModel]:
        """The options of each serde in ``used``, and a check of those that aren't."""
        given: dict[str, Any] = {}
        if raw is not None and not isinstance(raw, dict):
            text = "must be a mapping from a serde to its options, such as {cachegen: {step: fine}}"
            self.problems.append(describe(("serdes",), raw, self.merged.origin(("serdes",)), text))
            raw = None
        for name, options in (raw or {}).items():
            here = ("serdes", str(name))
            proper, origin = self._find(here, str(name)), self.merged.origin(here)
            if options is not None and not isinstance(options, dict):
                text = f"must be a mapping of options, such as {{{name}: {{…: …}}}}"
                self.problems.append(describe(here, options, origin, text))
            elif proper is not None and proper != name:
                text = f"is another name of {proper}; write serdes.{proper}"
                self.problems.append(describe(here, None, origin, text))
            elif proper is not None:
                given[proper] = options or {}
                if proper not in used:
                    notices.append(f"serdes.{proper} ({origin}): no effect: no backend uses it")
        found: dict[str, BaseModel] = {}
        for name in dict.fromkeys((*used, *given)):
            model = self.plugins.serde(name).config
            known = tuple(model.model_fields)
            checked = self._check(model, given.get(name, {}), ("serdes", name), known)
            if checked is not None and name in used:
                found[name] = checked
        return found

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
        isolated = descriptor.isolated if head.isolated is None else head.isolated
        if isolated:
            try:
                self.plugins.check_isolation(descriptor)
            except PluginError as error:
                self.cause = self.cause or error
                path = (*here, "isolated")
                self.problems.append(describe(path, True, self.merged.origin(path), str(error)))
        return BackendSection(
            name,
            kind,
            checked,
            head.serde,
            head.deadline_s,
            isolated,
            head.isolated_memory_gib,
            descriptor.maps_region is not None and descriptor.maps_region(checked),
        )

    def _inherited(self, section: BackendSection, origins: dict[str, str]) -> None:
        """A section's origin isn't that of what it takes over from the top level."""
        here = f"backends.{section.name}"
        self._defaults(here, origins)
        if section.serde is None:
            origins[f"{here}.serde"] = "serde"
        if section.deadline_s is None:
            origins[f"{here}.deadline_s"] = "blocking_timeout_secs"

    def _defaults(self, here: str, origins: dict[str, str]) -> None:
        """What isn't set below ``here`` isn't set where ``here`` is."""
        for path in [p for p in origins if p.startswith(f"{here}.")]:
            if tuple(path.split(".")) not in self.merged.origins:
                origins[path] = "default"

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
