"""Writes docs/configuration.md from the models and tables that the code itself uses.

    python tools/config_reference.py            write it
    python tools/config_reference.py --check    fail if it isn't current

Shows what comes with lmcache-core; other plugins document their own options.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from types import NoneType, UnionType
from typing import Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from lmcache_core.config.layers import variable
from lmcache_core.config.models import CoreConfig, SectionHead, hidden
from lmcache_core.dialect.table import ALIASES, EXTRA_KEYS, KEYS, URL_PACKAGES, Key
from lmcache_core.plugins.discovery import CORE
from lmcache_core.plugins.manager import Plugins

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

INTRODUCTION = """\
# Configuration

<!-- Made by tools/config_reference.py. Change the models, then run it again. -->

```console
$ lmcache config
```

prints every option that is in effect and where it was set, or everything that is wrong.

Values come from five places; a later one is stronger:

1. defaults,
2. the YAML or JSON file that `LMCACHE_CONFIG_FILE` names,
3. environment variables `LMCACHE_…`; `__` nests (`LMCACHE_BACKENDS__DISK__PATH`); an empty one
   isn't set, and `null` unsets what the file says,
4. what the engine passes on: keys `lmcache.…` in vLLM's `kv_connector_extra_config`,
5. `--set KEY=VALUE` of the command line; dots nest.

An unknown option, a duplicate key or a wrong value stops the start-up; all mistakes are reported
together.
"""

SERDES = """\
## Serdes

What `serde` and `remote_serde` name is listed by `lmcache plugins --load`. Options of a serde stand
once, under its name, and hold wherever it is used:

```yaml
remote_url: "lm://localhost:65432"
remote_serde: cachegen
serdes:
  cachegen:
    step: fine
```

As a variable: `LMCACHE_SERDES__CACHEGEN__STEP=fine`. Packages document their own.
"""

POLICIES = """\
## Cache policies

What `cache_policy` names is listed by `lmcache plugins --load`. The options of a policy that has
any stand beside it:

```yaml
cache_policy: S3-FIFO
cache_policy_options:
  small_share: 0.1
```

As a variable: `LMCACHE_CACHE_POLICY_OPTIONS__SMALL_SHARE=0.1`. Packages document their own; `LRU`,
`LFU`, `FIFO` and `MRU` have none.
"""

BACKENDS = """\
## Backends

`backends:` is a mapping in the order of the tiers behind host memory, nearest first.

```yaml
backends:
  disk:
    type: filesystem
    path: /var/cache/lmcache
    max_size_gib: 100
```

Every section may have:
"""


def main() -> int:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if out of date")
    text = page()
    if parser.parse_args().check:
        if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text:
            return 0
        print(f"{PAGE.name} is out of date: run python tools/config_reference.py", file=sys.stderr)
        return 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text, encoding="utf-8")
    return 0


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION, "## Options\n", _model(CoreConfig, variables=True)]
    parts += [SERDES, POLICIES, BACKENDS, _model(SectionHead)]
    plugins = Plugins(environ={})
    ours = {
        provided.partition("storage backend ")[2]
        for record in plugins.records
        if record.distribution == CORE
        for provided in record.provides
    }
    for descriptor in plugins.storage_backends():
        if descriptor.name in ours:
            summary = f"{descriptor.summary[:1].upper()}{descriptor.summary[1:].rstrip('.')}."
            parts += [f"### {descriptor.name}\n\n{summary}\n", _model(descriptor.config)]
    parts += ["## LMCache's keys\n\nThe flat keys of LMCache work unchanged, or say why not.\n"]
    parts += [_fates(KEYS.items())]
    renamed = [(f"`{old}`", f"`{new}`") for old, new in ALIASES.items()]
    parts += ["### Old names\n", _rows(("old", "now"), renamed)]
    parts += [
        "### `extra_config`\n\nA key that a configured backend reads goes to it. Core knows:\n",
        _fates(EXTRA_KEYS.items()),
        "### Addresses\n\n`remote_url` is opened by the package that knows its scheme:\n",
        _rows(("scheme", "package"), [(f"`{s}://`", f"`{p}`") for s, p in URL_PACKAGES.items()]),
    ]
    return "\n".join(parts)


def _model(model: type[BaseModel], *, variables: bool = False) -> str:
    rows: list[tuple[str, ...]] = []
    for name, info in model.model_fields.items():
        default = info.get_default(call_default_factory=False)
        shown = "required" if default is PydanticUndefined else f"`{_plain(hidden(default))}`"
        row = (f"`{name}`", _type(info.annotation), shown, info.description or "")
        rows.append((*row, f"`{variable((name,))}`") if variables else row)
    head = ("option", "type", "default", "meaning", "variable")
    return _rows(head if variables else head[:4], rows)


def _type(annotation: object) -> str:
    """In words, and the same whatever Python's version calls it."""
    arguments = get_args(annotation)
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(map(_type, arguments))
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{argument}`" for argument in arguments)
    if annotation is NoneType:
        return "null"
    if isinstance(annotation, type) and not arguments:
        return annotation.__name__
    return str(annotation)


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _fates(keys: Iterable[tuple[str, Key]]) -> str:
    return _rows(
        ("key", "effect", "why, or what it becomes"),
        [(f"`{name}`", key.fate.value, key.why) for name, key in keys],
    )


def _rows(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    cells = (" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines)
    return "".join(f"| {line} |\n" for line in cells)


if __name__ == "__main__":
    raise SystemExit(main())
