"""Writes docs/public-api.md: every public name of lmcache-core with its signature.

    python tools/public_surface.py            write it
    python tools/public_surface.py --check    fail if it isn't current

What an application or a plugin may import is `lmcache_core` and `lmcache_core.testing`. The page is
the record of it: a change of a name or a signature shows there, and is a decision.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import inspect
import sys
import textwrap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import lmcache_core

PAGE = Path(__file__).resolve().parent.parent / "docs" / "public-api.md"

TESTING = (
    *("storage", "serde", "policy", "transfer", "connector"),
    *("faults", "faulty", "loop", "ports", "simulated_memory"),
)

COLUMNS = 120

INTRODUCTION = """\
# Public names

<!-- Made by tools/public_surface.py. Change the code, then run it again. -->

Applications and plugins import from `lmcache_core`, and their tests from the modules of
`lmcache_core.testing`:

```python
from lmcache_core import BlockingBackend, StorageBackendDescriptor, hookimpl
```

These names stay within a minor version, and so do their parameters. Everything else, the modules
where they live too, may move without notice. A name is imported when it is first used.
"""


def main() -> int:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if out of date")
    text = page()
    if parser.parse_args().check:
        if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text:
            return 0
        print(f"{PAGE.name} is out of date: run python tools/public_surface.py", file=sys.stderr)
        return 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for role, names in lmcache_core._ROLES.items():
        parts.append(_section(role, {name: getattr(lmcache_core, name) for name in sorted(names)}))
    for name in TESTING:
        module = import_module(f"lmcache_core.testing.{name}")
        own = {
            key: value
            for key, value in sorted(vars(module).items())
            if getattr(value, "__module__", "") == module.__name__ and not key.startswith("_")
        }
        parts.append(_section(f"For tests: `lmcache_core.testing.{name}`", own))
    return "\n".join(parts)


def _section(title: str, names: dict[str, Any]) -> str:
    lines = [f"## {title}", ""]
    for name, thing in names.items():
        lines += _wrapped(f"- `{name}`: {_summary(thing)}", "  ")
    lines += ["", "```text"]
    for name, thing in names.items():
        for line in _shape(name, thing):
            lines += _wrapped(line, " " * 8)
    return "\n".join([*lines, "```", ""])


def _wrapped(line: str, indent: str) -> list[str]:
    return textwrap.wrap(line, COLUMNS, subsequent_indent=indent, break_long_words=False)


def _summary(thing: Any) -> str:
    """The first paragraph of its docstring, or its value if it is a plain one."""
    if (kind := getattr(thing, "__supertype__", None)) is not None:
        return f"`{kind.__name__}`, as a type of its own."  # its docstring is Python's
    if not callable(thing) or not thing.__doc__:
        return f"`{thing!r}`" if isinstance(thing, (int, float, str)) else type(thing).__name__
    return " ".join(inspect.cleandoc(thing.__doc__).split("\n\n")[0].split())


def _shape(name: str, thing: Any) -> Iterator[str]:
    """A line for it, and one for each public part of a class."""
    if not inspect.isclass(thing):
        yield f"{name}{_signature(thing)}" if inspect.isfunction(thing) else name
        return
    bases = ", ".join(base.__name__ for base in thing.__bases__ if base is not object)
    yield f"class {name}({bases})" if bases else f"class {name}"
    if issubclass(thing, enum.Enum):
        yield f"    {', '.join(member.name for member in thing)}"
    elif issubclass(thing, BaseModel):
        for field, info in thing.model_fields.items():
            yield f"    {field}: {_text(info.annotation)}{' = …' if not info.is_required() else ''}"
    elif dataclasses.is_dataclass(thing):
        for one in dataclasses.fields(thing):
            optional = (one.default, one.default_factory) != (dataclasses.MISSING,) * 2
            yield f"    {one.name}: {one.type}{' = …' if optional else ''}"
    elif hasattr(thing, "__init__") and inspect.isfunction(thing.__init__):
        yield f"    __init__{_signature(thing.__init__)}"
    for key, value in vars(thing).items():
        if key.startswith(("_", "test_")):
            continue
        function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        if inspect.isfunction(function):
            kind = "async " if inspect.iscoroutinefunction(function) else ""
            yield f"    {kind}{key}{_signature(function)}"
        elif isinstance(function, property):
            yield f"    {key}: {_annotation(function.fget)}"


def _signature(function: Any) -> str:
    shown = inspect.signature(function)
    parameters = [
        one.replace(default="…") if one.default is not one.empty else one
        for one in shown.parameters.values()
    ]
    return str(shown.replace(parameters=parameters)).replace("'", "")


def _annotation(function: Any) -> str:
    return str(function.__annotations__.get("return", "Any"))


def _text(annotation: Any) -> str:
    return getattr(annotation, "__name__", str(annotation)) if annotation else "None"


if __name__ == "__main__":
    raise SystemExit(main())
