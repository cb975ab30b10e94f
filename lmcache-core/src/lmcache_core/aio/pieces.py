"""Memory that is filled or sent one piece after the other, some of it at a time: what is left.

A list with the last piece first, so that what is done is taken off its end. Knows nothing about
what fills or sends it.
"""

from __future__ import annotations

from collections.abc import Sequence

IOV_MAX = 512
"""So many pieces go to the kernel at a time; it takes no more than 1,024."""


def last_first(views: Sequence[bytes | memoryview]) -> list[memoryview]:
    """What is left of ``views`` at the beginning: all that isn't empty."""
    return [memoryview(view) for view in reversed(views) if len(view)]


def next_of(left: list[memoryview]) -> list[memoryview]:
    """The next pieces in their order, at most `IOV_MAX`."""
    return left[: -IOV_MAX - 1 : -1]


def take_out(left: list[memoryview], nbytes: int) -> None:
    """The next ``nbytes`` are done."""
    while left and nbytes >= left[-1].nbytes:
        nbytes -= left.pop().nbytes
    if nbytes:
        left[-1] = left[-1][nbytes:]
