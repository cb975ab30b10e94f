"""KV events: tells vLLM's event stream which chunks host memory gained and lost.

Consumers (routers) see a chunk as a block of ``chunk_size`` tokens on medium
``CPU``; its hash is the first 8 bytes of our digest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.distributed.kv_events import MEDIUM_CPU, BlockRemoved, BlockStored, KVCacheEvent

from lmcache_core import ChunkKey, PrefixHasher

if TYPE_CHECKING:
    from vllm.v1.request import Request


def block_hash(key: bytes) -> int:
    """An event's hash of a chunk: 64 bits, as consumers expect."""
    return int.from_bytes(key[:8], "little")


class ChunkEvents:
    """Collects events until vLLM takes them.

    A chunk's tokens are remembered only from the plan to its confirmation.
    """

    def __init__(self, chunk_tokens: int) -> None:
        self._chunk_tokens = chunk_tokens
        self._planned: dict[ChunkKey, BlockStored] = {}
        self._events: list[KVCacheEvent] = []

    def planned(
        self, key: ChunkKey, request: Request, begin: int, tokens: int, hasher: PrefixHasher
    ) -> None:
        """A store or fetch was planned; it becomes an event if it succeeds."""
        index = begin // self._chunk_tokens
        lora = request.lora_request
        self._planned[key] = BlockStored(
            block_hashes=[block_hash(key)],
            parent_block_hash=block_hash(hasher.digests[index - 1]) if index else None,
            token_ids=list(request.all_token_ids[begin : begin + tokens]),
            block_size=tokens,
            lora_id=lora.lora_int_id if lora is not None else None,
            medium=MEDIUM_CPU,
            lora_name=lora.lora_name if lora is not None else None,
        )

    def ready(self, key: ChunkKey) -> None:
        """A chunk is in host memory."""
        if (event := self._planned.pop(key, None)) is not None:
            self._events.append(event)

    def failed(self, key: ChunkKey) -> None:
        """What was planned didn't happen."""
        self._planned.pop(key, None)

    def evicted(self, key: ChunkKey) -> None:
        """A chunk left host memory."""
        self._events.append(BlockRemoved(block_hashes=[block_hash(key)], medium=MEDIUM_CPU))

    def take(self) -> list[KVCacheEvent]:
        """Events since the last call."""
        events, self._events = self._events, []
        return events
