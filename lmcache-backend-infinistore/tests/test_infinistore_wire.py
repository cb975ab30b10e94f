"""What our own connection asks a real server, and that the client library understands the same."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from infini_server import Server, emulated_nic

from lmcache_backend_infinistore import backend
from lmcache_backend_infinistore.config import InfinistoreConfig
from lmcache_backend_infinistore.layout import BEGINNING, MAX_VALUE_BYTES, Head
from lmcache_backend_infinistore.links import HEAD_BYTES, VALUES
from lmcache_backend_infinistore.wire import Block, Wire
from lmcache_core.chunks.keys import CacheNamespace, ChunkKey
from lmcache_core.chunks.layout import DType, KVLayout, full_attention
from lmcache_core.contracts.storage import BackendContext

MIB = 1 << 20
SIZES = (1, 4 << 10, 64 << 10, (64 << 10) - 8, 300_001, 2 * MIB, 5 * MIB + 7)
"""Less and more than a segment, and than the server sends at once."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(emulated_nic(tmp_path_factory.mktemp("nic"))) as one:
        yield one


@pytest.fixture(params=["127.0.0.1", "127.0.0.2"], ids=["on this machine", "elsewhere"])
def wire(server: Server, request: pytest.FixtureRequest) -> Iterator[Wire]:
    """To a server that has our address, or another one, as that of another machine is."""
    server.empty()
    one = Wire(request.param, server.port, 2.0)
    yield one
    one.close()


@pytest.fixture
def client(server: Server) -> Iterator[Any]:
    import infinistore

    one = infinistore.InfinityConnection(
        infinistore.ClientConfig(
            host_addr="127.0.0.1",
            service_port=server.port,
            connection_type=infinistore.TYPE_TCP,
        )
    )
    one.connect()
    yield one
    one.close()


class Memory:
    """Bytes at an address, and the block that they are under a name."""

    def __init__(self, data: bytes) -> None:
        self._held = (ctypes.c_char * len(data)).from_buffer_copy(data)

    @property
    def data(self) -> bytes:
        return bytes(self._held)

    def under(self, name: str) -> Block:
        return Block(name, ctypes.addressof(self._held), len(self._held))


def put(wire: Wire, *names: str, data: bytes = b"x") -> bool:
    one = Memory(data)
    return wire.put([one.under(name) for name in names], [])()


