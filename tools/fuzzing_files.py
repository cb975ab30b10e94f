"""The parsers that `fuzz` feeds with files, their names, addresses and peers' descriptions.

Files lie in memory where the system has a folder there, and stay open: making one on a disk takes
ten times as long as reading it.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import xxhash
import yaml
from fuzzing import Target, mutated

from lmcache_backend_mooncake.config import MooncakeConfig
from lmcache_backend_nixl.index import Index, OwnIndex
from lmcache_backend_nixl.slots import Shape as PoolShape
from lmcache_connector_vllm.adapters import AdapterUse, Board, Published
from lmcache_core import Plugins, load_config
from lmcache_core.builtin import filesystem_manifest as manifest
from lmcache_core.builtin.filesystem_io import ChunkFiles
from lmcache_core.builtin.filesystem_ledger import LEDGER, Space, UsageLedger, contents
from lmcache_core.builtin.filesystem_scan import _key
from lmcache_core.builtin.filesystem_usage import FolderUsage
from lmcache_core.chunks.keys import CacheNamespace, ChunkKey
from lmcache_core.chunks.layout import DType, KVLayout, full_attention
from lmcache_core.config.models import CoreConfig
from lmcache_core.contracts.transfer import PeerDescriptor
from lmcache_core.errors import BackendRejected, ConfigError, PluginError

GROUP = full_attention(layers=2, heads=2, head_size=32, dtype=DType.BF16)
NAMESPACE = CacheNamespace("model", KVLayout(16, (GROUP,)))
MEMORY = Path("/dev", "shm")
DEPTHS = (10, 200, 600, 900, 950, 980, 1_000, 20_000)


def nested(chance: random.Random) -> bytes:
    """JSON or YAML that is deeper than it is long."""
    depth = chance.choice(DEPTHS) + chance.randrange(20)
    opens, closes = chance.choice(((b"[", b"]"), (b'{"a":', b"}")))
    return opens * depth + b"1" + closes * depth


def odd(chance: random.Random, text: str) -> Any:
    """A value of JSON that is rarely what somebody expects; ``text`` is one of them."""
    kind = chance.randrange(12)
    if kind < 4:
        return text[: chance.choice((4, 20, 60))]
    if kind < 7:
        return chance.choice((0, 1, -1, 7, 256, 1 << 31, 1 << 63, 1 << 70, 0.5, 1e308, -0.0))
    if kind == 7:
        return chance.choice((float("nan"), float("inf"), "nan", "inf", "1e400", "0x10", "1_0"))
    if kind == 8:
        return chance.choice((True, None, "", " ", "\0", "\ud800", "true", "null", "[1", "{"))
    if kind == 9:
        return [odd(chance, text) for _ in range(chance.randrange(3))]
    if kind == 10:
        return {str(odd(chance, text)): odd(chance, text) for _ in range(chance.randrange(3))}
    deep: Any = text[:4]
    for _ in range(chance.choice((1, 5, 60))):
        deep = [deep] if chance.random() < 0.5 else {"a": deep}
    return deep


def damage(tree: Any, chance: random.Random, text: str) -> Any:
    """``tree`` with one of its values, or names, another one; it is changed."""
    at = tree
    while isinstance(at, dict) and at:
        name = chance.choice(list(at))
        if not isinstance(at[name], (dict, list)) or not at[name] or chance.random() < 0.3:
            if chance.random() < 0.2:
                at[text[:12]] = at.pop(name)
            else:
                at[name] = odd(chance, text)
            return tree
        at = at[name]
    if isinstance(at, list) and at:
        at[chance.randrange(len(at))] = odd(chance, text)
        return tree
    return odd(chance, text)


class InFolder(Target):
    """What lies in a file of a folder."""

    def __init__(self) -> None:
        where = MEMORY if os.access(MEMORY, os.W_OK) else None
        self._folder = tempfile.TemporaryDirectory(prefix="fuzz-", dir=where)
        self.folder = Path(self._folder.name)
        self._files: dict[str, tuple[Path, int, int]] = {}

    def put(self, name: str, data: bytes) -> Path:
        """The file ``name`` with ``data`` in it; a new one, if a parser removed or replaced it."""
        path, fd, number = self._files.get(name) or (self.folder / name, -1, -1)
        try:
            gone = os.stat(path).st_ino != number
        except FileNotFoundError:
            gone = True
        if gone:
            if fd >= 0:
                os.close(fd)
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            self._files[name] = path, fd, os.fstat(fd).st_ino
        os.ftruncate(fd, 0)
        os.pwrite(fd, data, 0)
        return path

    def close(self) -> None:
        for _, fd, _ in self._files.values():
            os.close(fd)
        self._files.clear()
        self._folder.cleanup()


class Manifest(InFolder):
    """A namespace's manifest and a folder's ledger; whatever they say, nothing is raised."""

    name = "manifest"
    documented = ()
    _space = "0123456789abcdef"

    def __init__(self) -> None:
        super().__init__()
        self._chunks = ChunkFiles("fuzz", direct=False, fsync=False)
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
            self.put(f"{self._space}/{manifest.NAME}", data)
            manifest.described(self._named)
            if chance.random() < 0.01:
                again = self._named.with_name("f" * 16)
                again.mkdir(exist_ok=True)
                (again / manifest.NAME).write_bytes(data)
                manifest.keep(again, NAMESPACE, self._chunks, "fuzz")
                if manifest.read(again) != manifest.facts(NAMESPACE):
                    raise AssertionError("a manifest that is damaged isn't written anew")

    def _look_at_ledger(self, data: bytes, chance: random.Random) -> None:
        if chance.random() < 0.8:  # what a checksum would hide
            text = data.partition(b"\n")[0]
            data = text + b"\n" + xxhash.xxh3_64_hexdigest(text).encode() + b"\n"
        found = UsageLedger.loaded(data)
        if found is not None and UsageLedger.loaded(found.dumped()) != found:
            raise AssertionError("a ledger isn't read as it is written")
        if chance.random() < 0.01:
            self.put(LEDGER, data)
            contents(self.folder)
            bound = chance.choice((None, 1 << 20))
            usage = FolderUsage(self.folder, self._space, self._chunks, bound)
            usage.open()
            for one in usage.standing():
                if len(one.space) != 16 or not one.space.isalnum():
                    raise AssertionError(f"a namespace is called {one.space!r}")
            usage.take(1)
            usage.close()


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
        path = self.put("pool", data)
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


class Boards(InFolder):
    """What a worker of vLLM publishes; a damaged file is none."""

    name = "board"
    documented = ()

    def __init__(self) -> None:
        super().__init__()
        self._board = Board("engine", lambda: self.folder)
        self._left = self.folder / "left"
        self._left.mkdir()
        self._others = Board("another", lambda: self._left)

    def samples(self) -> list[bytes]:
        published = Published(pid=1, loaded={"1": "x"}, replaced=[["a", "b"]])
        return [json.dumps(vars(published)).encode(), b'{"pid": 2}', b"{}"]

    def parse(self, data: bytes, chance: random.Random) -> None:
        if chance.random() < 0.01:
            data = b'{"loaded": ' + nested(chance) + b"}"
        self.put("engine.json", data)
        self._board._seen = None  # its time may be that of the one before
        found = self._board.read()
        if found is not None:
            found.content(AdapterUse(1, "x"))
        if chance.random() < 0.05:
            (self._left / "other.json").write_bytes(data)
            self._others.remove()


_MOONCAKE = {"local_hostname": "a", "metadata_server": "b", "master_server_address": "c:1"}
_MOONCAKE_WHOLE = {
    **_MOONCAKE,
    "protocol": "tcp",
    "global_segment_size": "4gb",
    "local_buffer_size": 1 << 20,
    "transfer_timeout": 2,
    "device_name": "",
    "enable_ssd_offload": "1",
    "ssd_offload_path": "x",
    "tenant_id": "",
}


class Mooncake(InFolder):
    """Mooncake's own configuration."""

    name = "mooncake"
    documented = (ValueError,)

    def samples(self) -> list[bytes]:
        return [json.dumps(_MOONCAKE).encode(), json.dumps(_MOONCAKE_WHOLE).encode()]

    def parse(self, data: bytes, chance: random.Random) -> None:
        if chance.random() < 0.01:
            data = b'{"protocol": ' + nested(chance) + b"}"
        if chance.random() < 0.5:
            tree = damage(dict(_MOONCAKE_WHOLE), chance, data.decode("latin-1"))
            data = json.dumps(tree).encode()
        MooncakeConfig(config_path=self.put("mooncake.json", data))


