"""The slow tiers of one process, in the order of the configuration.

Knows how backends are opened, opened again when they weren't there at the
start, and closed; and which tier has a chunk. What one tier does is `tier`'s
business; which chunks go where is decided by the planner.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

from pydantic import BaseModel

from lmcache_core.aio.guard import Answer, Guard, attempted
from lmcache_core.aio.io_loop import EARLY, IOLoop
from lmcache_core.chunks.frame import HEADER_BYTES, VERSION
from lmcache_core.chunks.keys import CacheNamespace, ChunkKey
from lmcache_core.chunks.layout import KVLayout
from lmcache_core.contracts.serde import Rope, Serde, SerdeDescriptor, SerdeFacts
from lmcache_core.contracts.storage import (
    BackendCapabilities,
    BackendContext,
    HostRegion,
    StorageBackend,
    StorageBackendDescriptor,
)
from lmcache_core.errors import (
    BackendRejected,
    BackendTimeout,
    BackendUnavailable,
    ConfigError,
    LMCacheError,
    PluginError,
)
from lmcache_core.memory.host_memory import keep_writers_out
from lmcache_core.metrics import Counters
from lmcache_core.plugins.creation import NotCreated, created
from lmcache_core.redaction import without_passwords_in
from lmcache_core.tiers.serde_chain import chain_serdes
from lmcache_core.tiers.tier import LoadAnswer, StoreAnswer, Tier

__all__ = ["LoadAnswer", "StoreAnswer", "Tier", "Tiers"]

logger = logging.getLogger(__name__)

_PART = 4
"""All tiers' stores together have one part in so many of host memory at one time; so have loads."""
CLEAR_AGAIN_S = 2.0
"""Between two tries to clear a tier, which isn't used until then. Short beside what a breaker stays
open for: while it does, a try costs nothing, and the tier is back soon after."""
_IDENTITY = re.compile(r"[!-~]{1,500}")


class Section(Protocol):
    """One entry of ``backends:``, validated; `config.models.BackendSection` is one."""

    @property
    def name(self) -> str: ...
    @property
    def type(self) -> str: ...
    @property
    def options(self) -> Any: ...
    @property
    def serde(self) -> str | None: ...
    @property
    def deadline_s(self) -> float | None: ...
    @property
    def isolated(self) -> bool: ...
    @property
    def isolated_memory_gib(self) -> float | None: ...


class PluginIndex(Protocol):
    """Where descriptors come from; `plugins.Plugins` is one."""

    def storage_backend(self, name: str, /) -> StorageBackendDescriptor: ...
    def serde(self, name: str, /) -> SerdeDescriptor: ...


