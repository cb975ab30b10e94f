"""``lmcache status``, ``lmcache ls`` and ``lmcache purge``: what operators ask a running server.

Knows how to choose a server and namespaces, and how to print. What is asked on the wire is
`inventory`'s business.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import re
import sys
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from lmcache_backend_lm import inventory
from lmcache_backend_lm.config import SCHEMES, LmConfig, config_from_url, read_token
from lmcache_backend_lm.inventory import PAGE, Purged, Stock
from lmcache_backend_lm.protocol import Op
from lmcache_core import BackendRejected, ConfigError, Plugins, load_config, text_table

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace, _SubParsersAction

    from lmcache_backend_lm.connection import Connection

logger = logging.getLogger(__name__)
_T = TypeVar("_T")
_NO_SPACE = "0" * 16
"""The connection's own namespace, of which nothing is asked."""
_LEAST_DIGITS = 4
"""So many of a fingerprint's or a model's first digits may stand for all."""
_MOST_SPACES = 1 << 17
"""A server that lists more is mistaken."""
_NUMBER = re.compile(r"[0-9]{1,20}")
_MIB = 1 << 20

_STATUS_EXAMPLES = """\
examples:
  lmcache status                              the server of remote_url
  lmcache status lm://cache:65432 --json
  lmcache status lm+tls://cache:65432 --token-file /etc/lmcache/token --ca-file ca.pem
"""
_LS_EXAMPLES = """\
examples:
  lmcache ls
  lmcache ls lm+unix:///run/lmcache/server.sock --json
  lmcache ls --model meta-llama/Llama-3.1-8B

A namespace is a model, one rank's heads and layers, and a way of writing chunks. The model is shown
as its clients called it last; a namespace that none of them opened since the start of a server
without a disk tier is of an unknown one. Bytes of files are those that were noted last.
"""
_PURGE_EXAMPLES = """\
examples:
  lmcache purge --model meta-llama/Llama-3.1-8B
  lmcache purge --namespace 0f3a --yes
  lmcache purge lm://cache:65432 --all

Clients go on: what they ask for is a miss, and what they store afterwards stays.
"""


