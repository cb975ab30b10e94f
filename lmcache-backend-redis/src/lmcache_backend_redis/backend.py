"""The redis backend: batches of chunks in pipelines of commands.

Knows which commands keep, find and remove a chunk, and in which order, so that no reader ever sees
a part of one. Names and heads are `layout`'s business, replies `resp`'s, servers `topology`'s.
Retries, deadlines, metrics and tiers are core's.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from lmcache_backend_redis import topology
from lmcache_backend_redis.config import RedisConfig
from lmcache_backend_redis.layout import HEAD, MAX_VALUE_BYTES, Head, Names
from lmcache_backend_redis.resp import ProtocolError, Reply, ReplyError, Wire, command, commands
from lmcache_backend_redis.topology import Node, Topology
from lmcache_core.errors import BackendError, BackendRejected, BackendUnavailable
from lmcache_core.keys import ChunkKey
from lmcache_core.storage import (
    MISS,
    BackendCapabilities,
    BackendContext,
    BlockingBackend,
    StoreOutcome,
)

IN_FLIGHT_BYTES: Final = 4 << 20
"""How much is asked for before the first of it has been read. Enough to keep both sides busy, and
little enough that the server's replies stay in its processor's cache. Tuned with
bench/redis_store.py on two cores over loopback."""
_STAGING_MARGIN_S: Final = 60
_SCAN_COUNT: Final = b"1000"


class RedisBackend(BlockingBackend):
    """Keeps each chunk under one name, or under one name and one for each of its pieces."""

    def __init__(self, config: RedisConfig) -> None:
        self._config = config
        self._topology: Topology | None = None
        self._names = Names(config.prefix, "")

    @property
    def capabilities(self) -> BackendCapabilities:
        return BackendCapabilities(
            shared=True,
            persistent=True,
            max_chunk_bytes=MAX_VALUE_BYTES,
            preferred_batch=8,  # more calls, each with a connection, rather than longer ones
            max_concurrency=self._config.connections,
        )

    # -- opening and closing ---------------------------------------------------------------

    def open_blocking(self, context: BackendContext) -> None:
        largest = context.max_value_bytes
        if largest is not None and largest > MAX_VALUE_BYTES:
            raise BackendRejected(
                f"a chunk may have {largest} bytes here, and this backend keeps values of up to "
                f"{MAX_VALUE_BYTES} bytes, as Redis does; set a smaller chunk_size"
            )
        self._names = Names(self._config.prefix, context.namespace.fingerprint)
        self._topology = topology.connect(self._config)

    async def close(self) -> None:
        if self._topology is not None:
            self._topology.abort()  # so that no thread goes on waiting for a server
        await super().close()

    def close_blocking(self) -> None:
        if self._topology is not None:
            self._topology.close()

    # -- asking ----------------------------------------------------------------------------

    def contains_blocking(self, keys: Sequence[ChunkKey]) -> list[bool]:
        names = [self._names.head(key) for key in keys]
        found = [False] * len(keys)
        groups = self._groups(names, read=True)
        until = time.monotonic() + self._config.call_timeout_s

        def ask(node: Node, positions: list[int]) -> Iterator[None]:
            with self._open.wire(node, until) as wire:
                wire.send([commands(b"EXISTS", [names[i] for i in positions])])
                yield
                for i, count in zip(positions, wire.integers(len(positions)), strict=True):
                    found[i] = count > 0

        # Every node is asked before any is waited for: together they cost one round trip.
        asking = [ask(*group) for group in groups.items()]
        failures: list[BackendError] = []
        for _ in ("ask", "listen"):
            for one in asking:
                with _noting(failures):
                    next(one, None)
        _raise_if_all_failed(failures, len(groups))
        return found

    async def count_leading_hits(self, keys: Sequence[ChunkKey]) -> int:
        """How many keys from the first on would hit, up to the first miss."""
        found = await self.contains(keys)
        return found.index(False) if False in found else len(found)

    # -- loading ---------------------------------------------------------------------------

    def load_blocking(self, keys: Sequence[ChunkKey], into: Sequence[memoryview]) -> list[int]:
        names = [self._names.head(key) for key in keys]
        sizes = [MISS] * len(keys)

        def load(wire: Wire, positions: list[int]) -> None:
            _Load(wire, self._config.piece_bytes).run(positions, names, into, sizes)

        self._each(self._groups(names, read=True), load)
        return sizes

    # -- storing ---------------------------------------------------------------------------

    def store_blocking(
        self, keys: Sequence[ChunkKey], sources: Sequence[memoryview]
    ) -> list[StoreOutcome]:
        names = [self._names.head(key) for key in keys]
        outcomes = [StoreOutcome.NOT_ADMITTED] * len(keys)

        def store(wire: Wire, positions: list[int]) -> None:
            _Store(wire, self._config).run(positions, names, sources, outcomes)

        self._each(self._groups(names, read=False), store)
        return outcomes

    # -- forgetting ------------------------------------------------------------------------

    async def delete(self, keys: Sequence[ChunkKey]) -> int:
        """Forget ``keys``; answer how many of them were there."""
        return await self._run(self._delete_blocking, keys)

    async def clear(self) -> int:
        """Forget every chunk of the namespace; answer how many there were."""
        return await self._run(self._clear_blocking)

    def _delete_blocking(self, keys: Sequence[ChunkKey]) -> int:
        names = [self._names.head(key) for key in keys]
        counts: list[int] = []
        self._each(
            self._groups(names, read=False),
            lambda wire, positions: counts.append(_discard(wire, [names[i] for i in positions])),
        )
        return sum(counts)

    def _clear_blocking(self) -> int:
        counts: list[int] = []
        nodes: dict[Node, list[int]] = {node: [] for node in self._open.primaries()}
        self._each(nodes, lambda wire, _: counts.append(_clear(wire, self._names)))
        return sum(counts)

    # -- inside ----------------------------------------------------------------------------

    @property
    def _open(self) -> Topology:
        if self._topology is None:
            raise BackendUnavailable("the backend isn't open")
        return self._topology

    def _groups(self, names: Sequence[bytes], *, read: bool) -> dict[Node, list[int]]:
        if not names:
            return {}
        groups = self._open.groups(names, read=read)
        if not groups:
            raise BackendUnavailable("no node of the cluster that has these keys can be reached")
        return groups

    def _each(
        self, groups: dict[Node, list[int]], work: Callable[[Wire, list[int]], object]
    ) -> None:
        """Do ``work`` on each node. One that fails costs its own keys, and only that."""
        failures: list[BackendError] = []
        until = time.monotonic() + self._config.call_timeout_s
        for node, positions in groups.items():
            with _noting(failures), self._open.wire(node, until) as wire:
                work(wire, positions)
        _raise_if_all_failed(failures, len(groups))


# -- loading -------------------------------------------------------------------------------


@dataclass
class _Value:
    """One chunk on its way in."""

    position: int
    into: memoryview
    nbytes: int = 0
    missing: int = 0
    """Pieces that haven't been read yet."""
    lost: bool = False