class Tiers:
    """All slow tiers. Make them with `open`; `locate` runs on the I/O loop, the rest anywhere."""

    def __init__(
        self, tiers: Sequence[Tier], loop: IOLoop, *, again_after_s: float = CLEAR_AGAIN_S
    ) -> None:
        self.tiers = tuple(tiers)
        self._loop = loop
        self._again_after_s = again_after_s
        self._clearing: asyncio.Task[None] | None = None
        self._reopening: list[asyncio.Task[None]] = []
        self._closed = False

    @classmethod
    def open(
        cls,
        sections: Sequence[Section],
        plugins: PluginIndex,
        *,
        namespace: CacheNamespace,
        region: HostRegion | None,
        loop: IOLoop,
        counters: Counters,
        lookup_only: bool = False,
        default_deadline_s: float = 5.0,
        default_serde: str = "raw",
        serdes: Mapping[str, BaseModel] = MappingProxyType({}),
        open_deadline_s: float = 10.0,
        reopen_after_s: float = 10.0,
        rope: Rope | None = None,
        weights: str = "",
    ) -> Tiers:
        """Open every backend, all at the same time, and wait for ``open_deadline_s`` at most.

        A backend that can't be reached yet is kept as a tier that misses everything. It is tried
        again every ``reopen_after_s`` in the background, each time with a fresh instance. One that
        is only slow to open (it may be reading its index) joins when it has finished. ``serdes``
        are options by the serde's name; ``rope`` and ``weights`` are for serdes that know what to
        do with them: see `SerdeFacts`.

        Raises:
            ConfigError: a backend refused its options or credentials.
            PluginError: a plugin is missing, lacks what it needs, or is broken.
        """
        fd = None if region is None else region.fd
        if fd is not None and not any(section.isolated for section in sections):
            # Nobody but isolated backends' processes, which may be replaced at any time, writes it.
            with contextlib.suppress(OSError):  # an old kernel, or a plugin's own kind of file
                keep_writers_out(fd)
        openings = []
        for section in sections:
            prepared = prepare(
                section,
                plugins,
                namespace=namespace,
                region=region,
                counters=counters,
                deadline_s=section.deadline_s or default_deadline_s,
                default_serde=default_serde,
                serdes=serdes,
                facts=SerdeFacts(namespace.fingerprint, rope, weights),
                lookup_only=lookup_only,
                max_bytes=None if region is None else region.nbytes // (_PART * len(sections)),
            )
            openings.append(_Opening(prepared, open_deadline_s, reopen_after_s))
        tiers = cls([o.tier for o in openings], loop)
        if not openings:
            return tiers
        try:
            problems = loop.run(tiers._open_all(openings), open_deadline_s + 5.0)
        except TimeoutError:
            names = ", ".join(f"backends.{section.name}" for section in sections)
            raise PluginError(
                f"one of {names} blocks the event loop while it opens; its plugin must not"
            ) from None
        if problems:
            tiers.close()
            raise type(problems[0])(without_passwords_in("\n".join(map(str, problems))))
        return tiers

    async def locate(self, keys: Sequence[ChunkKey], deadline_s: float | None = None) -> list[int]:
        """For each key the index of the first tier that has it, or -1. Asks all at the same time.

        A single tier may be asked for its leading hits only: nothing behind its first miss can
        make the prefix longer.
        """
        alone = len(self.tiers) == 1
        found = [-1] * len(keys)
        answers = await asyncio.gather(
            *(tier.contains(keys, deadline_s, leading=alone) for tier in self.tiers)
        )
        for index in reversed(range(len(answers))):
            for position, hit in enumerate(answers[index]):
                if hit:
                    found[position] = index
        return found

    def clear(self, deadline_s: float | None = None) -> Coroutine[Any, Any, int]:
        """Forget everything in every tier that can; awaited, answers how many chunks that were.

        Nothing from before is offered by any of them as soon as this is called, on any thread. One
        that can't be cleared now isn't used until it could be, which is tried again and again;
        `Tier.uncleared` says why. Only this process knows of that.

        Raises:
            RuntimeError: the I/O loop is closed.
        """
        for tier in self.tiers:
            tier.hide()
        self._loop.call_soon(self._see_to_it)
        return self._clear_all(deadline_s)

    async def _clear_all(self, deadline_s: float | None) -> int:
        counts = await asyncio.gather(*(tier.clear_again(deadline_s) for tier in self.tiers))
        return sum(count or 0 for count in counts)

    def _see_to_it(self) -> None:
        if self._clearing is None or self._clearing.done():
            self._clearing = asyncio.get_running_loop().create_task(self._clear_later())

    async def _clear_later(self) -> None:
        """Try until no tier owes it any more."""
        while not self._closed and any(tier.owes_clear for tier in self.tiers):
            await asyncio.sleep(self._again_after_s)
            owing = [tier for tier in self.tiers if tier.owes_clear]
            await asyncio.gather(*(tier.clear_again() for tier in owing))

    def close(self, timeout_s: float = 5.0) -> None:
        """Close every backend, within ``timeout_s`` in all. Idempotent; never raises."""
        if self._closed:
            return
        self._closed = True
        try:
            self._loop.run(self._close_all(EARLY * timeout_s), timeout_s)
        except (TimeoutError, RuntimeError) as error:
            logger.warning("The storage backends couldn't be closed: %s", error)

    async def _open_all(self, openings: Sequence[_Opening]) -> list[LMCacheError]:
        problems = await asyncio.gather(*(opening.first() for opening in openings))
        found = [problem for problem in problems if problem is not None]
        if not found:
            create = asyncio.get_running_loop().create_task
            self._reopening = [create(o.again()) for o in openings if not o.tier.ready]
        return found

    async def _close_all(self, deadline_s: float) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + deadline_s
        background = self._reopening + ([self._clearing] if self._clearing is not None else [])
        for task in background:
            task.cancel()
        if background:
            await asyncio.wait(background, timeout=0.5 * deadline_s)
        closing = [tier for tier in self.tiers if tier.ready]
        for tier in closing:
            tier.closing()
        left_s = until - loop.time()
        answers: list[Answer[None]] = await asyncio.gather(
            *(t.guard.once("close", t.backend.close, deadline_s=left_s) for t in closing)
        )
        for tier, answer in zip(closing, answers, strict=True):
            if answer.error is not None:
                logger.warning("%s: closing failed: %s", tier.name, answer.error)


