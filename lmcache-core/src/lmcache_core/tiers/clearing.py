"""Whether a tier is still to be cleared, and who is told.

Knows counts and words. Knows nothing about how a tier is cleared.
"""

from __future__ import annotations

import logging

from lmcache_core.metrics import Counters

logger = logging.getLogger(__name__)


class Clearing:
    """What the tier called ``name`` owes. `asked` may be called on any thread."""

    def __init__(self, name: str, counters: Counters) -> None:
        self._name = name
        self._counters = counters
        self._told = False
        self.times = 0
        """How often it was to be cleared."""
        self.owed = False
        """Whether it still is: nothing of it may be offered until then, nor stored."""
        self.uncleared = ""
        """Why it wasn't cleared the last time; empty if it was."""

    def asked(self) -> None:
        """It is to be cleared, from now on."""
        self.times += 1
        self.owed = True
        self.uncleared = "it hasn't answered yet"

    def failed(self, why: str, *, for_good: bool = False) -> None:
        """It couldn't be; ``for_good``: nor ever will."""
        self.uncleared = why
        if for_good:
            self.owed = False
            logger.warning("%s can't be cleared: %s; what is in it stays", self._name, why)
        self._tell(self.owed)
        if self.owed and not self._told:
            logger.warning(
                "%s couldn't be cleared: %s. Nothing of it is used until it is; that is tried "
                "again. If this process ends before, what is in it is back",
                self._name,
                why,
            )
        self._told = self.owed

    def done(self, times: int) -> None:
        """It was, as it was asked for ``times`` times; unless it was asked for again since."""
        if times != self.times:
            return
        self.owed, self.uncleared = False, ""
        if self._told:
            logger.info("%s is cleared now, and used again", self._name)
        self._tell(False)
        self._told = False

    def _tell(self, owed: bool) -> None:
        if owed != self._told:
            self._counters.add("clear_owed", 1 if owed else -1, tier=self._name)
