"""Which sockets a process listens on, from /proc, and what docs/security.md says of them."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import struct
import sys
from collections import Counter
from pathlib import Path

SECURITY = Path(__file__).parents[3] / "docs" / "security.md"
_LISTENING = "0A"
_ACCEPTS = 1 << 16  # __SO_ACCEPTCON


def open_ports(process: int) -> Counter[tuple[str, str]]:
    """How often the process and its descendants listen so: ``TCP`` or ``Unix``, and for whom.

    For whom: ``this user``, ``this machine`` or ``the network``; of a Unix socket, what its file's
    mode says.
    """
    found: Counter[tuple[str, str]] = Counter()
    inodes: set[str] = set()
    for one in _family(process):
        inodes |= _sockets(one)
    tables = Path(f"/proc/{process}/net")
    for name in ("tcp", "tcp6"):
        for line in (tables / name).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == _LISTENING and words[9] in inodes:
                loopback = _address(words[1].rpartition(":")[0]).is_loopback
                found["TCP", "this machine" if loopback else "the network"] += 1
    for line in (tables / "unix").read_text().splitlines()[1:]:
        words = line.split()
        if int(words[3], 16) & _ACCEPTS and words[6] in inodes:
            path = Path(words[7]) if len(words) > 7 else Path()
            private = path.is_socket() and path.stat().st_mode & 0o077 == 0
            found["Unix", "this user" if private else "this machine"] += 1
    return found


def documented(who: str) -> set[tuple[str, str]]:
    """What the table in docs/security.md says that ``who`` listens on, and for whom by default."""
    rows = set()
    known = False
    for line in SECURITY.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and cells[0] == who:
            known = True
            kind = cells[1].split()[0].rstrip(",")
            if kind != "none":
                rows.add((kind, re.split("[;,(]", cells[2])[0].strip()))
    assert known, f"docs/security.md has no row for {who}"
    return rows


def _address(digits: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    words = [int(digits[i : i + 8], 16) for i in range(0, len(digits), 8)]
    packed = struct.pack(f"{'<' if sys.byteorder == 'little' else '>'}{len(words)}I", *words)
    kind = socket.AF_INET if len(words) == 1 else socket.AF_INET6
    return ipaddress.ip_address(socket.inet_ntop(kind, packed))


def _sockets(process: int) -> set[str]:
    found = set()
    for link in Path(f"/proc/{process}/fd").iterdir():
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target.startswith("socket:["):
            found.add(target[8:-1])
    return found


def _family(process: int) -> list[int]:
    """The process and all below it."""
    found = [process]
    for one in found:
        for children in Path(f"/proc/{one}/task").glob("*/children"):
            found += map(int, children.read_text().split())
    return found
