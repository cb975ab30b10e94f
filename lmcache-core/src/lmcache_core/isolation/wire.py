"""What crosses between an engine process and the process of an isolated backend.

Messages are JSON with a length in front, over one stream socket; bytes of chunks never cross it,
only where they lie. Nothing is unpickled, so a client library that went mad can at worst answer
nonsense, and nonsense ends its process.

    request     {"id": 7, "do": "load", "keys": ["0a…"], "places": [[0, 4096, 512]], …}
    answer      {"id": 7, "ok": [512]}  or  {"id": 7, "error": ["unavailable", "no route"]}

Knows encodings. Knows nothing about processes or when to call what.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Final

from pydantic import BaseModel, SecretBytes, SecretStr, TypeAdapter
from pydantic_core import to_jsonable_python

from lmcache_core.chunks.keys import CacheNamespace
from lmcache_core.contracts.storage import BackendContext, HostRegion
from lmcache_core.errors import (
    BackendError,
    BackendRejected,
    BackendTimeout,
    BackendUnavailable,
    ConfigError,
    LMCacheError,
    PluginError,
    PluginLoadError,
    UnknownPluginError,
)
from lmcache_core.plugins.creation import NotCreated

Message = dict[str, Any]
Place = tuple[int, int, int]
"""Where a buffer lies: `ARENA` or `SCRATCH`, first byte, length."""

ARENA: Final = 0
SCRATCH: Final = 1

_LENGTH_BYTES = 4
_SEND_TIMEOUT_S = 60.0
MAX_MESSAGE_BYTES = 64 << 20
"""The keys of a million chunks fit. What claims to be longer isn't a message."""


class Channel(asyncio.Protocol):
    """Both ends of the socket. Lives on one event loop.

    ``on_message`` gets each message; ``on_lost`` is called once, when nothing more will come, with
    what was wrong with the last one, or "".
    """

    def __init__(
        self, on_message: Callable[[Message], object], on_lost: Callable[[str], object]
    ) -> None:
        self._on_message = on_message
        self._on_lost = on_lost
        self._received = bytearray()
        self._transport: asyncio.WriteTransport | None = None
        self._wrong = ""

    def send(self, message: Message) -> None:
        """Queue a message; lost without a word once the other end is gone.

        Raises:
            TypeError, ValueError: it isn't plain data, or too much.
        """
        encoded = _encoded(message)
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encoded)

    def close(self) -> None:
        """Hang up; what was queued may be lost."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not isinstance(transport, asyncio.WriteTransport):
            raise TypeError(f"{transport!r} can't be written to")
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        while not self._wrong and len(self._received) >= _LENGTH_BYTES:
            length = int.from_bytes(self._received[:_LENGTH_BYTES], "little")
            end = _LENGTH_BYTES + length
            if length > MAX_MESSAGE_BYTES:
                self._fail(f"it announced a message of {length} bytes")
            elif len(self._received) < end:
                return
            else:
                body = bytes(self._received[_LENGTH_BYTES:end])
                del self._received[:end]
                self._message(body)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self._on_lost(self._wrong)

    def _message(self, body: bytes) -> None:
        try:
            message = json.loads(body)
        except (ValueError, RecursionError) as error:  # Unicode's are ValueErrors, too
            self._fail(f"it sent what isn't JSON: {error}")
            return
        if isinstance(message, dict):
            self._on_message(message)
        else:
            self._fail(f"it sent {message!r:.80}, not a message")

    def _fail(self, wrong: str) -> None:
        self._wrong = wrong
        self.close()


class Answers:
    """The writing half of the child's end, for all of its threads.

    An answer that its loop had to be woken for first would be later by that. ``on_lost`` is called
    if the other end is gone, or doesn't read: after a part of a message nothing may follow.
    """

    def __init__(self, control: socket.socket, on_lost: Callable[[], object]) -> None:
        """``control`` is the child's end, duplicated: the event loop reads from the other one."""
        control.settimeout(_SEND_TIMEOUT_S)
        self._socket = control
        self._on_lost = on_lost
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        """Send a message.

        Raises:
            TypeError, ValueError: it isn't plain data, or too much.
        """
        encoded = _encoded(message)
        with self._lock:
            try:
                self._socket.sendall(encoded)
            except OSError:
                self._on_lost()


def _encoded(message: Message) -> bytes:
    body = json.dumps(message, separators=(",", ":"), allow_nan=False).encode()
    if len(body) > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {len(body)} bytes is too long")
    return len(body).to_bytes(_LENGTH_BYTES, "little") + body


# -- errors --------------------------------------------------------------------------------


class ClientError(LMCacheError):
    """What an isolated backend raised and shouldn't have, such as a ``ValueError``, in words."""


_ERRORS: dict[str, type[Exception]] = {
    # The first that an error is an instance of; builtins as `guard` knows them.
    "unavailable": BackendUnavailable,
    "timeout": BackendTimeout,
    "rejected": BackendRejected,
    "backend": BackendError,
    "config": ConfigError,
    "plugin_load": PluginLoadError,
    "plugin_unknown": UnknownPluginError,
    "plugin": PluginError,
    "late": TimeoutError,
    "connection": ConnectionError,
    "eof": EOFError,
}


def error_to_plain(error: BaseException) -> list[str]:
    """What kind of error it is, and its text."""
    if isinstance(error, NotCreated):
        return ["not_created", *error_to_plain(error.problem)]
    if isinstance(error, asyncio.TimeoutError):  # another class until Python 3.11
        return ["late", str(error)]
    for kind, class_ in _ERRORS.items():
        if isinstance(error, class_):
            return [kind, str(error)]
    return ["other", f"{type(error).__name__}: {error}"]


def error_from_plain(plain: Any) -> Exception:
    """The error that `error_to_plain` described."""
    if not isinstance(plain, list) or len(plain) < 2 or not all(isinstance(p, str) for p in plain):
        return ClientError(f"it sent an error that makes no sense: {plain!r:.80}")
    if plain[0] == "not_created" and plain[1] != "not_created":
        problem = error_from_plain(plain[1:])
        if not isinstance(problem, LMCacheError):
            problem = ClientError(str(problem))
        return NotCreated(problem)
    return _ERRORS.get(plain[0], ClientError)(plain[1])


# -- what a backend is made and opened with ------------------------------------------------

_NAMESPACE = TypeAdapter(CacheNamespace)


def options_to_plain(options: BaseModel) -> dict[str, Any]:
    """Validated options so that validating them again gives the same, secrets in clear.

    Only for the socket, which nobody else can read.
    """
    plain: dict[str, Any] = to_jsonable_python(_revealed(options.model_dump(by_alias=True)))
    return plain


def _revealed(value: Any) -> Any:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, SecretBytes):
        return value.get_secret_value().decode()
    if isinstance(value, Mapping):
        return {key: _revealed(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_revealed(item) for item in value]
    return value


def context_to_plain(context: BackendContext) -> dict[str, Any]:
    """A context without its region, which each process maps by itself."""
    return {
        "name": context.name,
        "namespace": asdict(context.namespace),
        "max_value_bytes": context.max_value_bytes,
        "lookup_only": context.lookup_only,
        "deadline_s": context.deadline_s,
    }


def context_from_plain(plain: dict[str, Any], region: HostRegion | None) -> BackendContext:
    """The context that `context_to_plain` described, with this process's view of the region."""
    return BackendContext(
        plain["name"],
        _NAMESPACE.validate_python(plain["namespace"]),
        region,
        plain["max_value_bytes"],
        lookup_only=plain["lookup_only"],
        deadline_s=plain["deadline_s"],
    )