@dataclass(frozen=True)
class Prepared:
    """A tier whose backend isn't open yet."""

    tier: Tier
    make: Callable[[], StorageBackend]
    """Makes another instance of the backend."""
    context: BackendContext
    """What to open it with."""


def prepare(
    section: Section,
    plugins: PluginIndex,
    *,
    namespace: CacheNamespace,
    region: HostRegion | None,
    counters: Counters,
    deadline_s: float,
    default_serde: str,
    serdes: Mapping[str, BaseModel],
    facts: SerdeFacts,
    lookup_only: bool = False,
    max_bytes: int | None = None,
) -> Prepared:
    """Make the tier that ``section`` describes; the arguments are those of `Tiers.open` and `Tier`.

    Raises:
        ConfigError: its options are refused.
        PluginError: a plugin is missing, lacks what it needs, or is broken.
    """
    serde, exact = _serde(plugins, section, default_serde, serdes)
    serde = serde.bound(facts)
    placed = namespace.placed(_place(serde, namespace.layout, section))
    make = _maker(plugins.storage_backend(section.type), section, deadline_s, counters)
    tier = Tier(
        section.name,
        make(),
        serde,
        guard=Guard(section.name, deadline_s=deadline_s, counters=counters),
        counters=counters,
        deadline_s=deadline_s,
        exact=exact,
        fingerprint=placed.fingerprint,
        max_bytes=max_bytes,
    )
    longest = _longest_value(serde, namespace.layout)
    context = BackendContext(
        section.name,
        placed,
        region,
        longest,
        lookup_only=lookup_only,
        deadline_s=deadline_s,
    )
    return Prepared(tier, make, context)


class _Opening:
    """Gets one backend open, at the start or later."""

    def __init__(self, prepared: Prepared, deadline_s: float, again_after_s: float) -> None:
        self.tier = prepared.tier
        self._make = prepared.make
        self._context = prepared.context
        self._deadline_s = deadline_s
        self._again_after_s = again_after_s
        self._slow: asyncio.Task[Any] | None = None

    async def first(self) -> LMCacheError | None:
        """Try once; answer what the user must know of before anything runs."""
        error = await self._try(self.tier.backend)
        if error is None:
            return None
        where = f"backends.{self._context.name}"
        if isinstance(error, NotCreated):
            return error.problem
        if isinstance(error, (BackendUnavailable, BackendTimeout)):
            logger.warning(
                "%s isn't available: %s. Going on without it; %s",
                where,
                without_passwords_in(str(error)),
                f"trying again every {self._again_after_s:g} s"
                if self._slow is None
                else "it joins when it is open",
            )
            return None
        if isinstance(error, (BackendRejected, ConfigError)):
            return ConfigError(f"{where}: {error}; correct its options, or remove the section")
        return PluginError(
            f"{where}: {type(self.tier.backend).__name__} failed to open with "
            f"{type(error).__name__}: {error}; correct its options or report this to the plugin's "
            "authors"
        )

    async def again(self) -> None:
        """Go on trying until it is open."""
        told = ""
        while not self.tier.ready:
            if self._slow is not None:
                error = await self._wait_for_slow(self._slow)
            else:
                await asyncio.sleep(self._again_after_s)
                made = self.tier.guard.now("create", self._make)
                error = made.error if made.value is None else await self._try(made.value)
            if error is not None and str(error) != told:
                told = str(error)
                said = without_passwords_in(told)
                logger.info("backends.%s still isn't available: %s", self._context.name, said)
        logger.info("backends.%s is available now", self._context.name)

    async def _try(self, backend: StorageBackend) -> BaseException | None:
        async def opened() -> BackendCapabilities:
            await backend.open(self._context)
            capabilities = backend.capabilities
            if not isinstance(capabilities, BackendCapabilities):
                raise TypeError(f"capabilities are {capabilities!r}, not BackendCapabilities")
            self.tier.opened(backend, capabilities)
            return capabilities

        answer = await self.tier.guard.once(
            "open", opened, deadline_s=self._deadline_s, owns_buffers=True
        )
        self._slow = answer.unsettled
        return answer.error

    async def _wait_for_slow(self, task: asyncio.Task[Any]) -> BaseException | None:
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            task.cancel()
            raise
        self._slow = None
        return BackendUnavailable("opening was cancelled") if task.cancelled() else task.exception()


