"""``lmcache server`` and ``lmcache_server``: the store behind ``lm://`` addresses."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lmcache_backend_lm.config import DEFAULT_PORT, TOKEN_VARIABLE
from lmcache_backend_lm.protocol import VERSION
from lmcache_backend_lm.version import CORE, DISTRIBUTION, version_of
from lmcache_core import ConfigError, LMCacheError, init_logger

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace, _SubParsersAction

_EXAMPLES = """\
examples:
  {prog} localhost 65432
  {prog} localhost 65432 /var/cache/lmcache --disk-gib 500
  {prog} 0.0.0.0 65432 --memory-gib 64 --token-file /etc/lmcache/token \\
      --tls-cert server.pem --tls-key server.key --metrics-port 9090

Clients: remote_url: "lm://HOST:65432". See docs/lm-server.md.
"""


def add(subcommands: _SubParsersAction[ArgumentParser]) -> None:
    """Add the subcommand."""
    parser = subcommands.add_parser(
        "server",
        help="run the store behind lm:// addresses",
        epilog=_EXAMPLES.format(prog="lmcache server"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_options(parser)
    parser.set_defaults(run=run)


def main(argv: Sequence[str] | None = None) -> int:
    """The command ``lmcache_server``, as LMCache's documentation calls it."""
    parser = argparse.ArgumentParser(
        prog="lmcache_server",
        description="A store for KV caches that several engines share.",
        epilog=_EXAMPLES.format(prog="lmcache_server"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_options(parser)
    try:
        return run(parser.parse_args(argv))
    except LMCacheError as error:
        print(f"lmcache_server: {error}", file=sys.stderr)
        return 1


def run(args: Namespace) -> int:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ConfigError: an option has no effect, or can't be had.
    """
    disk = None if args.storage in ("cpu", "cuda") else Path(args.storage)
    _refuse_what_has_no_effect(args, disk)
    init_logger("lmcache_backend_lm")
    from lmcache_backend_lm.server import DEFAULT_METRICS_HOST, Server, ServerOptions

    memory = None if args.memory_gib is None else int(args.memory_gib * 2**30)
    Server(
        ServerOptions(
            host=args.host,
            port=args.port,
            memory_bytes=memory,
            populate=args.populate,
            disk=disk,
            disk_size_gib=args.disk_gib,
            token_file=args.token_file,
            tls_cert=args.tls_cert,
            tls_key=args.tls_key,
            unix=args.unix,
            metrics_host=args.metrics_host or DEFAULT_METRICS_HOST,
            metrics_port=args.metrics_port,
            metrics_token_file=args.metrics_token_file,
            metrics_tls=args.metrics_tls,
            threads=args.threads,
            max_connections=args.max_connections,
            stall_s=args.stall_timeout,
        )
    ).run()
    return 0


def _add_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("host", nargs="?", default="localhost", help="address to listen on (default: localhost)")
    add("port", nargs="?", type=_port, default=DEFAULT_PORT, help=f"(default: {DEFAULT_PORT})")
    add(
        "storage",
        nargs="?",
        default="cpu",
        metavar="cpu|DIR",
        help="memory only, or a folder for a disk tier behind it (default: cpu)",
    )
    add(
        "--memory-gib",
        type=_positive,
        metavar="GIB",
        help="memory for values (default: 8, or half of what is available if that is less)",
    )
    add("--populate", action="store_true", help="take all that memory at start")
    add("--disk-gib", type=_positive, metavar="GIB", help="most that all files may take")
    add(
        "--token-file",
        type=Path,
        metavar="FILE",
        help=f"ask clients for this file's content (default: the variable {TOKEN_VARIABLE})",
    )
    add("--tls-cert", type=Path, metavar="PEM", help="speak TLS on TCP, with this certificate")
    add("--tls-key", type=Path, metavar="PEM", help="its key, if it isn't in the same file")
    add(
        "--unix",
        default="auto",
        metavar="PATH",
        help="Unix socket for clients on this machine; none: no socket (default: one in "
        "$XDG_RUNTIME_DIR or /tmp that only this user can reach)",
    )
    add("--metrics-port", type=_port, metavar="PORT", help="serve /metrics and /health there")
    add("--metrics-host", metavar="HOST", help="(default: 127.0.0.1)")
    add(
        "--metrics-token-file",
        type=Path,
        metavar="FILE",
        help="ask for this file's content (Authorization: Bearer) before showing numbers",
    )
    add("--metrics-tls", action="store_true", help="serve them over HTTPS, with --tls-cert")
    add(
        "--threads",
        type=_threads,
        metavar="N",
        help="that serve (default: two for each CPU, up to 8)",
    )
    add("--version", action=_Version, nargs=0, help="print versions and exit")
    add(
        "--max-connections",
        type=int,
        metavar="N",
        help="(default: 4096, or as many as the limit of descriptors allows)",
    )
    add(
        "--stall-timeout",
        type=_positive,
        default=30.0,
        metavar="SECONDS",
        help="close a connection that makes no progress for so long (default: 30)",
    )


def _refuse_what_has_no_effect(args: Namespace, disk: Path | None) -> None:
    if args.disk_gib is not None and disk is None:
        raise ConfigError(
            f"--disk-gib {args.disk_gib:g} has no effect without a disk tier; name its folder "
            "after the port (HOST PORT DIR), or leave it out"
        )
    for name in ("metrics_host", "metrics_token_file", "metrics_tls"):
        value = getattr(args, name)
        if value and args.metrics_port is None:
            option = f"--{name.replace('_', '-')}{'' if value is True else f' {value}'}"
            raise ConfigError(
                f"{option} has no effect without --metrics-port; set that, or leave it out"
            )
    if not args.unix:
        raise ConfigError("--unix '' is no path; write a path, or none for no socket")


class _Version(argparse.Action):
    """Prints versions, which take a moment to find."""

    def __call__(self, parser: ArgumentParser, *_: object) -> None:
        said = [f"{name} {version_of(name)}" for name in (DISTRIBUTION, CORE)]
        print(f"lmcache_server: {', '.join(said)}, lm:// version {VERSION}")
        parser.exit()


def _threads(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(
            f"{text}: nothing would be served; at least 1, or leave it out for two a CPU"
        )
    return number


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{text}: a port is below 65536")
    return port


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be more than 0")
    return number
