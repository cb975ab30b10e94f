"""Where chunk files lie below a folder, and what is there.

    PATH/<namespace fingerprint>/<first byte of the key>/<key>

Knows names, and sweeps what crashes left; what isn't named so is somebody else's and stays. Knows
nothing about bounds.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from lmcache_core.builtin.filesystem_io import ChunkFiles, remove
from lmcache_core.chunks.keys import ChunkKey

_SPACE = re.compile(r"[0-9a-f]{16}")


def place(folder: Path, key: ChunkKey) -> str:
    """The file of ``key`` in a namespace's folder."""
    name = key.hex()
    return f"{folder}/{name[:2]}/{name}"


def is_space(name: str) -> bool:
    """Whether a folder of this name is a namespace's."""
    return _SPACE.fullmatch(name) is not None


def spaces(top: Path) -> list[str]:
    """The namespaces that have a folder below ``top``."""
    with os.scandir(top) as entries:
        return [
            one.name for one in entries if is_space(one.name) and one.is_dir(follow_symlinks=False)
        ]


def scan(folder: Path, files: ChunkFiles) -> Iterator[tuple[int, ChunkKey, int]]:
    """Time, key and size of every chunk in a namespace's folder; sweeps what crashes left."""
    for entry in _entries(folder):
        path = Path(entry.path)
        try:
            facts = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue  # another process evicted it
        if entry.name.startswith(".") and entry.name.endswith(".tmp"):
            if files.is_abandoned(path, facts.st_mtime):
                remove(path)
            continue
        key = _key(path)
        if key is None or not stat.S_ISREG(facts.st_mode):
            continue  # not ours
        if facts.st_size:  # an empty one may be another by now: whoever has a chunk replaces it
            yield facts.st_mtime_ns, key, facts.st_size


def folders(folder: Path) -> list[Path]:
    """A namespace's folder, after those in it; none if it isn't there."""
    try:
        with os.scandir(folder) as level:
            below = [Path(one.path) for one in level if one.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    return [*below, folder]


def remove_empty(folder: Path) -> None:
    """Remove a namespace's folder, which nobody uses, if only what is empty is left in it."""
    try:
        for entry in _entries(folder):
            if not entry.stat(follow_symlinks=False).st_size and _key(Path(entry.path)):
                os.unlink(entry.path)
        for one in folders(folder):
            os.rmdir(one)
    except OSError:
        return  # it isn't empty, or can't be removed: either way it stays


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as level:
            below = list(level)
    except FileNotFoundError:
        return
    for one in below:
        if not one.is_dir(follow_symlinks=False):
            yield one
            continue
        try:
            with os.scandir(one) as level:
                yield from level
        except FileNotFoundError:
            continue  # another process removed it


def _key(path: Path) -> ChunkKey | None:
    """The key that a file is named after, or ``None`` for a file that isn't ours."""
    name = path.name
    if path.parent.name != name[:2] or name != name.lower():
        return None
    try:
        return ChunkKey(bytes.fromhex(name))
    except ValueError:
        return None
