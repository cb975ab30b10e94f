"""Who has slots of host memory: those that read them, and the operations that fill them.

Knows who has what, and that it is given back once. Knows nothing about what lies in a slot.
"""

from __future__ import annotations

from dataclasses import dataclass

from lmcache_core.chunks.keys import ChunkKey
from lmcache_core.errors import LeaseError
from lmcache_core.memory.leases import Lease


class Hold:
    """Slots that somebody is going to read, in prefix order: not evicted until `release`.

    It has one owner, who may hand it on. ``awaited`` are slots that are being fetched for it.
    """

    __slots__ = ("_lease", "awaited", "keys", "slots")

    def __init__(
        self, lease: Lease, keys: list[ChunkKey], slots: list[int], awaited: list[int]
    ) -> None:
        self.keys = keys
        self.slots = slots
        self.awaited = awaited
        self._lease = lease

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def live(self) -> bool:
        """Whether it is still to be released."""
        return self._lease.live

    def release(self) -> None:
        """Give the slots back.

        Raises:
            LeaseError: that was done before.
        """
        self._lease.release()


@dataclass(slots=True)
class Operation:
    """Has a lease of its slot until every rank has reported its result and its release.

    What is due are sets of ranks, as bits: who has answered can't answer for another.
    """

    key: ChunkKey
    slot: int
    results_due: int
    releases_due: int
    failed: bool = False


def check_live(hold: Hold) -> None:
    if not hold.live:
        raise LeaseError("slots can't be added to a hold that was released: nobody would free them")


def not_under_way(op: int) -> str:
    return (
        f"operation {op} isn't under way: it was never planned, or every rank has reported its "
        "end; this is a mistake in the mover that reports it"
    )


def not_due(op: int, what: str, ranks: int) -> str:
    named = [rank for rank in range(ranks.bit_length()) if ranks >> rank & 1]
    return (
        f"operation {op}: a {what} of ranks {named} isn't due: each of its ranks reports one, "
        "once; this is a mistake in the mover that reports it"
    )
