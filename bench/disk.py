"""The ``filesystem`` backend: how far from the file system itself?

    python3 bench/disk.py            about a minute
    python3 bench/disk.py --quick    seconds, wider spread
    python3 bench/disk.py --folder /mnt/nvme

Stores and loads values as core hands them over: a frame's header and a chunk of 32 MiB or 2 MiB,
from memory that begins at a page; a call has one of the former or eight of the latter. The
calibration is `RawFiles`: open, write or read, and close, of as many files with the same bytes
(with O_DIRECT: whole pages), through the page cache or past it as the backend does, and on the
disk before it returns if ``fsync`` asks for that. What is around that in the backend: a thread, a
temporary name, rename, free space, an index of sizes.

    buffered    through the page cache: stores end up there, and loads find their value there
    direct      O_DIRECT: the disk itself
    durable     O_DIRECT, and survives a power cut
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from calibrations import RawFiles, aligned
from measuring import Report, Run, parse, parser, take_turns, throughput

from lmcache_core.builtin.filesystem import FilesystemBackend, FilesystemConfig
from lmcache_core.chunks.frame import HEADER_BYTES
from lmcache_core.chunks.keys import CacheNamespace, ChunkKey
from lmcache_core.chunks.layout import DType, KVLayout, full_attention
from lmcache_core.contracts.storage import BackendContext, StoreOutcome

SHAPES = {"1 x 32 MiB": (1, 32 << 20), "8 x 2 MiB": (8, 2 << 20)}
MODES = {
    "buffered": {"direct_io": False, "fsync": False},
    "direct": {"direct_io": True, "fsync": False},
    "durable": {"direct_io": True, "fsync": True},
}
TURNS = 3
FOLDER = Path("/var/tmp")  # noqa: S108 - /tmp is memory on many machines
LAYOUT = KVLayout(256, (full_attention(layers=32, heads=8, head_size=128, dtype=DType.BF16),))


class Disk:
    """The backend and the calibration on one file system, with as many values a call."""

    def __init__(self, folder: Path, mode: str, values: int, nbytes: int) -> None:
        options = MODES[mode]
        self._loop = asyncio.new_event_loop()
        self._backend = FilesystemBackend(FilesystemConfig(path=folder / "backend", **options))
        context = BackendContext(name="bench", namespace=CacheNamespace("bench", LAYOUT))
        self._loop.run_until_complete(self._backend.open(context))
        self._raw = RawFiles(folder, direct=options["direct_io"], sync=options["fsync"])
        framed = HEADER_BYTES + nbytes
        self.nbytes = values * framed
        padded = [aligned(framed) for _ in range(2 * values)]
        for memory in padded[:values]:
            memory[:] = random.Random(0).randbytes(len(memory))
        # O_DIRECT wants whole pages of the calibration; the backend sees to that by itself.
        self._plain = padded if options["direct_io"] else [memory[:framed] for memory in padded]
        self._values = [memory[:framed] for memory in padded]
        self._count = values

    def store(self, turn: int) -> None:
        outcomes = self._loop.run_until_complete(
            self._backend.store(self._keys(turn), self._values[: self._count])
        )
        assert outcomes == [StoreOutcome.STORED] * self._count, outcomes

    def load(self, turn: int) -> None:
        sizes = self._loop.run_until_complete(
            self._backend.load(self._keys(turn), self._values[self._count :])
        )
        assert sum(sizes) == self.nbytes, sizes

    def write(self, turn: int) -> None:
        for index, memory in enumerate(self._plain[: self._count]):
            self._raw.write(f"{turn}-{index}", memory)

    def read(self, turn: int) -> None:
        for index, memory in enumerate(self._plain[self._count :]):
            self._raw.read(f"{turn}-{index}", memory)

    def forget(self, turn: int) -> None:
        """Nothing of a turn stays, nor waits to be written while the next one is timed."""
        self._loop.run_until_complete(self._backend.delete(self._keys(turn)))
        for index in range(self._count):
            self._raw.remove(f"{turn}-{index}")

    def same(self) -> bool:
        half = self._count
        return all(a == b for a, b in zip(self._values[:half], self._values[half:], strict=True))

    def close(self) -> None:
        self._raw.__exit__()
        self._loop.run_until_complete(self._backend.close())
        self._loop.close()

    def _keys(self, turn: int) -> list[ChunkKey]:
        return [
            ChunkKey(bytes([index]) * 8 + turn.to_bytes(8, "big")) for index in range(self._count)
        ]


@contextmanager
def opened(folder: Path, mode: str, values: int, nbytes: int) -> Iterator[Disk]:
    with tempfile.TemporaryDirectory(prefix="bench-disk-", dir=folder) as place:
        disk = Disk(Path(place), mode, values, nbytes)
        try:
            yield disk
        finally:
            disk.close()


def measure(disk: Disk, runs: int) -> dict[str, list[Run]]:
    """Turns of store and load, each with its calibration; medians a run."""
    found: dict[str, list[Run]] = {"store": [], "load": []}
    for number in range(-1, runs):  # the first one doesn't count
        put: tuple[list[float], list[float]] = ([], [])
        get: tuple[list[float], list[float]] = ([], [])
        for turn in range((number + 1) * TURNS, (number + 2) * TURNS):
            for seconds, ours, plain in (
                (put, disk.store, disk.write),
                (get, disk.load, disk.read),
            ):
                for column, (value,) in zip(
                    seconds, take_turns(ours, plain, 1, first=turn), strict=True
                ):
                    column.append(value)
            assert disk.same(), "what was loaded isn't what was stored"
            disk.forget(turn)
        if number >= 0:
            found["store"].append(Run(*map(statistics.median, put)))
            found["load"].append(Run(*map(statistics.median, get)))
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--folder", type=Path, default=FOLDER, help="on the disk to measure")
    options.add_argument("--only", default="", help="names that contain this")
    arguments = parse(options)
    report = Report(arguments, "raw file")
    for mode in MODES:
        for shape, (values, nbytes) in SHAPES.items():
            title = f"{mode}/{shape}"
            if arguments.only not in title:
                continue
            with opened(arguments.folder, mode, values, nbytes) as disk:
                for what, runs in measure(disk, arguments.runs).items():
                    report.add(throughput(f"{title}/{what}", disk.nbytes, runs))
    report.write()


if __name__ == "__main__":
    main()
