"""``lmcache config``: the effective configuration and where each value comes from."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from lmcache_core.cli.table import text_table
from lmcache_core.config import Config, load_config
from lmcache_core.plugins.manager import Plugins

if TYPE_CHECKING:
    from argparse import ArgumentParser, _SubParsersAction

EXAMPLES = """\
examples:
  lmcache config
  lmcache config --file lmcache.yaml
  lmcache config --set chunk_size=128 --set backends.disk.type=filesystem \\
                 --set backends.disk.path=/var/cache/lmcache
  LMCACHE_LOCAL_DISK=/var/cache/lmcache lmcache config --json

Prints every mistake and exits with 1 if something is wrong.
"""


def add(subcommands: _SubParsersAction[ArgumentParser], plugins: Plugins) -> None:
    """Add the subcommand."""
    parser = subcommands.add_parser(
        "config",
        help="check the configuration and print effective values with their origins",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=lambda args: run(args, plugins))


def add_options(parser: ArgumentParser) -> None:
    """What chooses a configuration, for every command that reads one."""
    parser.add_argument(
        "--file", metavar="PATH", help="YAML or JSON file instead of LMCACHE_CONFIG_FILE"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="one option; dots nest; stronger than file and environment; may be repeated",
    )


def load(args: argparse.Namespace, plugins: Plugins) -> Config:
    """The configuration that `add_options` chose.

    Raises:
        ConfigError: it is wrong.
    """
    return load_config(plugins, file=args.file, assignments=args.set)


def run(args: argparse.Namespace, plugins: Plugins) -> int:
    """Print the effective values, secrets hidden. A wrong configuration raises `ConfigError`."""
    config = load(args, plugins)
    rows = list(config.rows())
    if args.json:
        values = {name: {"value": value, "origin": origin} for name, value, origin in rows}
        print(json.dumps({"values": values, "notices": config.notices}, indent=2))
        return 0
    print(
        text_table(
            ("OPTION", "VALUE", "ORIGIN"),
            [(name, _shown(value), origin) for name, value, origin in rows],
        )
    )
    for notice in config.notices:
        print(f"\nnotice: {notice}")
    return 0


def _shown(value: object) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)
