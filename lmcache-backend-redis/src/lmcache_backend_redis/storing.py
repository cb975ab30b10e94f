"""Chunks on their way out to one node, so that no reader ever sees a part of one.

Knows the order of commands and what becomes of a chunk that comes second. Knows nothing about
keys, nor about other nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from lmcache_backend_redis.commands import discard, intact, unlink
from lmcache_backend_redis.config import RedisConfig
from lmcache_backend_redis.layout import Head
from lmcache_backend_redis.resp import ProtocolError, Reply, ReplyError, Wire, command
from lmcache_core import StoreOutcome

_STAGING_MARGIN_S: Final = 60


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


class Store:
    """One batch to one node.

    Values that are there already aren't sent again. Pieces are written with a time to live, so that
    an interrupted store leaves nothing for long; one transaction then makes them stay and sets the
    head that names them. The head is only set where there is none (NX): whoever comes second takes
    its pieces away again.
    """

    def __init__(self, wire: Wire, config: RedisConfig, most_bytes: int) -> None:
        self._wire = wire
        self._most_bytes = most_bytes
        self._piece_bytes = config.piece_bytes
        self._ttl_s = config.ttl_s
        self._staging = b"%d" % (int(config.call_timeout_s) + _STAGING_MARGIN_S)

    async def run(
        self,
        positions: Iterable[int],
        names: Sequence[bytes],
        sources: Sequence[memoryview],
        outcomes: list[StoreOutcome],
    ) -> None:
        fits = [i for i in positions if sources[i].nbytes <= self._most_bytes]
        present = await intact(self._wire, [names[i] for i in fits], self._most_bytes)
        puts = []
        for i, there in zip(fits, present, strict=True):
            if there:
                outcomes[i] = StoreOutcome.ALREADY_PRESENT
                continue
            head = Head.of(sources[i].nbytes, self._piece_bytes)
            puts.append(_Put(i, names[i], sources[i], head, head.pieces(names[i])))
        await self._send(puts)
        for put in puts:  # while the server is busy
            if put.pieces:
                put.commit = b"".join(self._transaction(put))
        if await self._wire.came(b"+OK\r\n" * sum(len(put.pieces) or 1 for put in puts)):
            written = puts
            for put in puts:
                if not put.pieces:
                    outcomes[put.position] = StoreOutcome.STORED
        else:
            written = [put for put in puts if await self._written(put, outcomes)]
        await self._commit([put for put in written if put.pieces], outcomes)

    async def _send(self, puts: Iterable[_Put]) -> None:
        parts: list[bytes | memoryview] = []
        for put in puts:
            if put.pieces:
                for name, place in put.pieces:
                    parts += _set(name, b"", put.source[place], (b"EX", self._staging))
            else:
                parts += _set(put.name, put.head.pack(), put.source, (b"NX", *self._expiry(0)))
        await self._wire.send(parts)

    async def _written(self, put: _Put, outcomes: list[StoreOutcome]) -> bool:
        """Read what became of the SETs of one chunk."""
        replies = [await self._wire.reply() for _ in put.pieces or (None,)]
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

    async def _commit(self, puts: Sequence[_Put], outcomes: list[StoreOutcome]) -> None:
        if not puts:
            return
        await self._wire.send([put.commit for put in puts])
        if await self._wire.came(b"".join(_kept(len(put.pieces)) for put in puts)):
            for put in puts:
                outcomes[put.position] = StoreOutcome.STORED
            return
        superseded: list[bytes] = []
        incomplete: list[bytes] = []
        for put in puts:
            done = await self._transacted(len(put.pieces) + 1)
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
        await discard(self._wire, incomplete, self._most_bytes)
        await unlink(self._wire, superseded)

    def _transaction(self, put: _Put) -> Iterator[bytes]:
        yield command(b"MULTI")
        for name, _ in put.pieces:
            # Pieces outlive their head, so that none is missing while the head is there.
            lasting = self._expiry(_STAGING_MARGIN_S)
            yield command(b"EXPIRE", name, lasting[1]) if lasting else command(b"PERSIST", name)
        yield command(b"SET", put.name, put.head.pack(), b"NX", *self._expiry(0))
        yield command(b"EXEC")

    async def _transacted(self, count: int) -> list[Reply] | None:
        """What ``count`` commands answered in a transaction; ``None`` if there was no memory."""
        queued = [await self._wire.reply() for _ in range(count + 1)]  # with MULTI's own
        done = await self._wire.reply()
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
