"""Registers the ``lm`` backend: chunks on an ``lmcache_server``. The client is imported on use."""

from __future__ import annotations

from lmcache_core.hookspecs import hookimpl
from lmcache_core.lm.config import SCHEMES, LmConfig, config_from_url
from lmcache_core.storage import StorageBackend, StorageBackendDescriptor


def _create(config: LmConfig) -> StorageBackend:
    from lmcache_core.lm.backend import LmBackend

    return LmBackend(config)


@hookimpl
def lmcache_storage_backends() -> list[StorageBackendDescriptor]:
    return [
        StorageBackendDescriptor(
            name="lm",
            summary="an lmcache_server, on this machine or another",
            config=LmConfig,
            create=_create,
            url_schemes=SCHEMES,
            config_from_url=config_from_url,
            maps_region=lambda config: config.is_near,
        )
    ]
