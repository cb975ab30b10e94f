"""Finds plugins without running them.

Knows distributions, entry points and version requirements. Imports no plugin
and decides nothing: that is `plugins`' business.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata
from types import ModuleType

ENTRY_POINT_GROUP = "lmcache.plugins"
CORE = "lmcache-core"
BUILTIN_PLUGINS = (
    "lmcache_core.builtin.memory",
    "lmcache_core.builtin.filesystem",
    "lmcache_core.builtin.tcp",
    "lmcache_core.builtin.raw",
    "lmcache_core.builtin.policies",
    "lmcache_core.builtin.host",
    "lmcache_core.builtin.reference_kernels",
    "lmcache_core.dialect",
)
DISABLE_VARIABLE = "LMCACHE_DISABLE_PLUGINS"
IN_PROCESS = "registered in this process"
"""Stands where a distribution does, for a plugin that an application brings along."""


@dataclass(frozen=True)
class Candidate:
    """A plugin that could be loaded: who ships it, and how."""

    name: str
    distribution: str
    version: str
    target: str
    load: Callable[[], object]
    requires: tuple[str, ...] = ()

    @property
    def identity(self) -> str:
        """Unique in a process, even where two distributions call a plugin the same."""
        return f"{self.distribution}:{self.name}"

    def is_among(self, names: set[str]) -> bool:
        """Whether ``names``, as `disabled_by` answers them, has it or its distribution."""
        return bool(names & {normalised(self.name), normalised(self.distribution)})


def in_words(name: str, distribution: str) -> str:
    """A plugin and where it comes from."""
    return f"{name}, {IN_PROCESS}" if distribution == IN_PROCESS else f"{name} of {distribution}"


def disabled_by(environ: Mapping[str, str], others: Iterable[str] = ()) -> set[str]:
    """Names of plugins and distributions that ``environ`` or the caller has turned off."""
    named = (*others, *environ.get(DISABLE_VARIABLE, "").split(","))
    return {normalised(name.strip()) for name in named if name.strip()}


def candidates() -> list[Candidate]:
    """Core's own plugins, and then whatever is installed."""
    return [*map(_builtin, BUILTIN_PLUGINS), *installed()]


def _builtin(module: str) -> Candidate:
    """A plugin that ships inside core."""
    return Candidate(
        name=module.rpartition(".")[2],
        distribution=CORE,
        version=core_version() or "?",
        target=module,
        load=lambda: import_module(module),
    )


def registered(plugins: Iterable[object]) -> list[Candidate]:
    """What an application or a test brings along, modules or objects, in their order.

    A module or class is called by its own name, another object by its class. Where several are
    called the same, the later ones have a number.
    """
    found: list[Candidate] = []
    for plugin in plugins:
        named = plugin if isinstance(plugin, (ModuleType, type)) else type(plugin)
        same = sum(other.target == named.__name__ for other in found)
        found.append(
            Candidate(
                name=f"{named.__name__}-{same + 1}" if same else named.__name__,
                distribution=IN_PROCESS,
                version="",
                target=named.__name__,
                load=partial(_itself, plugin),
            )
        )
    return found


def _itself(plugin: object) -> object:
    return plugin


def installed() -> list[Candidate]:
    """Every entry point in the group, sorted by name and distribution.

    Walks the distributions itself: ``importlib.metadata.entry_points`` raises when any
    distribution at all, related or not, has an entry-point file that can't be parsed.
    """
    found: dict[str, list[Candidate]] = {}
    for distribution in metadata.distributions():
        text = distribution.read_text("entry_points.txt")
        if not text or ENTRY_POINT_GROUP not in text:
            continue
        name = distribution.metadata["Name"] or "?"
        # The first of two distributions with one name is the one that imports find.
        found.setdefault(normalised(name), list(_candidates(distribution, name)))
    return sorted(
        (candidate for group in found.values() for candidate in group),
        key=lambda candidate: (candidate.name, candidate.distribution),
    )


def _candidates(distribution: metadata.Distribution, name: str) -> Iterator[Candidate]:
    version = distribution.metadata["Version"] or "?"
    try:
        entry_points = list(distribution.entry_points)
    except Exception as error:  # noqa: BLE001 - the parser raises whatever a bad line leads to
        yield Candidate(
            name, name, version, "entry_points.txt", _raiser(f"can't be parsed: {error}")
        )
        return
    for entry_point in entry_points:
        if entry_point.group == ENTRY_POINT_GROUP:
            yield Candidate(
                name=entry_point.name,
                distribution=name,
                version=version,
                target=entry_point.value,
                load=entry_point.load,
                requires=tuple(distribution.requires or ()),
            )


def _raiser(message: str) -> Callable[[], object]:
    def load() -> object:
        raise ImportError(message)

    return load


def unmet_core_requirement(requires: tuple[str, ...]) -> str:
    """Why a distribution doesn't go with the core that is running, or an empty string.

    pip checks this when it installs, but ``--no-deps`` and later upgrades of core get around it.
    """
    # Here, not above: whoever only names plugins of core needs none of it.
    from packaging.requirements import InvalidRequirement, Requirement

    running = core_version()
    for text in requires:
        try:
            requirement = Requirement(text)
        except InvalidRequirement as error:
            return f"its requirement {text!r} can't be read: {error}"
        if normalised(requirement.name) != CORE or running is None:
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if not requirement.specifier.contains(running, prereleases=True):
            return f"needs {CORE}{requirement.specifier}, but {CORE} {running} is installed"
    return ""


def core_version() -> str | None:
    """The installed version of core; ``None`` when it runs without being installed."""
    try:
        return metadata.version(CORE)
    except metadata.PackageNotFoundError:
        return None


def normalised(name: str) -> str:
    """A distribution's name as PEP 503 compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()
