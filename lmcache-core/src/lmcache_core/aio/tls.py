"""What TLS means here, whoever listens or connects: version 1.2 or later, and names are checked.

Knows certificates. Knows nothing about who listens, nor about how a mistake is told.
"""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

from lmcache_core.aio.secret_file import remark_if_public


def server_context(certificate: Path, key: Path | None) -> ssl.SSLContext:
    """For a listener. ``key`` is in the certificate's file if it is ``None``.

    Raises:
        OSError: a file can't be read, or isn't what it should be (`ssl.SSLError` is one).
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key, _no_pass_phrase)
    remark_if_public(key or certificate, "the key in")
    return context


def _no_pass_phrase() -> str:
    raise OSError("the key has a pass phrase, which nobody would be there to type; use one without")


def client_context(ca_file: Path | None) -> ssl.SSLContext:
    """For a connection to somebody whom ``ca_file``, or the system's authorities, vouch for.

    Raises:
        OSError: as above.
    """
    context = ssl.create_default_context(cafile=ca_file)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def binding_of(sock: socket.socket) -> bytes:
    """What no other connection has in common with this one, as far as there is such a thing.

    With TLS it is a secret of this one's handshake, so that a proof can't be passed on over
    another. Without, it is the kind of socket: who sits between can pass everything on.

    Raises:
        OSError: TLS doesn't say.
    """
    if isinstance(sock, ssl.SSLSocket):
        unique = sock.get_channel_binding("tls-unique")
        if unique is None:
            raise OSError("TLS has no channel binding to prove the token over")
        return b"tls" + unique
    return b"unix" if sock.family == socket.AF_UNIX else b"tcp"
