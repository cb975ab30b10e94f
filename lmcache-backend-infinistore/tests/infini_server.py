"""An InfiniStore server that a test starts, kills and starts again; over TCP and an emulated NIC.

Run as a program, it is the real server, but for what a test can't have: it doesn't lower its
``oom_score_adj``, which needs privileges, and its management port is on loopback. One fault of it
is undone (``uv_poll_repair.c``), so that tests see our own.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from lmcache_backend_infinistore.config import InfinistoreConfig
from lmcache_core.testing.ports import free_port

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
DEVICE = "mlx5_1"
PATIENCE_S = 60.0
DYING_S = 10.0
"""What a server that dies takes to write down where."""
INSTALL = "pip install torch==2.13.0; pip install infinistore uvloop==0.21.0"


def emulated_nic(folder: Path) -> Path:
    """The stand-in, compiled.

    Raises:
        Missing: that isn't possible here; says what to install.
    """
    from system_packages import need  # not above: the server below has no path to it

    need("a C compiler", "infiniband/verbs.h", "libibverbs.so.1")
    return _compiled(folder, "emu_ibverbs")


def _compiled(folder: Path, name: str) -> Path:
    compiler = str(shutil.which("cc") or shutil.which("gcc"))
    made = folder / f"lib{name}.so"
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", made, HERE / f"{name}.c"]
    done = subprocess.run(
        [*command, "-lpthread", "-ldl"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{name}.c doesn't compile\n{done.stderr}")
    return made


class Server:
    """One server with a pool of ``gib`` GiB; stopped at the end of ``with``."""

    def __init__(self, nic: Path, gib: int = 1) -> None:
        self._preloads = [nic, _compiled(nic.parent, "uv_poll_repair")]
        self._gib = gib
        self.port, self._manage_port = free_port(), free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed at the end of `with`

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        self._log.close()

    def start(self) -> None:
        """Start it, empty, and wait until it answers."""
        command = [sys.executable, __file__, "--host=127.0.0.1", f"--service-port={self.port}"]
        command += [f"--manage-port={self._manage_port}", f"--prealloc-size={self._gib}"]
        command += ["--link-type=IB", f"--dev-name={DEVICE}", "--log-level=warning"]
        environment = {**os.environ, "LD_PRELOAD": ":".join(map(str, self._preloads))}
        self._process = subprocess.Popen(
            command, env=environment, stdout=self._log, stderr=subprocess.STDOUT
        )
        until = time.monotonic() + PATIENCE_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > until:
                self.kill()
                raise RuntimeError(f"no InfiniStore server runs here: {INSTALL}\n{self.printed()}")
            time.sleep(0.1)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """Let it hang: connections stay, nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        # The signal is only on its way.
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def go_on(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def empty(self) -> None:
        """Forget all keys; a server that has died is started again, and the log says so."""
        assert self._process is not None
        try:
            self._manage("/purge", data=b"")
        except OSError:
            try:
                status = self._process.wait(DYING_S)
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"the server doesn't answer\n{self.printed()}") from None
            logger.warning("the server died (%d) and starts again\n%s", status, self.printed())
            self.start()

    def chunks(self) -> int:
        """How many keys it has, heads and pieces."""
        count: int = self._manage("/kvmap_len")["len"]
        return count

    def config(self, **options: Any) -> InfinistoreConfig:
        """How to reach it."""
        return InfinistoreConfig(url=f"infinistore://127.0.0.1:{self.port}", **options)

    def printed(self) -> str:
        """The end of what it printed."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-2000:]

    def _answers(self) -> bool:
        try:
            self.chunks()
        except OSError:
            return False
        return True

    def _manage(self, path: str, data: bytes | None = None) -> dict[str, Any]:
        address = f"http://127.0.0.1:{self._manage_port}{path}"
        with urllib.request.urlopen(address, data=data, timeout=5.0) as answer:
            found: dict[str, Any] = json.load(answer)
            return found


def main() -> None:
    import infinistore.server as server

    configured = server.uvicorn.Config

    def on_loopback(app: Any, host: str, **options: Any) -> Any:
        return configured(app, host="127.0.0.1", log_level="warning", **options)

    server.prevent_oom = lambda: None
    server.uvicorn.Config = on_loopback
    server.main()


if __name__ == "__main__":
    main()
