"""How many wrong tokens a peer's address may still try. Knows addresses and a clock."""

from __future__ import annotations

import ipaddress
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

BURST = 10
"""So many at once, then one each `EVERY_S`: an engine with a wrong token that is started again and
again doesn't keep out those beside it, and nobody finds a token that takes a million guesses."""
EVERY_S = 1.0
MAX_ADDRESSES = 1024


class Guesses:
    """Remembers the last addresses that said a wrong token. Constant memory; thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._free_at: OrderedDict[str, float] = OrderedDict()
        """Address → when none of its wrong tokens counts any more."""

    def wait_s(self, address: str) -> float:
        """How long until a proof from there is looked at; 0: now."""
        with self._lock:
            left = self._free_at.get(_network(address), 0.0) - self._clock()
        return max(0.0, left - (BURST - 1) * EVERY_S)

    def wrong(self, address: str) -> None:
        """Remember that one was."""
        name = _network(address)
        with self._lock:
            now = self._clock()
            self._free_at[name] = max(now, self._free_at.pop(name, now)) + EVERY_S
            if len(self._free_at) > MAX_ADDRESSES:
                self._free_at.popitem(last=False)

    def __len__(self) -> int:
        return len(self._free_at)


def _network(address: str) -> str:
    """What counts as one: an IPv4 address, or the /64 that a host has to itself with IPv6."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if found.version == 4:
        return address
    network = ipaddress.IPv6Network((int(found), 64), strict=False)
    return str(ipaddress.IPv6Address(int(found)).ipv4_mapped or network)
