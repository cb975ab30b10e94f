"""Streams own their socket from the beginning: none is left where one can't be made."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

import pytest

from lmcache_core.aio import stream
from lmcache_core.aio.stream import PlainStream, TlsStream, dial, dial_unix


class Reluctant(socket.socket):
    """Takes no options, as one whose other end has gone may not."""

    def setsockopt(self, *_: object) -> None:
        raise OSError(22, "Invalid argument")


def test_a_socket_without_another_end_is_closed() -> None:
    sock = socket.socket()
    with pytest.raises(OSError, match="not connected"):
        PlainStream(sock)
    assert sock.fileno() == -1


def test_a_socket_that_takes_no_options_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    sock = Reluctant()
    monkeypatch.setattr(stream.socket, "create_connection", lambda *_: sock)
    with pytest.raises(OSError, match="Invalid argument"):
        dial("127.0.0.1", 1, 1.0)
    assert sock.fileno() == -1


def test_a_socket_that_nobody_encrypts_is_closed() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with pytest.raises(OSError):
        TlsStream(ours, ssl.create_default_context(), "localhost", 1.0)
    assert ours.fileno() == -1


def test_a_path_where_nobody_listens_leaves_no_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[socket.socket] = []

    class Kept(socket.socket):
        def __init__(self, *kind: int) -> None:
            super().__init__(*kind)
            made.append(self)

    monkeypatch.setattr(stream.socket, "socket", Kept)
    with pytest.raises(FileNotFoundError):
        dial_unix(tmp_path / "nobody", 1.0)
    assert [sock.fileno() for sock in made] == [-1]
