"""The parsers that `fuzz` feeds with what files, addresses and peers' descriptions say."""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import xxhash
from fuzzing import Target

from lmcache_backend_mooncake.config import MooncakeConfig
from lmcache_backend_nixl.index import Index, OwnIndex
from lmcache_backend_nixl.slots import Shape as PoolShape
from lmcache_connector_vllm.adapters import AdapterUse, Board, Published
from lmcache_core import Plugins, load_config
from lmcache_core.builtin import filesystem_manifest as manifest
from lmcache_core.builtin.filesystem_io import ChunkFiles
from lmcache_core.builtin.filesystem_ledger import LEDGER, Space, UsageLedger, contents
from lmcache_core.builtin.filesystem_usage import FolderUsage
from lmcache_core.errors import BackendRejected, ConfigError, PluginError
from lmcache_core.keys import CacheNamespace, ChunkKey
from lmcache_core.layout import DType, KVLayout, full_attention
from lmcache_core.transfer import PeerDescriptor
from lmcache_kernels.codec.aesgcm import KEYS_VARIABLE, AesGcmConfig, read_keys
from lmcache_kernels.codec.gpu import stream
from lmcache_kernels.codec.profile import Profile

GROUP = full_attention(layers=2, heads=2, head_size=32, dtype=DType.BF16)
NAMESPACE = CacheNamespace("model", KVLayout(16, (GROUP,)))
DEPTHS = (10, 200, 600, 900, 950, 980, 1_000, 20_000)


def nested(chance: random.Random) -> bytes:
    """JSON or YAML that is deeper than it is long."""
    depth = chance.choice(DEPTHS) + chance.randrange(20)
    opens, closes = chance.choice(((b"[", b"]"), (b'{"a":', b"}")))
    return opens * depth + b"1" + closes * depth


class InFolder(Target):
    """What lies in a file of a folder."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fuzz-")
        self.folder = Path(self._folder.name)

    def close(self) -> None:
        self._folder.cleanup()


class Manifest(InFolder):
    """A namespace's manifest and a folder's ledger; whatever they say, nothing is raised."""

    name = "manifest"
    documented = ()
    _space = "0123456789abcdef"

    def __init__(self) -> None:
        super().__init__()
        self._files = ChunkFiles("fuzz", direct=False, fsync=False)
        self._named = self.folder / self._space
        self._named.mkdir()

    def samples(self) -> list[bytes]:
        writers = {"0" * 16: (self._space, 4096), "1" * 16: ("f" * 16, 0)}
        ledger = UsageLedger(True, {self._space: Space(5, 9, 7), "f" * 16: Space()}, writers)
        return [
            ledger.dumped().rstrip() + b"\n",
            UsageLedger().dumped().rstrip() + b"\n",
            json.dumps(manifest.facts(NAMESPACE), indent=1).encode(),
            b'{"known_to": "clients", "format": 1}',
            b'{"model": {"a": [1.5, null, true]}, "layout": {"tokens_per_chunk": [1]}, "place": 2}',
        ]

    def parse(self, data: bytes, chance: random.Random) -> None:
        if chance.random() < 0.01:
            data = data[:-1] + b', "model": ' + nested(chance) + b"}"
        if chance.random() < 0.6:
            self._look_at_ledger(data, chance)
        else:
            (self._named / manifest.NAME).write_bytes(data)
            manifest.described(self._named)
            if chance.random() < 0.1:
                manifest.keep(self._named, NAMESPACE, self._files, "fuzz")
                if manifest.read(self._named) != manifest.facts(NAMESPACE):
                    raise AssertionError("a manifest that is damaged isn't written anew")

    def _look_at_ledger(self, data: bytes, chance: random.Random) -> None:
        if chance.random() < 0.8:  # what a checksum would hide
            text = data.partition(b"\n")[0]
            data = text + b"\n" + xxhash.xxh3_64_hexdigest(text).encode() + b"\n"
        found = UsageLedger.loaded(data)
        if found is not None and UsageLedger.loaded(found.dumped()) != found:
            raise AssertionError("a ledger isn't read as it is written")
        if chance.random() < 0.05:
            (self.folder / LEDGER).write_bytes(data)
            contents(self.folder)
            bound = chance.choice((None, 1 << 20))
            usage = FolderUsage(self.folder, self._space, self._files, bound)
            usage.open()
            for one in usage.standing():
                if len(one.space) != 16 or not one.space.isalnum():
                    raise AssertionError(f"a namespace is called {one.space!r}")
            usage.take(1)
            usage.close()


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
        path = self.folder / "one"
        path.write_bytes(data)
        if chance.random() < 0.3:
            path = path.rename(self.folder / "one.kvprofile")
            Profile.find(self.folder, "m", GROUP)
        found = Profile.load(path)
        with suppress(ValueError):  # numbers that no model has
            found.of(GROUP)


class Pool(InFolder):
    """The index of a pool of NIXL's; whatever it says, nothing is raised."""

    name = "nixl"
    documented = ()
    _shape = PoolShape(4096, 2, 1)

    def samples(self) -> list[bytes]:
        path = self.folder / "made"
        path.touch()
        own = self._own(path)
        own.recover(3, self._shape, 3)
        keys = [ChunkKey(bytes(range(16))), ChunkKey(bytes(32))]
        own.publish([(0, keys[0], 100), (2, keys[1], 4096)])
        own.close()
        return [path.read_bytes()]

    def _own(self, path: Path) -> OwnIndex:
        return OwnIndex(path, "pool", os.open(path, os.O_RDWR))

    def parse(self, data: bytes, chance: random.Random) -> None:
        path = self.folder / "pool"
        path.write_bytes(data)
        index = Index(path, "pool")
        try:
            index.refresh()
            for entry in index.entries.values():
                if not 0 < entry.nbytes <= index.shape.slot_bytes:
                    raise AssertionError(f"a value of {entry.nbytes} bytes is in a slot")
        finally:
            index.close()
        if chance.random() < 0.2:
            own = self._own(path)
            try:
                own.recover(3, self._shape, 3)
            finally:
                own.close()


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


