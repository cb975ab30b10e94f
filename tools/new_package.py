"""Starts a new backend package from ``_template/``.

    python3 tools/new_package.py acme             makes lmcache-backend-acme/
    python3 tools/new_package.py acme --to DIR    elsewhere

The template is a working package that is called ``newthing``; this renames it. Standard library
only.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
TEMPLATE = REPOSITORY / "_template" / "lmcache-backend-newthing"
WORD = "newthing"
NEXT = """\
{package} is there. Next:
  1. say what it keeps chunks in: README.md, config.py, backend.py, plugin.py
  2. add '-e ./{package}' to requirements-dev.txt, and {module} to the Makefile's `types`
  3. make lint types unit
"""


def render(name: str, into: Path) -> Path:
    """Write the template under ``into`` for a backend called ``name``; return the new folder.

    Raises:
        ValueError: ``name`` isn't a lower-case word.
        FileExistsError: the folder is there already.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*", name):
        raise ValueError(f"{name!r} can't be a package and a class; take one lower-case word")

    def renamed(text: str) -> str:
        return text.replace(WORD, name).replace(WORD.capitalize(), name.capitalize())

    package = into / renamed(TEMPLATE.name)
    package.mkdir(parents=True)
    for source in sorted(TEMPLATE.rglob("*")):
        if source.is_dir() or "__pycache__" in source.parts:
            continue
        target = package / renamed(str(source.relative_to(TEMPLATE)))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(renamed(source.read_text(encoding="utf-8")), encoding="utf-8")
    # An sdist can't reach above its own folder, so each package has a copy.
    shutil.copy(REPOSITORY / "LICENSE", package / "LICENSE")
    return package


def main() -> int:
    """Render the template and say what comes next."""
    parser = argparse.ArgumentParser(description="Start a new backend package.")
    parser.add_argument("name", help="what configurations will call it, such as acme")
    parser.add_argument("--to", type=Path, default=REPOSITORY, metavar="DIR")
    arguments = parser.parse_args()
    try:
        package = render(arguments.name, arguments.to)
    except (ValueError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(NEXT.format(package=package.name, module=package.name.replace("-", "_")), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