@dataclass
class _Ask:
    """One GET: the head of ``value``, or the piece that belongs at ``place``."""

    name: bytes
    expected_bytes: int
    value: _Value
    place: slice | None = None


class _Load:
    """One batch from one node, at most `IN_FLIGHT_BYTES` of it on the way at a time.

    Heads are asked for in order; a long value's pieces are asked for as soon as its head has come.
    """

    def __init__(self, wire: Wire, piece_bytes: int) -> None:
        self._wire = wire
        self._piece_bytes = piece_bytes
        self._asked: deque[_Ask] = deque()
        self._waiting: deque[_Ask] = deque()
        self._in_flight = 0

    def run(
        self,
        positions: Iterable[int],
        names: Sequence[bytes],
        into: Sequence[memoryview],
        sizes: list[int],
    ) -> None:
        values = [_Value(i, into[i]) for i in positions]
        for value in values:
            # A chunk that fills a large buffer is in pieces, and its head is short.
            capacity = value.into.nbytes
            expected = HEAD.size + (capacity if capacity <= self._piece_bytes else 0)
            self._waiting.append(_Ask(names[value.position], expected, value))
        while self._waiting or self._asked:
            self._ask()
            one = self._asked.popleft()
            self._in_flight -= one.expected_bytes
            if one.place is None:
                self._read_head(one)
            else:
                self._read_piece(one, one.place)
        for value in values:
            if not (value.lost or value.missing):
                sizes[value.position] = value.nbytes

    def _ask(self) -> None:
        if self._asked and self._in_flight > IN_FLIGHT_BYTES // 2:
            return  # soon, for several at once
        asked: list[bytes] = []
        while self._waiting:
            one = self._waiting[0]
            if one.place is not None and one.value.lost:
                self._waiting.popleft()
                continue
            full = self._in_flight + one.expected_bytes > IN_FLIGHT_BYTES
            if full and self._asked:
                break
            self._asked.append(self._waiting.popleft())
            self._in_flight += one.expected_bytes
            asked.append(one.name)
        self._wire.send([commands(b"GET", asked)])

    def _read_head(self, one: _Ask) -> None:
        wire, value = self._wire, one.value
        length = wire.bulk_length()
        if length is None:
            value.lost = True
            return
        head = Head.unpack(wire.take(HEAD.size)) if length >= HEAD.size else None
        follows = length - HEAD.size if length >= HEAD.size else length
        if head is None or not _whole(head, follows) or head.value_bytes > value.into.nbytes:
            value.lost = True
            wire.skip(follows)
        else:
            value.nbytes = head.value_bytes
            wire.read_into(value.into[:follows])
            pieces = head.pieces(one.name)
            value.missing = len(pieces)
            for name, place in pieces:
                self._waiting.append(_Ask(name, place.stop - place.start, value, place))
        wire.end_bulk()

    def _read_piece(self, one: _Ask, place: slice) -> None:
        length = self._wire.bulk_length()
        if length is None:
            one.value.lost = True
            return
        if length == place.stop - place.start:
            self._wire.read_into(one.value.into[place])
            one.value.missing -= 1
        else:
            one.value.lost = True
            self._wire.skip(length)
        self._wire.end_bulk()


