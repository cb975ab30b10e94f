"""The serdes whose work is done in C++: `lossless`, `cachegen`, `int8` and `fp8`.

Knows the contract of `lmcache_core.Serde` and what the native module is asked. Which bytes come out
is described in docs/codec-format.md.
"""

from __future__ import annotations

import copy
import math
import os
import struct
from typing import ClassVar

from lmcache_core import AttentionKind, ConfigError, DType, LayerGroup, Rope, Serde, SerdeFacts
from lmcache_kernels import _native
from lmcache_kernels.codec.config import STEPS, VALUES_BY_KEYS, CacheGenConfig, CodecConfig
from lmcache_kernels.codec.profile import Profile
from lmcache_kernels.codec.profiles import Profiles, profile_folder
from lmcache_kernels.cpu import CpuKernels

_DTYPES = {DType.BF16: 0, DType.F16: 1, DType.F32: 2}
_BYTES = 3
"""Every 8-bit dtype: stored as it is."""

_Shape = tuple[int, int, int, int, int, int]


def _shape(group: LayerGroup, tokens: int) -> _Shape:
    """dtype, layers, planes, heads, head size, tokens."""
    dtype = _DTYPES.get(group.dtype, _BYTES)
    return dtype, len(group.layers), group.planes, group.heads, group.head_size, tokens


def engine(threads: int | None = None, simd: str | None = None) -> _native.Codec:
    """The native codecs on ``threads`` threads; as many as copies use, if not said."""
    return _native.Codec(threads or CpuKernels().threads, simd)


class CodecSerde(Serde):
    """What the four have in common. One pool of threads for each instance."""

    number: ClassVar[int]
    """The codec's in its streams."""
    id: ClassVar[int]

    def __init__(self, config: CodecConfig, codec: _native.Codec | None = None) -> None:
        self._config = config
        self._codec = codec or engine(config.threads)

    @property
    def wire_id(self) -> int:
        return self.id

    def max_encoded_bytes(self, group: LayerGroup, tokens: int) -> int:
        return _native.codec_max_encoded(_shape(group, tokens), group.head_size // 2)

    def encode(self, chunk: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> int:
        return self._codec.encode(
            self.number, _shape(group, tokens), chunk, into, (1.0, 1.0), b"", False, 0, None
        )

    def decode(self, encoded: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> None:
        self._codec.decode(self.number, _shape(group, tokens), encoded, into, None)

    def decode_layers(
        self,
        encoded: memoryview,
        into: memoryview,
        group: LayerGroup,
        tokens: int,
        layers: range,
    ) -> None:
        """Decode consecutive ``layers`` of the group. ``encoded`` may end behind the last of them.

        Raises:
            ValueError: as `decode` does.
            IndexError: the group hasn't got these layers.
        """
        self._codec.decode(
            self.number,
            _shape(group, tokens),
            encoded,
            into,
            None,
            first_layer=layers.start,
            layers=len(layers),
        )


class LosslessSerde(CodecSerde):
    """bf16 and fp16: exponents are coded, the rest is stored. Other dtypes are stored."""

    number, id = 1, 10


class Int8Serde(CodecSerde):
    """8-bit integers with a scale for each token and head."""

    number, id = 3, 11


class Fp8Serde(CodecSerde):
    """E4M3 with a scale for each token and head."""

    number, id = 4, 12


class CacheGenSerde(CodecSerde):
    """K without its rotation and mean, V with steps by its size; rounded, then coded with rANS.

    Keys are turned back by their position, or by their distance from the chunk's start where that
    isn't known: what is left then is one rotation for the whole chunk, on which neither a channel's
    variance around its own mean nor the decoder depends.
    """

    number, id = 2, 13

    def __init__(
        self,
        config: CacheGenConfig,
        codec: _native.Codec | None = None,
        *,
        rope: Rope | None = None,
        profile: Profile | Profiles | None = None,
    ) -> None:
        super().__init__(config, codec)
        self._options = config
        self._step = STEPS[config.step] if isinstance(config.step, str) else config.step
        if not 0.001 <= self._step <= 10:
            raise ConfigError(
                f"cachegen's step is {self._step}: set it to 0.001 to 10, such as 0.3"
            )
        if not isinstance(profile, Profiles):
            folder = profile_folder(config.profiles, os.environ)
            profile = Profiles(config.profile if profile is None else profile, folder)
        self._profiles = profile
        self._rope = rope
        self._turns = b"" if rope is None else _turns(rope)
        self._start: int | None = None

    def identity(self, group: LayerGroup) -> str:
        return f"{self.id}:{self._step:g}:{self._profiles.chosen(group) or '-'}"

    def bound(self, facts: SerdeFacts) -> Serde:
        return CacheGenSerde(
            self._options, self._codec, rope=facts.rope, profile=self._profiles.bound(facts)
        )

    def for_chunk(self, key: bytes, start: int | None) -> Serde:  # noqa: ARG002  any chunk
        placed = copy.copy(self)
        placed._start = start
        return placed

    def encode(self, chunk: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> int:
        profile = self._profiles.to_encode(group)
        keys = self._step / 2 if profile else self._step
        interleaved = self._rope is not None and self._rope.interleaved
        return self._codec.encode(
            self.number,
            _shape(group, tokens),
            chunk,
            into,
            (keys, self._step * VALUES_BY_KEYS),
            self._angles(group),
            interleaved,
            -1,
            profile,
            self._start,
        )

    def decode(self, encoded: memoryview, into: memoryview, group: LayerGroup, tokens: int) -> None:
        profile = self._profiles.to_decode(encoded, group)
        self._codec.decode(self.number, _shape(group, tokens), encoded, into, profile)

    def decode_layers(
        self,
        encoded: memoryview,
        into: memoryview,
        group: LayerGroup,
        tokens: int,
        layers: range,
    ) -> None:
        self._codec.decode(
            self.number,
            _shape(group, tokens),
            encoded,
            into,
            self._profiles.to_decode(encoded, group),
            first_layer=layers.start,
            layers=len(layers),
        )

    def _angles(self, group: LayerGroup) -> bytes:
        """Each pair's cosine and sine, for a group that has keys with so many pairs."""
        turned = group.kind in (AttentionKind.FULL, AttentionKind.SLIDING_WINDOW)
        return self._turns if turned and len(self._turns) // 16 <= group.head_size // 2 else b""


def create(name: str, config: CodecConfig, threads: int | None) -> Serde:
    """The serde called ``name``, on ``threads`` threads if ``config`` doesn't say."""
    codec = engine(config.threads or threads)
    if isinstance(config, CacheGenConfig):
        return CacheGenSerde(config, codec)
    plain: dict[str, type[CodecSerde]] = {
        "lossless": LosslessSerde,
        "int8": Int8Serde,
        "fp8": Fp8Serde,
    }
    return plain[name](config, codec)


def _turns(rope: Rope) -> bytes:
    """Cosine and sine of each frequency, as float64."""
    pairs = [f(angle) for angle in rope.frequencies for f in (math.cos, math.sin)]
    return struct.pack(f"<{len(pairs)}d", *pairs)
