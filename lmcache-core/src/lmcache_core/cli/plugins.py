"""``lmcache plugins``: what is installed, what works, and why the rest doesn't."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from lmcache_core.cli.table import text_table
from lmcache_core.plugins.manager import Plugins

if TYPE_CHECKING:
    from argparse import ArgumentParser, _SubParsersAction

EXAMPLES = """\
examples:
  lmcache plugins
  lmcache plugins --json
  LMCACHE_TRACE_PLUGINS=1 lmcache plugins     each step, and tracebacks
  LMCACHE_DISABLE_PLUGINS=redis lmcache plugins
"""


def add(subcommands: _SubParsersAction[ArgumentParser], plugins: Plugins) -> None:
    """Add the subcommand."""
    parser = subcommands.add_parser(
        "plugins",
        help="list plugins and what they provide",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=lambda args: run(args, plugins))


def run(args: argparse.Namespace, plugins: Plugins) -> int:
    """Print all plugins; broken ones are listed, not an error."""
    if args.json:
        rows = [asdict(record) for record in plugins.records]
        print(json.dumps({"plugins": rows, "conflicts": plugins.conflicts()}, indent=2))
        return 0
    print(
        text_table(
            ("NAME", "DISTRIBUTION", "VERSION", "STATUS", "PROVIDES", "DETAIL"),
            [
                (r.name, r.distribution, r.version, r.status, ", ".join(r.provides), r.detail)
                for r in plugins.records
            ],
        )
    )
    for line in plugins.conflicts():
        print(f"\nconflict: {line}")
    return 0
