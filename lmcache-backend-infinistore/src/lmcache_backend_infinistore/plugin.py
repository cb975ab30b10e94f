"""What this distribution tells lmcache-core. Imports no client."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmcache_backend_infinistore.config import SCHEME, InfinistoreConfig
from lmcache_core import StorageBackend, StorageBackendDescriptor, hookimpl


def _create(config: InfinistoreConfig) -> StorageBackend:
    # Here, not above: a client that is installed but not configured shouldn't cost start-up time.
    from lmcache_backend_infinistore.backend import InfinistoreBackend

    return InfinistoreBackend(config)


def _config_from_url(url: str) -> dict[str, Any]:
    return {"url": url}  # the model reads it: one place, and the same message wherever it stands


@hookimpl
def lmcache_storage_backends() -> Sequence[StorageBackendDescriptor]:
    return [
        StorageBackendDescriptor(
            name="infinistore",
            summary="an InfiniStore server, over RDMA or TCP",
            config=InfinistoreConfig,
            create=_create,
            url_schemes=(SCHEME,),
            config_from_url=_config_from_url,
            extra_config_keys={"infinistore_link_type": "link_type"},
            # No call has a time-out.
            isolated=True,
        )
    ]
