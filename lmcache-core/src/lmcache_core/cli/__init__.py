"""The ``lmcache`` command.

One module for each subcommand; plugins add more through the ``lmcache_cli``
hook. Knows how to print, and nothing that the rest of core doesn't know too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lmcache_core.cli import config, doctor, new_plugin, version
from lmcache_core.cli import plugins as plugins_command
from lmcache_core.errors import LMCacheError
from lmcache_core.logging import init_logger
from lmcache_core.plugins.manager import Plugins


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; the answer is the exit status.

    A subcommand's parser sets ``run``, which is called with the parsed arguments.
    """
    init_logger("lmcache_core")
    parser = argparse.ArgumentParser(
        prog="lmcache",
        description="Inspect a KV cache for LLM serving.",
        epilog="example: lmcache doctor",
    )
    subcommands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    plugins = Plugins()
    for command in (plugins_command, config, doctor, new_plugin, version):
        command.add(subcommands, plugins)
    plugins.add_subcommands(subcommands)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args) or 0)
    except LMCacheError as error:
        print(f"lmcache: {error}", file=sys.stderr)
        return 1
