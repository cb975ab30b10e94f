"""How a mistake is told: what, its value without secrets, where it was set, what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from lmcache_core.redaction import without_password, without_passwords_in


def describe(path: Iterable[str], value: Any, origin: str, text: str) -> str:
    """One problem. ``None``, lists and mappings aren't shown: the origin says where to look."""
    shown = ""
    if isinstance(value, (str, bool, int, float)):
        plain = without_password(value) if isinstance(value, str) else value
        shown = f" = {without_passwords_in(repr(plain))}"
    return f"{'.'.join(path)}{shown} ({origin})\n      {without_passwords_in(text)}"


def suggest(name: str, known: Iterable[str]) -> str:
    """What to write instead of the unknown option ``name``."""
    options = sorted(set(known))
    near = get_close_matches(name, options, n=1)
    if near:
        return f"no such option; did you mean {near[0]!r}?"
    if len(options) > 12:
        return "no such option; docs/configuration.md lists them all"
    return f"no such option; options: {', '.join(options) or 'none'}"
