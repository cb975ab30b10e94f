"""What lies in a pool's slots: a small file beside them, written by its owner and read by all.

    offset  bytes  header
    0       8      magic        b"LMCNIX\\x00\\x01"; anything else: the pool is gone, or being made
    8       8      slot bytes
    16      8      files
    24      8      parts        of a slot: see `slots`
    32      8      changes      another number after each change that the owner made
    40      8      withdrawals  another number after each that somebody else made
    48      16     zeros

    offset  bytes  the record of a slot, at 64 + 64 x slot
    0       8      nonce        when the value was stored, in nanoseconds since 1970, and more than
                                that of any value before it in this pool; 0: there is none
    8       8      length       of the value
    16      32     key          padded with zeros
    48      4      key length
    52      4      CRC-32       of bytes 0-51
    56      8      withdrawn    the nonce of a value that is to be forgotten

All integers are little-endian. A record is written once all of the value is in its slot, and is
emptied before another value goes there; ``changes`` is written after either. So who finds the
header as it was knows that the records are as they were, and who finds the same nonce before and
after it read a slot has read that value and no other. Half a record is no record (CRC).

Who isn't the owner writes only ``withdrawn``, and then ``withdrawals``. A value that came to the
slot meanwhile has another nonce.

Everything is read and written by system calls and not through a mapping: every file system has
them, what one process has written is what the next call of another one reads, and a file that was
cut short is an answer and not a signal.

Knows records. Knows nothing about what was used last, and nothing about NIXL.
"""

from __future__ import annotations

import os
import secrets
import struct
import time
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from lmcache_backend_nixl.slots import Places, Shape
from lmcache_core import ChunkKey

KEY_BYTES: Final = 32
"""The longest key, as in core's frame."""
_MAGIC: Final = b"LMCNIX\0\1"
_HEADER: Final = struct.Struct("<8sQQQQQ16x")
_CHANGES_AT: Final = 32
_WITHDRAWALS_AT: Final = 40
_VALUE: Final = struct.Struct(f"<QQ{KEY_BYTES}sI")
_RECORD: Final = struct.Struct(f"<{_VALUE.size}sIQ")
_WITHDRAWN_AT: Final = _RECORD.size - 8
_MOST_FILES: Final = 64
_NO_SHAPE: Final = Shape(0, 1, 1)
_BLOCK: Final = 64 * _RECORD.size
"""So much of two states is compared at once."""


class Entry(NamedTuple):
    """Where a value lies."""

    pool: str
    slot: int
    places: Places
    """Where the parts of its slot begin."""
    files: int
    """Of its pool."""
    nbytes: int
    nonce: int


