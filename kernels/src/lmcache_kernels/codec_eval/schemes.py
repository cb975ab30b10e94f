"""What is measured: any installed serde, by the bytes that it really writes.

Knows core's contract of serdes. The schemes of others that are here for comparison are in
`references`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from torch import Tensor

from lmcache_core import ConfigError, Plugins, Serde, SerdeDescriptor, SerdeFacts, chain_serdes
from lmcache_kernels.codec.config import CacheGenConfig
from lmcache_kernels.codec.profile import Profile
from lmcache_kernels.codec_eval.models import Model

CHUNK_TOKENS = 256


@dataclass(frozen=True)
class Coded:
    """A cache that went through a scheme."""

    cache: Tensor
    bits: float
    """All that was stored, side information included."""


class Scheme(Protocol):
    """Makes a cache smaller."""

    @property
    def name(self) -> str:
        """For tables."""

    @property
    def reference(self) -> bool:
        """Whether it is computed here for comparison, rather than an installed serde."""

    def code(self, cache: Tensor) -> Coded:
        """``cache`` (see `Model`), encoded and decoded. It begins at the sequence's start."""


@dataclass(frozen=True)
class SerdeScheme:
    """A serde of a plugin, chunk by chunk, as core calls it."""

    name: str
    serde: Serde
    model: Model
    chunk_tokens: int = CHUNK_TOKENS
    reference: bool = False

    def code(self, cache: Tensor) -> Coded:
        decoded = torch.empty_like(cache)
        written = 0
        for start in range(0, cache.shape[2], self.chunk_tokens):
            piece = slice(start, start + self.chunk_tokens)
            chunk = cache[:, :, piece].contiguous()
            key = hashlib.sha256(_bytes(chunk)).digest()
            encoded = self._encoded(chunk, key, start)
            written += encoded.nbytes
            into = torch.empty_like(chunk)
            serde = self.serde.for_chunk(key, None)
            serde.decode(encoded, _bytes(into), self.model.group, chunk.shape[2])
            decoded[:, :, piece] = into
        return Coded(decoded, 8.0 * written)

    def _encoded(self, chunk: Tensor, key: bytes, start: int) -> memoryview:
        group, tokens = self.model.group, chunk.shape[2]
        serde = self.serde.for_chunk(key, start)
        into = memoryview(bytearray(serde.max_encoded_bytes(group, tokens)))
        return into[: serde.encode(_bytes(chunk), into, group, tokens)]


def _bytes(chunk: Tensor) -> memoryview:
    return memoryview(chunk.view(torch.uint8).numpy()).cast("B")


def serde_scheme(
    words: str, model: Model, plugins: Plugins, profile: Path | None = None
) -> SerdeScheme:
    """The serde that ``words`` name: ``NAME[+NAME…][:OPTION=VALUE,…]``.

    `cachegen` uses ``profile``, or none: what it would find in a folder is for who asks for it.

    Raises:
        PluginError: none is called that; the message lists those that are installed.
        ConfigError: none of them has such an option, or it refuses its value.
    """
    names, said = _parsed(words)
    descriptors = [plugins.serde(name) for name in names]
    for option in said:
        if not any(option in d.config.model_fields for d in descriptors):
            known = sorted({field for d in descriptors for field in d.config.model_fields})
            raise ConfigError(
                f"--serde {words}: {'+'.join(names)} has no option {option!r}; it has "
                f"{', '.join(known)}"
            )
    default = {"profile": "none" if profile is None else profile}
    serde = chain_serdes(
        [
            _link(words, one, {**default, **said} if one.config is CacheGenConfig else said)
            for one in descriptors
        ]
    )
    facts = SerdeFacts(model.identity, model.rope, model.identity)
    name = words if profile is None else f"{words} {Profile.load(profile).kind}"
    return SerdeScheme(name, serde.bound(facts), model)


def takes_profile(words: str, plugins: Plugins) -> bool:
    """Whether a serde in ``words`` uses a profile, and they don't say which."""
    names, said = _parsed(words)
    uses = any(plugins.serde(name).config is CacheGenConfig for name in names)
    return uses and "profile" not in said


def _parsed(words: str) -> tuple[list[str], dict[str, str]]:
    names, _, rest = words.partition(":")
    options = dict(_option(words, pair) for pair in rest.split(",") if pair)
    return [name.strip() for name in names.split("+")], options


def _option(words: str, pair: str) -> tuple[str, str]:
    name, equals, value = pair.partition("=")
    if not equals:
        raise ConfigError(f"--serde {words}: {pair!r} isn't OPTION=VALUE")
    return name.strip(), value.strip()


def _link(words: str, descriptor: SerdeDescriptor, wanted: Mapping[str, object]) -> Serde:
    fields: Mapping[str, Any] = descriptor.config.model_fields
    mine = {name: value for name, value in wanted.items() if name in fields}
    try:
        return descriptor.create(descriptor.config.model_validate(mine))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"--serde {words}: {problems}") from None