class Configuration(InFolder):
    """A configuration's file and variables, and what an engine passes on."""

    name = "config"
    documented = (ConfigError,)
    _whole = (
        b"chunk_size: 256\nlocal_cpu: true\nmax_local_cpu_size: 1.5\ncache_policy: LRU\n",
        b"backends:\n  disk: {type: filesystem, path: /tmp/x, serde: raw}\n  lm: {host: a}\n",
        b"remote_url: redis://host:6379\nextra_config: {a: 1}\nserdes: {cachegen: {step: t4}}",
        b"local_disk: file:///tmp/x\nmax_local_disk_size: 5\nremote_serde: naive\n",
    )
    """PyYAML takes a millisecond for one of them, so most runs of the file are short."""

    def __init__(self) -> None:
        super().__init__()
        self._plugins = Plugins()
        self._trees = [yaml.safe_load(text) for text in self._whole]
        self._options = list(CoreConfig.model_fields)

    def samples(self) -> list[bytes]:
        return [
            b"chunk_size: 256\n",
            b"a: &a {b: 1}\nc: *a\n",
            b"<<: {serde: raw}\n",
            b'{"local_cpu":\ttrue}',
            b"max_local_cpu_size: 1.5 # GiB\n",
            b"serde: !!int '3'\n",
        ]

    def parse(self, data: bytes, chance: random.Random) -> None:
        if chance.random() < 0.003:
            data = b"extra_config: " + nested(chance)[:600]
        way = chance.random()
        if way < 0.12:
            if chance.random() < 0.1:
                data = mutated(chance.choice(self._whole), self._whole, chance)
            path = self.put(chance.choice(("config.yaml", "config.json")), data)
            load_config(self._plugins, file=path, environ={})
            return
        text = data.decode(errors=chance.choice(("replace", "surrogateescape")))
        if way < 0.3:
            names = ("CHUNK_SIZE", "BACKENDS", "BACKENDS__A__URL", "EXTRA_CONFIG", "REMOTE_URL")
            load_config(self._plugins, environ={f"LMCACHE_{chance.choice(names)}": text})
            return
        tree = damage(deepcopy(chance.choice(self._trees)), chance, text)
        tree[chance.choice(self._options)] = odd(chance, text)
        given = {f"lmcache.{name}": value for name, value in tree.items()}
        load_config(self._plugins, environ={}, engine=("vLLM", given))


class FileNames(Target):
    """What files in a folder of chunks are called; whatever it is, nothing is raised."""

    name = "file-name"
    documented = ()

    def __init__(self) -> None:
        self._chunks = ChunkFiles("fuzz", direct=False, fsync=False)

    def samples(self) -> list[bytes]:
        path = Path("00") / bytes(16).hex()
        return [bytes(path), bytes(self._chunks._temporary(path)), b"00/.k.host.4194305.a-1.tmp"]

    def parse(self, data: bytes, chance: random.Random) -> None:  # noqa: ARG002
        path = Path(os.fsdecode(data.replace(b"\0", b"0")[:255]))
        _key(path)
        self._chunks.is_abandoned(path, time.time())


TARGETS: dict[str, Callable[[], Target]] = {
    target.name: target
    for target in (Manifest, Pool, Described, Addresses, Boards, Mooncake, Configuration, FileNames)
}
