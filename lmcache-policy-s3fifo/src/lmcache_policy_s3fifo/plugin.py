"""What this distribution tells lmcache-core."""

from __future__ import annotations

from collections.abc import Sequence

from lmcache_core import CachePolicyDescriptor, hookimpl
from lmcache_policy_s3fifo.config import S3FifoConfig
from lmcache_policy_s3fifo.policy import S3Fifo

LMCACHE_PLUGIN_API = 1


@hookimpl
def lmcache_cache_policies() -> Sequence[CachePolicyDescriptor]:
    return [
        CachePolicyDescriptor(
            name="S3-FIFO",
            summary="new chunks go first, unless they are used again soon",
            config=S3FifoConfig,
            create=S3Fifo,
        )
    ]
