"""The ledger of a folder of chunk files: what each namespace holds, and who has set room aside.

Knows its form, and takes anything else for none. When it is read and written is
`filesystem_usage`'s business.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from lmcache_core.builtin.filesystem_io import FULL
from lmcache_core.builtin.filesystem_manifest import described
from lmcache_core.builtin.filesystem_scan import is_space, spaces

LEDGER = ".usage"
TOKEN = re.compile(r"[0-9a-f]{16}")
MOST_BYTES = 16 << 20
_PAGE = 4096


@dataclass
class Space:
    """What is known of a namespace."""

    nbytes: int = 0
    """Of its files."""
    written: int = 0
    """All that was ever added to them."""
    count: int = 0
    """Which count ``nbytes`` goes back to: a number that no other count has."""


@dataclass(frozen=True)
class Removal:
    """``nbytes`` of a namespace's files were removed, after what was known from ``count``."""

    space: str
    nbytes: int
    count: int


@dataclass
class Standing:
    """A namespace with its bytes, written or set aside, and whether a writer of it lives."""

    space: str
    nbytes: int
    count: int
    alive: bool = False


@dataclass
class UsageLedger:
    """The content of ``.usage``. ``counted``: the files were counted since it was made."""

    counted: bool = False
    spaces: dict[str, Space] = field(default_factory=dict)
    writers: dict[str, tuple[str, int]] = field(default_factory=dict)
    """For each token its namespace, and the bytes that it has set aside."""

    @property
    def total(self) -> int:
        """Bytes of files, and of those that may be written."""
        aside = sum(nbytes for _, nbytes in self.writers.values())
        return aside + sum(space.nbytes for space in self.spaces.values())

    def dumped(self) -> bytes:
        """As `loaded` reads it: JSON, its checksum, and blanks up to whole pages."""
        facts = {
            "counted": self.counted,
            "spaces": {
                name: [one.nbytes, one.written, one.count] for name, one in self.spaces.items()
            },
            "writers": self.writers,
        }
        text = json.dumps(facts, separators=(",", ":")).encode()
        line = text + b"\n" + xxhash.xxh3_64_hexdigest(text).encode() + b"\n"
        return line.ljust(-(-len(line) // _PAGE) * _PAGE)

    @classmethod
    def loaded(cls, data: bytes) -> UsageLedger | None:
        """What `dumped` wrote; ``None`` if it is anything else."""
        text, _, rest = data.partition(b"\n")
        if rest.strip() != xxhash.xxh3_64_hexdigest(text).encode():
            return None
        try:
            facts = json.loads(text)
            spaces = {name: Space(*map(_count, one)) for name, one in facts["spaces"].items()}
            writers = {
                token: (str(space), _count(nbytes))
                for token, (space, nbytes) in facts["writers"].items()
            }
            named = {*spaces, *(space for space, _ in writers.values())}
            if not all(map(TOKEN.fullmatch, writers)) or not all(map(is_space, named)):
                return None
            return cls(facts["counted"] is True, spaces, writers)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None

    def take_off(self, removal: Removal) -> None:
        """Less is there, unless a count that ended meanwhile may know it already."""
        known = self.spaces.get(removal.space)
        if known is not None and known.count == removal.count:
            known.nbytes = max(0, known.nbytes - removal.nbytes)

    def save(self, fd: int) -> None:
        """Write it to its file."""
        try:
            data = self.dumped()
            os.pwrite(fd, data, 0)
            if os.fstat(fd).st_size > len(data):
                os.ftruncate(fd, len(data))
        except OSError as error:
            # On a full disk it stays as it was, or is damaged and made anew: little can be written.
            if error.errno not in FULL:
                raise


def noted(top: Path) -> dict[str, int]:
    """Bytes of each namespace's files as they were noted last; none that can't be read."""
    try:
        with (top / LEDGER).open("rb") as file:
            ledger = UsageLedger.loaded(file.read(MOST_BYTES))
    except OSError:
        return {}
    return {} if ledger is None else {name: one.nbytes for name, one in ledger.spaces.items()}


def contents(top: Path) -> list[str]:
    """A line for each namespace of a folder: what of, and how much as far as was noted."""
    try:
        names = sorted(spaces(top))
    except OSError:
        return []
    sizes = noted(top)
    return [
        f"namespace {name}, {sizes.get(name, 0) / (1 << 30):.2f} GiB: {described(top / name)}"
        for name in names
    ]


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise ValueError(f"{value!r} isn't a number of bytes")
    return value
