"""Writers of a folder that are killed, or lose power, where a seed says so.

    python crashing.py kills FOLDER --count 10000 --seed 7
    python crashing.py cuts FOLDER --count 1000 --seed 7

See `killing` and `cutting`. Exit status 1: something was missing, wrong, back or removed without
need, or there was no room for a chunk. It says in which chain; ``--first`` begins with that
one. 2: a signal ended it. The last line says how to go on. ``--break`` makes a mistake on purpose,
to see that it is found.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from cutting import Cuts
from forks import FoundError
from killing import Kills
from writers import KINDS, prepare

from lmcache_core.builtin import filesystem, filesystem_io, filesystem_room, filesystem_scan
from lmcache_core.builtin.filesystem_io import ChunkFiles


def _no_names() -> None:
    for module in (filesystem, filesystem_io):
        module.sync_folder = lambda path: None  # type: ignore[attr-defined]


def _no_bytes() -> None:
    write = ChunkFiles.write

    def unsynced(self: ChunkFiles, path: Path, source: memoryview) -> int:
        fsync, self._fsync = self._fsync, False
        replaced = write(self, path, source)
        self._fsync = fsync
        if fsync:
            filesystem_io.sync_folder(path.parent)
            self._settle(path.parent)
        return replaced

    ChunkFiles.write = unsynced  # type: ignore[method-assign]


def _in_place() -> None:
    ChunkFiles._temporary = lambda self, path: path  # type: ignore[method-assign]


def _unwanted() -> None:
    filesystem.FilesystemBackend._clear = lambda self: 0  # type: ignore[method-assign]


def _swept() -> None:
    def remove_all(self: filesystem_room.FolderRoom, key: Any) -> bool:
        os.unlink(filesystem_scan.place(self._top / self._space, key))
        return False

    filesystem_room.FolderRoom._is_whole = remove_all  # type: ignore[method-assign]


MISTAKES = {
    "no-names": _no_names,
    "no-bytes": _no_bytes,
    "in-place": _in_place,
    "no-clear": _unwanted,
    "swept": _swept,
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("what", choices=("kills", "cuts"))
    add("folder", type=Path, help="an empty one, best in memory")
    add("--count", type=int, default=100, metavar="N", help="of kills or cuts (default: 100)")
    add("--seed", type=int, default=0, help="(default: 0)")
    add("--first", type=int, default=0, metavar="CHAIN", help="number of the first chain")
    add("--jobs", type=int, default=1, metavar="N", help="chains at one time (default: 1)")
    add("--kinds", default=",".join(KINDS), help=f"of writers: {', '.join(KINDS)} (default: all)")
    add("--break", dest="mistake", choices=MISTAKES, help="make a mistake on purpose")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    prepare()
    if len(os.listdir("/proc/self/task")) > 1:
        parser.error("a fork has one thread of its parent's only, and there are more")
    if arguments.mistake:
        MISTAKES[arguments.mistake]()
    chains: Kills | Cuts = Cuts(arguments.folder, arguments.seed)
    status = 0
    try:
        if arguments.what == "kills":
            chains = Kills(arguments.folder, arguments.seed, arguments.kinds.split(","))
            chains.record()
        for one in (signal.SIGINT, signal.SIGTERM):
            signal.signal(one, chains.stop)
        if not chains.run(arguments.count, arguments.first, arguments.jobs):
            status = 2
    except FoundError as error:
        print(f"seed {arguments.seed}, {error}")
        status = 1
    print(f"seed {arguments.seed}: {chains.summary}")
    print(f"to go on: {arguments.what} --seed {arguments.seed} --first {chains.next}")
    return status


if __name__ == "__main__":
    sys.exit(main())