class Index:
    """The index of a pool, for everybody. Not thread-safe."""

    def __init__(self, path: Path, pool: str) -> None:
        """Open it.

        Raises:
            OSError: it isn't there, or isn't to be read.
        """
        self.path = path
        self.pool = pool
        self.entries: dict[ChunkKey, Entry] = {}
        """What it said when it was last looked at."""
        self.shape = _NO_SHAPE
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._header = self._records = b""
        self._keys: dict[int, ChunkKey] = {}
        """By slot."""

    def refresh(self) -> None:
        """Bring `entries` up to date; there are none if the pool is gone.

        Raises:
            OSError: the file system failed.
        """
        header = os.pread(self._fd, _HEADER.size, 0)
        if header == self._header:
            return
        records = b""
        if (shape := _shape(header)) is not None:
            if shape != self.shape:
                self._update(b"")
                self.shape = shape
            records = _read_records(self._fd)
        self._update(records)
        self._header = header

    def withdraw(self, entries: Iterable[Entry]) -> None:
        """Have everybody forget these values, as far as they are still there.

        Raises:
            OSError: the file system failed, or the index isn't to be written.
        """
        fd = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            for entry in entries:
                place = _place(entry.slot) + _WITHDRAWN_AT
                os.pwrite(fd, entry.nonce.to_bytes(8, "little"), place)
            os.pwrite(fd, secrets.token_bytes(8), _WITHDRAWALS_AT)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Call nothing afterwards."""
        os.close(self._fd)

    def _update(self, records: bytes) -> None:
        """Take over what is other than before."""
        old, size = self._records, max(len(self._records), len(records))
        for block in range(0, size, _BLOCK):
            if old[block : block + _BLOCK] == records[block : block + _BLOCK]:
                continue
            for start in range(block, min(block + _BLOCK, size), _RECORD.size):
                record = records[start : start + _RECORD.size]
                if record != old[start : start + _RECORD.size]:
                    self._take(start // _RECORD.size, record)
        self._records = records

    def _take(self, slot: int, record: bytes) -> None:
        before = self._keys.pop(slot, None)
        if before is not None and (was := self.entries.get(before)) and was.slot == slot:
            del self.entries[before]
        if (found := _parse(record)) is not None and found[1] <= self.shape.slot_bytes:
            key, nbytes, nonce = found
            self._keys[slot] = key
            self.entries[key] = _entry(self.pool, self.shape, slot, nbytes, nonce)


class OwnIndex:
    """The index of a pool, for its owner: nobody else writes records. Not thread-safe."""

    def __init__(self, path: Path, pool: str, fd: int) -> None:
        """``fd`` is it, open for reading and writing; it is this object's from now on."""
        self.path = path
        self.fd = fd
        self._pool = pool
        self._shape = _NO_SHAPE
        self._nonce = 0
        self._changes = secrets.randbits(63)
        self._withdrawals = b""

    def recover(self, slots: int, shape: Shape, there: int) -> dict[ChunkKey, Entry]:
        """What is in it, the oldest first; what doesn't fit the slots as they are now is dropped.

        Only of the first ``there`` slots the files still have the bytes.

        Raises:
            OSError: the file system refuses.
        """
        before = Index(self.path, self._pool)
        try:
            before.refresh()
        finally:
            before.close()
        oldest_first = sorted(before.entries.items(), key=lambda item: item[1].nonce)
        same = before.shape == shape
        keep = min(slots, there) if same else 0
        os.ftruncate(self.fd, _place(keep) if keep else 0)
        os.ftruncate(self.fd, _place(slots))
        self._shape = shape
        if oldest_first:
            self._nonce = oldest_first[-1][1].nonce
        self._withdrawals = os.pread(self.fd, 8, _WITHDRAWALS_AT)
        found = {key: entry for key, entry in oldest_first if entry.slot < keep}
        # A key may be there twice, if publishing failed once: the other slot is free from now on.
        self.empty(set(range(slots)) - {entry.slot for entry in found.values()})
        header = _HEADER.pack(_MAGIC, *shape, self._changes, 0)
        os.pwrite(self.fd, header[:_WITHDRAWALS_AT], 0)
        return found

    def publish(self, values: Sequence[tuple[int, ChunkKey, int]]) -> list[Entry]:
        """Make values visible: a slot, a key and a length for each; later ones are newer.

        Raises:
            OSError: the file system failed.
        """
        records: dict[int, bytes] = {}
        entries = []
        for slot, key, nbytes in values:
            self._nonce = max(self._nonce + 1, time.time_ns())
            value = _VALUE.pack(self._nonce, nbytes, key, len(key))
            records[slot] = _RECORD.pack(value, zlib.crc32(value), 0)
            entries.append(_entry(self._pool, self._shape, slot, nbytes, self._nonce))
        self._write(records)
        return entries

    def empty(self, slots: Iterable[int]) -> None:
        """Have nobody find what is in these slots any more.

        Raises:
            OSError: the file system failed.
        """
        self._write(dict.fromkeys(slots, bytes(_RECORD.size)))

    def withdrawn(self, entries: Iterable[tuple[ChunkKey, Entry]]) -> list[ChunkKey]:
        """The keys of values that somebody had forgotten since the last call.

        Raises:
            OSError: the file system failed.
        """
        withdrawals = os.pread(self.fd, 8, _WITHDRAWALS_AT)
        if withdrawals == self._withdrawals:
            return []
        records = _read_records(self.fd)
        self._withdrawals = withdrawals
        return [
            key
            for key, entry in entries
            if _parse(records[(at := entry.slot * _RECORD.size) : at + _RECORD.size]) is None
        ]

    def vanish(self) -> None:
        """Have nobody find the pool any more.

        Raises:
            OSError: the file system failed.
        """
        os.ftruncate(self.fd, 0)

    def close(self) -> None:
        """Let others have the pool. Call nothing afterwards."""
        os.close(self.fd)

    def _write(self, records: dict[int, bytes]) -> None:
        """Nobody can have withdrawn what isn't there yet, nor cares for what is no longer there.

        So `withdrawn` may be overwritten too, and neighbours go in one call, which costs as much
        as a record alone.
        """
        waiting: list[bytes] = []
        for slot in sorted(records):
            waiting.append(records[slot])
            if slot + 1 not in records:
                os.pwrite(self.fd, b"".join(waiting), _place(slot + 1 - len(waiting)))
                waiting.clear()
        self._changes += 1
        os.pwrite(self.fd, self._changes.to_bytes(8, "little"), _CHANGES_AT)


def _entry(pool: str, shape: Shape, slot: int, nbytes: int, nonce: int) -> Entry:
    return Entry(pool, slot, shape.places(slot), shape.files, nbytes, nonce)


def _shape(header: bytes) -> Shape | None:
    """``None`` if it isn't a header of a pool that is there."""
    if len(header) != _HEADER.size or not header.startswith(_MAGIC):
        return None
    _, slot_bytes, files, parts, _, _ = _HEADER.unpack(header)
    if not 0 < files <= _MOST_FILES or parts not in (1, files):
        return None
    return Shape(slot_bytes, files, parts)


def _place(slot: int) -> int:
    return _HEADER.size + slot * _RECORD.size


def _read_records(fd: int) -> bytes:
    records = os.pread(fd, max(0, os.fstat(fd).st_size - _HEADER.size), _HEADER.size)
    return records[: len(records) // _RECORD.size * _RECORD.size]


def _parse(record: bytes) -> tuple[ChunkKey, int, int] | None:
    """Key, length and nonce of a value; ``None`` if there is none."""
    if len(record) != _RECORD.size:
        return None
    value, crc, withdrawn = _RECORD.unpack(record)
    nonce, nbytes, key, length = _VALUE.unpack(value)
    if nonce in (0, withdrawn) or nbytes == 0 or length > KEY_BYTES or crc != zlib.crc32(value):
        return None
    return ChunkKey(key[:length]), nbytes, nonce
