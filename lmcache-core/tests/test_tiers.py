"""All tiers: opening them, opening them again, asking them all, closing them."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import BaseModel

from lmcache_core.aio.io_loop import IOLoop
from lmcache_core.builtin.memory import MemoryBackend, MemoryConfig
from lmcache_core.builtin.raw import RawConfig, RawSerde
from lmcache_core.chunks.frame import HEADER_BYTES
from lmcache_core.chunks.keys import CacheNamespace, ChunkKey
from lmcache_core.chunks.layout import AttentionKind, DType, KVLayout, LayerGroup
from lmcache_core.contracts.serde import SerdeDescriptor
from lmcache_core.contracts.storage import (
    MISS,
    BackendCapabilities,
    BackendContext,
    StorageBackend,
    StorageBackendDescriptor,
    StoreOutcome,
)
from lmcache_core.errors import (
    BackendRejected,
    BackendUnavailable,
    ConfigError,
    PluginError,
    PluginLoadError,
)
from lmcache_core.metrics import Counters
from lmcache_core.tiers.tiers import Tiers

LONG_S = 30.0
NAMESPACE = CacheNamespace(
    "model", KVLayout(16, (LayerGroup((0,), AttentionKind.FULL, 2, 1, 8, DType.BF16),))
)


def key(number: int) -> ChunkKey:
    return ChunkKey(number.to_bytes(16, "little"))


class Fake(StorageBackend):
    """Holds some keys. ``opening`` is awaited when it is opened."""

    def __init__(self, *held: int, opening: Callable[[], Any] | None = None) -> None:
        self.held = {key(number) for number in held}
        self.opening = opening
        self.context: BackendContext | None = None
        self.closed = 0

    @property
    def capabilities(self) -> BackendCapabilities:
        return BackendCapabilities(shared=False, persistent=False)

    async def open(self, context: BackendContext) -> None:
        if self.opening is not None:
            await self.opening()
        self.context = context

    async def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        return [k in self.held for k in keys]

    async def load(self, keys: Sequence[ChunkKey], into: Sequence[memoryview]) -> list[int]:
        return [MISS for _ in keys]

    async def store(
        self, keys: Sequence[ChunkKey], sources: Sequence[memoryview]
    ) -> list[StoreOutcome]:
        return [StoreOutcome.NOT_ADMITTED for _ in keys]

    async def close(self) -> None:
        self.closed += 1


class Clearing(Fake):
    async def clear(self) -> int:
        count = len(self.held)
        self.held.clear()
        return count


class Options(BaseModel):
    pass


@dataclass(frozen=True)
class Section:
    name: str
    type: str
    options: Any = None
    serde: str | None = None
    deadline_s: float | None = None
    isolated: bool = False
    isolated_memory_gib: float | None = None


class Index:
    """Descriptors by name, made from factories."""

    def __init__(self, **backends: Callable[[], Any]) -> None:
        self.backends = backends

    def storage_backend(self, name: str) -> StorageBackendDescriptor:
        make = self.backends[name]
        return StorageBackendDescriptor(
            name=name,
            summary="",
            config=Options,
            create=lambda options: make() if options is None else make(options),
        )

    def serde(self, name: str) -> SerdeDescriptor:
        return SerdeDescriptor(
            name=name,
            summary="",
            lossless=True,
            config=RawConfig,
            create=lambda _: RawSerde() if name == "raw" else None,
        )


LONGEST = HEADER_BYTES + NAMESPACE.layout.chunk_bytes()
PLACED = NAMESPACE.placed("frame=3;serde=1")


@pytest.fixture
def loop() -> Iterator[IOLoop]:
    loop = IOLoop("test")
    yield loop
    loop.close(10.0)


@pytest.fixture
def open_tiers(loop: IOLoop) -> Iterator[Callable[..., Tiers]]:
    opened: list[Tiers] = []

    def open_(*sections: Section, plugins: Index, **options: Any) -> Tiers:
        usual = {"namespace": NAMESPACE, "default_deadline_s": LONG_S, "open_deadline_s": LONG_S}
        options = {**usual, **options}
        tiers = Tiers.open(
            sections,
            plugins,
            region=None,
            loop=loop,
            counters=Counters(),
            **options,
        )
        opened.append(tiers)
        return tiers

    yield open_
    for tiers in opened:
        tiers.close()


OpenTiers = Callable[..., Tiers]


def raising(error: BaseException) -> Callable[[], Any]:
    async def opening() -> None:
        raise error

    return opening


# -- opening -------------------------------------------------------------------------------


def test_tiers_come_in_order_and_know_their_context(open_tiers: OpenTiers) -> None:
    tiers = open_tiers(
        Section("fast", "a"),
        Section("slow", "b", deadline_s=7.0),
        plugins=Index(a=Fake, b=Fake),
        lookup_only=True,
    )
    assert [(t.name, t.ready, t.deadline_s) for t in tiers.tiers] == [
        ("fast", True, LONG_S),
        ("slow", True, 7.0),
    ]
    assert isinstance(tiers.tiers[0].serde, RawSerde)
    context = tiers.tiers[1].backend.context
    assert context == BackendContext(
        "slow", PLACED, None, LONGEST, lookup_only=True, deadline_s=7.0
    )


def test_a_further_layer_group_moves_nothing(open_tiers: OpenTiers) -> None:
    """Values of the first group stay where they are, if the other is written the same way."""
    window = LayerGroup((1,), AttentionKind.SLIDING_WINDOW, 2, 1, 8, DType.BF16, 128)
    layout = KVLayout(16, (*NAMESPACE.layout.groups, window))
    more = dataclasses.replace(NAMESPACE, layout=layout)
    tiers = open_tiers(Section("slow", "a"), plugins=Index(a=Fake), namespace=more)
    assert tiers.tiers[0].fingerprint == PLACED.fingerprint


def test_a_backend_is_made_from_its_sections_options(open_tiers: OpenTiers) -> None:
    made: list[object] = []

    def make(options: object) -> Fake:
        made.append(options)
        return Fake()

    options = Options()
    open_tiers(Section("x", "a", options), plugins=Index(a=make))
    assert made == [options]


def test_backends_are_opened_at_the_same_time(open_tiers: OpenTiers) -> None:
    waiting = threading.Barrier(2)

    async def meet() -> None:
        await asyncio.get_running_loop().run_in_executor(None, waiting.wait, LONG_S)

    make = lambda: Fake(opening=meet)  # noqa: E731
    tiers = open_tiers(Section("x", "a"), Section("y", "a"), plugins=Index(a=make))
    assert all(tier.ready for tier in tiers.tiers)


def test_no_sections_are_no_tiers(open_tiers: OpenTiers, loop: IOLoop) -> None:
    tiers = open_tiers(plugins=Index())
    assert tiers.tiers == ()
    assert loop.run(tiers.locate([key(1)], LONG_S), LONG_S) == [-1]


def test_a_refusal_names_the_section_and_closes_the_others(open_tiers: OpenTiers) -> None:
    good = Fake()
    refusing = lambda: Fake(opening=raising(BackendRejected("wrong password")))  # noqa: E731
    with pytest.raises(ConfigError) as caught:
        open_tiers(
            Section("disk", "good"),
            Section("cache", "redis"),
            Section("other", "redis"),
            plugins=Index(good=lambda: good, redis=refusing),
        )
    assert str(caught.value).splitlines() == [
        f"backends.{name}: wrong password; correct its options, or remove the section"
        for name in ("cache", "other")
    ]
    assert good.closed == 1


def test_a_backend_that_breaks_while_it_opens_is_named(open_tiers: OpenTiers) -> None:
    make = lambda: Fake(opening=raising(AttributeError("oops")))  # noqa: E731
    with pytest.raises(PluginError, match=r"backends\.disk: Fake .* AttributeError: oops"):
        open_tiers(Section("disk", "a"), plugins=Index(a=make))


def test_a_missing_client_library_becomes_a_pip_command(open_tiers: OpenTiers) -> None:
    def make() -> Fake:
        raise ImportError("No module named 'redis'")

    with pytest.raises(PluginLoadError, match=r"backends\.x \(type a\).*'redis'.*pip install \S"):
        open_tiers(Section("x", "a"), plugins=Index(a=make))


def test_other_failures_to_create_are_told_apart(open_tiers: OpenTiers) -> None:
    def confused() -> Fake:
        raise ConfigError("path: must be absolute")

    def broken() -> Fake:
        raise KeyError("host")

    with pytest.raises(ConfigError, match=r"backends\.x .*must be absolute"):
        open_tiers(Section("x", "a"), plugins=Index(a=confused))
    with pytest.raises(PluginLoadError, match="KeyError: 'host'"):
        open_tiers(Section("x", "a"), plugins=Index(a=broken))
    with pytest.raises(PluginLoadError, match="not a StorageBackend"):
        open_tiers(Section("x", "a"), plugins=Index(a=lambda: 3))
    with pytest.raises(PluginLoadError, match=r"serde 'odd' of backends\.x"):
        open_tiers(Section("x", "a", serde="odd"), plugins=Index(a=Fake))


def test_capabilities_that_are_none_are_a_broken_plugin(open_tiers: OpenTiers) -> None:
    class Odd(Fake):
        @property
        def capabilities(self) -> BackendCapabilities:
            return {"shared": True}

    with pytest.raises(PluginError, match="capabilities"):
        open_tiers(Section("x", "a"), plugins=Index(a=Odd))


# -- opening later -------------------------------------------------------------------------


class Joined(logging.Handler):
    """Set when a tier is reported to be available."""

    def __init__(self) -> None:
        super().__init__()
        self.event = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if "is available now" in record.getMessage():
            self.event.set()


@pytest.fixture
def joined(caplog: pytest.LogCaptureFixture) -> Iterator[threading.Event]:
    handler, logger = Joined(), logging.getLogger("lmcache_core.tiers.tiers")
    logger.addHandler(handler)
    with caplog.at_level(logging.INFO, "lmcache_core.tiers.tiers"):
        yield handler.event
    logger.removeHandler(handler)


@pytest.mark.parametrize(
    "error", [BackendUnavailable("nobody answers"), ConnectionRefusedError("no")]
)
def test_a_backend_that_is_not_there_yet_joins_later(
    error: Exception,
    open_tiers: OpenTiers,
    loop: IOLoop,
    joined: threading.Event,
    caplog: pytest.LogCaptureFixture,
) -> None:
    up, tried_again = threading.Event(), threading.Event()
    made: list[Fake] = []

    async def opening() -> None:
        if len(made) > 3:
            tried_again.set()
        if not up.is_set():
            raise error

    def make() -> Fake:
        made.append(Fake(1, opening=opening))
        return made[-1]

    tiers = open_tiers(Section("cache", "a"), plugins=Index(a=make), reopen_after_s=0.0)
    tier = tiers.tiers[0]
    assert not tier.ready
    assert loop.run(tiers.locate([key(1)], LONG_S), LONG_S) == [-1]
    assert tried_again.wait(LONG_S)
    warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "backends.cache isn't available" in warnings[0].getMessage()
    up.set()
    assert joined.wait(LONG_S)
    assert loop.run(tiers.locate([key(1)], LONG_S), LONG_S) == [0]
    assert tier.backend is made[-1]
    tiers.close()
    assert [backend.closed for backend in made] == [0] * (len(made) - 1) + [1]


def test_a_backend_that_is_slow_to_open_joins_when_it_is_ready(
    open_tiers: OpenTiers, loop: IOLoop, joined: threading.Event
) -> None:
    release = threading.Event()
    made: list[Fake] = []

    async def opening() -> None:
        await asyncio.get_running_loop().run_in_executor(None, release.wait, LONG_S)

    def make() -> Fake:
        made.append(Fake(1, opening=opening))
        return made[-1]

    tiers = open_tiers(Section("disk", "a"), plugins=Index(a=make), open_deadline_s=0.01)
    assert not tiers.tiers[0].ready
    release.set()
    assert joined.wait(LONG_S)
    assert loop.run(tiers.locate([key(1)], LONG_S), LONG_S) == [0]
    assert len(made) == 1


def test_closing_ends_the_tries(open_tiers: OpenTiers, loop: IOLoop) -> None:
    hanging, cancelled = threading.Event(), threading.Event()

    async def opening() -> None:
        hanging.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    make = lambda: Fake(opening=opening)  # noqa: E731
    tiers = open_tiers(Section("x", "a"), plugins=Index(a=make), open_deadline_s=0.01)
    assert hanging.is_set()
    tiers.close()
    assert cancelled.wait(LONG_S)
    assert not tiers.tiers[0].ready


# -- asking and closing --------------------------------------------------------------------


def test_locate_answers_the_first_tier_for_each_key(open_tiers: OpenTiers, loop: IOLoop) -> None:
    tiers = open_tiers(
        Section("x", "x"),
        Section("y", "y"),
        plugins=Index(x=lambda: Fake(1, 3), y=lambda: Fake(0, 1, 4)),
    )
    keys = [key(number) for number in range(5)]
    assert loop.run(tiers.locate(keys, LONG_S), LONG_S) == [1, 0, -1, 0, 1]


def test_leading_hits_of_one_tier_do_not_hide_what_another_completes(
    open_tiers: OpenTiers, loop: IOLoop
) -> None:
    class Counting(Fake):
        async def count_leading_hits(self, keys: Sequence[ChunkKey]) -> int:
            return [*(k in self.held for k in keys), False].index(False)

    both = open_tiers(
        Section("x", "x"),
        Section("y", "y"),
        plugins=Index(x=lambda: Counting(0, 2), y=lambda: Counting(1)),
    )
    keys = [key(number) for number in range(3)]
    assert loop.run(both.locate(keys, LONG_S), LONG_S) == [0, 1, 0]
    alone = open_tiers(Section("x", "x"), plugins=Index(x=lambda: Counting(0, 2)))
    assert loop.run(alone.locate(keys, LONG_S), LONG_S) == [0, -1, -1]


def test_a_hanging_tier_hides_nothing_of_the_others(open_tiers: OpenTiers, loop: IOLoop) -> None:
    class Hanging(Fake):
        async def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
            await asyncio.Event().wait()
            return []

    tiers = open_tiers(
        Section("x", "x"), Section("y", "y"), plugins=Index(x=Hanging, y=lambda: Fake(1))
    )
    assert loop.run(tiers.locate([key(1), key(2)], 0.01), LONG_S) == [1, -1]


def test_clear_clears_what_can_be(open_tiers: OpenTiers, loop: IOLoop) -> None:
    tiers = open_tiers(
        Section("x", "x"),
        Section("y", "y"),
        plugins=Index(x=lambda: Clearing(1, 2), y=lambda: Fake(1)),
    )
    assert loop.run(tiers.clear(LONG_S), LONG_S) == 2
    assert loop.run(tiers.locate([key(1), key(2)], LONG_S), LONG_S) == [1, -1]


def test_close_closes_each_once_and_outlives_faults(
    open_tiers: OpenTiers, loop: IOLoop, caplog: pytest.LogCaptureFixture
) -> None:
    class Sulking(Fake):
        async def close(self) -> None:
            raise OSError("still busy")

    tiers = open_tiers(Section("x", "x"), Section("y", "y"), plugins=Index(x=Sulking, y=Fake))
    tiers.close()
    tiers.close()
    assert tiers.tiers[1].backend.closed == 1
    assert "x: closing failed: still busy" in caplog.text
    assert loop.run(tiers.locate([key(1)], LONG_S), LONG_S) == [-1]


def test_close_after_the_loop_is_a_warning(
    open_tiers: OpenTiers, loop: IOLoop, caplog: pytest.LogCaptureFixture
) -> None:
    tiers = open_tiers(Section("x", "x"), plugins=Index(x=Fake))
    loop.close(10.0)
    tiers.close()
    assert "couldn't be closed" in caplog.text


def test_a_serde_is_created_with_its_options(open_tiers: Callable[..., Tiers]) -> None:
    """Each of a chain with its own; with defaults where there are none."""
    seen: list[tuple[str, object]] = []

    class Noting(Index):
        def serde(self, name: str) -> SerdeDescriptor:
            def create(options: object) -> RawSerde:
                seen.append((name, options))
                return RawSerde()

            return dataclasses.replace(super().serde(name), create=create)

    given = Options()
    open_tiers(
        Section("a", "memory", serde="one+two"),
        plugins=Noting(memory=lambda: MemoryBackend(MemoryConfig())),
        serdes={"two": given},
    )
    assert seen[0] == ("one", RawConfig())
    assert seen[1][0] == "two"
    assert seen[1][1] is given
