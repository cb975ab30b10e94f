"""The parsers of codecs that `fuzz` feeds: containers, streams, profiles and keys."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress

from fuzzing import Target
from fuzzing_files import GROUP, InFolder

from lmcache_core import Plugins
from lmcache_core.chunks.layout import DType, full_attention
from lmcache_core.contracts.serde import Serde
from lmcache_core.errors import ConfigError
from lmcache_core.tiers.serde_chain import chain_serdes
from lmcache_kernels.codec.aesgcm import KEYS_VARIABLE, AesGcmConfig, read_keys
from lmcache_kernels.codec.gpu import stream
from lmcache_kernels.codec.profile import Profile


class Codec(Target):
    """Containers of every installed codec; ValueError is what `Serde.decode` documents."""

    name = "codec"
    documented = (ValueError,)
    _group, _tokens = full_attention(layers=2, heads=2, head_size=32, dtype=DType.BF16), 16

    def __init__(self) -> None:
        self._serdes: list[Serde] = []

    def samples(self) -> list[bytes]:
        nbytes = self._group.chunk_bytes(self._tokens)
        chunk = random.Random(0).randbytes(nbytes)
        found = []
        for descriptor in Plugins().serdes():
            if descriptor.name == "aesgcm":  # its first check is that of a signature
                continue
            serde = descriptor.create(descriptor.config())
            into = bytearray(serde.max_encoded_bytes(self._group, self._tokens))
            size = serde.encode(memoryview(chunk), memoryview(into), self._group, self._tokens)
            self._serdes.append(serde)
            found.append(bytes(into[:size]))
        return [*found, self._chained(chunk)]

    def parse(self, data: bytes, chance: random.Random) -> None:
        into = bytearray(self._group.chunk_bytes(self._tokens))
        serde = chance.choice(self._serdes)
        serde.decode(memoryview(data), memoryview(into), self._group, self._tokens)

    def _chained(self, chunk: bytes) -> bytes:
        named = {one.name: one for one in Plugins().serdes()}
        links = (named[name] for name in ("cachegen", "raw"))
        serde = chain_serdes([link.create(link.config()) for link in links])
        into = bytearray(serde.max_encoded_bytes(self._group, self._tokens))
        size = serde.encode(memoryview(chunk), memoryview(into), self._group, self._tokens)
        self._serdes.append(serde)
        return bytes(into[:size])


class Gpu(Target):
    """Streams of the codecs, as the host reads them for a GPU."""

    name = "gpu-stream"
    documented = (ValueError,)
    _shape = stream.Shape(stream.BF16, 2, 2, 2, 32, 16)

    def samples(self) -> list[bytes]:
        chunk = random.Random(0).randbytes(GROUP.chunk_bytes(16))
        found = []
        for descriptor in Plugins().serdes():
            if descriptor.name in ("aesgcm", "raw"):  # these write no streams
                continue
            serde = descriptor.create(descriptor.config())
            into = bytearray(serde.max_encoded_bytes(GROUP, 16))
            size = serde.encode(memoryview(chunk), memoryview(into), GROUP, 16)
            found.append(bytes(into[:size]))
        return found

    def parse(self, data: bytes, chance: random.Random) -> None:
        if chance.random() < 0.9:
            data = self._repaired(bytearray(data))
        kind = data[6] if len(data) > 6 and chance.random() < 0.9 else chance.randint(1, 4)
        every = range(self._shape.layers)
        layers = chance.choice((every, range(1), range(1, 2)))
        header, entries = stream.read(memoryview(data), self._shape, kind, None, layers)
        blocks = stream.blocks(self._shape, header.block_heads, layers)
        for entry, block in zip(entries, blocks, strict=True):
            for name, at in stream.parts(entry, block, self._shape, header).items():
                if not 0 <= at <= len(data):
                    raise AssertionError(f"{name} is at {at} of {len(data)} bytes")

    @staticmethod
    def _repaired(data: bytearray) -> bytes:
        """With the checksums that what is there has."""
        head, section = stream._HEADER.size, stream._SECTION
        if len(data) < head:
            return bytes(data)
        fields = list(stream._HEADER.unpack_from(data))
        payload = head + 16 * fields[10] + section.size * fields[15]
        if payload > len(data):
            return bytes(data)
        for at in range(head + 16 * fields[10], payload, section.size):
            row = list(section.unpack_from(data, at))
            begin = payload + row[0]
            row[5] = stream._checksum(memoryview(data)[begin : begin + row[1]])
            section.pack_into(data, at, *row)
        fields[-1] = stream._head_checksum(memoryview(data)[:payload])
        stream._HEADER.pack_into(data, 0, *fields)
        return bytes(data)


class Profiles(InFolder):
    """A calibrated profile."""

    name = "profile"
    documented = (ConfigError,)

    def samples(self) -> list[bytes]:
        channels, basis = 2 * 2 * 32, 2 * 2 * 32 * 32 * 2
        steps, means = b"\0\0\0\x3f" * channels, b"\0\x3f" * channels
        plain = Profile(2, 2, 32, steps, means, model="m")
        full = Profile(
            *(2, 2, 32, steps, means),
            key_means=means,
            basis_heads=1,
            key_basis=bytes(basis),
            value_basis=bytes(basis),
            gains=b"\0\0\x80\x3f" * 4,
        )
        return [plain.content, full.content]

    def parse(self, data: bytes, chance: random.Random) -> None:
        if chance.random() < 0.1:
            self.put("one.kvprofile", data)
            Profile.find(self.folder, "m", GROUP)
        found = Profile.load(self.put("one", data))
        with suppress(ValueError):  # numbers that no model has
            found.of(GROUP)


class Keys(Target):
    """Keys of aesgcm, as a variable has them."""

    name = "keys"
    documented = (ConfigError,)

    def samples(self) -> list[bytes]:
        key = b"MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
        return [b"1 " + key, b"# old\n7 " + key + b", 8 " + b"ab" * 32, b"9" * 5000 + b" " + key]

    def parse(self, data: bytes, chance: random.Random) -> None:  # noqa: ARG002
        read_keys(AesGcmConfig(), {KEYS_VARIABLE: data.decode(errors="replace")})


TARGETS: dict[str, Callable[[], Target]] = {
    target.name: target for target in (Codec, Gpu, Profiles, Keys)
}