class Described(Target):
    """A peer's description of its region."""

    name = "descriptor"
    documented = (BackendRejected,)

    def samples(self) -> list[bytes]:
        return [
            PeerDescriptor("tcp", "me", 1 << 20, True, bytes(40)).encode(),
            PeerDescriptor("nixl", "", 0, False, b"").encode(),
        ]

    def parse(self, data: bytes, chance: random.Random) -> None:
        if chance.random() < 0.8:  # what a checksum would hide
            data = data[:-8] + xxhash.xxh3_64_digest(data[:-8])
        found = PeerDescriptor.decode(data, chance.choice(("tcp", "nixl")))
        if PeerDescriptor.decode(found.encode(), found.channel) != found:
            raise AssertionError("a description isn't read as it is written")


class Addresses(Target):
    """Addresses of every backend, and the options that are made of them."""

    name = "url"
    documented = (PluginError, ValueError)
    """As LMCache's ``remote_url``; what the model says of the options is a ValueError."""

    def __init__(self) -> None:
        self._plugins = Plugins()

    def samples(self) -> list[bytes]:
        return [
            b"redis://user:secret@host:6379/3?a=1",
            b"rediss-sentinel://[::1]:1,b:2/master",
            b"redis-cluster://a:1,b:2",
            b"lm://host:65432?token_file=/x&tls=true",
            b"lm+tls://host:1?ca_file=/x",
            b"lm+unix:///run/lmcache.sock",
            b"mooncakestore://host:50051/?device=eth0",
            b"infinistore://host:12345?device=mlx5_0",
            b"file:///tmp/x?fsync=true",
            b"fs://host:1/tmp/x%20y",
        ]

    def parse(self, data: bytes, chance: random.Random) -> None:
        errors = chance.choice(("replace", "surrogateescape", "ignore"))
        url = data.decode(errors=errors)
        descriptor = self._plugins.backend_for_url(url)
        if descriptor is not None:
            descriptor.config.model_validate(self._plugins.options_from_url(descriptor, url))


