"""``lmcache new-plugin``: the start of a package with a plugin that works."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lmcache_core.errors import LMCacheError
from lmcache_core.templates import KINDS, render

if TYPE_CHECKING:
    from argparse import ArgumentParser, _SubParsersAction

EXAMPLES = """\
examples:
  lmcache new-plugin backend acme          makes ./lmcache-backend-acme/
  lmcache new-plugin policy acme --to DIR  elsewhere
"""
NEXT = """\
{package} is there: a plugin that works. Next:
  pip install -e '{package}[testing]'
  lmcache plugins --load
  pytest {package}
Then put the real thing into its place, and say so in README.md. Choose a licence: pyproject.toml
says Apache-2.0.
"""


def add(subcommands: _SubParsersAction[ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subcommands.add_parser(
        "new-plugin",
        help="start a package with a plugin: " + ", ".join(KINDS),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=list(KINDS), help="what it is")
    parser.add_argument("name", help="what configurations will call it, such as acme")
    parser.add_argument("--to", type=Path, default=Path(), metavar="DIR", help="where to")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the package and say what comes next."""
    try:
        package = render(args.kind, args.name, args.to)
    except (ValueError, OSError) as error:
        raise LMCacheError(str(error)) from error
    print(NEXT.format(package=package), end="")
    return 0
