"""What this distribution tells lmcache-core. Imports no client."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Final

from lmcache_backend_nixl.config import NixlChannelConfig, NixlConfig
from lmcache_core import (
    BackendRejected,
    StorageBackend,
    StorageBackendDescriptor,
    TransferChannel,
    TransferChannelDescriptor,
    hookimpl,
)

INSTALL: Final = "pip install numpy && pip install --no-deps nixl nixl-cu12"
"""NIXL isn't a requirement of this distribution, because its own pull a CUDA build of torch."""


def _check_installed() -> None:
    # Only looked for: it is imported where something is opened that moves bytes.
    missing = [name for name in ("nixl", "numpy") if find_spec(name) is None]
    if missing:
        raise BackendRejected(f"{' and '.join(missing)} isn't installed; {INSTALL}")


def _create(config: NixlConfig) -> StorageBackend:
    _check_installed()
    if config.backend == "OBJ":
        from lmcache_backend_nixl.objects import NixlObjectBackend

        return NixlObjectBackend(config)
    from lmcache_backend_nixl.files import NixlFileBackend

    return NixlFileBackend(config)


def _create_channel(config: NixlChannelConfig) -> TransferChannel:
    _check_installed()
    from lmcache_backend_nixl.channel import NixlChannel

    return NixlChannel(config)


@hookimpl
def lmcache_transfer_channels() -> Sequence[TransferChannelDescriptor]:
    return [
        TransferChannelDescriptor(
            name="nixl",
            summary="NIXL over UCX: RDMA where there is any, sockets and shared memory otherwise",
            config=NixlChannelConfig,
            create=_create_channel,
            isolated=True,  # UCX was seen to end the process that it is in
        )
    ]


@hookimpl
def lmcache_storage_backends() -> Sequence[StorageBackendDescriptor]:
    return [
        StorageBackendDescriptor(
            name="nixl",
            summary="NIXL's storage plugins: files (POSIX, GDS, GDS_MT, HF3FS) or objects (OBJ)",
            config=NixlConfig,
            create=_create,
            extra_config_keys={
                "enable_nixl_storage": "type",
                "nixl_backend": "backend",
                "nixl_path": "path",
                "nixl_pool_size": "pool_size",
                "nixl_file_pool_size": "pool_size",
                "nixl_backend_params": "backend_params",
                "nixl_buffer_size": "buffer_bytes",
                "nixl_buffer_device": "buffer_device",
                "nixl_persist": "persist",
                "use_direct_io": "direct_io",
            },
        )
    ]
