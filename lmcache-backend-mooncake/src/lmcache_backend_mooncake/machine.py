"""What this machine has: free memory, an address, RDMA devices.

Knows where Linux says it. Knows nothing about Mooncake.
"""

from __future__ import annotations

import ipaddress
import socket
from contextlib import suppress
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_RDMA = Path("/sys/class/infiniband")


def available_bytes(meminfo: Path = Path("/proc/meminfo"), groups: Path = _GROUPS) -> int | None:
    """Memory that can be had without swapping, also by the bounds of this container.

    ``None``: this system doesn't say.
    """
    found = [_in_container(groups)]
    with suppress(OSError, ValueError):
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    known = [one for one in found if one is not None]
    return min(known) if known else None


def _in_container(groups: Path) -> int | None:
    """What the control group leaves: its limit less what it uses and couldn't drop."""
    for limit, used, stat, dropped in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    ):
        with suppress(OSError, ValueError):
            bound = int((groups / limit).read_text())  # "max" isn't a number: no bound
            facts = dict(line.split() for line in (groups / stat).read_text().splitlines())
            taken = int((groups / used).read_text()) - int(facts.get(dropped, 0))
            return max(0, bound - taken)
    return None


def rdma_devices(folder: Path = _RDMA) -> list[str]:
    """Names of the RDMA devices, such as ``mlx5_0``."""
    with suppress(OSError):
        return sorted(path.name for path in folder.iterdir())
    return []


def address_towards(host: str, port: int) -> str:
    """This machine's address on the way to ``host``; nothing is sent.

    Raises:
        OSError: the name doesn't resolve, or there is no route.
    """
    family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)
        return str(probe.getsockname()[0])


def address_of(name: str) -> str | None:
    """An address of this machine that ``name`` stands for; ``None`` if others can't use it.

    A host name that ``/etc/hosts`` maps to 127.0.1.1 is such a case, and so is the address of a
    gateway in front of this machine.

    Raises:
        OSError: the name doesn't resolve.
    """
    family, kind, _, _, place = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)[0]
    address = str(place[0])
    if ipaddress.ip_address(address).is_loopback and name not in ("localhost", address):
        return None
    with suppress(OSError), socket.socket(family, kind) as probe:
        probe.bind(place)
        return address
    return None
