"""Merges configuration layers and remembers where every value came from.

    defaults < file < environment < engine < command line

A layer is a nested mapping. Nothing is validated here: `schema` does that
once, on the merged result, and asks `Merged` whom to blame. What can't even be
read is appended to ``problems``, so that everything is reported together.

Text from a shell stays text, which pydantic then reads as the option's type:
a password ``0123`` isn't a number, whatever YAML thinks.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from lmcache_core.config.dialect import Dialect

ENV_PREFIX = "LMCACHE_"
ENV_NESTING = "__"
ENGINE_PREFIX = "lmcache."
PROCESS_VARIABLES = frozenset(
    {
        "LMCACHE_CONFIG_FILE",
        "LMCACHE_DISABLE_PLUGINS",
        "LMCACHE_TRACE_PLUGINS",
        "LMCACHE_LOG_LEVEL",
        # What the kernels and this project's own tools read; people export them.
        "LMCACHE_KERNEL_THREADS",
        "LMCACHE_KERNEL_TRITON",
        "LMCACHE_ENVS",
        "LMCACHE_INSTALL",
        "LMCACHE_TEST_KILLS",
        "LMCACHE_TEST_LAYOUTS",
        "LMCACHE_TEST_SEED",
        "LMCACHE_TEST_STEPS",
        "LMCACHE_VLLM_PYTHON",
    }
)
"""Switches of processes, which aren't options."""
# Kubernetes and Docker describe a service named lmcache-… to every container in this form.
_SERVICE_LINK = re.compile(
    r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)$"
)
_SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://")
MERGE_TAG = "tag:yaml.org,2002:merge"
_UNREADABLE = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)
"""What PyYAML raises of text that isn't right: others than its own where tags like ``!!int`` don't
fit, or where it is nested too deep."""
_MOST_ENTRIES = 100_000
FREE_FORM = "extra_config"
"""LMCache's mapping of backend options. Its keys may have dots in them."""

KeyPath = tuple[str, ...]


@dataclass(frozen=True)
class Layer:
    """Values from one place; ``origins`` says where in that place each one stands."""

    name: str
    values: Mapping[str, Any]
    origins: Mapping[KeyPath, str] = field(default_factory=dict)

    def origin(self, path: KeyPath) -> str:
        """Where the value at ``path``, or what it is part of, was written."""
        for length in range(len(path), 0, -1):
            if found := self.origins.get(path[:length]):
                return found
        return self.name


