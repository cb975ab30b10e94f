"""What is published besides core, for messages about what isn't installed.

Decides nothing: others' packages are found like these. A command to install a package is shown for
these names alone, because a misspelt one may be anybody's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches

_KERNELS = "lmcache-kernels"

PACKAGES: Mapping[str, Mapping[str, str]] = {
    "storage backend": {
        name: f"lmcache-backend-{name}"
        for name in ("infinistore", "lm", "mooncake", "nixl", "redis")
    },
    "serde": dict.fromkeys(("aesgcm", "cachegen", "fp8", "int8", "lossless"), _KERNELS),
    "engine connector": {"vllm": "lmcache-connector-vllm"},
    "transfer channel": {"nixl": "lmcache-backend-nixl"},
    "cache policy": {"s3-fifo": "lmcache-policy-s3fifo"},
}
"""What a plugin provides → its name → the distribution."""


def advice(noun: str, name: str, installed: Collection[str]) -> str:
    """What to do about a ``noun`` called ``name`` that nothing installed provides."""
    known = PACKAGES.get(noun, {})
    if package := known.get(name.lower()):
        return f". Try: pip install {package}"
    near = get_close_matches(name.lower(), sorted({*map(str.lower, installed), *known}), n=1)
    if not near:
        return ". Install the package that provides it"
    if near[0] in map(str.lower, installed):
        return f"; did you mean {near[0]!r}?"
    return f"; did you mean {near[0]!r}? (pip install {known[near[0]]})"