def _whole(head: Head, follows: int) -> bool:
    """Whether as many bytes follow a head as it says."""
    return follows == (0 if head.piece_bytes else head.value_bytes)


# -- storing -------------------------------------------------------------------------------


@dataclass
class _Put:
    """One chunk on its way out."""

    position: int
    name: bytes
    source: memoryview
    head: Head
    pieces: list[tuple[bytes, slice]]
    commit: bytes = b""
    """The transaction that makes its pieces stay."""


class _Store:
    """One batch to one node.

    Values that are there already aren't sent again. Pieces are written with a time to live, so that
    an interrupted store leaves nothing for long; one transaction then makes them stay and sets the
    head that names them. The head is only set where there is none (NX): whoever comes second takes
    its pieces away again.
    """

    def __init__(self, wire: Wire, config: RedisConfig) -> None:
        self._wire = wire
        self._piece_bytes = config.piece_bytes
        self._ttl_s = config.ttl_s
        self._staging = b"%d" % (int(config.call_timeout_s) + _STAGING_MARGIN_S)

    def run(
        self,
        positions: Iterable[int],
        names: Sequence[bytes],
        sources: Sequence[memoryview],
        outcomes: list[StoreOutcome],
    ) -> None:
        fits = [i for i in positions if sources[i].nbytes <= MAX_VALUE_BYTES]
        present = _intact(self._wire, [names[i] for i in fits])
        puts = []
        for i, there in zip(fits, present, strict=True):
            if there:
                outcomes[i] = StoreOutcome.ALREADY_PRESENT
                continue
            head = Head.of(sources[i].nbytes, self._piece_bytes)
            puts.append(_Put(i, names[i], sources[i], head, head.pieces(names[i])))
        self._send(puts)
        for put in puts:  # while the server is busy
            if put.pieces:
                put.commit = b"".join(self._transaction(put))
        if self._wire.came(b"+OK\r\n" * sum(len(put.pieces) or 1 for put in puts)):
            written = puts
            for put in puts:
                if not put.pieces:
                    outcomes[put.position] = StoreOutcome.STORED
        else:
            written = [put for put in puts if self._written(put, outcomes)]
        self._commit([put for put in written if put.pieces], outcomes)

    def _send(self, puts: Iterable[_Put]) -> None:
        parts: list[bytes | memoryview] = []
        for put in puts:
            if put.pieces:
                for name, place in put.pieces:
                    parts += _set(name, b"", put.source[place], (b"EX", self._staging))
            else:
                parts += _set(put.name, put.head.pack(), put.source, (b"NX", *self._expiry(0)))
        self._wire.send(parts)

    def _written(self, put: _Put, outcomes: list[StoreOutcome]) -> bool:
        """Read what became of the SETs of one chunk."""
        replies = [self._wire.reply() for _ in put.pieces or (None,)]
        errors = [reply for reply in replies if isinstance(reply, ReplyError)]
        for error in errors:
            if error.code != "OOM":
                raise error
        if errors:
            return False  # full, and told to evict nothing: not admitted
        if replies == [None]:
            outcomes[put.position] = StoreOutcome.ALREADY_PRESENT  # NX: somebody was faster
        elif not put.pieces:
            outcomes[put.position] = StoreOutcome.STORED
        return True

    def _commit(self, puts: Sequence[_Put], outcomes: list[StoreOutcome]) -> None:
        if not puts:
            return
        self._wire.send([put.commit for put in puts])
        if self._wire.came(b"".join(_kept(len(put.pieces)) for put in puts)):
            for put in puts:
                outcomes[put.position] = StoreOutcome.STORED
            return
        superseded: list[bytes] = []
        incomplete: list[bytes] = []
        for put in puts:
            done = self._transacted(len(put.pieces) + 1)
            if done is None:
                continue  # full; the pieces expire
            *kept, set_head = done
            if set_head is None:
                outcomes[put.position] = StoreOutcome.ALREADY_PRESENT
                superseded += [name for name, _ in put.pieces]
            elif all(kept):
                outcomes[put.position] = StoreOutcome.STORED
            else:
                incomplete.append(put.name)  # a piece was evicted while the others were written
        _discard(self._wire, incomplete)
        _unlink(self._wire, superseded)

    def _transaction(self, put: _Put) -> Iterator[bytes]:
        yield command(b"MULTI")
        for name, _ in put.pieces:
            # Pieces outlive their head, so that none is missing while the head is there.
            lasting = self._expiry(_STAGING_MARGIN_S)
            yield command(b"EXPIRE", name, lasting[1]) if lasting else command(b"PERSIST", name)
        yield command(b"SET", put.name, put.head.pack(), b"NX", *self._expiry(0))
        yield command(b"EXEC")

    def _transacted(self, count: int) -> list[Reply] | None:
        """What ``count`` commands answered in a transaction; ``None`` if there was no memory."""
        queued = [self._wire.reply() for _ in range(count + 1)]  # with MULTI's own
        done = self._wire.reply()
        errors = [reply for reply in (*queued, done) if isinstance(reply, ReplyError)]
        if errors:
            if errors[0].code == "OOM":
                return None
            raise errors[0]
        if not isinstance(done, list) or len(done) != count:
            raise ProtocolError(f"{self._wire.peer} answered EXEC with {done!r:.80}")
        for reply in done:
            if isinstance(reply, ReplyError):
                raise reply
        return done

    def _expiry(self, margin_s: int) -> tuple[bytes, ...]:
        return () if self._ttl_s is None else (b"EX", b"%d" % (self._ttl_s + margin_s))