@dataclass
class Merged:
    """All layers in one. Changed only while the configuration is being built."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)

    def origin(self, path: KeyPath) -> str:
        """Where the value at ``path``, or the nearest thing around it, was set."""
        if found := self.origins.get(path):
            return found
        for candidate, origin in self.origins.items():
            if candidate[: len(path)] == path:
                return origin
        return self.origin(path[:-1]) if len(path) > 1 else "default"

    def put(self, path: KeyPath, value: Any, origin: str) -> None:
        """Set ``path`` and forget the origins of whatever it replaces."""
        for stale in [p for p in self.origins if p[: len(path)] == path]:
            del self.origins[stale]
        for length in range(1, len(path)):
            self.origins.pop(path[:length], None)
        assign(self.values, path, value)
        self.origins[path] = origin


def merge(layers: Sequence[Layer]) -> Merged:
    """Overlay ``layers``, weakest first. Mappings merge; everything else replaces."""
    merged = Merged()
    for layer in layers:
        for path, value in _leaves(layer.values):
            if value == {} and isinstance(_at(merged.values, path), dict):
                continue  # an empty mapping adds nothing to what a weaker layer has there
            merged.put(path, value, layer.origin(path))
    return merged


def _leaves(values: Mapping[str, Any], prefix: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    for key, value in values.items():
        path = (*prefix, str(key))
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, path)
        else:
            yield path, value


def _at(values: Any, path: KeyPath) -> Any:
    for key in path:
        if not isinstance(values, dict):
            return None
        values = values.get(key)
    return values


def assign(values: dict[str, Any], path: KeyPath, value: Any) -> None:
    """Set ``values`` at ``path``; mappings on the way are made, other things replaced."""
    for key in path[:-1]:
        inner = values.get(key)
        if not isinstance(inner, dict):
            inner = values[key] = {}
        values = inner
    values[path[-1]] = value


def file_layer(path: Path, problems: list[str], named_by: str = "") -> Layer:
    """Read a YAML (or JSON) file, keeping line numbers.

    ``named_by`` says in messages who asked for it.
    """
    empty = Layer(str(path), {})
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            # YAML reads JSON but for tabs, which JSON has between things and never inside them.
            text = text.replace("\t", " ")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return empty
        if not isinstance(node, yaml.MappingNode):
            problems.append(f"{path}{named_by} must hold a mapping of options at its top level")
            return empty
        notes = _Notes(path.name, problems)
        notes.take(node, (), ())
        return Layer(str(path), yaml.safe_load(text), notes.origins)
    except OSError as error:
        problems.append(f"can't read the configuration file {path}{named_by}: {error.strerror}")
    except _UNREADABLE as error:
        problems.append(f"{path}{named_by} isn't valid YAML: {error}")
    return empty


@dataclass
class _Notes:
    """Walks a YAML document for the lines of its keys, and for keys that stand there twice."""

    file: str
    problems: list[str]
    origins: dict[KeyPath, str] = field(default_factory=dict)
    entries: int = 0

    def take(self, node: yaml.Node, prefix: KeyPath, parents: tuple[int, ...]) -> None:
        if id(node) in parents:
            raise ValueError(f"{'.'.join(prefix)} contains itself")
        self.entries += 1
        if self.entries > _MOST_ENTRIES:
            raise ValueError(
                f"there are more than {_MOST_ENTRIES:,} entries, with all that * repeats"
            )
        parents = (*parents, id(node))
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                self.take(item, prefix, parents)
        if not isinstance(node, yaml.MappingNode):
            return
        own: dict[str, int] = {}
        for key, value in node.value:
            if key.tag == MERGE_TAG:  # first: what stands here itself is stronger
                self.take(value, prefix, parents)
        for key, value in node.value:
            if key.tag == MERGE_TAG:
                continue
            name, line = str(key.value), key.start_mark.line + 1
            if name in own:
                self.problems.append(
                    f"{'.'.join((*prefix, name))} ({self.file} line {line})\n"
                    f"      is there already in line {own[name]}; keep one"
                )
            own[name] = line
            here = (*prefix, name)
            self.origins[here] = f"{self.file} line {line}"
            self.take(value, here, parents)


def variables_of_ours(
    environ: Mapping[str, str], dialects: Sequence[Dialect], others: Collection[str]
) -> tuple[dict[str, str], list[str]]:
    """The ``LMCACHE_…`` variables that set options, and those that a dialect knows not to.

    ``others`` are read by plugins, and neither.
    """
    silent = PROCESS_VARIABLES.union(others, *(one.switches for one in dialects))
    beginnings = tuple(start for one in dialects for start in one.foreign_variables)
    own: dict[str, str] = {}
    foreign: list[str] = []
    for name, value in environ.items():
        if not name.startswith(ENV_PREFIX) or name in silent or _is_service_link(name, value):
            continue
        if name.startswith(beginnings):
            foreign.append(name)
        else:
            own[name] = value
    return own, sorted(foreign)


def _is_service_link(name: str, value: str) -> bool:
    is_address = name.endswith("_PORT") and _SERVICE_ADDRESS.match(value) is not None
    return is_address or _SERVICE_LINK.search(name) is not None


def engine_options(
    engine: str,
    extra: Mapping[str, Any],
    dialects: Sequence[Dialect],
    ignores: Collection[str],
    problems: list[str],
    notices: list[str],
) -> dict[str, Any]:
    """Our options among an engine's extra configuration, without their ``lmcache.`` prefix."""
    own: dict[str, Any] = {}
    silent: dict[str, list[str]] = {}
    for key, value in extra.items():
        name = key.removeprefix(ENGINE_PREFIX)
        if key in ignores or any(key in one.engine_keys for one in dialects):
            continue
        meant = (one.option_of_engine_key(key, value) for one in dialects)
        if option := next(filter(None, meant), None):
            own.setdefault(*option)
            notices.append(f"{key} ({engine} extra config) is now called {option[0]}")
            continue
        whys = (one.why_without_effect(name) for one in dialects)
        if name == key:
            problems.append(
                f"{key} ({engine} extra config)\n      our keys start with '{ENGINE_PREFIX}' "
                f"there: write '{ENGINE_PREFIX}{key}' if it is one, or take it out"
            )
        elif why := next(filter(None, whys), ""):
            silent.setdefault(why, []).append(key)
        else:
            own[name] = value
    for why, keys in silent.items():
        notices.append(f"{', '.join(keys)} ({engine} extra config): no effect: {why}")
    return own


