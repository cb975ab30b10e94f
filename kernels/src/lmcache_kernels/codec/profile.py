"""What calibration found out about a model, for `cachegen`. See docs/codec-format.md.

A profile is a file named after its content. Streams name the profile that they need by the first
eight bytes of that name; decoding without it is an error, which core makes a miss.

Knows bytes. Knows nothing about how a profile is made, nor which one a serde should use.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from lmcache_core import ConfigError, LayerGroup
from lmcache_kernels import _native

MAGIC = b"KVP1"
VERSION = 2
SUFFIX = ".kvprofile"
_HEAD = struct.Struct("<4sHHIIIHHII")
_KEY_MEANS, _GAINS, _BASES = 1, 2, 4
_MOST_IDENTITY = 4096


@dataclass(frozen=True)
class Profile:
    """Numbers for each channel, in the order layers, heads of all ranks, elements of a head.

    ``steps``: float32, the step of a key's channel for a logit noise of about one.
    ``means``: bfloat16, the mean of a value's channel.
    ``key_means``: bfloat16, that of a key's channel before rotation; empty if unknown.
    ``basis_heads``: heads whose channels share a basis, 0 if there are none. With H heads a layer
    has ⌈H / basis_heads⌉ blocks of C = heads × head_size channels, the last maybe of fewer.
    ``key_basis``, ``value_basis``: binary16, for each layer and each of its blocks C × C: row c,
    column k is what channel c has of component k. Orthogonal; of keys, they are the components of
    ``(key - key_means) / steps``; of values those of ``(value - means) / r``, where r is the rms
    of the token's head. Largest variance first, which decodes faster.
    ``gains``: float32, layers × (keys, values): what multiplies a layer's steps; empty for ones.

    Raises:
        ValueError: lengths don't fit to each other.
    """

    layers: int
    heads: int
    head_size: int
    steps: bytes
    means: bytes
    first_layer: int = 0
    """The model's number of the first of them."""
    model: str = ""
    """Names the weights: `lmcache_core.weights_identity`. Empty: any that has this shape."""
    key_means: bytes = b""
    basis_heads: int = 0
    key_basis: bytes = b""
    value_basis: bytes = b""
    gains: bytes = b""
    _natives: dict[tuple[object, ...], _native.CodecProfile] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if min(self.layers, self.heads, self.head_size) < 1 or self.basis_heads > self.heads:
            raise ValueError(
                "layers, heads and head size are positive; a basis has no more heads than there are"
            )
        if len(self.model.encode()) > _MOST_IDENTITY:
            raise ValueError(f"a model's identity has {_MOST_IDENTITY} bytes at most")
        if self.basis_heads and not self.key_means:
            raise ValueError("a basis of keys is around means of keys, which aren't there")
        for name, size in _sizes(self, self._flags).items():
            if len(getattr(self, name)) != size:
                raise ValueError(f"{name} has {len(getattr(self, name))} bytes, not {size}")

    @property
    def _flags(self) -> int:
        return (
            (_KEY_MEANS if self.key_means else 0)
            | (_GAINS if self.gains else 0)
            | (_BASES if self.basis_heads else 0)
        )

    @property
    def kind(self) -> str:
        """``T2``; ``T3`` with bases; ``T4`` with bases and gains."""
        if not self.basis_heads:
            return "T2"
        return "T4" if self.gains else "T3"

    @cached_property
    def content(self) -> bytes:
        """The file's bytes."""
        model = self.model.encode()
        head = _HEAD.pack(
            MAGIC,
            VERSION,
            self.first_layer,
            self.layers,
            self.heads,
            self.head_size,
            self._flags,
            self.basis_heads,
            len(model),
            0,
        )
        return b"".join([head, model, *(getattr(self, name) for name in _sizes(self, self._flags))])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file, in hexadecimal: its name."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def id(self) -> int:
        """The digest's first eight bytes as a little-endian integer; in streams."""
        return int.from_bytes(bytes.fromhex(self.digest[:16]), "little")

    def save(self, folder: Path) -> Path:
        """Write ``<digest>.kvprofile`` into ``folder``, which is made if need be.

        Nobody sees a file that is only half written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.digest}{SUFFIX}"
        partial = path.with_suffix(".partial")
        partial.write_bytes(self.content)
        partial.replace(path)
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
            found = _parse(content)
        except (struct.error, ValueError) as error:
            raise ConfigError(f"profile {path} isn't one: {error}; calibrate the model") from None
        if path.suffix == SUFFIX and path.stem != found.digest:
            raise ConfigError(f"profile {path} has changed: its content is {found.digest}")
        return found

    @classmethod
    def find(cls, folder: Path, model: str, group: LayerGroup) -> Profile | None:
        """The best profile in ``folder`` for the model called ``model``; ``None`` if none is.

        ``group`` is one rank's. Bases and gains are better than none; of equals the newest file is
        taken. What isn't a profile is passed over.

        Raises:
            ConfigError: the best one's content isn't what its name says.
        """
        found = []
        for path, head in _heads(folder):
            layers = range(head.first_layer, head.first_layer + head.layers)
            if (
                head.model == model != ""
                and head.head_size == group.head_size
                and head.heads == group.model_heads
                and all(layer in layers for layer in group.layers)
            ):
                rank = (head.flags & _BASES, head.flags & _GAINS, path.stat().st_mtime_ns, path)
                found.append(rank)
        return cls.load(max(found)[-1]) if found else None

    @classmethod
    def named(cls, folder: Path, number: int) -> Profile | None:
        """The profile in ``folder`` whose `id` is ``number``; ``None`` if it isn't there.

        Raises:
            ConfigError: its content isn't what its name says.
        """
        start = number.to_bytes(8, "little").hex()
        for path in sorted(folder.glob(f"{start}*{SUFFIX}")):
            return cls.load(path)
        return None

    def of(self, group: LayerGroup) -> _native.CodecProfile | None:
        """This profile for a rank's ``group``; ``None`` if it isn't of these layers and heads.

        Without its bases, if those mix heads of several ranks.

        Raises:
            ValueError: it has numbers that no model has.
        """
        first = group.first_head
        rows = [layer - self.first_layer for layer in group.layers]
        if (
            group.planes != 2
            or (group.model_heads, group.head_size) != (self.heads, self.head_size)
            or min(rows) < 0
            or max(rows) >= self.layers
        ):
            return None
        key = (group.layers, first, group.heads)
        if key not in self._natives:
            self._natives[key] = self._make_native(rows, first, group.heads)
        return self._natives[key]

    def _make_native(self, rows: list[int], first: int, heads: int) -> _native.CodecProfile:
        """For layers number ``rows`` of these, and ``heads`` heads from number ``first`` on."""
        every, part = self.heads * self.head_size, slice(first, first + heads)

        def of_channels(data: bytes, size: int) -> bytes:
            one = size * self.head_size
            begins = [size * every * row + one * part.start for row in rows]
            return b"".join(data[at : at + one * heads] for at in begins if data)

        gains = struct.unpack(f"<{len(self.gains) // 4}f", self.gains)
        steps = of_channels(self.steps, 4)
        if gains:
            plain = struct.iter_unpack(f"<{heads * self.head_size}f", steps)
            scaled = [s * gains[2 * r] for r, row in zip(rows, plain, strict=True) for s in row]
            steps = struct.pack(f"<{len(scaled)}f", *scaled)
        whole = heads == self.heads
        bases = self.basis_heads
        if bases and not whole and (first % bases or heads % bases):
            bases = 0
        layer = basis_bytes(self.heads, self.head_size, bases)
        skip = basis_bytes(first, self.head_size, bases)
        size = basis_bytes(heads, self.head_size, bases)

        def of_bases(data: bytes) -> bytes:
            begins = [layer * row + skip for row in rows]
            return b"".join(data[at : at + size] for at in begins)

        return _native.CodecProfile(
            self.id,
            steps,
            of_channels(self.means, 2),
            of_channels(self.key_means, 2),
            struct.pack(f"<{len(rows)}f", *(gains[2 * row + 1] for row in rows)) if gains else b"",
            bases,
            of_bases(self.key_basis),
            of_bases(self.value_basis),
        )


def basis_bytes(heads: int, head_size: int, basis_heads: int) -> int:
    """Bytes of the bases of one layer's keys, or values."""
    if basis_heads == 0:
        return 0
    whole, rest = divmod(heads, basis_heads)
    return 2 * head_size**2 * (whole * basis_heads**2 + rest**2)