def content(nbytes: int) -> bytes:
    return (b"%d" % nbytes * (nbytes // 2 + 1))[:nbytes]


def test_what_is_put_is_what_both_get(wire: Wire, client: Any) -> None:
    values = {f"value-{nbytes}": Memory(content(nbytes)) for nbytes in SIZES}
    stored: list[str] = []
    assert wire.put([one.under(name) for name, one in values.items()], stored)()
    assert stored == list(values)
    for name, one in values.items():
        assert client.tcp_read_cache(name).tobytes() == one.data
        room = Memory(bytes(len(one.data)))
        assert wire.get(room.under(name))
        assert room.data == one.data


@pytest.mark.parametrize("length", range(1, 10))
def test_names_of_every_length(wire: Wire, client: Any, length: int) -> None:
    names = [letter * length for letter in "abc"]
    assert put(wire, *names)
    assert all(client.check_exist(name) for name in names)
    assert wire.exist(["absent", *names]) == [False, True, True, True]
    assert wire.delete([names[0], "absent", names[2]]) == 2
    assert [client.check_exist(name) for name in names] == [False, True, False]


def test_more_questions_than_are_asked_at_once(wire: Wire) -> None:
    names = [f"key-{i}" for i in range(1000)]
    even = names[::2]
    assert put(wire, *even)
    assert wire.exist(names) == [i % 2 == 0 for i in range(1000)]
    assert wire.delete(names) == len(even)
    assert wire.exist([]) == []
    assert wire.delete([]) == 0


@pytest.mark.parametrize("nbytes", [1, 4 << 10, 3 * MIB + 1])
def test_a_value_of_another_length_isnt_had_and_harms_nothing(wire: Wire, nbytes: int) -> None:
    assert put(wire, "value", data=content(nbytes))
    for other in (nbytes + 1, 2 * nbytes + 5, 100):
        room = Memory(b"\xee" * other)
        assert not wire.get(room.under("value"))
        assert room.data == b"\xee" * other
    assert not wire.get(Memory(b"x").under("absent"))
    room = Memory(bytes(nbytes))
    assert wire.get(room.under("value"))
    assert room.data == content(nbytes)


def test_no_room(wire: Wire, server: Server) -> None:
    large = Memory(bytes(300 * MIB))
    stored: list[str] = []
    try:
        done = wire.put([large.under(f"large-{i}") for i in range(5)], stored)()
    except OSError:
        done = False
    assert not done
    assert 1 <= len(stored) < 5
    with_room = Wire("127.0.0.1", server.port, 2.0)
    assert with_room.exist(stored) == [True] * len(stored)
    assert with_room.delete(stored) == len(stored)
    with_room.close()


def test_an_end_is_noticed_without_asking(wire: Wire, server: Server) -> None:
    assert not wire.ended()
    server.kill()
    assert wire.ended()
    with pytest.raises(OSError):
        wire.exist(["key"])
    server.start()


def test_a_head_names_no_more_pieces_than_a_chunk_can_have() -> None:
    """Whoever deletes a value names all of its pieces, and a head is what a stranger may write."""
    head = Head.of(MAX_VALUE_BYTES, 64 << 10, bytes(8), 0)
    assert Head.unpack(memoryview(head.pack()), MAX_VALUE_BYTES) == head
    assert Head.unpack(memoryview(head.pack()), MAX_VALUE_BYTES - 1) is None
    assert len(head.pack()) == BEGINNING
    for nbytes in (MAX_VALUE_BYTES + 1, 1 << 46):
        too_long = Head.of(nbytes, 64 << 10, bytes(8), 0)
        assert Head.unpack(memoryview(too_long.pack()), MAX_VALUE_BYTES) is None


class OneHead:
    """A connection to a server that has the head ``said`` under every name."""

    def __init__(self, said: Head) -> None:
        self._said = said
        self.heads = memoryview(bytearray(VALUES * HEAD_BYTES))
        self.heads_address = 0
        self.forgotten: list[list[str]] = []

    def probe(self) -> None:
        """It is there."""

    def close(self) -> None:
        """Nothing is held."""

    def read_heads(self, blocks: Sequence[Block]) -> list[bool]:
        for i in range(len(blocks)):
            self.heads[i * HEAD_BYTES : i * HEAD_BYTES + BEGINNING] = self._said.pack()
        return [True] * len(blocks)

    def forget(self, name: str, pieces: Sequence[str]) -> bool:
        self.forgotten.append([name, *pieces])
        return True


@pytest.mark.parametrize(("nbytes", "names"), [(1 << 20, 17), (MAX_VALUE_BYTES, 1)])
def test_a_delete_names_the_pieces_that_a_chunk_here_can_have(
    nbytes: int, names: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = OneHead(Head.of(nbytes, 64 << 10, bytes(8), HEAD_BYTES - BEGINNING))
    monkeypatch.setattr(backend, "TcpLink", lambda _: link)
    config = InfinistoreConfig(url="infinistore://localhost", connection_type="TCP")
    store = backend.InfinistoreBackend(config)
    group = full_attention(layers=1, heads=1, head_size=8, dtype=DType.BF16)
    namespace = CacheNamespace("model", KVLayout(16, (group,)))
    store.open_blocking(BackendContext("x", namespace, max_value_bytes=1 << 20))
    store._delete([ChunkKey(bytes(16))])
    assert [len(one) for one in link.forgotten] == [names]
    store.close_blocking()
