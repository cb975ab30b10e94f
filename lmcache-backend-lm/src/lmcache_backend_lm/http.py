"""``/metrics`` in Prometheus' text format and ``/health``, on a port of their own.

Knows HTTP, who may ask, and counters; nothing about what they count.
"""

from __future__ import annotations

import hmac
import json
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from lmcache_core import METRIC_PREFIX, ConfigError, Counters, render_prometheus

logger = logging.getLogger(__name__)


_MAX_REQUESTS = 16
"""At the same time; more are turned away."""


class MetricsServer:
    """Serves on threads of its own, so that it answers while clients keep the others busy.

    With a ``token``, which may change, numbers are for requests with ``Authorization: Bearer
    TOKEN``, and others learn from ``/health`` that it is up. With ``tls``, it is HTTPS.

    Raises:
        ConfigError: the port can't be had.
    """

    def __init__(
        self,
        host: str,
        port: int,
        counters: Counters,
        totals: Callable[[], Mapping[str, int]],
        *,
        token: Callable[[], bytes] = bytes,
        tls: Callable[[], ssl.SSLContext | None] | None = None,
    ) -> None:
        class Handler(BaseHTTPRequestHandler):
            timeout = 5.0  # a client that says nothing holds a thread for so long at most

            def do_GET(self) -> None:
                said = self.headers.get("Authorization", "").encode("latin-1", "replace")
                if (needed := token()) and not hmac.compare_digest(said, b"Bearer " + needed):
                    if self.path == "/health":
                        self._reply(200, "application/json", json.dumps({"status": "ok"}))
                    else:
                        self._reply(401, "text/plain", "Authorization: Bearer TOKEN is needed\n")
                elif self.path == "/metrics":
                    gauges = "".join(
                        f"# TYPE {METRIC_PREFIX}{name} gauge\n{METRIC_PREFIX}{name} {value}\n"
                        for name, value in totals().items()
                    )
                    text = render_prometheus(counters.snapshot()) + gauges
                    self._reply(200, "text/plain; version=0.0.4; charset=utf-8", text)
                elif self.path == "/health":
                    self._reply(200, "application/json", json.dumps({"status": "ok", **totals()}))
                else:
                    self._reply(404, "text/plain", "there are /metrics and /health\n")

            def _reply(self, status: int, kind: str, text: str) -> None:
                data = text.encode()
                self.send_response(status)
                if status == 401:
                    self.send_header("WWW-Authenticate", "Bearer")
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                logger.debug(format, *args)

        try:
            self._server = _Server((host, port), Handler, tls)
        except OSError as error:
            raise ConfigError(f"--metrics-port {port} on {host}: {error.strerror}") from error
        bound = self._server.server_address
        scheme = "http" if tls is None else "https"
        self.url = f"{scheme}://{bound[0]!s}:{bound[1]}/metrics"
        self.host = str(bound[0])
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="lmcache-server-metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(2.0)


class _Server(ThreadingHTTPServer):
    """Bounded, and quiet about what strangers do."""

    daemon_threads = True

    def __init__(
        self,
        address: tuple[str, int],
        handler: type[BaseHTTPRequestHandler],
        tls: Callable[[], ssl.SSLContext | None] | None,
    ) -> None:
        self._tls = tls
        self._places = threading.BoundedSemaphore(_MAX_REQUESTS)
        super().__init__(address, handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        sock, peer = super().get_request()
        context = None if self._tls is None else self._tls()
        if context is not None:  # its greeting is the request's thread's business
            sock = context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        return sock, peer

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        logger.debug("a request for metrics from %s ended badly", client_address, exc_info=True)
