"""What TLS means here, whoever listens or connects: version 1.2 or later, and names are checked.

Knows certificates. Knows nothing about who listens, nor about how a mistake is told.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from lmcache_core.secret_file import remark_if_public


def server_context(certificate: Path, key: Path | None) -> ssl.SSLContext:
    """For a listener. ``key`` is in the certificate's file if it is ``None``.

    Raises:
        OSError: a file can't be read, or isn't what it should be (`ssl.SSLError` is one).
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key)
    remark_if_public(key or certificate, "the key in")
    return context


def client_context(ca_file: Path | None) -> ssl.SSLContext:
    """For a connection to somebody whom ``ca_file``, or the system's authorities, vouch for.

    Raises:
        OSError: as above.
    """
    context = ssl.create_default_context(cafile=ca_file)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
