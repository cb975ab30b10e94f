"""Starts a new package of this repository from core's templates.

    python3 tools/new_package.py acme               makes lmcache-backend-acme/
    python3 tools/new_package.py acme --kind serde  makes lmcache-serde-acme/

Elsewhere ``lmcache new-plugin`` does it; this adds the licence. Standard library only.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "lmcache-core" / "src"))

from lmcache_core.templates import KINDS, render  # noqa: E402

NEXT = """\
{package} is there. Next:
  1. put the real thing into its place, and say in README.md what it is
  2. add '-e ./{package}' to requirements-dev.txt, and {package} to the Makefile's `types` and to
     mypy_path and testpaths in pyproject.toml
  3. make lint types unit
"""


def main() -> int:
    """Render the template and say what comes next."""
    parser = argparse.ArgumentParser(description="Start a new package.")
    parser.add_argument("name", help="what configurations will call it, such as acme")
    parser.add_argument("--kind", choices=list(KINDS), default="backend")
    parser.add_argument("--to", type=Path, default=REPOSITORY, metavar="DIR")
    arguments = parser.parse_args()
    try:
        package = render(arguments.kind, arguments.name, arguments.to)
    except (ValueError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    # An sdist can't reach above its own folder, so each package has a copy.
    shutil.copy(REPOSITORY / "LICENSE", package / "LICENSE")
    print(NEXT.format(package=package.name), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
