"""What this distribution tells lmcache-core. Imports no client."""

from __future__ import annotations

from collections.abc import Sequence

from lmcache_backend_newthing.config import NewthingConfig
from lmcache_core import StorageBackend, StorageBackendDescriptor, hookimpl


def _create(config: NewthingConfig) -> StorageBackend:
    # Here, not above: a client that is installed but not configured shouldn't cost start-up time.
    from lmcache_backend_newthing.backend import NewthingBackend

    return NewthingBackend(config)


@hookimpl
def lmcache_storage_backends() -> Sequence[StorageBackendDescriptor]:
    return [
        StorageBackendDescriptor(
            name="newthing",
            summary="newthing, in one sentence",
            config=NewthingConfig,
            create=_create,
        )
    ]
