"""What calibration found out about a model, for `cachegen`. See docs/codec-format.md.

A profile is a file named after its content. Streams name the profile that they need by the first
eight bytes of that name; decoding without it is an error, which core makes a miss.

Knows bytes. Knows nothing about how a profile is made.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from lmcache_core.errors import ConfigError
from lmcache_core.layout import LayerGroup
from lmcache_kernels import _native

MAGIC = b"KVP1"
_HEAD = struct.Struct("<4sHHIII12x")


@dataclass(frozen=True)
class Profile:
    """``layers x heads x head_size`` numbers of each kind, for one rank's heads.

    ``steps``: float32, the step of a key's channel for a logit noise of one, in model order.
    ``means``: bfloat16, the mean of a value's channel.
    """

    layers: int
    heads: int
    head_size: int
    steps: bytes
    means: bytes
    first_layer: int = 0
    """The model's number of the first of them."""
    _natives: dict[tuple[int, ...], _native.CodecProfile] = field(
        default_factory=dict, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        channels = self.layers * self.heads * self.head_size
        if channels < 1 or (len(self.steps), len(self.means)) != (4 * channels, 2 * channels):
            raise ValueError(f"{channels} channels have other sizes than these steps and means")

    @cached_property
    def content(self) -> bytes:
        """The file's bytes."""
        head = _HEAD.pack(MAGIC, 1, self.first_layer, self.layers, self.heads, self.head_size)
        return head + self.steps + self.means

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file, in hexadecimal: its name."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def id(self) -> int:
        """The digest's first eight bytes as a little-endian integer; in streams."""
        return int.from_bytes(bytes.fromhex(self.digest[:16]), "little")

    def save(self, folder: Path) -> Path:
        """Write ``<digest>.kvprofile`` into ``folder``."""
        path = folder / f"{self.digest}.kvprofile"
        path.write_bytes(self.content)
        return path

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read a file that `save` wrote.

        Raises:
            ConfigError: there is no such file, or it isn't a profile, or not the one that its name
                says.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"profile {path}: {error.strerror}; calibrate the model") from None
        try:
            magic, version, first, layers, heads, size = _HEAD.unpack_from(content)
            if (magic, version) != (MAGIC, 1):
                raise ValueError(f"starts with {magic!r}, version {version}")
            middle = _HEAD.size + 4 * layers * heads * size
            found = cls(layers, heads, size, content[_HEAD.size : middle], content[middle:], first)
        except (struct.error, ValueError) as error:
            raise ConfigError(f"profile {path} isn't one: {error}; calibrate the model") from None
        if path.suffix == ".kvprofile" and path.stem != found.digest:
            raise ConfigError(f"profile {path} has changed: its content is {found.digest}")
        return found

    def of(self, group: LayerGroup) -> _native.CodecProfile | None:
        """This profile for ``group``; ``None`` if it isn't one of these layers and heads."""
        if group.planes != 2 or (group.heads, group.head_size) != (self.heads, self.head_size):
            return None
        rows = [layer - self.first_layer for layer in group.layers]
        if min(rows) < 0 or max(rows) >= self.layers:
            return None
        if group.layers not in self._natives:
            each = self.heads * self.head_size
            self._natives[group.layers] = _native.CodecProfile(
                self.id, _rows(self.steps, rows, 4 * each), _rows(self.means, rows, 2 * each)
            )
        return self._natives[group.layers]


def _rows(data: bytes, rows: Sequence[int], size: int) -> bytes:
    return b"".join(data[row * size : (row + 1) * size] for row in rows)
