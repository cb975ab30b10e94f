"""How much memory calls may have in use at one time, so that those that hang keep a bounded part.

Knows bytes and who waits for them. Knows nothing about calls. Lives on one event loop.
"""

from __future__ import annotations

import asyncio
from collections import deque


class Room:
    """``limit`` bytes, dealt out in the order of asking; ``None``: as many as anybody wants.

    Something longer than that is let in alone.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self._used = 0
        self._stuck = 0
        self._asking: deque[tuple[asyncio.Future[bool], int]] = deque()

    @property
    def stuck(self) -> int:
        """Bytes of calls that nobody waits for any more and that haven't ended."""
        return self._stuck

    @property
    def full(self) -> bool:
        """Whether `stuck` calls have all of it."""
        return self.limit is not None and self._stuck >= self.limit

    def denies(self, nbytes: int) -> bool:
        """Whether so much can't be had before a `stuck` call ends."""
        return self.limit is not None and self._stuck > 0 and self._stuck + nbytes > self.limit

    async def take(self, nbytes: int, timeout_s: float) -> Share | None:
        """So many bytes, as soon as they are free; ``None``: not in that time, or not at all."""
        if self.denies(nbytes):
            return None
        if not self._asking and self._fits(nbytes):
            self._used += nbytes
            return Share(self, nbytes)
        if timeout_s <= 0:
            return None
        asking: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        entry = (asking, nbytes)
        self._asking.append(entry)
        try:
            await asyncio.wait([asking], timeout=timeout_s)
        except asyncio.CancelledError:
            if asking.done() and asking.result():
                self._give(nbytes)
            raise
        finally:
            if not asking.done():
                self._asking.remove(entry)
                self._admit()  # whoever is behind it may need less
        return Share(self, nbytes) if asking.done() and asking.result() else None

    # -- for its shares --------------------------------------------------------------------

    def _give(self, nbytes: int) -> None:
        self._used -= nbytes
        self._admit()

    def _stick(self, nbytes: int) -> None:
        self._stuck += nbytes
        denied = [one for one in self._asking if self.denies(one[1])]
        for one in denied:
            self._asking.remove(one)
            one[0].set_result(False)
        self._admit()

    def _unstick(self, nbytes: int) -> None:
        self._stuck -= nbytes
        self._give(nbytes)

    def _fits(self, nbytes: int) -> bool:
        return self.limit is None or not self._used or self._used + nbytes <= self.limit

    def _admit(self) -> None:
        while self._asking and self._fits(self._asking[0][1]):
            asking, nbytes = self._asking.popleft()
            self._used += nbytes
            asking.set_result(True)


class Share:
    """Bytes that one call has until `end`, or until the task ends that it is left to."""

    def __init__(self, room: Room, nbytes: int) -> None:
        self._room = room
        self._nbytes = nbytes
        self._left_to_a_task = False

    def leave_to(self, task: asyncio.Task[object]) -> None:
        """Nobody waits for ``task`` any more, which has the bytes until it is done."""
        self._left_to_a_task = True
        self._room._stick(self._nbytes)
        task.add_done_callback(lambda _: self._room._unstick(self._nbytes))

    def end(self) -> None:
        """Give them back, unless they are left to a task. Called once."""
        if not self._left_to_a_task:
            self._room._give(self._nbytes)
