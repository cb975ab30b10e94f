"""What a server has from files: its token, that of its metrics, its certificate.

They are read at the start, and again when the operator says so: connections that are open stay as
they are. Knows files. Knows nothing about who is asked for what.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lmcache_backend_lm.config import read_token
from lmcache_core import ConfigError, LMCacheError, remark_if_public, server_context

logger = logging.getLogger(__name__)
_T = TypeVar("_T")


class Credentials:
    """Those in effect now. ``token_file=None``: the token is in the environment, if there is one.

    Raises:
        ConfigError, BackendRejected: a file can't be read, or isn't what it should be.
    """

    def __init__(
        self,
        *,
        token_file: Path | None = None,
        metrics_token_file: Path | None = None,
        tls_cert: Path | None = None,
        tls_key: Path | None = None,
    ) -> None:
        self._files = {"--token-file": token_file, "--metrics-token-file": metrics_token_file}
        self._cert, self._key = tls_cert, tls_key
        self.token = read_token(None, token_file)
        self.metrics_token = b""
        if metrics_token_file is not None:
            self.metrics_token = read_token(None, metrics_token_file)
        self.tls = None if tls_cert is None else self._context(tls_cert)
        self._remark()

    def reload(self) -> bool:
        """Read the files again; of what can't be read the old stays, and a line says so.

        Answers whether all of it could be.
        """
        token_file, metrics_file = self._files.values()
        failed: list[str] = []

        def again(read: Callable[[], _T], old: _T) -> _T:
            try:
                return read()
            except LMCacheError as error:
                failed.append(f"{error}")
                return old

        if token_file is not None:
            self.token = again(lambda: read_token(None, token_file), self.token)
        if metrics_file is not None:
            self.metrics_token = again(lambda: read_token(None, metrics_file), self.metrics_token)
        cert = self._cert
        if cert is not None:
            self.tls = again(lambda: self._context(cert), self.tls)
        for problem in failed:
            logger.error("SIGHUP: %s; what was read before stays in effect", problem)
        read = [name for name, file in self._files.items() if file is not None]
        read += ["--tls-cert"] if cert is not None else []
        if not failed:
            self._remark()
            what = ", ".join(read) or "nothing: neither a token nor a certificate is in a file"
            logger.info("SIGHUP: read again: %s", what)
        return not failed

    def _context(self, cert: Path) -> ssl.SSLContext:
        try:
            return server_context(cert, self._key)
        except OSError as error:
            raise ConfigError(f"--tls-cert {cert}, --tls-key {self._key}: {error}") from error

    def _remark(self) -> None:
        for name, file in self._files.items():
            if file is not None:
                remark_if_public(file, name)
