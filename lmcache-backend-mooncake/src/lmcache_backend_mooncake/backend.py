"""The mooncake backend.

Knows how chunks are called in a Mooncake store, and where their bytes lie. Their way to another
machine is the client library's business; its start and its dangers are `client`'s; retries,
deadlines, metrics and tiers are core's.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from lmcache_backend_mooncake.client import (
    BAD_PARAMETERS,
    EXISTS,
    LEASE_EXPIRED,
    NO_SPACE,
    NOT_FOUND,
    NOT_READY,
    OK,
    Client,
    connect,
    library,
)
from lmcache_backend_mooncake.config import MooncakeConfig
from lmcache_core import (
    MISS,
    BackendCapabilities,
    BackendContext,
    BackendRejected,
    BackendUnavailable,
    BlockingBackend,
    ChunkKey,
    HostRegion,
    StoreOutcome,
)

logger = logging.getLogger(__name__)

_ABSENT: Final = (BAD_PARAMETERS, NOT_READY, NOT_FOUND, LEASE_EXPIRED)
"""A load that answers one of these is a miss; the first: the value is longer than the buffer."""
_OUTCOMES: Final = {OK: StoreOutcome.STORED, EXISTS: StoreOutcome.ALREADY_PRESENT}


class MooncakeBackend(BlockingBackend):
    """Keeps each chunk as one object; an instance serves one namespace.

    Host memory is registered once, and values go straight from and to it. A value that lies
    elsewhere is registered for the length of its call.
    """

    def __init__(self, config: MooncakeConfig) -> None:
        self._config = config
        self._module = library()
        self._client: Client | None = None
        self._region: HostRegion | None = None
        self._placement: Any = None
        self._prefix = ""

    @property
    def capabilities(self) -> BackendCapabilities:
        # A segment goes with its process. One who gives none stores in those of others.
        persistent = self._config.global_segment_size == 0
        return BackendCapabilities(
            shared=True, persistent=persistent, preferred_batch=16, max_concurrency=4
        )

    def open_blocking(self, context: BackendContext) -> None:
        config = self._config
        if config.url_master not in (None, config.master_server_address):
            logger.warning(
                "%s: the master is %s (master_server_address), not %s (url)",
                context.name,
                config.master_server_address,
                config.url_master,
            )
        client = connect(self._module, config, lookup_only=context.lookup_only)
        try:
            if context.region is not None and not context.lookup_only:
                self._register(client, context.region)
            self._placement = self._module.ReplicateConfig()
            if config.prefer_local_alloc and config.global_segment_size:
                self._placement.preferred_segment = client.hostname
        except BaseException:
            client.close()
            raise
        self._prefix = f"lmcache-{context.namespace.fingerprint}-"
        self._client = client

    def contains_blocking(self, keys: Sequence[ChunkKey]) -> list[bool]:
        client, names = self._open(), self._names(keys)
        with client.lend() as store:
            found: list[int] = store.batch_is_exist(names)
        client.check("contains", found, ())
        return [one == 1 for one in found]

    def load_blocking(self, keys: Sequence[ChunkKey], into: Sequence[memoryview]) -> list[int]:
        client, names = self._open(), self._names(keys)
        with client.lend() as store, self._places(store, into) as places:
            sizes = _asked(store.batch_get_into, names, *places)
        client.check("load", sizes, _ABSENT)
        return [size if size > 0 else MISS for size in sizes]

    def store_blocking(
        self, keys: Sequence[ChunkKey], sources: Sequence[memoryview]
    ) -> list[StoreOutcome]:
        client, names = self._open(), self._names(keys)

        def put(names: list[str], places: list[int], sizes: list[int]) -> list[int]:
            codes: list[int] = store.batch_put_from(names, places, sizes, self._placement)
            return codes

        with client.lend() as store, self._places(store, sources) as places:
            codes = _asked(put, names, *places)
        client.check("store", codes, (NO_SPACE, BAD_PARAMETERS, EXISTS))
        return [_OUTCOMES.get(code, StoreOutcome.NOT_ADMITTED) for code in codes]

    async def delete(self, keys: Sequence[ChunkKey]) -> int:
        """Forget ``keys``; answer how many of them were there."""
        return await self._run(self._delete, keys)

    async def clear(self) -> int:
        """Forget every chunk of the namespace; answer how many there were."""
        return await self._run(self._clear)

    def close_blocking(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _delete(self, keys: Sequence[ChunkKey]) -> int:
        if not keys:
            return 0
        client, names = self._open(), self._names(keys)
        with client.lend() as store:
            # A reader holds a lease for seconds; who deletes a chunk doesn't want it read.
            codes: list[int] = store.batch_remove(names, True)
        client.check("delete", codes, (NOT_FOUND,))
        return codes.count(OK)

    def _clear(self) -> int:
        client = self._open()
        with client.lend() as store:
            removed: int = store.remove_by_regex(f"^{self._prefix}[0-9a-f]+$", True)
        client.check("clear", [removed], ())
        return removed

    def _open(self) -> Client:
        if self._client is None:
            raise BackendUnavailable("the backend isn't open")
        return self._client

    def _names(self, keys: Sequence[ChunkKey]) -> list[str]:
        return [self._prefix + key.hex() for key in keys]

    def _register(self, client: Client, region: HostRegion) -> None:
        with client.lend() as store:
            code = store.register_buffer(region.address, region.nbytes)
        if code != OK:
            raise BackendRejected(
                f"Mooncake's client can't register {region.nbytes / 2**30:.1f} GiB of host memory "
                f"({code}); with RDMA, `ulimit -l` has to allow that much"
            )
        self._region = region

    @contextmanager
    def _places(
        self, store: Any, buffers: Sequence[memoryview]
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Address and size of each buffer, registered until the call is over."""
        held = [_pinned(buffer) for buffer in buffers]
        places = [ctypes.addressof(one) if one is not None else 0 for one in held]
        sizes = [buffer.nbytes for buffer in buffers]
        guests: list[int] = []
        try:
            for place, size in zip(places, sizes, strict=True):
                if size and not self._is_registered(place, size):
                    code = store.register_buffer(place, size)
                    if code != OK:
                        raise BackendUnavailable(
                            f"Mooncake's client can't register a buffer of {size} bytes ({code})"
                        )
                    guests.append(place)
            yield places, sizes
        finally:
            for place in guests:
                store.unregister_buffer(place)
            held.clear()

    def _is_registered(self, place: int, size: int) -> bool:
        region = self._region
        if region is None:
            return False
        return region.address <= place and place + size <= region.address + region.nbytes


def _pinned(buffer: memoryview) -> Any:
    """Something at the address of ``buffer`` that keeps its memory where it is.

    For read-only memory, whose address Python doesn't tell, a copy.
    """
    if not buffer.nbytes:
        return None
    if buffer.readonly:
        return (ctypes.c_char * buffer.nbytes).from_buffer_copy(buffer)
    return ctypes.c_char.from_buffer(buffer)


def _asked(
    call: Callable[[list[str], list[int], list[int]], list[int]],
    names: list[str],
    places: list[int],
    sizes: list[int],
) -> list[int]:
    """What ``call`` answers, without empty values, which the library refuses."""
    if all(sizes):
        return call(names, places, sizes) if names else []
    kept = [i for i, size in enumerate(sizes) if size]
    answers = [BAD_PARAMETERS] * len(names)
    if kept:
        few = call([names[i] for i in kept], [places[i] for i in kept], [sizes[i] for i in kept])
        for i, answer in zip(kept, few, strict=True):
            answers[i] = answer
    return answers
