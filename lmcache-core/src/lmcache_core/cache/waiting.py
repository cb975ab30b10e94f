"""How much of host memory requests may hold before an engine schedules them.

A request's hits are leased from its lookup on, so that what the engine was promised is there. With
a long queue that would lease, or fetch, everything: requests that run could store nothing. So
lookups are admitted, in the order in which the engine asks, while those that wait hold a share.

Knows numbers of chunks. Knows nothing about keys, lookups or tiers.
"""

from __future__ import annotations

from lmcache_core.metrics import Counters

SHARE = 0.5
"""Of the slots of host memory, for all requests together that wait."""


class WaitingBudget:
    """Of ``slots`` slots. A request holds what it may lease until it `holds` less, or `ends`.

    One that needs more than the share is admitted when nobody else holds anything.
    """

    def __init__(self, slots: int, counters: Counters) -> None:
        self._counters = counters
        self._most = int(slots * SHARE)
        self._held: dict[str, int] = {}
        self._total = 0
        self._deferred: set[str] = set()
        self._refused = False

    def admits(self, request_id: str, chunks: int, *, asked: bool) -> bool:
        """Whether a request may lease ``chunks`` now; it holds them if so.

        ``asked``: the engine asks for it, in the order in which it would schedule. Once it is
        refused, so are those behind it, until `next_step`, and new ones that aren't asked for yet.
        """
        behind = self._refused if asked else bool(self._deferred)
        if behind or (self._total and self._total + chunks > self._most):
            if request_id not in self._deferred:
                self._deferred.add(request_id)
                self._counters.add("lookups_deferred")
            self._refused |= asked
            return False
        self._deferred.discard(request_id)
        self.holds(request_id, chunks)
        return True

    def holds(self, request_id: str, chunks: int) -> None:
        """So many chunks are leased for the request, or may be."""
        self._total += chunks - self._held.get(request_id, 0)
        self._held[request_id] = chunks

    def ends(self, request_id: str) -> None:
        """The request was scheduled, or doesn't look anything up any more."""
        self._total -= self._held.pop(request_id, 0)
        self._deferred.discard(request_id)

    def next_step(self) -> None:
        """The engine begins to ask from the front of its queue again."""
        self._refused = False
