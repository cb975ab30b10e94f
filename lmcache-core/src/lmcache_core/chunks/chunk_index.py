"""Which chunk lies in which slot, and which chunk continues which.

The planner's table. `ChunkIndex` says what it must do; `DictIndex` does it with Python's own
containers, for whoever has no kernels package, and is what a native one is tested against.
Knows keys, slots and states; knows nothing about leases, eviction or bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Protocol

from lmcache_core.chunks.hashing import PrefixHasher
from lmcache_core.chunks.keys import DIGEST_BYTES, ChunkKey
from lmcache_core.chunks.tokens import Tokens

NONE = -1
"""No slot."""


class ChunkState(IntEnum):
    """What host memory knows about a chunk. Native indexes use the numbers."""

    ABSENT = 0
    STORING = 1
    FETCHING = 2
    READY = 3


ABSENT, STORING, FETCHING, READY = map(int, ChunkState)
"""What indexes are given and answer: an enum's member is several times dearer for native code."""


class ChunkIndex(Protocol):
    """A tree of chunks in ``slots`` slots: a chunk's parent is the chunk that it continues.

    A slot that isn't one of the ``slots`` is an `IndexError`; a slot that holds no chunk where one
    is meant, a key that is there twice and a parent that isn't there are a `ValueError`.
    """

    @property
    def slots(self) -> int:
        """How many chunks there is room for."""

    @property
    def nbytes(self) -> int:
        """Bytes that the index takes when it is full."""

    def __len__(self) -> int: ...

    def insert(self, key: ChunkKey, slot: int, parent: int, state: int) -> None:
        """Put a chunk into an empty slot. ``parent`` is a slot or `NONE`; ``state`` not ABSENT."""

    def remove(self, slot: int) -> None:
        """Empty a slot. Chunks that continue its chunk stay, without a parent."""

    def find(self, key: ChunkKey) -> int:
        """The slot of a chunk, or `NONE`."""

    def key(self, slot: int) -> ChunkKey | None:
        """What lies in a slot."""

    def state(self, slot: int) -> int:
        """The `ChunkState` of what lies in a slot."""

    def set_state(self, slot: int, state: int) -> None:
        """Change it."""

    def leaf(self, slot: int) -> int:
        """A chunk that nothing continues: this one, or one that continues it, however far."""

    def descendants(self, slot: int) -> list[int]:
        """All that continue a chunk, however far; each before what it continues."""

    def ready_slots(self, keys: Sequence[ChunkKey]) -> list[int]:
        """The slots of the leading keys that are READY."""

    def match(
        self,
        parent: bytes,
        tokens: Tokens,
        chunk_tokens: int,
        extras: Mapping[int, bytes] | None = None,
        start: int = 0,
    ) -> tuple[bytes, list[int]]:
        """Digest the full chunks of ``tokens`` up to the first that isn't READY.

        Answers the digests, one after the other, that of the first miss included, and the slots of
        the others. ``parent`` is the digest before ``tokens``, or the root of the chain; ``start``
        the number of the first chunk, which ``extras`` are counted by. See `PrefixHasher`.
        """

    def digests(
        self,
        parent: bytes,
        tokens: Tokens,
        chunk_tokens: int,
        extras: Mapping[int, bytes] | None = None,
        start: int = 0,
    ) -> bytes:
        """The digests of all full chunks of ``tokens``, one after the other."""


class DictIndex:
    """See `ChunkIndex`."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._slot_of: dict[ChunkKey, int] = {}
        self._keys: list[ChunkKey | None] = [None] * slots
        self._states = bytearray(slots)
        self._parents: dict[int, int] = {}
        self._children: dict[int, dict[int, None]] = {}

    @property
    def nbytes(self) -> int:
        """An estimate: dictionaries and their keys, all slots full."""
        return self.slots * 250

    def __len__(self) -> int:
        return len(self._slot_of)

    def insert(self, key: ChunkKey, slot: int, parent: int, state: int) -> None:
        self._check(slot)
        if key in self._slot_of:
            raise ValueError("the index has this key already")
        if self._states[slot]:
            raise ValueError(f"slot {slot} holds a chunk already")
        if parent != NONE:
            self._check(parent)
            if not self._states[parent]:
                raise ValueError(f"slot {parent} holds no chunk that could be continued")
            self._parents[slot] = parent
            self._children.setdefault(parent, {})[slot] = None
        self._slot_of[key] = slot
        self._keys[slot] = key
        self._states[slot] = state

    def remove(self, slot: int) -> None:
        key = self._held(slot)
        for child in self._children.pop(slot, ()):
            del self._parents[child]
        parent = self._parents.pop(slot, None)
        if parent is not None:
            siblings = self._children[parent]
            del siblings[slot]
            if not siblings:
                del self._children[parent]
        del self._slot_of[key]
        self._keys[slot] = None
        self._states[slot] = ABSENT

    def find(self, key: ChunkKey) -> int:
        return self._slot_of.get(key, NONE)

    def key(self, slot: int) -> ChunkKey | None:
        self._check(slot)
        return self._keys[slot]

    def state(self, slot: int) -> int:
        self._check(slot)
        return self._states[slot]

    def set_state(self, slot: int, state: int) -> None:
        self._held(slot)
        self._states[slot] = state

    def leaf(self, slot: int) -> int:
        self._held(slot)
        while slot in self._children:
            slot = next(iter(self._children[slot]))
        return slot

    def descendants(self, slot: int) -> list[int]:
        self._check(slot)
        found = [slot]
        for one in found:
            found += self._children.get(one, ())
        return found[:0:-1]

    def ready_slots(self, keys: Sequence[ChunkKey]) -> list[int]:
        slots: list[int] = []
        for key in keys:
            slot = self._slot_of.get(key, NONE)
            if slot == NONE or self._states[slot] != READY:
                break
            slots.append(slot)
        return slots

    def match(
        self,
        parent: bytes,
        tokens: Tokens,
        chunk_tokens: int,
        extras: Mapping[int, bytes] | None = None,
        start: int = 0,
    ) -> tuple[bytes, list[int]]:
        digests = self.digests(parent, tokens, chunk_tokens, extras, start)
        keys = [
            ChunkKey(digests[i : i + DIGEST_BYTES]) for i in range(0, len(digests), DIGEST_BYTES)
        ]
        slots = self.ready_slots(keys)
        return digests[: (len(slots) + 1) * DIGEST_BYTES], slots

    def digests(
        self,
        parent: bytes,
        tokens: Tokens,
        chunk_tokens: int,
        extras: Mapping[int, bytes] | None = None,
        start: int = 0,
    ) -> bytes:
        shifted = {chunk - start: extra for chunk, extra in (extras or {}).items()}
        return b"".join(PrefixHasher(parent, chunk_tokens, shifted).extend(tokens))

    def _check(self, slot: int) -> None:
        if not 0 <= slot < self.slots:
            raise IndexError(f"slot {slot}: there are {self.slots}")

    def _held(self, slot: int) -> ChunkKey:
        key = self.key(slot)
        if key is None:
            raise ValueError(f"slot {slot} holds no chunk")
        return key
