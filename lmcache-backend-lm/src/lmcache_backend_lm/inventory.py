"""What operators ask a server for, and what it says: the meta of DESCRIBE, LIST, STATUS and PURGE.

Knows their bytes and bounds, which `protocol` describes along with everything else. Knows nothing
about who asks, nor about what a server holds.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lmcache_backend_lm.protocol import ProtocolError, parse_space
from lmcache_core import CacheNamespace

PAGE = 128
"""Namespaces in one answer to LIST, at the most; one with fewer is the last."""
MAX_DESCRIPTION_BYTES = 512
MAX_STATUS_BYTES = 16 << 10
PURGE_FILES = 4096
"""One PURGE removes no more files; it is asked for again until nothing is left."""
_BEFORE_ALL = bytes(16)
_COUNT = struct.Struct("<H")
_STOCK = struct.Struct("<16sQQQH")
_PURGED = struct.Struct("<QQQQB")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_LINES = 3

MAX_PAGE_BYTES = _COUNT.size + PAGE * (_STOCK.size + MAX_DESCRIPTION_BYTES)
PURGED_BYTES = _PURGED.size


class Stock(NamedTuple):
    """What a server holds of one namespace."""

    space: str
    values: int
    """In memory."""
    nbytes: int
    """Of those."""
    disk_bytes: int
    """Of its files, as far as was noted."""
    description: str
    """See `description_of`; empty: nobody said."""


class Purged(NamedTuple):
    """What one PURGE removed."""

    values: int
    nbytes: int
    files: int
    file_bytes: int
    more: bool
    """Whether files may be left."""


# -- what a namespace is of --------------------------------------------------------------------


def description_of(namespace: CacheNamespace) -> str:
    """For people: what the model is called, what identifies it, and how chunks are written."""
    lines = (
        namespace.label or namespace.model,
        namespace.model,
        f"{namespace.layout.tokens_per_chunk} tokens a chunk, {namespace.place}",
    )
    clean = ("".join(one if one.isprintable() else "?" for one in line[:160]) for line in lines)
    text = "\n".join(clean).encode("utf-8", "replace")[:MAX_DESCRIPTION_BYTES]
    return text.decode("utf-8", "ignore")


def parse_description(data: memoryview) -> str:
    """What `description_of` made.

    Raises:
        ProtocolError: it is too long, or no text.
    """
    if len(data) > MAX_DESCRIPTION_BYTES:
        raise ProtocolError(
            f"{len(data)} bytes describe a namespace; at most {MAX_DESCRIPTION_BYTES} are allowed"
        )
    try:
        text = bytes(data).decode()
    except UnicodeDecodeError:
        raise ProtocolError("a description of a namespace isn't UTF-8") from None
    lines = text.split("\n")
    if len(lines) > _LINES or not all(map(str.isprintable, lines)):
        raise ProtocolError(f"a description of a namespace has {_LINES} lines of text at the most")
    return text


# -- LIST --------------------------------------------------------------------------------------


def after(space: str) -> bytes:
    """Ask for the namespaces behind ``space``; empty: for the first ones."""
    return space.encode("ascii") or _BEFORE_ALL


def parse_after(data: memoryview) -> str:
    """What `after` made.

    Raises:
        ProtocolError: it isn't a namespace.
    """
    return "" if data == _BEFORE_ALL else parse_space(data)


def page(stocks: Sequence[Stock]) -> bytes:
    """The answer to LIST."""
    parts = [_COUNT.pack(len(stocks))]
    for one in stocks:
        text = one.description.encode()
        space = one.space.encode("ascii")
        parts += [_STOCK.pack(space, one.values, one.nbytes, one.disk_bytes, len(text)), text]
    return b"".join(parts)


def parse_page(data: memoryview) -> list[Stock]:
    """What `page` made.

    Raises:
        ProtocolError: it is something else; or namespaces aren't in order, so that asking for what
            comes behind the last one might never end.
    """
    if len(data) < _COUNT.size:
        raise ProtocolError(f"{len(data)} bytes are too few for a list of namespaces")
    (count,) = _COUNT.unpack_from(data)
    if count > PAGE:
        raise ProtocolError(f"{count} namespaces in a list; at most {PAGE} are allowed")
    found: list[Stock] = []
    at = _COUNT.size
    for _ in range(count):
        if len(data) < at + _STOCK.size:
            raise ProtocolError(f"{count} namespaces don't fit into {len(data)} bytes")
        name, values, nbytes, disk_bytes, length = _STOCK.unpack_from(data, at)
        at += _STOCK.size
        if len(data) < at + length:
            raise ProtocolError(f"{count} namespaces don't fit into {len(data)} bytes")
        space = parse_space(memoryview(name))
        if found and space <= found[-1].space:
            raise ProtocolError(f"namespace {space} comes after {found[-1].space}")
        text = parse_description(data[at : at + length])
        found.append(Stock(space, values, nbytes, disk_bytes, text))
        at += length
    if at != len(data):
        raise ProtocolError(f"{len(data) - at} bytes too many after the last namespace")
    return found


# -- STATUS ------------------------------------------------------------------------------------


def status(facts: Mapping[str, int | str]) -> bytes:
    """The answer to STATUS: a line ``NAME VALUE`` for each of ``facts``."""
    return "".join(f"{name} {value}\n" for name, value in facts.items()).encode()


def parse_status(data: memoryview) -> dict[str, str]:
    """What `status` made.

    Raises:
        ProtocolError: it is too long, or something else.
    """
    if len(data) > MAX_STATUS_BYTES:
        raise ProtocolError(f"a status of {len(data)} bytes")
    try:
        lines = bytes(data).decode().splitlines()
    except UnicodeDecodeError:
        raise ProtocolError("a status isn't UTF-8") from None
    found: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(" ")
        if not _NAME.fullmatch(name) or not value or not value.isprintable():
            raise ProtocolError(f"{line[:80]!r} is no line of a status")
        found[name] = value
    return found


# -- PURGE -------------------------------------------------------------------------------------


def purged(what: Purged) -> bytes:
    """The answer to PURGE."""
    return _PURGED.pack(*what)


def parse_purged(data: memoryview) -> Purged:
    """What `purged` made.

    Raises:
        ProtocolError: it is longer or shorter.
    """
    if len(data) != _PURGED.size:
        raise ProtocolError(f"{len(data)} bytes don't say what was purged")
    values, nbytes, files, file_bytes, more = _PURGED.unpack(data)
    return Purged(values, nbytes, files, file_bytes, bool(more))
