"""What this distribution tells lmcache-core. Imports no client."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmcache_backend_mooncake.config import SCHEME, MooncakeConfig
from lmcache_core import StorageBackend, StorageBackendDescriptor, hookimpl

_SETUP_KEYS = (
    "local_hostname",
    "metadata_server",
    "master_server_address",
    "protocol",
    "device_name",
    "global_segment_size",
    "local_buffer_size",
    "transfer_timeout",
    "storage_root_dir",
)


def _create(config: MooncakeConfig) -> StorageBackend:
    # Here, not above: a client that is installed but not configured shouldn't cost start-up time.
    from lmcache_backend_mooncake.backend import MooncakeBackend

    return MooncakeBackend(config)


def _config_from_url(url: str) -> dict[str, Any]:
    return {"url": url}  # the model reads it: one place, and the same message wherever it stands


@hookimpl
def lmcache_storage_backends() -> Sequence[StorageBackendDescriptor]:
    return [
        StorageBackendDescriptor(
            name="mooncake",
            summary="a Mooncake store: the memory of all its clients",
            config=MooncakeConfig,
            create=_create,
            url_schemes=(SCHEME,),
            config_from_url=_config_from_url,
            extra_config_keys={
                **{key: key for key in _SETUP_KEYS},
                # LMCache's newer spelling of the same.
                **{f"mooncake_{key}": key for key in _SETUP_KEYS},
                "mooncake_prefer_local_alloc": "prefer_local_alloc",
            },
            # The client library installs signal handlers, stops every Python thread while it starts
            # and ends, and hands its sockets to whatever the process starts.
            isolated=True,
        )
    ]
