"""Telling an event loop, from another thread, what it waits for.

Knows futures. Knows nothing about who awaits them.
"""

from __future__ import annotations

import asyncio
from typing import Any

from lmcache_core.errors import contained


def settle_soon(
    future: asyncio.Future[Any], result: Any = None, error: BaseException | None = None
) -> bool:
    """Give ``future`` its result, or ``error``, on its own loop; from any thread.

    One that is done by then, because it was cancelled, stays as it is. ``False`` if the loop has
    ended: nobody is left to be told.
    """

    def settle() -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(contained(error))

    try:
        future.get_loop().call_soon_threadsafe(settle)
    except RuntimeError:
        return False
    return True
