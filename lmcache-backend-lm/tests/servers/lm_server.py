"""Starts real servers for tests, in processes of their own, and stops them by their id."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

READY_S = 30.0


class RunningServer:
    """An ``lmcache_server`` on a free loopback port."""

    def __init__(
        self, *options: str, port: int = 0, wrapper: tuple[str, ...] = (), **environment: str
    ) -> None:
        self.lines: list[str] = []
        self._ready = threading.Event()
        code = "from lmcache_backend_lm.command import main; exit(main())"
        command = [sys.executable, "-c", code]
        positional = [] if options and not options[0].startswith("-") else ["localhost", str(port)]
        self.process = subprocess.Popen(
            [*wrapper, *command, *positional, *options],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "LMCACHE_LOG_LEVEL": "INFO", **environment},
        )
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        self._ready.wait(READY_S)
        found = re.search(r"serving (lm(?:\+tls)?)://.*?:(\d+)", self.text)
        if found is None:
            self.stop()
            raise AssertionError("the server didn't start:\n" + self.text)
        self.scheme, self.port = found[1], int(found[2])
        unix = re.search(r"lm\+unix://([^\s,]+)", self.text)
        self.unix = Path(unix[1]) if unix else None
        metrics = re.search(r"https?://\S+/metrics", self.text)
        self.metrics = metrics[0] if metrics else ""

    @property
    def url(self) -> str:
        return f"{self.scheme}://localhost:{self.port}"

    @property
    def text(self) -> str:
        """Everything that it wrote so far."""
        return "".join(self.lines)

    def kill(self) -> None:
        """As a crash ends it."""
        self.process.kill()
        self._wait()

    def stop(self) -> int:
        """As an operator ends it; the answer is its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self._wait()

    def _wait(self) -> int:
        try:
            status = self.process.wait(READY_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self._thread.join(READY_S)
            assert self.process.stderr is not None
            self.process.stderr.close()
        return status

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if "serving lm" in line:
                self._ready.set()
        self._ready.set()


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for localhost that nobody else signed, and its key."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    subprocess.run(
        [*command.split(), "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", cert],
        check=True,
        capture_output=True,
    )
    return cert, key