def _longest_value(serde: Serde, layout: KVLayout) -> int:
    """Bytes of the longest frame: a chunk that doesn't shrink grows a little."""
    tokens = layout.tokens_per_chunk
    return HEADER_BYTES + max(serde.max_encoded_bytes(group, tokens) for group in layout.groups)


def _serde(
    plugins: PluginIndex, section: Section, default: str, options: Mapping[str, BaseModel]
) -> tuple[Serde, bool]:
    """The serde that ``section`` names, or the chain of them; and whether it is exact."""
    names = [name.strip() for name in (section.serde or default).split("+")]
    descriptors = [plugins.serde(name) for name in names]
    serde = chain_serdes([_link(descriptor, section, options) for descriptor in descriptors])
    return serde, all(descriptor.lossless for descriptor in descriptors)


def _place(serde: Serde, layout: KVLayout, section: Section) -> str:
    """Where values lie that are written so: see `CacheNamespace.placed`.

    Raises:
        PluginError: the serde can't say what it writes.
    """
    answers = [attempted(serde.identity, group) for group in layout.groups]
    for answer in answers:
        if isinstance(answer.error, LMCacheError):
            raise answer.error
        if not isinstance(answer.value, str) or not _IDENTITY.fullmatch(answer.value):
            raise PluginError(
                f"the serde of backends.{section.name} ({type(serde).__name__}) has the identity "
                f"{answer.value or answer.error!r:.80}, not 1 to 500 printable ASCII characters "
                "without blanks; this is a mistake in its plugin"
            )
    identities = [str(answer.value) for answer in answers]
    if len(set(identities)) == 1:  # a further group that is written the same way moves nothing
        del identities[1:]
    return f"frame={VERSION};serde=" + ",".join(identities)


def _link(descriptor: SerdeDescriptor, section: Section, options: Mapping[str, BaseModel]) -> Serde:
    where = f"serde {descriptor.name!r} of backends.{section.name}"
    return created(
        lambda: descriptor.create(options.get(descriptor.name) or descriptor.config()),
        Serde,  # type: ignore[type-abstract]
        where,
        descriptor.create,
    )


def _maker(
    descriptor: StorageBackendDescriptor, section: Section, deadline_s: float, counters: Counters
) -> Callable[[], StorageBackend]:
    where = f"backends.{section.name} (type {section.type})"
    if section.isolated:
        from lmcache_core.isolation.backend import IsolatedBackend

        return lambda: IsolatedBackend(
            descriptor.name,
            section.options,
            where=where,
            deadline_s=deadline_s,
            counters=counters,
            memory_gib=section.isolated_memory_gib,
        )

    def make() -> StorageBackend:
        return created(
            lambda: descriptor.create(section.options),
            StorageBackend,  # type: ignore[type-abstract]
            where,
            descriptor.create,
        )

    return make
