"""Detects the upstream ``lmcache`` distribution beside this one.

Both install files below ``lmcache/``, and pip lets one silently overwrite the
other's. Knows names of distributions; imports nothing of either.
"""

from __future__ import annotations

import sys
from importlib import metadata
from importlib.machinery import PathFinder

from lmcache_core.errors import ConfigError

UPSTREAM = "lmcache"


def find_upstream() -> str | None:
    """What stands in the way, in words, or ``None``."""
    try:
        version = metadata.distribution(UPSTREAM).version
    except metadata.PackageNotFoundError:
        pass
    else:
        return f"the distribution lmcache {version} is installed beside lmcache-core"
    # What a half-removed upstream leaves behind: a regular package hides every namespace portion.
    spec = PathFinder.find_spec(UPSTREAM, sys.path)
    if spec is not None and spec.origin is not None:
        return f"{spec.origin} hides the files that lmcache-core installs below lmcache/"
    return None


def refuse_upstream() -> None:
    """Stop a start-up that would mix two implementations' files.

    Raises:
        ConfigError: upstream's ``lmcache`` is there. The message says how to remove it.
    """
    if (found := find_upstream()) is not None:
        raise ConfigError(
            f"{found}; their files overwrite each other. Remedy: pip uninstall lmcache, delete the "
            "folder lmcache/ if it is still there, then reinstall what shared it: "
            "pip install --force-reinstall --no-deps lmcache-core, and likewise each installed "
            "lmcache-connector-… package"
        )
