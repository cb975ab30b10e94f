"""Another host on this machine: a network namespace behind a cable that can be cut and slowed down.

Needs root and iproute2. Linux only.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

ADDRESS, OUR_ADDRESS = "10.231.7.2", "10.231.7.1"


class Host:
    """The other host, at `ADDRESS`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._ours, self._theirs = f"{name}a", f"{name}b"
        self._started: list[subprocess.Popen[bytes]] = []

    def connect(self) -> None:
        """Make the namespace and the cable."""
        _ip("netns", "add", self.name)
        _ip("link", "add", self._ours, "type", "veth", "peer", "name", self._theirs)
        _ip("link", "set", self._theirs, "netns", self.name)
        _ip("addr", "add", f"{OUR_ADDRESS}/30", "dev", self._ours)
        _ip("link", "set", self._ours, "up")
        self._inside("ip", "addr", "add", f"{ADDRESS}/30", "dev", self._theirs)
        self.mend()
        self._inside("ip", "link", "set", "lo", "up")

    def start(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Run a program there."""
        with log.open("ab") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command], stdout=output, stderr=output
            )
        self._started.append(process)
        return process

    def cut(self) -> None:
        """From now on packets vanish in both directions, and nobody is told."""
        self._inside("ip", "link", "set", self._theirs, "down")

    def mend(self) -> None:
        """Undo `cut`."""
        self._inside("ip", "link", "set", self._theirs, "up")

    def slow_down(self, rate: str) -> None:
        """Let at most ``rate``, such as ``1gbit``, through in each direction."""
        shape = ["root", "tbf", "rate", rate, "burst", "256kb", "latency", "50ms"]
        _run(["tc", "qdisc", "replace", "dev", self._ours, *shape])
        self._inside("tc", "qdisc", "replace", "dev", self._theirs, *shape)

    def received_bytes(self) -> int:
        """What came to us from there so far."""
        return int(Path(f"/sys/class/net/{self._ours}/statistics/rx_bytes").read_text())

    def sent_bytes(self) -> int:
        """What we sent there so far."""
        return int(Path(f"/sys/class/net/{self._ours}/statistics/tx_bytes").read_text())

    def remove(self) -> None:
        """End what runs there, and take all of it down."""
        for process in self._started:
            process.kill()
            process.wait()
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("netns", "del", self.name)
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "del", self._ours)

    def _inside(self, *command: str) -> None:
        _run(["ip", "netns", "exec", self.name, *command])


def why_not() -> str | None:
    """Why there can't be another host here; ``None``: there can."""
    if shutil.which("ip") is None:
        return "there is no ip command; run: apt-get install -y iproute2"
    return None if os.geteuid() == 0 else "network namespaces need root"


@contextlib.contextmanager
def another_host() -> Iterator[Host]:
    """For the length of the block."""
    host = Host(f"lmc{secrets.token_hex(3)}")
    try:
        host.connect()
        yield host
    finally:
        host.remove()


def _ip(*arguments: str) -> None:
    _run(["ip", *arguments])


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)