def variable(path: KeyPath) -> str:
    """The environment variable that sets the option at ``path``."""
    return ENV_PREFIX + ENV_NESTING.join(path).upper()


def env_layer(variables: Mapping[str, str], notices: list[str]) -> Layer:
    """``LMCACHE_CHUNK_SIZE`` sets ``chunk_size``; ``LMCACHE_BACKENDS__REDIS__URL`` nests.

    An empty variable is one that isn't set, as in a compose file. Quotes around a value are taken
    off: no shell leaves them there, but ``docker --env-file`` does.
    """
    values: dict[str, Any] = {}
    origins: dict[KeyPath, str] = {}
    quoted: list[str] = []
    for name in sorted(variables):
        text = variables[name].strip()
        if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
            quoted.append(name)
            text = text[1:-1]
        if not text.strip():
            continue
        path = tuple(name[len(ENV_PREFIX) :].lower().split(ENV_NESTING))
        assign(values, path, _from_text(text))
        origins[path] = f"environment {name}"
    if quoted:
        notices.append(
            f"{', '.join(quoted)}: read without the quotes, which docker's --env-file keeps"
        )
    return Layer("environment", values, origins)


def engine_layer(engine: str, options: Mapping[str, Any]) -> Layer:
    """What an engine passes on, such as vLLM's ``kv_connector_extra_config``; dots nest."""
    values: dict[str, Any] = {}
    origins: dict[KeyPath, str] = {}
    for key, value in options.items():
        path = _dotted(key)
        assign(values, path, deepcopy(value))  # the engine's own mapping stays as it is
        origins[path] = f"{engine} extra config lmcache.{key}"
    return Layer(f"{engine} extra config", values, origins)


def cli_layer(assignments: Sequence[str], problems: list[str]) -> Layer:
    """``--set backends.redis.url=redis://h``, once per option."""
    values: dict[str, Any] = {}
    origins: dict[KeyPath, str] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not all(key.split(".")):
            problems.append(f"--set {text}\n      write it as --set KEY=VALUE")
            continue
        path = _dotted(key)
        assign(values, path, _from_text(value))
        origins[path] = f"--set {key}"
    return Layer("command line", values, origins)


def _dotted(key: str) -> KeyPath:
    first, dot, rest = key.partition(".")
    if first == FREE_FORM and dot:
        return (first, rest)
    return tuple(key.split("."))


def _from_text(text: str) -> Any:
    """Shell text: ``null``, a list or mapping in YAML's flow style, or the text itself."""
    plain = text.strip()
    if plain.lower() in ("null", "none", "~"):
        return None
    if plain[:1] in ("[", "{"):
        try:
            return yaml.safe_load(plain)
        except _UNREADABLE:
            return text
    return text
