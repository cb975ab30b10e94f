"""Something that is bounded and that many share: whoever takes much of it leaves some to others.

Knows numbers and names. Knows nothing about what is shared. Not thread-safe.
"""

from __future__ import annotations


class Shares:
    """``bound`` of something. Nobody may have more of it than is left for others."""

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self.taken = 0
        """By all together; more than ``bound`` where somebody took more than was left."""
        self._by: dict[str, int] = {}

    def left(self, who: str) -> int:
        """How much more ``who`` may take now; 0 or less: nothing."""
        return self.bound - self.taken - self._by.get(who, 0)

    def take(self, who: str, amount: int) -> None:
        """Count ``amount`` for ``who``, whatever is left."""
        self.taken += amount
        self._by[who] = self._by.get(who, 0) + amount

    def give(self, who: str, amount: int) -> None:
        """Take that back."""
        self.taken -= amount
        self._by[who] -= amount
        if not self._by[who]:
            del self._by[who]
