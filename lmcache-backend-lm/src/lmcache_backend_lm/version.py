"""Which versions are installed here. Knows the names of distributions."""

from __future__ import annotations

from importlib import metadata

DISTRIBUTION = "lmcache-backend-lm"
CORE = "lmcache-core"


def version_of(distribution: str) -> str:
    """As its metadata says; a remark if there are none, as where sources are run as they are."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "(not installed)"
