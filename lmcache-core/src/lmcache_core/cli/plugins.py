"""``lmcache plugins``: what is installed; with ``--load``, what works, and why the rest doesn't.

The list alone loads no plugin: it is metadata of what pip installed, which takes a tenth of it.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from importlib.util import find_spec
from typing import TYPE_CHECKING

from lmcache_core.cli.table import text_table
from lmcache_core.plugins.discovery import (
    DISABLE_VARIABLE,
    Candidate,
    candidates,
    disabled_by,
    unmet_core_requirement,
)

if TYPE_CHECKING:
    from argparse import ArgumentParser, _SubParsersAction

EXAMPLES = """\
examples:
  lmcache plugins                                    what is installed
  lmcache plugins --load                             load each: what it provides, or what is wrong
  lmcache plugins --load --json
  LMCACHE_TRACE_PLUGINS=1 lmcache plugins --load     each step, and tracebacks
  LMCACHE_DISABLE_PLUGINS=redis lmcache plugins
"""


def add(subcommands: _SubParsersAction[ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subcommands.add_parser(
        "plugins",
        help="list plugins, and what they provide",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--load", action="store_true", help="load them, and show what each provides"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print all plugins; broken ones are listed, not an error."""
    return _loaded(as_json=args.json) if args.load else _found(as_json=args.json)


def _found(*, as_json: bool) -> int:
    off = disabled_by(os.environ)
    found = [(one, *_status(one, off)) for one in candidates()]
    if as_json:
        rows = [
            {
                "name": one.name,
                "distribution": one.distribution,
                "version": one.version,
                "target": one.target,
                "status": status,
                "detail": detail,
            }
            for one, status, detail in found
        ]
        print(json.dumps({"plugins": rows}, indent=2))
        return 0
    cells = [
        (one.name, one.distribution, one.version, status, detail) for one, status, detail in found
    ]
    print(text_table(("NAME", "DISTRIBUTION", "VERSION", "STATUS", "DETAIL"), cells))
    print("\nlmcache plugins --load loads each, and shows what it provides or what is wrong")
    return 0


def _status(candidate: Candidate, off: set[str]) -> tuple[str, str]:
    """What is known of a plugin that wasn't loaded, and why it won't be."""
    if candidate.is_among(off):
        return "disabled", f"by {DISABLE_VARIABLE}"
    if unmet := unmet_core_requirement(candidate.requires):
        return "incompatible", unmet
    package = candidate.target.partition(":")[0].partition(".")[0]
    if not package.isidentifier() or find_spec(package) is None:
        return "failed", f"there is no module {candidate.target}"
    return "installed", ""


def _loaded(*, as_json: bool) -> int:
    from lmcache_core.plugins.manager import Plugins

    plugins = Plugins()
    plugins.add_subcommands(argparse.ArgumentParser().add_subparsers())  # one may be broken
    if as_json:
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
