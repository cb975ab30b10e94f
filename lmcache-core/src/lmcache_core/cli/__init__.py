"""The ``lmcache`` command.

One module for each subcommand; plugins add more through the ``lmcache_cli``
hook. Knows how to print, and nothing that the rest of core doesn't know too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmcache_core.cli import new_plugin, version
from lmcache_core.cli import plugins as plugins_command
from lmcache_core.errors import LMCacheError
from lmcache_core.logging import init_logger

if TYPE_CHECKING:
    from argparse import ArgumentParser, _SubParsersAction


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
    for command in (plugins_command, version, new_plugin):
        command.add(subcommands)
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] not in subcommands.choices:  # these need no plugin to be loaded
        _add_others(subcommands)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args) or 0)
    except LMCacheError as error:
        print(f"lmcache: {error}", file=sys.stderr)
        return 1


def _add_others(subcommands: _SubParsersAction[ArgumentParser]) -> None:
    from lmcache_core.cli import config, doctor
    from lmcache_core.plugins.manager import Plugins

    plugins = Plugins()
    for command in (config, doctor):
        command.add(subcommands, plugins)
    plugins.add_subcommands(subcommands)