def _kept(pieces: int) -> bytes:
    """What is answered to a transaction that made so many pieces stay, and set their head."""
    queued = b"+QUEUED\r\n" * (pieces + 1)
    return b"+OK\r\n%b*%d\r\n%b+OK\r\n" % (queued, pieces + 1, b":1\r\n" * pieces)


def _set(
    name: bytes, head: bytes, value: memoryview, options: Sequence[bytes]
) -> list[bytes | memoryview]:
    """SET of ``head`` and ``value`` in parts, so that the value is sent from where it lies."""
    return [
        b"*%d\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n%b"
        % (3 + len(options), len(name), name, len(head) + value.nbytes, head),
        value,
        b"\r\n" + b"".join(b"$%d\r\n%b\r\n" % (len(one), one) for one in options),
    ]


# -- commands that several of the above use ------------------------------------------------


def _intact(wire: Wire, names: Sequence[bytes]) -> list[bool]:
    """Say which chunks are there in full, and forget those that are there in part.

    A head whose pieces were evicted, or what another version left, would keep a new value out.
    """
    asking = [
        command(b"GETRANGE", name, b"0", b"%d" % (HEAD.size - 1)) + command(b"STRLEN", name)
        for name in names
    ]
    wire.send([b"".join(asking)])
    intact = [False] * len(names)
    if wire.came(b"$0\r\n\r\n:0\r\n" * len(names)):
        return intact  # none is there, as usual
    heads = [(_string(wire), _integer(wire)) for _ in names]
    pieces: list[tuple[int, bytes, int]] = []
    damaged: set[int] = set()
    for i, (start, length) in enumerate(heads):
        if not length:
            continue
        head = Head.unpack(start)
        intact[i] = head is not None and _whole(head, length - HEAD.size)
        if head is None or not intact[i]:
            damaged.add(i)
            continue
        for name, place in head.pieces(names[i]):
            pieces.append((i, name, place.stop - place.start))
    wire.send([commands(b"STRLEN", [name for _, name, _ in pieces])])
    lengths = wire.integers(len(pieces))
    damaged.update(i for (i, _, nbytes), got in zip(pieces, lengths, strict=True) if got != nbytes)
    for i in damaged:
        intact[i] = False
    _discard(wire, [names[i] for i in sorted(damaged)])
    return intact


