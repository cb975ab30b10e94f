"""What the user wants: merged from layers, checked once, frozen.

`load_config` is all that the rest of core needs. `layers` knows where values
come from, `dialect` what others may call them, `models` what they mean, `schema` how they are
checked.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmcache_core.config import layers, schema
from lmcache_core.config.models import BackendSection, Config, CoreConfig
from lmcache_core.plugins.manager import Plugins

__all__ = ["BackendSection", "Config", "CoreConfig", "load_config"]

FILE_VARIABLE = "LMCACHE_CONFIG_FILE"


def load_config(
    plugins: Plugins,
    *,
    file: str | os.PathLike[str] | None = None,
    environ: Mapping[str, str] | None = None,
    engine: tuple[str, Mapping[str, Any]] | None = None,
    engine_ignores: Collection[str] = (),
    assignments: Sequence[str] = (),
) -> Config:
    """Read every layer and answer the one valid configuration that they make.

    Args:
        plugins: what is installed; each backend's own options are checked by its plugin.
        file: a YAML or JSON file; ``None`` means ``LMCACHE_CONFIG_FILE`` of ``environ``, if set.
        environ: ``None`` means ``os.environ``.
        engine: the engine's name and what it passes on, such as ``("vLLM", extra_config)``. Our
            keys start with ``lmcache.``.
        engine_ignores: other keys in there that are the engine's own, besides those that a dialect
            knows.
        assignments: ``KEY=VALUE`` texts of ``--set``; dots nest.

    Raises:
        ConfigError: with everything that is wrong, each with its origin.
    """
    environ = os.environ if environ is None else environ
    problems: list[str] = []
    notices: list[str] = []
    found: list[layers.Layer] = []
    if file is not None:
        found.append(layers.file_layer(Path(file), problems))
    elif path := environ.get(FILE_VARIABLE):
        found.append(layers.file_layer(Path(path), problems, f" ({FILE_VARIABLE})"))
    dialects = plugins.dialects()
    own, foreign = layers.variables_of_ours(environ, dialects, plugins.environment())
    found.append(layers.env_layer(own, notices))
    if foreign:
        notices.append(f"{', '.join(foreign)}: not an option of this version; not read")
    if engine is not None:
        name, extra = engine
        ours = layers.engine_options(name, extra, dialects, engine_ignores, problems, notices)
        found.append(layers.engine_layer(name, ours))
    found.append(layers.cli_layer(assignments, problems))

    for dialect in dialects:
        found = [dialect.rename(layer, plugins, problems, notices) for layer in found]
    merged = layers.merge(found)
    for dialect in dialects:
        dialect.upgrade(merged, plugins, problems, notices)
    return schema.validate(merged, plugins, problems, notices)
