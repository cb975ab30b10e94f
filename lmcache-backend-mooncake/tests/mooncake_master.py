"""A real Mooncake master and what belongs to it, on free loopback ports, stopped by process."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.request import urlopen

from system_packages import need

from lmcache_backend_mooncake.config import MooncakeConfig
from lmcache_core.testing.ports import free_port

MIB = 1 << 20
PATIENCE_S = 20.0


def need_libraries() -> None:
    """The wheel's own parts load these."""
    need("libibverbs.so.1", "libnuma.so.1", "libcurl.so.4")


def binary() -> str:
    """The master of the installed wheel."""
    need_libraries()
    spec = importlib.util.find_spec("mooncake")
    assert spec is not None, "pip install mooncake-transfer-engine-non-cuda"
    assert spec.submodule_search_locations is not None
    return str(Path(spec.submodule_search_locations[0]) / "mooncake_master")


class Master:
    """A master with its HTTP metadata server; a context manager that kills it.

    ``ports``: its own, the metadata server's and that of its metrics; free ones if not said.
    """

    def __init__(self, *flags: str, ports: Sequence[int] = ()) -> None:
        self.port, self.metadata_port, self.metrics_port = ports or [free_port() for _ in range(3)]
        self._flags = flags
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def metadata(self) -> str:
        return f"http://127.0.0.1:{self.metadata_port}/metadata"

    def options(self, **changed: Any) -> dict[str, Any]:
        """What a section for this master says; small, so that many fit."""
        return {
            "master_server_address": self.address,
            "metadata_server": self.metadata,
            "local_hostname": "localhost",
            "global_segment_size": 128 * MIB,
            "transfer_timeout": 1,
            "master_timeout_s": 1,
            **changed,
        }

    def config(self, **changed: Any) -> MooncakeConfig:
        return MooncakeConfig.model_validate(self.options(**changed))

    def start(self) -> None:
        command = [
            binary(),
            "--rpc_address=127.0.0.1",
            f"--rpc_port={self.port}",
            "--enable_http_metadata_server=1",
            "--http_metadata_server_host=127.0.0.1",
            f"--http_metadata_server_port={self.metadata_port}",
            "--metrics_host=127.0.0.1",
            f"--metrics_port={self.metrics_port}",
            *self._flags,
        ]
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        await_port(self.port)
        await_port(self.metadata_port)
        await_port(self.metrics_port)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def keys(self) -> int:
        """How many objects it knows."""
        with urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        return next(int(float(s.split()[1])) for s in lines if s.startswith("master_key_count"))

    def pause(self) -> None:
        assert self._process is not None
        pause(self._process)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Master:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()


class Holder:
    """A client in a process of its own that gives the cluster memory."""

    _CODE = """
import sys
from mooncake.store import MooncakeDistributedStore
hostname, metadata, nbytes, master = sys.argv[1:]
store = MooncakeDistributedStore()
assert store.setup(hostname, metadata, int(nbytes), 0, "tcp", "", master) == 0
print("ready", flush=True)
for line in sys.stdin:
    print(store.remove_all(True), flush=True)
"""

    def __init__(self, master: Master, nbytes: int, metadata: str | None = None) -> None:
        arguments = ["127.0.0.1", metadata or master.metadata, str(nbytes), master.address]
        self._process = subprocess.Popen(
            [sys.executable, "-c", self._CODE, *arguments],
            env={**os.environ, "MC_TCP_BIND_ADDRESS": "127.0.0.1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._line() == "ready"

    def forget_everything(self) -> None:
        """Empty the cluster."""
        assert self._process.stdin is not None
        self._process.stdin.write("all\n")
        self._process.stdin.flush()
        assert int(self._line()) >= 0

    def pause(self) -> None:
        pause(self._process)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@dataclass(frozen=True)
class Cluster:
    """A master, and somebody who gives memory: ours needn't, which makes their end quicker."""

    config: MooncakeConfig
    holder: Holder

    @classmethod
    def running(cls, metadata: str | None) -> Iterator[Cluster]:
        with Master() as master:
            holder = Holder(master, 96 * MIB, metadata)
            options = {"metadata_server": metadata} if metadata else {}
            yield cls(master.config(global_segment_size=0, **options), holder)
            holder.kill()


class MetadataServer:
    """Mooncake's metadata server in a process of its own, without the master."""

    def __init__(self) -> None:
        self.port = free_port()
        module = "mooncake.http_metadata_server"
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, "--host", "127.0.0.1", "--port", str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        await_port(self.port)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/metadata"

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def pause(process: subprocess.Popen[Any]) -> None:
    """Stop a process, all threads of it, before this returns: a signal alone is only on its way."""
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


def await_port(port: int) -> None:
    """Until somebody listens there."""
    until = time.monotonic() + PATIENCE_S
    while not listens(port):
        assert time.monotonic() < until, f"nobody listens at port {port}"
        time.sleep(0.02)


def listens(port: int) -> bool:
    """Whether somebody does."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
