"""What lies in a pool's slots: a small file beside them, written by its owner and read by all.

    offset  bytes  header
    0       8      magic        b"LMCNIX\\x00\\x01"; anything else: the pool is gone, or being made
    8       8      slot bytes
    16      8      changes      another number after each change that the owner made
    24      8      withdrawals  another number after each that somebody else made
    32      32     zeros

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

Who isn't the owner writes only ``withdrawn``, and then ``withdrawals``. The owner never writes
these, so no change is lost, and a value that came to the slot meanwhile has another nonce.

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

from lmcache_core.keys import ChunkKey

KEY_BYTES: Final = 32
"""The longest key, as in core's frame."""
_MAGIC: Final = b"LMCNIX\0\1"
_HEADER: Final = struct.Struct("<8sQQQ32x")
_CHANGES_AT: Final = 16
_WITHDRAWALS_AT: Final = 24
_VALUE: Final = struct.Struct(f"<QQ{KEY_BYTES}sI")
_RECORD: Final = struct.Struct(f"<{_VALUE.size}sIQ")
_WITHDRAWN_AT: Final = _RECORD.size - 8
_EMPTY: Final = bytes(_WITHDRAWN_AT)
_BLOCK: Final = 64 * _RECORD.size
"""So much of two states is compared at once."""


class Entry(NamedTuple):
    """Where a value lies."""

    pool: str
    slot: int
    offset: int
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
        self.slot_bytes = 0
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
        if len(header) == _HEADER.size and header.startswith(_MAGIC):
            _, slot_bytes, _, _ = _HEADER.unpack(header)
            if slot_bytes != self.slot_bytes:
                self._update(b"")
                self.slot_bytes = slot_bytes
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
        if (found := _parse(record)) is not None and found[1] <= self.slot_bytes:
            key, nbytes, nonce = found
            self._keys[slot] = key
            self.entries[key] = Entry(self.pool, slot, slot * self.slot_bytes, nbytes, nonce)


class OwnIndex:
    """The index of a pool, for its owner: nobody else writes records. Not thread-safe."""

    def __init__(self, path: Path, pool: str, slots: int, slot_bytes: int) -> None:
        """Open it, or make it. What doesn't fit the slots as they are now is dropped.

        Raises:
            OSError: the file system refuses.
        """
        self.path, self._pool, self._slot_bytes = path, pool, slot_bytes
        self._nonce = 0
        self._changes = secrets.randbits(63)
        self._withdrawals = b""
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self.found = self._recover(slots)
        except BaseException:
            os.close(self.fd)
            raise

    def publish(self, values: Sequence[tuple[int, ChunkKey, int]]) -> list[Entry]:
        """Make values visible: a slot, a key and a length for each.

        Raises:
            OSError: the file system failed.
        """
        entries = []
        for slot, key, nbytes in values:
            self._nonce = max(self._nonce + 1, time.time_ns())
            value = _VALUE.pack(self._nonce, nbytes, key, len(key))
            os.pwrite(self.fd, value + zlib.crc32(value).to_bytes(4, "little"), _place(slot))
            entries.append(self._entry(slot, nbytes, self._nonce))
        self._tell()
        return entries

    def empty(self, slots: Iterable[int]) -> None:
        """Have nobody find what is in these slots any more.

        Raises:
            OSError: the file system failed.
        """
        for slot in slots:
            os.pwrite(self.fd, _EMPTY, _place(slot))
        self._tell()

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

    def close(self, *, keep: bool) -> None:
        """Call nothing afterwards. Unless ``keep``, nobody finds the pool any more."""
        if not keep:
            os.ftruncate(self.fd, 0)
            self.path.unlink(missing_ok=True)
        os.close(self.fd)

    def _recover(self, slots: int) -> dict[ChunkKey, Entry]:
        before = Index(self.path, self._pool)
        try:
            before.refresh()
        finally:
            before.close()
        oldest_first = sorted(before.entries.items(), key=lambda item: item[1].nonce)
        same = before.slot_bytes == self._slot_bytes
        found = {key: entry for key, entry in oldest_first if same and entry.slot < slots}
        if not same:
            os.ftruncate(self.fd, 0)
        os.ftruncate(self.fd, _place(slots))
        if oldest_first:
            self._nonce = oldest_first[-1][1].nonce
        self._withdrawals = os.pread(self.fd, 8, _WITHDRAWALS_AT)
        header = _HEADER.pack(_MAGIC, self._slot_bytes, self._changes, 0)
        os.pwrite(self.fd, header[:_WITHDRAWALS_AT], 0)
        return found

    def _entry(self, slot: int, nbytes: int, nonce: int) -> Entry:
        return Entry(self._pool, slot, slot * self._slot_bytes, nbytes, nonce)

    def _tell(self) -> None:
        self._changes += 1
        os.pwrite(self.fd, self._changes.to_bytes(8, "little"), _CHANGES_AT)


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
