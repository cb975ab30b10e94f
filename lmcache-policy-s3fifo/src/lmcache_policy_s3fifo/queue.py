"""A queue of slots in which a run of chunks that continue each other leaves end first.

Knows slots. Which of them may leave is the policy's to say.
"""

from __future__ import annotations

from collections import OrderedDict


class RunQueue:
    """First in, first out, by runs: of each run the slot that was put last is the first to go."""

    def __init__(self) -> None:
        self._runs: OrderedDict[int, OrderedDict[int, None]] = OrderedDict()
        self._run_of: dict[int, int] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self._run_of)

    def __contains__(self, slot: int) -> bool:
        return slot in self._run_of

    @property
    def runs(self) -> int:
        """How many runs there are."""
        return len(self._runs)

    def put(self, slot: int, after: int | None = None) -> None:
        """Put a slot last, in a run of its own; or at the end of the run that ``after`` ends."""
        run = None if after is None else self._run_of.get(after)
        if run is None or next(reversed(self._runs[run])) != after:
            run = self._next
            self._next += 1
            self._runs[run] = OrderedDict()
        self._runs[run][slot] = None
        self._run_of[slot] = run

    def take(self, slot: int) -> None:
        """Take a slot out, wherever it is.

        Raises:
            KeyError: it isn't in the queue.
        """
        number = self._run_of.pop(slot)
        run = self._runs[number]
        del run[slot]
        if not run:
            del self._runs[number]

    def first(self) -> int:
        """The slot whose turn it is to go: the end of the first run. There must be one."""
        return next(reversed(self._runs[next(iter(self._runs))]))

    def postpone(self) -> None:
        """The first run is the last from now on. There must be one."""
        self._runs.move_to_end(next(iter(self._runs)))

    def clear(self) -> None:
        """Forget every slot."""
        self._runs.clear()
        self._run_of.clear()