@dataclass(frozen=True)
class _Head:
    """A file's first bytes."""

    first_layer: int
    layers: int
    heads: int
    head_size: int
    flags: int
    basis_heads: int
    model: str
    bytes: int


def _sizes(shape: Profile | _Head, flags: int) -> dict[str, int]:
    """What follows the identity, in order: how many bytes each has."""
    channels = shape.layers * shape.heads * shape.head_size
    basis = shape.layers * basis_bytes(shape.heads, shape.head_size, shape.basis_heads)
    return {
        "steps": 4 * channels,
        "means": 2 * channels,
        "key_means": 2 * channels if flags & _KEY_MEANS else 0,
        "gains": 8 * shape.layers if flags & _GAINS else 0,
        "key_basis": basis,
        "value_basis": basis,
    }


def _parse_head(content: bytes) -> _Head:
    magic, version, first, layers, heads, size, flags, basis_heads, length, zero = (
        _HEAD.unpack_from(content)
    )
    if (magic, version) != (MAGIC, VERSION):
        raise ValueError(f"starts with {magic!r}, version {version}")
    if flags & ~(_KEY_MEANS | _GAINS | _BASES) or zero or (basis_heads > 0) != bool(flags & _BASES):
        raise ValueError("has bits of a later format")
    if length > _MOST_IDENTITY or len(content) < _HEAD.size + length:
        raise ValueError("ends inside of its model's identity")
    end = _HEAD.size + length
    model = content[_HEAD.size : end].decode()
    return _Head(first, layers, heads, size, flags, basis_heads, model, end)


def _parse(content: bytes) -> Profile:
    head = _parse_head(content)
    parts: dict[str, bytes] = {}
    at = head.bytes
    for name, size in _sizes(head, head.flags).items():
        parts[name] = content[at : at + size]
        at += size
    if at != len(content):
        raise ValueError(f"has {len(content)} bytes, not {at}")
    return Profile(
        head.layers,
        head.heads,
        head.head_size,
        first_layer=head.first_layer,
        model=head.model,
        basis_heads=head.basis_heads,
        **parts,
    )


def _heads(folder: Path) -> Iterator[tuple[Path, _Head]]:
    """The profiles in ``folder``, without reading more than their beginning."""
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        head = _head_of(path)
        if head is not None:
            yield path, head


def _head_of(path: Path) -> _Head | None:
    try:
        with path.open("rb") as file:
            return _parse_head(file.read(_HEAD.size + _MOST_IDENTITY))
    except (OSError, ValueError, struct.error):
        return None
