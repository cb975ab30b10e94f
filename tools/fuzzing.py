"""What `fuzz` feeds with what others send or store: valid samples, a call, the errors it documents.

What files and addresses say is in `fuzzing_files`, codecs are in `fuzzing_codecs`, and what users
ask an engine for in `fuzzing_requests`.
"""

from __future__ import annotations

import inspect
import json
import random
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType, ModuleType
from typing import Any

from lmcache_backend_infinistore import wire as infinistore
from lmcache_backend_infinistore.layout import Head as InfiniHead
from lmcache_backend_infinistore.links import HEAD_BYTES
from lmcache_backend_lm import greeting, inventory, protocol
from lmcache_backend_lm.inventory import Purged, Stock
from lmcache_backend_redis.blocking import BlockingWire, at_once
from lmcache_backend_redis.commands import discard, intact
from lmcache_backend_redis.layout import HEAD as REDIS_HEAD
from lmcache_backend_redis.layout import Head as RedisHead
from lmcache_backend_redis.loading import Load
from lmcache_backend_redis.resp import ReplyError
from lmcache_core.chunks.frame import HEADER_BYTES, checksums, may_start, read_header, write_header
from lmcache_core.chunks.keys import CacheNamespace, ChunkKey
from lmcache_core.chunks.layout import DType, KVLayout, full_attention
from lmcache_core.contracts.storage import BackendContext
from lmcache_core.errors import BackendError, FrameError, LMCacheError
from lmcache_core.isolation import wire as isolation
from lmcache_core.transfer_tcp import wire as tcp

Errors = tuple[type[BaseException], ...]
_MOST_BYTES = 1 << 20
"""Of a value, where a parser is told."""
_LENGTHS = (0, 1, 0x7F, 0xFF, 0x100, 0x7FFF, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1)


