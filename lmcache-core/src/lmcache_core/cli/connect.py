"""``lmcache doctor --connect``: does each tier take a chunk, give it back and delete it?

Opens the configured backends one after the other, as a cache would, and asks each of them itself:
nothing is tried again, and what goes wrong is said as it was raised. The chunk is made up, has a
random key, and lies in a namespace that no model has.

Knows the contract of backends. Knows nothing about any of them.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import TypeVar, cast

from lmcache_core.aio.guard import Guard, attempted
from lmcache_core.aio.io_loop import IOLoop
from lmcache_core.chunks.checksums import checksums
from lmcache_core.chunks.frame import HEADER_BYTES
from lmcache_core.chunks.keys import DIGEST_BYTES, CacheNamespace, ChunkKey, chunk_key
from lmcache_core.chunks.layout import KVLayout
from lmcache_core.config import BackendSection, Config
from lmcache_core.contracts.report import ReportLine
from lmcache_core.contracts.serde import SerdeFacts
from lmcache_core.contracts.storage import (
    MISS,
    BackendCapabilities,
    HostRegion,
    StoreOutcome,
    SupportsDelete,
)
from lmcache_core.errors import (
    BackendTimeout,
    BackendUnavailable,
    FrameError,
    LMCacheError,
)
from lmcache_core.memory.host_memory import HostArena
from lmcache_core.metrics import Counters
from lmcache_core.plugins.creation import NotCreated
from lmcache_core.plugins.manager import Plugins
from lmcache_core.redaction import without_passwords_in
from lmcache_core.tiers.sealing import Chunk, Sealer
from lmcache_core.tiers.tier import Tier
from lmcache_core.tiers.tiers import Prepared, prepare

_T = TypeVar("_T")

MODEL = "lmcache doctor"
"""The namespace's model, which no other has."""
OPEN_S = 10.0
CLOSE_S = 5.0
_FINITE = bytes(byte & 0xBF for byte in range(256))
"""Without the first bit of an exponent no pattern is an infinity, whatever the type."""
_REPORT = "correct its options or report this to the plugin's authors"


class Failed(Exception):
    """A step of a try failed; the message is for the user."""


