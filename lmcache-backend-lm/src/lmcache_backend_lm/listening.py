"""The sockets that a server listens on: TCP on every address of a name, and a Unix socket.

Knows addresses, and who may reach what. Knows nothing about who connects.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
from pathlib import Path

from lmcache_core import ConfigError

logger = logging.getLogger(__name__)

_BACKLOG = 1024


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets on all addresses of ``host``, and one port; 0: any that is free.

    Raises:
        ConfigError: it isn't this machine's, or others listen there.
    """
    try:
        found = socket.getaddrinfo(
            host or "localhost", port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except socket.gaierror as error:
        raise ConfigError(f"host {host!r}: {error.strerror}; use an address of this machine") from (
            error
        )
    listeners: list[socket.socket] = []
    failed: OSError | None = None
    # IPv4 first, so that where port is 0, the port is free there.
    for family, kind, protocol, _, address in sorted(found, key=lambda one: one[0]):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            chosen = listeners[0].getsockname()[1] if listeners else port
            sock.bind((address[0], chosen, *address[2:]))
            sock.listen(_BACKLOG)
            sock.setblocking(False)
        except OSError as error:
            sock.close()
            failed = error
            continue
        listeners.append(sock)
    if not listeners:
        why = failed.strerror if failed else "it has no address"
        raise ConfigError(f"can't listen on {host}:{port}: {why}")
    return listeners


def unix_path(asked: str, port: int) -> Path | None:
    """Where the Unix socket goes; ``auto``: below a folder that only this user can look into.

    ``None``: there is no such folder, which was logged.
    """
    if asked != "auto":
        return Path(asked).absolute()
    base = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(base, "lmcache") if base else Path(f"/tmp/lmcache-{os.getuid()}")  # noqa: S108
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        facts = folder.lstat()
    except OSError as error:
        logger.warning("no Unix socket: %s: %s", folder, error)
        return None
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        logger.warning("no Unix socket: %s isn't a folder of this user alone", folder)
        return None
    return folder / f"server-{port}.sock"


def listen_unix(path: Path) -> socket.socket:
    """A Unix socket that only this user can connect to, instead of one that nobody listens on.

    Raises:
        OSError: somebody listens there, or the folder isn't ours to write.
    """
    if path.is_socket():
        probe = socket.socket(socket.AF_UNIX)
        try:
            probe.settimeout(1.0)
            probe.connect(str(path))
        except OSError:
            path.unlink()  # a server that was killed left it
        else:
            raise OSError(None, "another server listens there")
        finally:
            probe.close()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        before = os.umask(0o177)
        try:
            sock.bind(str(path))
        finally:
            os.umask(before)
        try:
            sock.listen(_BACKLOG)
            sock.setblocking(False)
        except BaseException:
            path.unlink()
            raise
    except BaseException:
        sock.close()
        raise
    return sock
