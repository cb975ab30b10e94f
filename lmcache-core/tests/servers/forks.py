"""Children that are forks of this process, which has imported everything and has one thread."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable

HUNG_S = 600
STEPS = (4, 16)
"""What a writer does is so many things, at least and at most."""


class FoundError(Exception):
    """What these children are there to find."""


def forked(work: Callable[[], object]) -> int:
    """The process id of a child that does ``work``; its exit status is 1 if that raised."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.alarm(HUNG_S)
        work()
        status = 0
    except BaseException:  # noqa: BLE001  whatever it is must not go on as the parent
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def ended(pid: int) -> int:
    """The exit status of a child, or minus the signal that it died of."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