def _discard(wire: Wire, names: Sequence[bytes]) -> int:
    """Remove chunks with their pieces; answer how many there were.

    A head is read and removed in one transaction, so whoever removes it knows all of its pieces.
    """
    if not names:
        return 0
    taking = [
        command(b"MULTI")
        + command(b"GETRANGE", name, b"0", b"%d" % (HEAD.size - 1))
        + command(b"UNLINK", name)
        + command(b"EXEC")
        for name in names
    ]
    wire.send([b"".join(taking)])
    count, pieces = 0, []
    for name in names:
        for _ in range(3):
            _refuse(wire.reply())
        done = _refuse(wire.reply())
        match done:
            case [bytes(start), int(removed)]:
                count += removed
                head = Head.unpack(start)
                pieces += [piece for piece, _ in head.pieces(name)] if head else []
            case _:
                raise ProtocolError(f"{wire.peer} answered EXEC with {done!r:.80}")
    _unlink(wire, pieces)
    return count


def _unlink(wire: Wire, names: Sequence[bytes]) -> None:
    # One command a name: a cluster refuses a command about several slots.
    wire.send([commands(b"UNLINK", names)])
    wire.integers(len(names))


def _clear(wire: Wire, names: Names) -> int:
    """Remove everything of a namespace from one node; answer how many chunks there were."""
    count, cursor = 0, b"0"
    while True:
        wire.send([command(b"SCAN", cursor, b"MATCH", names.pattern, b"COUNT", _SCAN_COUNT)])
        page = _refuse(wire.reply())
        match page:
            case [bytes(cursor), list(found)]:
                these = [name for name in found if isinstance(name, bytes)]
            case _:
                raise ProtocolError(f"{wire.peer} answered SCAN with {page!r:.80}")
        # Heads first, so that nobody is sent after pieces that are gone.
        these.sort(key=Names.is_head, reverse=True)
        wire.send([commands(b"UNLINK", these)])
        removed = wire.integers(len(these))
        count += sum(n for name, n in zip(these, removed, strict=True) if Names.is_head(name))
        if cursor == b"0":
            return count


def _refuse(reply: Reply) -> Reply:
    """``reply``, or raise it if it is an error."""
    if isinstance(reply, ReplyError):
        raise reply
    return reply


def _integer(wire: Wire) -> int:
    reply = _refuse(wire.reply())
    if not isinstance(reply, int):
        raise ProtocolError(f"{wire.peer} answered {reply!r:.80} where a number was expected")
    return reply


def _string(wire: Wire) -> bytes:
    reply = _refuse(wire.reply())
    if not isinstance(reply, bytes):
        raise ProtocolError(f"{wire.peer} answered {reply!r:.80} where a string was expected")
    return reply


@contextmanager
def _noting(failures: list[BackendError]) -> Iterator[None]:
    """Go on after a node failed."""
    try:
        yield
    except BackendError as error:
        failures.append(error)


def _raise_if_all_failed(failures: Sequence[BackendError], count: int) -> None:
    if failures and len(failures) == count:
        raise failures[0]
