"""S3-FIFO keeps the contract of cache policies, with its defaults and with extreme options."""

from __future__ import annotations

from typing import Any

import pytest

from lmcache_core.testing.policy import CachePolicyTests, MakePolicy
from lmcache_policy_s3fifo.config import S3FifoConfig
from lmcache_policy_s3fifo.policy import S3Fifo


class TestS3Fifo(CachePolicyTests):
    @pytest.fixture(
        params=[
            {},
            {"small_share": 0.01, "ghost_share": 0, "promoted_after": 1},
            {"small_share": 0.99, "ghost_share": 16, "promoted_after": 3},
        ],
        ids=["defaults", "least", "most"],
    )
    def make_policy(self, request: pytest.FixtureRequest) -> MakePolicy:
        options: dict[str, Any] = request.param
        return lambda: S3Fifo(S3FifoConfig(**options))
