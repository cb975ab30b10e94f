"""Commands about whole chunks on one node: which are intact, and forgetting them.

Knows heads, pieces and replies. Knows nothing about what calls them, nor about other nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from lmcache_backend_redis.layout import HEAD, Head, Names
from lmcache_backend_redis.resp import ProtocolError, Reply, ReplyError, Wire, command, commands

_SCAN_COUNT: Final = b"1000"


def is_whole(head: Head, follows: int) -> bool:
    """Whether as many bytes follow a head as it says."""
    return follows == (0 if head.piece_bytes else head.value_bytes)


async def intact(wire: Wire, names: Sequence[bytes], most_bytes: int) -> list[bool]:
    """Say which chunks are there in full, and forget those that are there in part.

    A head whose pieces were evicted, or what another version left, would keep a new value out; so
    would one that announces more than ``most_bytes``, which no load has room for.
    """
    asking = [
        command(b"GETRANGE", name, b"0", b"%d" % (HEAD.size - 1)) + command(b"STRLEN", name)
        for name in names
    ]
    await wire.send([b"".join(asking)])
    intact = [False] * len(names)
    if await wire.came(b"$0\r\n\r\n:0\r\n" * len(names)):
        return intact  # none is there, as usual
    heads = [(await _string(wire), await _integer(wire)) for _ in names]
    pieces: list[tuple[int, bytes, int]] = []
    damaged: set[int] = set()
    for i, (start, length) in enumerate(heads):
        if not length:
            continue
        head = Head.unpack(start, most_bytes)
        intact[i] = head is not None and is_whole(head, length - HEAD.size)
        if head is None or not intact[i]:
            damaged.add(i)
            continue
        for name, place in head.pieces(names[i]):
            pieces.append((i, name, place.stop - place.start))
    await wire.send([commands(b"STRLEN", [name for _, name, _ in pieces])])
    lengths = await wire.integers(len(pieces))
    damaged.update(i for (i, _, nbytes), got in zip(pieces, lengths, strict=True) if got != nbytes)
    for i in damaged:
        intact[i] = False
    await discard(wire, [names[i] for i in sorted(damaged)], most_bytes)
    return intact


async def discard(wire: Wire, names: Sequence[bytes], most_bytes: int) -> int:
    """Remove chunks with their pieces; answer how many there were.

    A head is read and removed in one transaction, so whoever removes it knows all of its pieces.
    Of one that announces more than ``most_bytes`` only the head is removed.
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
    await wire.send([b"".join(taking)])
    count, pieces = 0, []
    for name in names:
        for _ in range(3):
            _refuse(await wire.reply())
        done = _refuse(await wire.reply())
        match done:
            case [bytes(start), int(removed)]:
                count += removed
                head = Head.unpack(start, most_bytes)
                pieces += [piece for piece, _ in head.pieces(name)] if head else []
            case _:
                raise ProtocolError(f"{wire.peer} answered EXEC with {done!r:.80}")
    await unlink(wire, pieces)
    return count


async def unlink(wire: Wire, names: Sequence[bytes]) -> None:
    # One command a name: a cluster refuses a command about several slots.
    await wire.send([commands(b"UNLINK", names)])
    await wire.integers(len(names))


async def clear(wire: Wire, names: Names) -> int:
    """Remove everything of a namespace from one node; answer how many chunks there were."""
    count, cursor = 0, b"0"
    while True:
        await wire.send([command(b"SCAN", cursor, b"MATCH", names.pattern, b"COUNT", _SCAN_COUNT)])
        page = _refuse(await wire.reply())
        match page:
            case [bytes(cursor), list(found)]:
                these = [name for name in found if isinstance(name, bytes)]
            case _:
                raise ProtocolError(f"{wire.peer} answered SCAN with {page!r:.80}")
        # Heads first, so that nobody is sent after pieces that are gone.
        these.sort(key=Names.is_head, reverse=True)
        await wire.send([commands(b"UNLINK", these)])
        removed = await wire.integers(len(these))
        count += sum(n for name, n in zip(these, removed, strict=True) if Names.is_head(name))
        if cursor == b"0":
            return count


def _refuse(reply: Reply) -> Reply:
    """``reply``, or raise it if it is an error."""
    if isinstance(reply, ReplyError):
        raise reply
    return reply


async def _integer(wire: Wire) -> int:
    reply = _refuse(await wire.reply())
    if not isinstance(reply, int):
        raise ProtocolError(f"{wire.peer} answered {reply!r:.80} where a number was expected")
    return reply


async def _string(wire: Wire) -> bytes:
    reply = _refuse(await wire.reply())
    if not isinstance(reply, bytes):
        raise ProtocolError(f"{wire.peer} answered {reply!r:.80} where a string was expected")
    return reply
