"""``/metrics`` in Prometheus' text format and ``/health``, on a port of their own.

Knows HTTP and counters; nothing about what they count.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from lmcache_core.errors import ConfigError
from lmcache_core.metrics import PREFIX, Counters, render_prometheus

logger = logging.getLogger(__name__)


class MetricsServer:
    """Serves on threads of its own, so that it answers while clients keep the others busy.

    Raises:
        ConfigError: the port can't be had.
    """

    def __init__(
        self, host: str, port: int, counters: Counters, totals: Callable[[], Mapping[str, int]]
    ) -> None:
        class Handler(BaseHTTPRequestHandler):
            timeout = 5.0  # a client that says nothing holds a thread for so long at most

            def do_GET(self) -> None:
                if self.path == "/metrics":
                    gauges = "".join(
                        f"# TYPE {PREFIX}{name} gauge\n{PREFIX}{name} {value}\n"
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
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                logger.debug(format, *args)

        try:
            self._server = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise ConfigError(f"--metrics-port {port} on {host}: {error.strerror}") from error
        self._server.daemon_threads = True
        bound = self._server.server_address
        self.address = f"{bound[0]!s}:{bound[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="lmcache-server-metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(2.0)