def findings(
    layout: KVLayout,
    config: Config,
    plugins: Plugins,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[ReportLine]:
    """What came of trying each tier with a chunk of ``layout``."""
    if not config.backends:
        yield ReportLine("warn", "--connect: no backend is configured, so there is none to try")
        return
    loop = IOLoop("doctor")
    try:
        for section in config.backends:
            yield _Try(section, config, plugins, layout, loop, clock).finding()
    finally:
        loop.close(CLOSE_S)


class _Try:
    """One tier's."""

    def __init__(
        self,
        section: BackendSection,
        config: Config,
        plugins: Plugins,
        layout: KVLayout,
        loop: IOLoop,
        clock: Callable[[], float],
    ) -> None:
        self._section = section
        self._config = config
        self._plugins = plugins
        self._layout = layout
        self._loop = loop
        self._clock = clock
        self._deadline_s = section.deadline_s or config.core.blocking_timeout_secs
        self._times: list[str] = []
        self._space = ""
        self._hangs = False

    def finding(self) -> ReportLine:
        """Open the backend, use it, and close it."""
        where = f"backends.{self._section.name} ({self._section.type})"
        try:
            region = self._region()
            warning = self._loop.run(self._all(region), OPEN_S + CLOSE_S + 5 * self._deadline_s)
        except (Failed, LMCacheError) as error:
            return ReportLine("FAIL", f"{where}: {without_passwords_in(str(error))}")
        except TimeoutError:
            return ReportLine("FAIL", f"{where}: it blocks the event loop; its plugin must not")
        text = f"{where}: namespace {self._space}, {', '.join(self._times)}"
        return ReportLine("warn", f"{text}; {warning}") if warning else ReportLine("ok", text)

    def _region(self) -> HostRegion:
        """Host memory as a cache has it, for a chunk to store and one to load."""
        return self._plugins.host_region(
            2 * (HEADER_BYTES + self._layout.chunk_bytes()) + (1 << 20),
            "cpu",
            numa_mode=self._config.core.numa_mode,
            shared=self._config.shares_region,
        )

    async def _all(self, region: HostRegion) -> str:
        core = self._config.core
        namespace = CacheNamespace(MODEL, self._layout)
        prepared = prepare(
            self._section,
            self._plugins,
            namespace=namespace,
            region=region,
            counters=Counters(),
            deadline_s=self._deadline_s,
            default_serde=core.serde,
            serdes=self._config.serdes,
            facts=SerdeFacts(namespace.fingerprint),
        )
        guard, backend = prepared.tier.guard, prepared.tier.backend
        self._space = prepared.tier.fingerprint
        try:
            await self._step(guard, "open", "opened", lambda: _open(prepared), OPEN_S)
            return await self._use(prepared, region)
        finally:
            if not self._hangs:
                await guard.once("close", backend.close, deadline_s=CLOSE_S)

    async def _use(self, prepared: Prepared, region: HostRegion) -> str:
        """Store, load and delete; answers what the user should know of all the same."""
        arena = HostArena(region, HEADER_BYTES + self._layout.chunk_bytes())
        key = chunk_key(os.urandom(DIGEST_BYTES))
        group, tokens = self._layout.groups[0], self._layout.tokens_per_chunk
        stored, loaded = (Chunk(key, arena.slot(i), group, tokens, 0) for i in range(2))
        try:
            await self._there_and_back(prepared.tier, stored, loaded)
        except (Failed, LMCacheError):
            with suppress(Failed):
                await self._delete(prepared.tier, key)
            raise
        return await self._delete(prepared.tier, key)

    async def _there_and_back(self, tier: Tier, stored: Chunk, loaded: Chunk) -> None:
        key, backend = stored.key, tier.backend
        sealer = Sealer(tier.serde, exact=tier.exact, fingerprint=tier.fingerprint)
        stored.payload[:] = os.urandom(stored.payload.nbytes).translate(_FINITE)
        sums = checksums(stored.payload, len(stored.group.layers))
        value = _called("encode", lambda: sealer.seal(stored, sums))
        _check_limit(tier, value.nbytes)
        size = f"{value.nbytes / (1 << 20):.1f} MiB"
        outcome = _only(
            await self._step(
                tier.guard, "store", f"{size} stored", lambda: backend.store([key], [value])
            )
        )
        if outcome is not StoreOutcome.STORED:
            raise Failed(
                f"it didn't keep a chunk of {size} ({outcome!r:.60}): it is full, or takes no "
                "value as long as that; give it more room, or lower chunk_size"
            )
        buffer = sealer.landing(loaded)
        nbytes = _only(
            await self._step(tier.guard, "load", "loaded", lambda: backend.load([key], [buffer]))
        )
        if nbytes == MISS:
            raise Failed(
                f"it doesn't have the chunk of {size} that it has just stored: it evicts at once, "
                "or drops values as long as that; give it more room, or lower chunk_size"
            )
        if nbytes != value.nbytes:
            raise Failed(f"it loaded {nbytes!r:.60} bytes of {value.nbytes}; {_REPORT}")
        _called("decode", lambda: sealer.open(buffer[: value.nbytes], loaded))

    async def _delete(self, tier: Tier, key: ChunkKey) -> str:
        """Remove the chunk; answers why it stays, if it does."""
        if self._hangs:
            return ""
        backend = tier.backend
        if not isinstance(backend, SupportsDelete):
            return "it can't delete: the chunk stays until the store evicts it"
        deleting = backend
        await self._step(tier.guard, "delete", "deleted", lambda: deleting.delete([key]))
        if any(await self._step(tier.guard, "contains", "", lambda: tier.backend.contains([key]))):
            return "the chunk is still there after it was deleted; the store evicts it one day"
        return ""

    async def _step(
        self,
        guard: Guard,
        name: str,
        done: str,
        call: Callable[[], Awaitable[_T]],
        deadline_s: float | None = None,
    ) -> _T:
        """Await one call of the backend, and note how long it took as that it is ``done``.

        Raises:
            Failed: it raised, or didn't come back.
        """
        until_s = self._deadline_s if deadline_s is None else deadline_s
        began = self._clock()
        answer = await guard.once(name, call, deadline_s=until_s, owns_buffers=True)
        if answer.error is not None:
            if answer.unsettled is not None:
                await asyncio.wait([answer.unsettled], timeout=1.0)
                self._hangs = not answer.unsettled.done()
            raise Failed(_explained(answer.error)) from answer.error
        if done:
            self._times.append(f"{done} in {(self._clock() - began) * 1e3:.1f} ms")
        return cast("_T", answer.value)


async def _open(prepared: Prepared) -> None:
    backend = prepared.tier.backend
    await backend.open(prepared.context)
    capabilities = backend.capabilities
    if not isinstance(capabilities, BackendCapabilities):
        raise TypeError(f"capabilities are {capabilities!r}, not BackendCapabilities")
    prepared.tier.opened(backend, capabilities)


def _check_limit(tier: Tier, nbytes: int) -> None:
    limit = None if tier.capabilities is None else tier.capabilities.max_chunk_bytes
    if limit is not None and nbytes > limit:
        raise Failed(
            f"it takes values of {limit} bytes at the most, and a chunk has {nbytes}, so that "
            "nothing would be stored: raise that limit, lower chunk_size, or set a serde that "
            "makes chunks smaller"
        )


def _only(answers: object) -> object:
    """The answer for the only key; whatever it is instead, if that is nonsense."""
    return answers[0] if isinstance(answers, (list, tuple)) and len(answers) == 1 else answers


def _called(name: str, call: Callable[[], _T]) -> _T:
    """What the tier's serde makes of something."""
    answer = attempted(call)
    if answer.error is not None:
        who = "" if isinstance(answer.error, FrameError) else f"serde: {name}: "
        raise Failed(who + _explained(answer.error)) from answer.error
    return cast("_T", answer.value)


def _explained(error: BaseException) -> str:
    """What went wrong, and what to do."""
    if isinstance(error, NotCreated):
        return str(error.problem)
    if isinstance(error, (BackendUnavailable, BackendTimeout)):
        return f"{error}; start its server, or correct its address"
    if isinstance(error, FrameError):
        return f"{error}: it gives back something else than was stored; look at what keeps it"
    if isinstance(error, LMCacheError):
        return f"{error}; correct its options, or remove the section"
    return f"{type(error).__name__}: {error}; {_REPORT}"
