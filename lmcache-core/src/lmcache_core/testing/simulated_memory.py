"""Host memory without bytes, for cache policies: `SimulatedMemory`.

    memory = SimulatedMemory(AcmePolicy(AcmeConfig()), slots=1000)
    hits = sum(memory.request(keys) for keys in trace)

Asks and tells a policy what the planner does, and evicts what it answers, the end of a prefix
before its beginning. Where the planner would count a policy's mistake and go on, this raises. For
tests of policies and for measuring what they are worth; knows nothing about tiers or tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lmcache_core.chunks.keys import ChunkKey
from lmcache_core.contracts.eviction import (
    Admits,
    CachePolicy,
    OrderedPolicy,
    PolicyRequest,
    SeesRequests,
)

LOOKED_AT = 16
"""So many slots of an order are looked at, at the most, as the planner does."""


class PolicyMistake(AssertionError):
    """A policy answered what its contract doesn't allow."""


class SimulatedMemory:
    """``slots`` slots, and what is in them as `CachedChunks` for ``policy``, which it opens.

    ``clock`` is what `now` answers; whoever drives it sets it. The others are counted: ``accesses``
    and ``hits`` are chunks of requests, ``evicted`` made room, ``refused`` weren't admitted, and
    ``unanswered`` is how often the policy had no victim.
    """

    def __init__(self, policy: CachePolicy, slots: int) -> None:
        self.policy = policy
        self.slots = slots
        self.clock = 0.0
        self.accesses = self.hits = self.evicted = self.refused = self.unanswered = 0
        self._slot_of: dict[ChunkKey, int] = {}
        self._keys: list[ChunkKey | None] = [None] * slots
        self._parents: list[int | None] = [None] * slots
        self._below: list[dict[int, None]] = [{} for _ in range(slots)]
        self._users = [0] * slots
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._free = list(range(slots - 1, -1, -1))
        policy.open(self)

    # -- what a policy may ask -------------------------------------------------------------

    def now(self) -> float:
        return self.clock

    def key(self, slot: int) -> ChunkKey | None:
        return self._keys[slot]

    def parent(self, slot: int) -> int | None:
        return self._parents[slot]

    def children(self, slot: int) -> int:
        return len(self._below[slot])

    def evictable(self, slot: int) -> bool:
        return slot in self._idle

    def leaf(self, slot: int) -> int:
        while self._below[slot]:
            slot = next(iter(self._below[slot]))
        return slot

    def descendants(self, slot: int) -> list[int]:
        found = [slot]
        for one in found:
            found += self._below[one]
        return found[:0:-1]

    # -- what drives it --------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._slot_of)

    def held(self) -> list[int]:
        """The slots that hold chunks."""
        return sorted(self._slot_of.values())

    def request(
        self,
        keys: Sequence[ChunkKey],
        *,
        tokens: int = 0,
        answer_tokens: int = 0,
        name: str = "",
        hints: Mapping[str, Any] | None = None,
    ) -> int:
        """One request, from lookup to end; answers how many of its leading chunks were there.

        Its chunks are in use meanwhile, and those that are missing are stored, in the order of the
        prefix, until there is no room for one.
        """
        found = self._begin(keys, tokens, name, hints or {})
        self.accesses += len(keys)
        self.hits += len(found)
        held, parent = found[:], found[-1] if found else None
        for key in keys[len(found) :]:
            slot = self.store(key, parent)
            if slot is None:
                break
            held.append(slot)
            self.use((slot,))
            parent = slot
        self.release(reversed(held))
        if name and isinstance(self.policy, SeesRequests):
            self.policy.finished(name, tokens + answer_tokens)
        return len(found)

    def store(self, key: ChunkKey, parent: int | None = None) -> int | None:
        """Put a chunk that isn't here into a slot, if there is room or the policy makes it."""
        slot = self._room(key, parent)
        if slot is None:
            return None
        self._slot_of[key] = slot
        self._keys[slot], self._parents[slot] = key, parent
        if parent is not None:
            self._below[parent][slot] = None
            self._idle.pop(parent, None)
        self._idle[slot] = None
        self.policy.added(slot)
        return slot

    def evict(self) -> int | None:
        """Make room for a chunk that continues nothing; answers the slot that is free now."""
        victim = self._victim(None)
        if victim is not None:
            self.evicted += 1
            self._drop(victim, evicted=True)
            self._free.append(victim)
        return victim

    def forget(self, slot: int) -> None:
        """Drop a chunk that nobody uses, with what continues it, as one that is damaged."""
        for one in (*self.descendants(slot), slot):
            self._drop(one, evicted=False)
            self._free.append(one)

    def use(self, slots: Iterable[int]) -> None:
        """Somebody uses ``slots`` until `release`: they can't be evicted."""
        for slot in slots:
            self._users[slot] += 1
            self._idle.pop(slot, None)

    def release(self, slots: Iterable[int]) -> None:
        """The opposite of `use`. The first of ``slots`` counts as idle for longer."""
        for slot in slots:
            self._users[slot] -= 1
            if not self._users[slot] and not self._below[slot]:
                self._idle[slot] = None

    # -- inside ----------------------------------------------------------------------------

    def _begin(
        self, keys: Sequence[ChunkKey], tokens: int, name: str, hints: Mapping[str, Any]
    ) -> list[int]:
        found: list[int] = []
        for key in keys:
            slot = self._slot_of.get(key)
            if slot is None:
                break
            found.append(slot)
        if isinstance(self.policy, SeesRequests):
            request = PolicyRequest(
                name=name, keys=keys, slots=found, tokens=tokens, now=self.clock, hints=hints
            )
            self.policy.requested(request)
        if found:
            self.policy.touched(found[::-1])
        self.use(found)
        return found

    def _room(self, key: ChunkKey, parent: int | None) -> int | None:
        if self._free:
            return self._free.pop()
        if isinstance(self.policy, Admits) and not self.policy.admit(key, parent):
            self.refused += 1
            return None
        victim = self._victim(parent)
        if victim is not None:
            self.evicted += 1
            self._drop(victim, evicted=True)
        return victim

    def _victim(self, spared: int | None) -> int | None:
        if isinstance(self.policy, OrderedPolicy):
            found = self._shown(self.policy, spared)
        elif self._idle:
            found = self.policy.victim(spared)
            if found is not None and (found == spared or found not in self._idle):
                raise PolicyMistake(f"slot {found} isn't evictable, or is spared ({spared})")
        else:
            found = None
        if found is None:
            self.unanswered += 1
            found = next((slot for slot in self._idle if slot != spared), None)
        return found

    def _shown(self, policy: OrderedPolicy, spared: int | None) -> int | None:
        for looked_at, slot in enumerate(policy.victims()):
            if looked_at == LOOKED_AT:
                break
            if self._keys[slot] is None:
                raise PolicyMistake(f"slot {slot} holds no chunk")
            leaf = self.leaf(slot)
            if not self._users[slot] and leaf != spared and leaf in self._idle:
                return leaf
        return None

    def _drop(self, slot: int, *, evicted: bool) -> None:
        self.policy.removed(slot, evicted)
        key, parent = self._keys[slot], self._parents[slot]
        if key is not None:
            del self._slot_of[key]
        self._keys[slot] = self._parents[slot] = None
        self._idle.pop(slot, None)
        if parent is not None:
            del self._below[parent][slot]
            if not self._below[parent] and not self._users[parent]:
                self._idle[parent] = None
                self._idle.move_to_end(parent, last=False)
