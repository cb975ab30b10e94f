"""Order in memory that two processes share.

What is shared is watched by a number that one side changes and the other one looks at: the epoch of
a lease, the voucher of an OFFER. That says something only if it is looked at after the bytes were
read, and changed before they are overwritten. x86 does both in the order of the program; other
processors may not.
"""

from __future__ import annotations

import threading

_lock = threading.Lock()


def fence() -> None:
    """What this thread read or wrote before comes before what it reads or writes next.

    Not a write before a read. What stands before it can't move behind the first release of the
    lock, nor what follows before the second acquisition, which reads what a release has written.
    """
    with _lock:
        pass
    with _lock:
        pass