def mutated(sample: bytes, others: Sequence[bytes], chance: random.Random) -> bytes:
    """``sample`` with one to four things done to it."""
    data = bytearray(sample)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at = chance.randrange(len(data) + 1)
        kind = chance.randrange(8)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << chance.randrange(8)
        elif kind == 1 and data:
            data[at % len(data)] = chance.randrange(256)
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + chance.randint(1, 8)]
        elif kind == 4:
            data[at:at] = chance.randbytes(chance.randint(1, 8))
        elif kind == 5:
            data[at:at] = data[at : at + chance.randint(1, 64)] * chance.randint(1, 8)
        elif kind == 6:
            size = chance.choice((1, 2, 4, 8))
            number = (chance.choice(_LENGTHS) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
            data[at : at + size] = number
        else:
            other = chance.choice(others)
            data[at:] = other[chance.randrange(len(other) + 1) :]
    return bytes(data)


class Target(ABC):
    """A parser."""

    name: str
    documented: Errors

    @abstractmethod
    def samples(self) -> list[bytes]:
        """Valid input, of each kind."""

    @abstractmethod
    def parse(self, data: bytes, chance: random.Random) -> None:
        """Parse it; raise what is `documented`, or nothing."""

    def close(self) -> None:  # noqa: B027  most have nothing to let go of
        """Let go of everything."""


class Frame(Target):
    """What a tier gave back."""

    name = "frame"
    documented = (FrameError,)
    _key, _place = ChunkKey(bytes(range(16))), "0123456789abcdef"

    def samples(self) -> list[bytes]:
        return [self._made(nbytes, raw) for nbytes in (64, 4096) for raw in (True, False)]

    def _made(self, nbytes: int, raw: bool) -> bytes:
        frame = bytearray(HEADER_BYTES + nbytes)
        sums = checksums(memoryview(frame)[HEADER_BYTES:], 2)
        write_header(
            memoryview(frame),
            key=self._key,
            fingerprint=self._place,
            serde=1,
            exact=True,
            raw_bytes=nbytes,
            payload_bytes=nbytes,
            chunk_sums=sums,
            raw=raw,
        )
        return bytes(frame)

    def parse(self, data: bytes, chance: random.Random) -> None:
        if chance.random() < 0.5 and len(data) >= HEADER_BYTES:  # what a checksum would hide
            import xxhash

            head = data[:120] + xxhash.xxh3_64_intdigest(data[:120]).to_bytes(8, "little")
            data = head + data[HEADER_BYTES:]
        may_start(data[:HEADER_BYTES], key=self._key, nbytes=len(data))
        read_header(memoryview(data), key=self._key, fingerprint=self._place)


class Parsers(Target):
    """All functions ``parse_…`` of some modules, one after the other, on the same bytes."""

    modules: tuple[ModuleType, ...]
    exact: Mapping[str, int] = MappingProxyType({})
    """Functions that are always given so many bytes."""

    def facts(self, chance: random.Random) -> dict[str, Any]:
        """Values for their further parameters, by name."""
        numbers = [chance.choice((0, 1, 7, 64, 1 << 20)) for _ in range(chance.randrange(5))]
        return {
            "count": chance.choice((0, 1, 2, 3, 64)),
            "slots": chance.choice((1, 64)),
            "bound": chance.choice((0, 4096, 1 << 30)),
            "capacities": numbers,
            "sizes": numbers,
        }

    @cached_property
    def parsers(self) -> list[tuple[Callable[..., object], int | None, list[str]]]:
        """Each function, the bytes that it is always given, and its further parameters."""
        found = []
        for module in self.modules:
            for name, function in inspect.getmembers(module, inspect.isfunction):
                if name.startswith("parse_") and function.__module__ == module.__name__:
                    size = self.exact.get(f"{module.__name__.rpartition('.')[2]}.{name}")
                    names = list(inspect.signature(function).parameters)[1:]
                    found.append((function, size, names))
        return found

    def parse(self, data: bytes, chance: random.Random) -> None:
        given, raised = self.facts(chance), None
        for function, size, names in self.parsers:
            part = data if size is None else data[:size].ljust(size, b"\0")
            try:
                function(memoryview(part), *(given[one] for one in names))
            except self.documented as error:
                raised = error
        if raised is not None:
            raise raised


def _structs(module: ModuleType, start: bytes) -> list[bytes]:
    """Something of the length of each structure in ``module``."""
    sizes = [one.size for one in vars(module).values() if isinstance(one, struct.Struct)]
    return [start + bytes(max(0, size - len(start))) for size in sizes]


class Lm(Parsers):
    """Messages of ``lm://``, of clients and of servers."""

    name = "lm"
    documented = (protocol.ProtocolError,)
    modules = (protocol, greeting, inventory)
    exact = MappingProxyType({"protocol.parse_header": protocol.HEADER_BYTES})

    def samples(self) -> list[bytes]:
        keys = [ChunkKey(bytes([i]) * 16) for i in range(3)]
        version = getattr(greeting, "VERSION", getattr(protocol, "VERSION", 1))
        return [
            *(protocol.header(op, 7, count=3, meta=51, payload=64) for op in protocol.Op),
            protocol.names(keys),
            protocol.names(keys) + protocol.numbers([1, 2, 3]),
            protocol.numbers([7, 64, protocol.MISSING, 0, 0, 4096]),
            protocol.extents([(0, 64), (4096, 7)]) + protocol.extents([(64, 64)]),
            protocol.usage(3, 4096) + b"more",
            *_structs(greeting, struct.pack("<H", version)),
            inventory.after("ab" * 8),
            inventory.page([Stock("0" * 16, 1, 2, 3, "a\nb\nc"), Stock("f" * 16, 1, 2, 3, "")]),
            inventory.status({"version": "0.1.0", "server_values": 7}),
            inventory.purged(Purged(1, 2, 3, 4, more=True)),
        ]


class Tcp(Parsers):
    """Messages and addresses of the ``tcp`` channel."""

    name = "tcp"
    documented = (tcp.WireError,)
    modules = (tcp,)
    exact = MappingProxyType(
        {
            "wire.parse_greeting": tcp.GREETING.size,
            "wire.parse_hello": tcp.HELLO.size,
            "wire.parse_request": tcp.REQUEST.size,
            "wire.parse_places": 32,
        }
    )

    def facts(self, chance: random.Random) -> dict[str, Any]:
        return {"asked": tcp.Request(tcp.Op.READ, 0, 2, chance.choice((0, 64, 4096)))}

    def samples(self) -> list[bytes]:
        return [
            tcp.greeting(bytes(16)),
            tcp.hello(b"me", bytes(16), bytes(32)),
            tcp.request(tcp.Op.WRITE, [(0, 64), (4096, 64)], 128, b"note"),
            tcp.Address("localhost", 1, bytes(32), True).encode(),
        ]

    def parse(self, data: bytes, chance: random.Random) -> None:
        super().parse(data, chance) if chance.random() < 0.7 else tcp.Address.decode(data)


class Isolation(Target):
    """What the process of an isolated backend says, and what it is told."""

    name = "isolation"
    documented = (LMCacheError, ValueError, KeyError, TypeError)
    """A context that makes no sense may raise any of these: it comes from the engine itself."""
    _long = (
        b'{"id": 7, "error": ["no' + b'", "no' * 3000 + b'"]}',
        b'{"id": 7, "error": ["not_created' + b'", "not_created' * 3000 + b'"]}',
        b"[" * 20_000 + b"]" * 20_000,
    )

    def samples(self) -> list[bytes]:
        group = full_attention(layers=2, heads=1, head_size=8, dtype=DType.BF16)
        context = BackendContext("me", CacheNamespace("model", KVLayout(16, (group,))))
        plain = isolation.context_to_plain(context)
        messages: list[Any] = [
            {"id": 7, "do": "load", "keys": ["0a"], "places": [[0, 4096, 512]]},
            {"id": 7, "ok": [512]},
            {"id": 7, "error": ["not_created", "config", "no"]},
            {"context": plain},
        ]
        texts = [json.dumps(message, default=str).encode() for message in messages]
        return [self._sized(text) for text in texts]

    @staticmethod
    def _sized(text: bytes) -> bytes:
        return len(text).to_bytes(4, "little") + text

    def parse(self, data: bytes, chance: random.Random) -> None:
        if chance.random() < 0.005:
            data = mutated(self._sized(chance.choice(self._long)), [data], chance)
        messages: list[isolation.Message] = []
        channel = isolation.Channel(messages.append, lambda _: None)
        cut = chance.randrange(len(data) + 1)
        if chance.random() < 0.5:  # a length that fits
            data = max(0, len(data) - 4).to_bytes(4, "little") + data[4:]
        channel.data_received(data[:cut])
        channel.data_received(data[cut:])
        channel.connection_lost(None)
        for message in messages:
            str(isolation.error_from_plain(message.get("error")))
            if isinstance(message.get("context"), dict):
                isolation.context_from_plain(message["context"], None)


class Scripted:
    """A socket that says what it was given, and then is closed."""

    def __init__(self, text: bytes) -> None:
        self._left = memoryview(text)

    def settimeout(self, timeout: float | None, /) -> None:
        """Nothing here waits."""

    def setsockopt(self, *_: object) -> None:
        """Nor is it sent in any special way."""

    def recv_into(self, buffer: memoryview, nbytes: int = 0, *_: int) -> int:
        count = min(buffer.nbytes, len(self._left), nbytes or buffer.nbytes)
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count

    def recv(self, count: int, *_: int) -> bytes:
        some, self._left = bytes(self._left[:count]), self._left[count:]
        return some

    def send(self, data: memoryview, /) -> int:
        return len(data)

    def sendall(self, data: bytes) -> None:
        """Nobody reads it."""

    def sendmsg(self, buffers: Sequence[memoryview], /) -> int:
        return sum(map(len, buffers))


class Resp(Target):
    """What a Redis server answers."""

    name = "resp"
    documented = (BackendError, ReplyError)

    def samples(self) -> list[bytes]:
        return [
            b"+OK\r\n:12\r\n$-1\r\n-MOVED 1 host:1\r\n",
            b"*3\r\n$3\r\nabc\r\n:1\r\n*1\r\n+x\r\n$5\r\nhello\r\n",
            b":1\r\n:0\r\n:1\r\n:-7\r\n$64\r\n" + bytes(64) + b"\r\n",
        ]

    def parse(self, data: bytes, chance: random.Random) -> None:
        if chance.random() < 0.1:
            self._read_head(data, chance)
        until = time.monotonic() + 60
        if chance.random() < 0.2:
            self._about_values(data, chance, until)
        reader = BlockingWire(Scripted(data), "peer", idle_s=1.0, until=until)
        while True:  # until the end, which is an error
            kind = chance.randrange(4)
            if kind == 0:
                at_once(reader.reply())
            elif kind == 1:
                at_once(reader.integers(2))
            elif kind == 2:
                at_once(reader.came(b"+OK\r\n"))
                at_once(reader.reply())
            elif (length := at_once(reader.bulk_length())) is not None:
                with memoryview(bytearray(min(length, 4096))) as into:
                    at_once(reader.read_into(into))
                at_once(reader.skip(length - min(length, 4096)))
                at_once(reader.end_bulk())

    def _about_values(self, data: bytes, chance: random.Random, until: float) -> None:
        """What is asked about whole values, where heads announce anything."""
        piece_bytes = chance.choice((4096, 5000, 1 << 20))
        head = RedisHead(chance.choice((0, 64, 1 << 20, 1 << 29)), piece_bytes, bytes(8)).pack()
        if chance.random() < 0.3:
            head = mutated(head, [head], chance)
        said = b"$%d\r\n%b\r\n:%d\r\n" % (len(head), head, chance.choice((24, 88)))
        if chance.random() < 0.3:
            said = b"+OK\r\n+QUEUED\r\n+QUEUED\r\n*2\r\n" + said
        whole = said + b":4096\r\n" * chance.choice((0, 1, 256))
        text = mutated(whole, [whole, data], chance) if chance.random() < 0.7 else whole
        wire = BlockingWire(Scripted(text), "peer", idle_s=1.0, until=until)
        kind = chance.randrange(3)
        with memoryview(bytearray(1 << 16)) as into:
            if kind == 0:
                at_once(intact(wire, [b"x"], _MOST_BYTES))
            elif kind == 1:
                at_once(discard(wire, [b"x"], _MOST_BYTES))
            else:
                at_once(Load(wire, 4096).run([0], [b"x"], [into], [0]))

    def _read_head(self, data: bytes, chance: random.Random) -> None:
        if chance.random() < 0.8:
            data = RedisHead.of(chance.choice((0, 64, 8192, 1 << 20)), 4096).pack()
            data = mutated(data, [data], chance)
        head = RedisHead.unpack(data[: REDIS_HEAD.size], _MOST_BYTES)
        if head is not None:
            _inside([place for _, place in head.pieces(b"x")], head.value_bytes)


def _inside(places: Sequence[slice], nbytes: int) -> None:
    """Raise an error if pieces of a value lie outside of it."""
    if any(not 0 <= place.start < place.stop <= nbytes for place in places):
        raise AssertionError(f"a piece is outside of {nbytes} bytes")


class InfiniStore(Target):
    """What an InfiniStore server answers."""

    name = "infinistore"
    documented = (BackendError, ConnectionError)

    def samples(self) -> list[bytes]:
        done = struct.pack("<I", infinistore.DONE)
        return [
            (done + bytes(4)) * 3,
            done + struct.pack("<I", 2),
            done + struct.pack("<I", 64) + bytes(64),
            done + struct.pack("<I", 65) + bytes(65) + struct.pack("<I", infinistore.MISSING),
        ]

    def parse(self, data: bytes, chance: random.Random) -> None:
        if chance.random() < 0.1:
            self._read_head(data, chance)
        wire = infinistore.Wire.__new__(infinistore.Wire)
        vars(wire).update(_socket=Scripted(data), _ahead_bytes=0, _answers=bytearray())
        for _ in range(4):
            kind = chance.randrange(3)
            if kind == 0:
                wire.exist(["a", "b"])
            elif kind == 1:
                wire.delete(["a"])
            else:
                kept = bytearray(64)
                address = infinistore.ctypes.addressof(infinistore.ctypes.c_char.from_buffer(kept))
                wire.get(infinistore.Block("a", address, len(kept)))

    def _read_head(self, data: bytes, chance: random.Random) -> None:
        if chance.random() < 0.8:
            nbytes = chance.choice((0, 64, 1 << 17, 1 << 20))
            data = InfiniHead.of(nbytes, 1 << 17, bytes(8), 4096).pack()
            data = mutated(data, [data], chance)
        page = memoryview(data[:HEAD_BYTES].ljust(HEAD_BYTES, b"\0"))
        head = InfiniHead.unpack(page, _MOST_BYTES)
        if head is not None:
            if len(head.names("x")) != len(head.starts()):
                raise AssertionError("pieces have no names")
            rest, size = head.nbytes - head.inline, head.piece_bytes
            _inside([slice(start, start + size) for start in head.starts()], rest)


TARGETS: dict[str, Callable[[], Target]] = {
    target.name: target for target in (Frame, Lm, Tcp, Isolation, Resp, InfiniStore)
}
