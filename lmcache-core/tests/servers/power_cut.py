"""What a power cut leaves of a folder: a log of system calls, replayed up to any of them.

`PowerLog` records what is done below a folder. `Disk.after` replays the log into a file system that
keeps a file's bytes when the file was synced, and a name when its folder was; `Disk.rebuild` writes
what such a disk has after a cut into an empty folder. What wasn't synced is kept or not, as `Kept`
says: the two extremes, or names, or names and blocks of bytes, by a seed.
"""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest

Entry = tuple[Any, ...]
BLOCK = 512
"""So many bytes are written whole or not at all."""


class Kept(NamedTuple):
    """Asked for each name, and for each block of bytes, that wasn't synced: whether it is there.

    Where ``names`` says so, a file has its length, with zeros for blocks that aren't there.
    """

    names: Callable[[], bool]
    blocks: Callable[[], bool]


nothing = Kept(lambda: False, lambda: False)
"""Only what was synced is there."""
everything = Kept(lambda: True, lambda: False)
"""All names are there, though not the bytes of files that weren't synced."""


def some(seed: int) -> Kept:
    """Each name that wasn't synced is there or not."""
    seeds = random.Random(seed)
    return Kept(lambda: seeds.random() < 0.5, lambda: False)


def torn(seed: int) -> Kept:
    """Each name and each block is there or not, most of them or few by the seed."""
    seeds = random.Random(seed)
    names, blocks = (seeds.choice((0.1, 0.5, 0.9)) for _ in range(2))
    return Kept(lambda: seeds.random() < names, lambda: seeds.random() < blocks)


@dataclass
class File:
    """Bytes as a reader sees them, and as they are on the disk."""

    data: bytearray = field(default_factory=bytearray)
    synced: bytes | None = None
    unsynced: list[tuple[int, bytes]] = field(default_factory=list)
    """What was written since then, and where."""

    def write(self, at: int, data: bytes) -> None:
        self.data.extend(bytes(max(0, at - len(self.data))))
        self.data[at : at + len(data)] = data
        self.unsynced.append((at, data))

    def sync(self) -> None:
        self.synced = bytes(self.data)
        self.unsynced.clear()

    def left(self, kept: Kept) -> bytes:
        """What a power cut leaves of it."""
        found = bytearray(self.synced or b"")
        for at, block in self._blocks():
            if kept.blocks():
                found.extend(bytes(max(0, at - len(found))))
                found[at : at + len(block)] = block
        if self.synced != self.data and kept.names():
            found = found[: len(self.data)].ljust(len(self.data), b"\0")
        return bytes(found)

    def _blocks(self) -> Iterator[tuple[int, bytes]]:
        for at, data in self.unsynced:
            for start in range(0, len(data), BLOCK):
                yield at + start, data[start : start + BLOCK]


@dataclass
class Folder:
    """Names as a reader sees them, and as they are on the disk."""

    names: dict[str, File | Folder] = field(default_factory=dict)
    synced: dict[str, File | Folder] = field(default_factory=dict)


