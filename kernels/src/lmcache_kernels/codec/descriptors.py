"""What core is told of the serdes in this package. Loads none of them until one is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lmcache_core import Serde, SerdeDescriptor
from lmcache_kernels.codec.config import AesGcmConfig, CacheGenConfig, CodecConfig

Threads = Callable[[], int | None]
"""How many threads one chunk gets where its options don't say; ``None``: as many as copies."""


def all_of(threads: Threads) -> list[SerdeDescriptor]:
    """The descriptors."""

    def native(name: str) -> Callable[[Any], Serde]:
        def create(config: Any) -> Serde:
            from lmcache_kernels.codec import serdes

            return serdes.create(name, config, threads())

        return create

    def aesgcm(config: Any) -> Serde:
        from lmcache_kernels.codec.aesgcm import create

        return create(config)

    return [
        SerdeDescriptor(
            name="lossless",
            summary="bf16 and fp16 in about two thirds of their bytes, every bit kept",
            lossless=True,
            config=CodecConfig,
            create=native("lossless"),
        ),
        SerdeDescriptor(
            name="cachegen",
            summary="a quarter of bf16's bytes; rounded as finely as the model notices",
            lossless=False,
            config=CacheGenConfig,
            create=native("cachegen"),
            environment=("LMCACHE_PROFILES",),
        ),
        SerdeDescriptor(
            name="int8",
            summary="half of bf16's bytes: integers with a scale for each token and head",
            lossless=False,
            config=CodecConfig,
            create=native("int8"),
        ),
        SerdeDescriptor(
            name="fp8",
            summary="half of bf16's bytes: E4M3 with a scale for each token and head",
            lossless=False,
            config=CodecConfig,
            create=native("fp8"),
        ),
        SerdeDescriptor(
            name="aesgcm",
            summary="encrypts, for stores that others can read; use it last, as in cachegen+aesgcm",
            lossless=True,
            config=AesGcmConfig,
            create=aesgcm,
            environment=("LMCACHE_AESGCM_KEYS", "LMCACHE_AESGCM_KEY_FILE"),
        ),
    ]
