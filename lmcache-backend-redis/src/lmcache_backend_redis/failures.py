"""What redis-py and servers say when something goes wrong, in core's terms.

Knows their exceptions and error codes. Knows nothing about connections.
"""

from __future__ import annotations

from typing import Final

import redis
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    InvalidResponse,
    MovedError,
    NoPermissionError,
    RedisClusterException,
    RedisError,
    ResponseError,
)

from lmcache_backend_redis.resp import ReplyError
from lmcache_core import BackendError, BackendRejected, BackendTimeout, BackendUnavailable

CLIENT_ERRORS: Final = (RedisError, RedisClusterException, OSError)
"""What redis-py raises; the second isn't one of the first."""
_LATER = frozenset(
    (
        "LOADING",
        "READONLY",
        "MASTERDOWN",
        "CLUSTERDOWN",
        "TRYAGAIN",
        "BUSY",
        "MISCONF",
        "NOREPLICAS",
    )
)
_MOVED = frozenset(("MOVED", "ASK"))
_REFUSED = frozenset(("NOAUTH", "WRONGPASS", "NOPERM", "WRONGTYPE"))


def is_move(error: Exception) -> bool:
    """Whether a node says that another one has the key."""
    return isinstance(error, MovedError) or (isinstance(error, ReplyError) and error.code in _MOVED)


def translated(error: Exception, peer: str) -> BackendError:
    """What redis-py or a server said, in core's terms."""
    if isinstance(error, BackendError):
        return error
    text = f"{peer}: {error or type(error).__name__}"
    if isinstance(error, ReplyError):
        if error.code in _REFUSED:
            return BackendRejected(text)
        later = error.code in _LATER or error.code in _MOVED
        return BackendUnavailable(text) if later else BackendError(text)
    refused = (AuthenticationError, AuthorizationError, NoPermissionError, InvalidResponse)
    if isinstance(error, refused) or _is_refusal(error):
        return BackendRejected(text)
    if isinstance(error, (redis.TimeoutError, TimeoutError)):
        return BackendTimeout(text)
    if isinstance(error, (redis.ConnectionError, RedisClusterException, OSError)):
        return BackendUnavailable(text)
    return BackendError(text)


def _is_refusal(error: BaseException | None) -> bool:
    """Whether waiting won't help: credentials, certificates, a server that is no cluster."""
    while error is not None:
        text = str(error)
        if isinstance(error, (AuthenticationError, NoPermissionError)):
            return True
        if isinstance(error, ResponseError) and "out of range" in text:
            return True  # SELECT of a database that isn't there
        if "CERTIFICATE_VERIFY_FAILED" in text or "Cluster mode is not enabled" in text:
            return True
        error = error.__cause__ or error.__context__
    return False