def add(subcommands: _SubParsersAction[ArgumentParser]) -> None:
    """Add the subcommands."""
    for name, run, summary, examples in (
        ("status", _status, "what an lmcache_server holds and does", _STATUS_EXAMPLES),
        ("ls", _ls, "the namespaces of an lmcache_server, by model", _LS_EXAMPLES),
        ("purge", _purge, "delete namespaces of an lmcache_server", _PURGE_EXAMPLES),
    ):
        parser = subcommands.add_parser(
            name,
            help=summary,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_server(parser)
        if name != "status":
            _add_choice(parser)
        if name == "purge":
            parser.add_argument("--all", action="store_true", help="every namespace")
            parser.add_argument("--yes", action="store_true", help="don't ask")
        parser.add_argument("--json", action="store_true", help="print JSON")
        parser.set_defaults(run=run)


def _add_server(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "address",
        nargs="?",
        help="lm://HOST[:PORT], lm+tls://… or lm+unix:///PATH (default: the configuration's)",
    )
    add("--file", metavar="PATH", help="configuration instead of LMCACHE_CONFIG_FILE")
    add("--token-file", type=Path, metavar="FILE", help="file whose content the server asks for")
    add("--ca-file", type=Path, metavar="PEM", help="certificates that may sign the server's")
    add(
        "--timeout",
        type=_seconds,
        default=60.0,
        metavar="SECONDS",
        help="how long to wait for each answer (default: 60)",
    )


def _add_choice(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--model", help="only those of this model: as it is called, or the start of its identity"
    )
    parser.add_argument("--namespace", metavar="HEX", help="only this one; its start is enough")


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: must be more than 0")
    return number


# -- the commands ------------------------------------------------------------------------------


def _status(args: Namespace) -> int:
    config = _server(args)
    facts = asyncio.run(_asked(config, lambda server: server.status()))
    shown = {name.removeprefix("server_"): value for name, value in facts.items()}
    if args.json:
        typed = {name: int(one) if _NUMBER.fullmatch(one) else one for name, one in shown.items()}
        print(json.dumps({"address": config.address, **typed}, indent=2))
    else:
        rows = [("address", config.address), *shown.items()]
        print(text_table(("WHAT", "VALUE"), rows))
    return 0


def _ls(args: Namespace) -> int:
    config = _server(args)
    stocks = _chosen(args, asyncio.run(_asked(config, lambda server: server.stocks())))
    if args.json:
        print(json.dumps({"address": config.address, "namespaces": list(map(_facts, stocks))}))
    else:
        print(_table(stocks))
    return 0


def _purge(args: Namespace) -> int:
    """Delete what was chosen, after a question.

    Raises:
        ConfigError: nothing was chosen, or nobody is there to be asked.
    """
    if not (args.model or args.namespace or args.all):
        raise ConfigError("purge: say what: --model, --namespace or --all")
    if args.all and (args.model or args.namespace):
        raise ConfigError("purge: --all has no effect beside --model or --namespace; leave it out")
    config = _server(args)
    stocks = _chosen(args, asyncio.run(_asked(config, lambda server: server.stocks())))
    if not stocks and (args.model or args.namespace):
        raise ConfigError(f"purge: {config.address} has no such namespace; lmcache ls lists them")
    if stocks and not args.yes:
        print(_table(stocks), file=sys.stderr)
        if not _confirmed(f"Delete {_counted(len(stocks), 'namespace')} of {config.address}?"):
            print("nothing was deleted", file=sys.stderr)
            return 1
    spaces = [one.space for one in stocks]
    gone = asyncio.run(_asked(config, lambda server: server.purge(spaces)))
    if args.json:
        rows = [{"namespace": space, **_purged_facts(one)} for space, one in gone.items()]
        print(json.dumps({"address": config.address, "purged": rows}, indent=2))
        return 0
    for space, one in gone.items():
        print(f"{space}: {_purged_text(one)}")
    if not gone:
        print("there was nothing to delete")
    elif len(gone) > 1:
        print(f"{_counted(len(gone), 'namespace')}: {_purged_text(_sum(gone.values()))}")
    return 0


def _confirmed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise ConfigError("purge: nobody is there to be asked; say --yes")
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


# -- choosing ----------------------------------------------------------------------------------


def _server(args: Namespace) -> LmConfig:
    """The server that was named, or the first one of the configuration.

    Raises:
        ConfigError: there is none, or its options are wrong.
    """
    if args.address is not None and args.file is not None:
        raise ConfigError(f"--file {args.file} has no effect beside an address; leave one out")
    config = _configured(args.file) if args.address is None else None
    given: dict[str, Any] = {} if config is None else config.model_dump(exclude_unset=True)
    try:
        if args.address is not None:
            scheme = args.address.partition("://")[0].lower()
            if scheme not in SCHEMES:
                known = ", ".join(f"{one}://" for one in SCHEMES)
                raise ValueError(f"it isn't the address of an lmcache_server: {known}")
            given = config_from_url(args.address)
        if args.token_file is not None:
            given = {**given, "token": None, "token_file": args.token_file}
        if args.ca_file is not None:
            given["ca_file"] = args.ca_file
        # Nothing is read by itself, so no memory is shared.
        return LmConfig.model_validate(
            {**given, "same_host": False, "stall_timeout_s": args.timeout}
        )
    except ValidationError as error:
        said = "; ".join(one["msg"].removeprefix("Value error, ") for one in error.errors())
        raise ConfigError(f"{args.address or 'the configuration'}: {said}") from error
    except ValueError as error:
        raise ConfigError(f"{args.address}: {error}") from error


def _configured(file: str | None) -> LmConfig:
    config = load_config(Plugins(), file=file)
    for section in config.backends:
        if isinstance(section.options, LmConfig):
            return section.options
    raise ConfigError(
        "no address was given, and the configuration has no lm:// store: write lm://HOST:PORT, or "
        "set remote_url"
    )


def _chosen(args: Namespace, stocks: Sequence[Stock]) -> list[Stock]:
    """Those that ``--model`` and ``--namespace`` name."""
    found = list(stocks)
    if args.namespace:
        start = args.namespace.lower()
        if len(start) < _LEAST_DIGITS:
            raise ConfigError(
                f"--namespace {args.namespace}: give at least {_LEAST_DIGITS} of its digits"
            )
        found = [one for one in found if one.space.startswith(start)]
        if len(found) > 1:
            raise ConfigError(
                f"--namespace {args.namespace}: {len(found)} namespaces start so; give more digits"
            )
    if args.model:
        found = [one for one in found if _is_of(one, args.model)]
    return found


def _is_of(stock: Stock, model: str) -> bool:
    called, identity, _ = _said(stock)
    starts = len(model) >= 2 * _LEAST_DIGITS and identity.startswith(model)
    return bool(called) and (model in (called, identity) or starts)


def _said(stock: Stock) -> tuple[str, str, str]:
    called, identity, written, *_ = [*stock.description.split("\n"), "", "", ""]
    return called, identity, written


# -- printing ----------------------------------------------------------------------------------


def _table(stocks: Sequence[Stock]) -> str:
    rows = []
    for one in stocks:
        called, _, written = _said(one)
        memory = f"{one.values}, {one.nbytes / _MIB:.1f} MiB"
        files = f"{one.disk_bytes / _MIB:.1f} MiB"
        rows.append((one.space, memory, files, called or "unknown", written))
    return text_table(("NAMESPACE", "CHUNKS IN MEMORY", "IN FILES", "MODEL", "WRITTEN AS"), rows)


def _facts(stock: Stock) -> dict[str, object]:
    called, identity, written = _said(stock)
    return {
        "namespace": stock.space,
        "model": called or None,
        "identity": identity or None,
        "written_as": written or None,
        "memory_chunks": stock.values,
        "memory_bytes": stock.nbytes,
        "disk_bytes": stock.disk_bytes,
    }


def _purged_facts(what: Purged) -> dict[str, int]:
    return {
        "memory_chunks": what.values,
        "memory_bytes": what.nbytes,
        "disk_chunks": what.files,
        "disk_bytes": what.file_bytes,
    }


def _purged_text(what: Purged) -> str:
    return (
        f"{_counted(what.values, 'chunk')}, {what.nbytes} bytes, went from memory; "
        f"{_counted(what.files, 'chunk')}, {what.file_bytes} bytes, from disk"
    )


def _sum(parts: Iterable[Purged]) -> Purged:
    values, nbytes, files, file_bytes, _ = zip(*parts, strict=True)
    return Purged(sum(values), sum(nbytes), sum(files), sum(file_bytes), more=False)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


# -- asking ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Server:
    """A server that is asked, over one connection. Raises `BackendError` where that fails."""

    connection: Connection

    async def status(self) -> dict[str, str]:
        parse, limit = inventory.parse_status, inventory.MAX_STATUS_BYTES
        return await self._ask(Op.STATUS, b"", parse, limit)

    async def stocks(self) -> list[Stock]:
        """All namespaces that hold anything."""
        found: list[Stock] = []
        while True:
            last = found[-1].space if found else ""
            more = await self._ask(
                Op.LIST, inventory.after(last), inventory.parse_page, inventory.MAX_PAGE_BYTES
            )
            if more and more[0].space <= last:
                raise BackendRejected("the server lists namespaces again; it must be mistaken")
            found += more
            if len(found) > _MOST_SPACES:
                raise BackendRejected(f"the server lists more than {_MOST_SPACES} namespaces")
            if len(more) < PAGE:
                return found

    async def purge(self, spaces: Sequence[str]) -> dict[str, Purged]:
        """What went of each; requests go on until nothing is left."""
        gone: dict[str, Purged] = {}
        for space in spaces:
            parts: list[Purged] = []
            more = True
            while more:
                one: Purged = await self._ask(
                    Op.PURGE, space.encode(), inventory.parse_purged, inventory.PURGED_BYTES
                )
                parts.append(one)
                more = one.more and bool(one.values or one.files)
            gone[space] = _sum(parts)
        return gone

    async def _ask(self, op: Op, meta: bytes, parse: Callable[[memoryview], _T], limit: int) -> _T:
        from lmcache_backend_lm.call import Call

        found: _T = await self.connection.call(Call(op, 0, meta, parse, limit))
        return found


async def _asked(config: LmConfig, ask: Callable[[_Server], Awaitable[_T]]) -> _T:
    """What the server answers, to whom it is connected for that only."""
    from lmcache_backend_lm.connection import Connection

    token = read_token(config.token, config.token_file)
    connection = Connection(config, _NO_SPACE, token, "lmcache", None, logger.warning)
    try:
        return await ask(_Server(connection))
    finally:
        await connection.close()