class Keys(Target):
    """Keys of aesgcm, as a variable has them."""

    name = "keys"
    documented = (ConfigError,)

    def samples(self) -> list[bytes]:
        key = b"MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
        return [b"1 " + key, b"# old\n7 " + key + b", 8 " + b"ab" * 32, b"9" * 5000 + b" " + key]

    def parse(self, data: bytes, chance: random.Random) -> None:  # noqa: ARG002
        read_keys(AesGcmConfig(), {KEYS_VARIABLE: data.decode(errors="replace")})


class Boards(InFolder):
    """What a worker of vLLM publishes; a damaged file is none."""

    name = "board"
    documented = ()

    def __init__(self) -> None:
        super().__init__()
        self._board = Board("engine", lambda: self.folder)

    def samples(self) -> list[bytes]:
        published = Published(pid=1, loaded={"1": "x"}, replaced=[["a", "b"]])
        return [json.dumps(vars(published)).encode(), b'{"pid": 2}', b"{}"]

    def parse(self, data: bytes, chance: random.Random) -> None:
        if chance.random() < 0.01:
            data = b'{"loaded": ' + nested(chance) + b"}"
        path = self.folder / "engine.json"
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        found = self._board.read()
        if found is not None:
            found.content(AdapterUse(1, "x"))
        if chance.random() < 0.1:
            path.rename(self.folder / "other.json")
            self._board.remove()


class Mooncake(InFolder):
    """Mooncake's own configuration."""

    name = "mooncake"
    documented = (ValueError,)

    def samples(self) -> list[bytes]:
        plain = {"local_hostname": "a", "metadata_server": "b", "master_server_address": "c:1"}
        more = {"protocol": "tcp", "global_segment_size": "4gb", "local_buffer_size": 1 << 20}
        return [json.dumps(plain).encode(), json.dumps({**plain, **more}).encode()]

    def parse(self, data: bytes, chance: random.Random) -> None:
        if chance.random() < 0.01:
            data = b'{"protocol": ' + nested(chance) + b"}"
        path = self.folder / "mooncake.json"
        path.write_bytes(data)
        MooncakeConfig(config_path=path)


class Configuration(InFolder):
    """A configuration's file and variables."""

    name = "config"
    documented = (ConfigError,)

    def __init__(self) -> None:
        super().__init__()
        self._plugins = Plugins()

    def samples(self) -> list[bytes]:
        return [
            b"chunk_size: 256\nlocal_cpu: true\nmax_local_cpu_size: 1.5\ncache_policy: LRU\n",
            b"backends:\n  disk: {type: filesystem, path: /tmp/x, serde: raw}\n  lm: {host: a}\n",
            b"remote_url: redis://host:6379\nextra_config: {a: 1}\nserdes: {cachegen: {step: t4}}",
            b"local_disk: file:///tmp/x\nmax_local_disk_size: 5\nremote_serde: naive\n",
            b"a: &a {b: 1}\nc: {<<: *a, d: [*a, *a]}\n",
        ]

    def parse(self, data: bytes, chance: random.Random) -> None:
        if chance.random() < 0.01:
            data = b"extra_config: " + nested(chance)[:600]
        if chance.random() < 0.8:
            path = self.folder / chance.choice(("config.yaml", "config.json"))
            path.write_bytes(data)
            load_config(self._plugins, file=path, environ={})
        else:
            name = chance.choice(("CHUNK_SIZE", "BACKENDS", "BACKENDS__A__URL", "EXTRA_CONFIG"))
            text = data.decode(errors="replace")
            load_config(self._plugins, environ={f"LMCACHE_{name}": text})


TARGETS: dict[str, Callable[[], Target]] = {
    target.name: target
    for target in (
        *(Manifest, Profiles, Pool, Gpu, Described, Addresses, Keys, Boards, Mooncake),
        Configuration,
    )
}
