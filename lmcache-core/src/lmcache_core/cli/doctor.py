"""``lmcache doctor``: would this machine and this configuration work?"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from lmcache_core.builtin.filesystem_ledger import contents
from lmcache_core.cli.chunk_shape import add_options as add_shape
from lmcache_core.cli.chunk_shape import first_given, layout_of
from lmcache_core.cli.config import add_options, load
from lmcache_core.config import BackendSection, Config
from lmcache_core.config.models import hidden
from lmcache_core.contracts.report import ReportLine
from lmcache_core.errors import ConfigError, LayoutError
from lmcache_core.plugins.discovery import core_version
from lmcache_core.plugins.manager import Plugins
from lmcache_core.plugins.upstream import refuse_upstream

if TYPE_CHECKING:
    from argparse import ArgumentParser, _SubParsersAction

EXAMPLES = """\
examples:
  lmcache doctor
  lmcache doctor --file lmcache.yaml
  lmcache doctor --set local_disk=/var/cache/lmcache
  lmcache doctor --connect
  lmcache doctor --connect --layers 80 --heads 8 --head-size 128   as in Llama-3.1-70B

Each line starts with ok, warn or FAIL; exits with 1 if there is a FAIL.
"""

GIB = 1 << 30


def add(subcommands: _SubParsersAction[ArgumentParser], plugins: Plugins) -> None:
    """Add the subcommand."""
    parser = subcommands.add_parser(
        "doctor",
        help="check the installation, the plugins, the configuration and the machine",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    parser.add_argument(
        "--connect",
        action="store_true",
        help="also open each tier, and store, load and delete one chunk of chunk_size tokens "
        "there, in a namespace of its own",
    )
    add_shape(parser, "--connect")
    parser.set_defaults(run=lambda args: run(args, plugins))


def run(args: argparse.Namespace, plugins: Plugins) -> int:
    """Print all findings; 1 if one of them is a failure.

    Raises:
        ConfigError: an option has no effect.
    """
    if not args.connect and (option := first_given(args)):
        raise ConfigError(f"{option} has no effect without --connect; add that")
    failed = False
    for finding in findings(args, plugins):
        failed |= finding.severity == "FAIL"
        print(f"{finding.severity:<4}  {finding.text}", flush=True)
    return int(failed)


def findings(args: argparse.Namespace, plugins: Plugins) -> Iterator[ReportLine]:
    """Everything that is checked, from the installation up to the configured folders."""
    yield from _installation()
    yield from _plugins(plugins)
    try:
        config = load(args, plugins)
    except ConfigError as error:
        yield ReportLine("FAIL", f"configuration: {error}")
    else:
        yield ReportLine("ok", f"configuration: {len(config.backends)} backends behind host memory")
        yield from (ReportLine("warn", f"configuration: {notice}") for notice in config.notices)
        yield _memory(config, memory_bytes())
        if config.core.local_cpu_use_hugepages:
            yield _huge_pages(config)
        for section in config.backends:
            if section.type == "filesystem":
                yield from _disk(section)
        if args.connect:
            yield from _connect(args, config, plugins)
    yield from plugins.report()


def _connect(args: argparse.Namespace, config: Config, plugins: Plugins) -> Iterator[ReportLine]:
    from lmcache_core.cli.connect import findings as tried

    try:
        layout = layout_of(args, config.core.chunk_size)
    except LayoutError as error:
        yield ReportLine("FAIL", f"--connect: {error}; correct --layers, --heads or --head-size")
    else:
        yield from tried(layout, config, plugins)


def _installation() -> Iterator[ReportLine]:
    yield ReportLine("ok", f"python {platform.python_version()} at {sys.executable}")
    yield ReportLine("ok", f"lmcache-core {core_version() or '(not installed)'}")
    # Not imported: that takes seconds, and core doesn't need it.
    if find_spec("torch") is None:
        yield ReportLine("warn", "torch isn't installed; engine connectors need it, core doesn't")
    else:
        yield ReportLine("ok", f"torch {_version('torch')}")
    try:
        refuse_upstream()
    except ConfigError as error:
        yield ReportLine("FAIL", str(error))
    else:
        yield ReportLine("ok", "upstream's lmcache isn't in the way")


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "of unknown version"


def _plugins(plugins: Plugins) -> Iterator[ReportLine]:
    for record in plugins.records:
        text = f"plugin {record.name} of {record.distribution} {record.version}: {record.status}"
        usable = record.status in ("ok", "disabled") and not record.detail.startswith("lmcache_")
        yield ReportLine(
            "ok" if usable else "warn", text + (f", {record.detail}" if record.detail else "")
        )
    yield from (ReportLine("warn", line) for line in plugins.conflicts())


def _memory(config: Config, available: int | None) -> ReportLine:
    wanted = config.core.max_local_cpu_size * GIB
    text = f"memory: max_local_cpu_size is {config.core.max_local_cpu_size:g} GiB for each rank"
    if available is None:
        return ReportLine("warn", f"{text}; how much this process may have can't be found out")
    text += f" of {available / GIB:.1f} GiB that this machine or container has"
    if wanted > available:
        return ReportLine("FAIL", f"{text}: lower max_local_cpu_size")
    return ReportLine("warn" if wanted > 0.8 * available else "ok", text)


def memory_bytes(cgroup: Path = Path("/sys/fs/cgroup/memory.max")) -> int | None:
    """Bytes of memory that this machine has, or the container if that is less."""
    sizes: list[int] = []
    with suppress(ValueError, OSError):  # not known to this system
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    try:
        limit = cgroup.read_text().strip()
    except OSError:  # no cgroup, or version 1
        limit = ""
    if limit.isdigit():
        sizes.append(int(limit))
    return min(sizes, default=None)


def _huge_pages(config: Config) -> ReportLine:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return ReportLine("warn", "huge pages: this system doesn't say how many it has")
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    free = int(fields.get("HugePages_Free", "0"))
    size = int(fields.get("Hugepagesize", "0 kB").split()[0]) * 1024
    needed = config.core.max_local_cpu_size * GIB
    text = f"huge pages: {free * size / GIB:.1f} GiB free"
    if free * size >= needed:
        return ReportLine("ok", text)
    return ReportLine(
        "warn", f"{text}, {needed / GIB:g} GiB wanted; reserve them: sysctl vm.nr_hugepages"
    )


def _disk(section: BackendSection) -> Iterator[ReportLine]:
    options = hidden(section.options)
    folder = Path(str(options["path"]))
    here = f"backends.{section.name}: {folder}"
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    try:
        # os.access says yes to root even on a read-only filesystem; trying is the only answer.
        with tempfile.TemporaryFile(dir=existing):
            pass
        free = shutil.disk_usage(existing).free
    except OSError as error:
        yield ReportLine("FAIL", f"{here} can't be written to ({existing}: {error.strerror})")
        return
    made = "" if existing == folder else ", will be created"
    yield ReportLine("ok", f"{here} can be written to{made}; {free / GIB:.1f} GiB free")
    bound = options.get("max_size_gib")
    if isinstance(bound, (int, float)) and bound * GIB > free:
        yield ReportLine("warn", f"{here}: max_size_gib is {bound:g}, more than is free now")
    yield from (ReportLine("ok", f"{here}: {line}") for line in contents(folder.expanduser()))
