"""What this distribution tells lmcache-core. Imports no client."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmcache_backend_redis.config import SCHEMES, RedisConfig
from lmcache_core import StorageBackend, StorageBackendDescriptor, hookimpl


def _create(config: RedisConfig) -> StorageBackend:
    # Here, not above: a client that is installed but not configured shouldn't cost start-up time.
    from lmcache_backend_redis.backend import RedisBackend

    return RedisBackend(config)


def _config_from_url(url: str) -> dict[str, Any]:
    return {"url": url}  # the model reads it: one place, and the same message wherever it stands


@hookimpl
def lmcache_storage_backends() -> Sequence[StorageBackendDescriptor]:
    return [
        StorageBackendDescriptor(
            name="redis",
            summary="Redis or Valkey: one server, Sentinel or a cluster",
            config=RedisConfig,
            create=_create,
            url_schemes=SCHEMES,
            config_from_url=_config_from_url,
            # What LMCache calls them, for its redis://, resp:// and valkey:// alike.
            extra_config_keys={
                "username": "username",
                "password": "password",
                "resp_num_threads": "connections",
                "valkey_mode": "mode",
                "valkey_username": "username",
                "valkey_password": "password",
                "valkey_database": "database",
                "valkey_num_workers": "connections",
                "valkey_ttl_sec": "ttl_s",
                "tls_enable": "tls",
            },
        )
    ]