class PowerLog:
    """Records system calls on what is below ``top``, and marks of the test between them."""

    def __init__(self, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[Entry] = []
        self._top = str(top)
        self._fds: dict[int, str | int] = {}
        self._files = 0
        for name in ("open", "pwrite", "ftruncate", "fsync", "replace", "mkdir", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, self._recording(name, getattr(os, name)))

    def mark(self, *what: object) -> None:
        """Note something that only the test understands."""
        self.log.append(("mark", *what))

    def _recording(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        note = getattr(self, f"_{name}")

        def call(*args: Any, **options: Any) -> Any:
            there = name == "open" and os.path.lexists(args[0])
            answer = real(*args, **options)
            note(answer, there, *args)
            return answer

        return call

    def _below(self, path: Any) -> str | None:
        """A path from ``top`` on, where it is there."""
        text = os.fspath(path)
        return os.path.relpath(text, self._top) if text.startswith(self._top) else None

    def _open(self, fd: int, there: bool, path: Any, flags: int, *_: Any) -> None:
        self._fds.pop(fd, None)
        if (below := self._below(path)) is None:
            return
        self._files += 1
        self._fds[fd] = self._files
        made = bool(flags & os.O_CREAT) and not there
        self.log.append(("open", self._files, below, made))

    def _pwrite(self, wrote: int, _: bool, fd: int, data: Any, at: int) -> None:
        if fd in self._fds:
            self.log.append(("write", self._fds[fd], at, bytes(data[:wrote])))

    def _ftruncate(self, _: None, __: bool, fd: int, size: int) -> None:
        if fd in self._fds:
            self.log.append(("truncate", self._fds[fd], size))

    def _fsync(self, _: None, __: bool, fd: int) -> None:
        if fd in self._fds:
            self.log.append(("sync", self._fds[fd]))

    def _replace(self, _: None, __: bool, source: Any, target: Any) -> None:
        if (below := self._below(source)) is not None:
            self.log.append(("rename", below, self._below(target)))

    def _mkdir(self, _: None, __: bool, path: Any, *___: Any) -> None:
        if (below := self._below(path)) is not None:
            self.log.append(("mkdir", below))

    def _unlink(self, _: None, __: bool, path: Any) -> None:
        if (below := self._below(path)) is not None:
            self.log.append(("remove", below))

    _rmdir = _unlink


class Disk:
    """A file system after some of a log."""

    def __init__(self) -> None:
        self.root = Folder()
        self._opened: dict[int, File | Folder] = {}

    @classmethod
    def of(cls, place: Path) -> Disk:
        """A disk with what is in ``place``, all of it synced."""
        disk = cls()
        disk.root = _folder_of(place)
        return disk

    @classmethod
    def after(cls, log: Sequence[Entry], before: Disk | None = None) -> Disk:
        """The disk when all of ``log`` was done, to an empty one or to a copy of ``before``."""
        disk = copy.deepcopy(before) if before else cls()
        for operation, *rest in log:
            if operation != "mark":
                getattr(disk, f"_{operation}")(*rest)
        return disk

    def rebuild(self, place: Path, kept: Kept) -> None:
        """Write what a power cut leaves into the empty folder ``place``."""
        self._rebuild(self.root, place, kept)

    def _rebuild(self, folder: Folder, place: Path, kept: Kept) -> None:
        for name in sorted({*folder.names, *folder.synced}):
            now, before = folder.names.get(name), folder.synced.get(name)
            found = now if now is before or kept.names() else before
            if isinstance(found, Folder):
                (place / name).mkdir()
                self._rebuild(found, place / name, kept)
            elif found is not None:
                (place / name).write_bytes(found.left(kept))

    def _find(self, path: str) -> tuple[Folder, str]:
        *above, name = path.split("/")
        folder = self.root
        for one in above:
            below = folder.names[one]
            assert isinstance(below, Folder)
            folder = below
        return folder, name

    def _open(self, number: int, path: str, made: bool) -> None:
        if path == ".":
            self._opened[number] = self.root
            return
        folder, name = self._find(path)
        if made:
            folder.names[name] = File()
        self._opened[number] = folder.names[name]

    def _write(self, number: int, at: int, data: bytes) -> None:
        file = self._opened[number]
        assert isinstance(file, File)
        file.write(at, data)

    def _truncate(self, number: int, size: int) -> None:
        file = self._opened[number]
        assert isinstance(file, File)
        del file.data[size:]

    def _sync(self, number: int) -> None:
        one = self._opened[number]
        if isinstance(one, File):
            one.sync()
        else:
            one.synced = dict(one.names)

    def _rename(self, source: str, target: str) -> None:
        (old, old_name), (new, new_name) = self._find(source), self._find(target)
        new.names[new_name] = old.names.pop(old_name)

    def _mkdir(self, path: str) -> None:
        folder, name = self._find(path)
        folder.names[name] = Folder()

    def _remove(self, path: str) -> None:
        folder, name = self._find(path)
        del folder.names[name]


def _folder_of(place: Path) -> Folder:
    names: dict[str, File | Folder] = {}
    for one in place.iterdir():
        if one.is_dir():
            names[one.name] = _folder_of(one)
        else:
            data = one.read_bytes()
            names[one.name] = File(bytearray(data), data)
    return Folder(names, dict(names))
