"""``lmcache version``."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from lmcache_core.plugins.discovery import core_version

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace, _SubParsersAction


def add(subcommands: _SubParsersAction[ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subcommands.add_parser(
        "version", help="print the installed version", epilog="example: lmcache version"
    )
    parser.set_defaults(run=run)


def run(_args: Namespace) -> int:
    """Print one line."""
    version = core_version() or "(not installed)"
    print(f"lmcache-core {version} (Python {platform.python_version()})")
    return 0
