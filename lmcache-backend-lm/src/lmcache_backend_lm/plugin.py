"""What this distribution tells lmcache-core. Client and server are imported on use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmcache_backend_lm.config import SCHEMES, TOKEN_VARIABLE, LmConfig, config_from_url
from lmcache_core import StorageBackend, StorageBackendDescriptor, hookimpl

if TYPE_CHECKING:
    from argparse import ArgumentParser, _SubParsersAction


def _create(config: LmConfig) -> StorageBackend:
    from lmcache_backend_lm.backend import LmBackend

    return LmBackend(config)


@hookimpl
def lmcache_storage_backends() -> Sequence[StorageBackendDescriptor]:
    return [
        StorageBackendDescriptor(
            name="lm",
            summary="an lmcache_server, on this machine or another",
            config=LmConfig,
            create=_create,
            url_schemes=SCHEMES,
            config_from_url=config_from_url,
            environment=(TOKEN_VARIABLE,),
            maps_region=lambda config: config.is_near,
        )
    ]


@hookimpl
def lmcache_cli(subcommands: _SubParsersAction[ArgumentParser]) -> None:
    from lmcache_backend_lm import administration, command

    command.add(subcommands)
    administration.add(subcommands)
