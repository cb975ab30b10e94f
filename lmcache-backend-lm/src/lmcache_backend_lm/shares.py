"""Something that is bounded and that many share: whoever takes much of it leaves some to others.

Knows numbers and names. Knows nothing about what is shared.
"""

from __future__ import annotations

import threading


class Shares:
    """``bound`` of something. Nobody may have more of it than is left. Not thread-safe."""

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
        left = self._by.get(who, 0) - amount
        if left:
            self._by[who] = left
        else:
            self._by.pop(who, None)


class Budget:
    """`Shares` that nobody exceeds. Thread-safe."""

    def __init__(self, bound: int) -> None:
        self._shares = Shares(bound)
        self._lock = threading.Lock()

    @property
    def taken(self) -> int:
        """By all together."""
        return self._shares.taken

    def take(self, who: str, amount: int) -> bool:
        """Take ``amount`` for ``who`` if that is left; whether it was."""
        with self._lock:
            if amount > self._shares.left(who):
                return False
            self._shares.take(who, amount)
            return True

    def give(self, who: str, amount: int) -> None:
        """Give that back."""
        with self._lock:
            self._shares.give(who, amount)
