"""What `testing.faults` injects is what it says, no more and no less, and all of it is recorded."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest

from lmcache_core.aio.guard import attempt
from lmcache_core.builtin.filesystem import FilesystemBackend, FilesystemConfig
from lmcache_core.builtin.memory import MemoryBackend, MemoryConfig
from lmcache_core.builtin.raw import RawSerde
from lmcache_core.chunks.keys import CacheNamespace, ChunkKey
from lmcache_core.chunks.layout import AttentionKind, DType, KVLayout, LayerGroup
from lmcache_core.contracts.connector import BlockSpan, EngineConnector, HostKernels
from lmcache_core.contracts.eviction import LRU, OrderedPolicy
from lmcache_core.contracts.paged import CanonicalBuffer
from lmcache_core.contracts.serde import Serde, SerdeFacts
from lmcache_core.contracts.storage import (
    MISS,
    BackendContext,
    ReportsUsage,
    StorageBackend,
    SupportsClear,
    SupportsDelete,
    SupportsPrefixLookup,
)
from lmcache_core.testing.connector import EngineConnectorTests, EngineMemory
from lmcache_core.testing.faults import (
    NEGATIVE,
    SHORT,
    TOO_FEW,
    TOO_LARGE,
    TOO_MANY,
    WRONG_TYPE,
    Corrupt,
    Fault,
    Faults,
    Gate,
    Half,
    Injected,
    Raise,
    Wait,
    WrongAnswer,
)
from lmcache_core.testing.faulty import (
    FaultyBackend,
    FaultyConnector,
    FaultyKernels,
    FaultyPolicy,
    FaultySerde,
)
from lmcache_core.testing.serde import MakeSerde, SerdeTests
from lmcache_core.testing.storage import MakeBackend, StorageBackendTests

T = TypeVar("T")
GROUP = LayerGroup((0, 1, 2), AttentionKind.FULL, 2, 2, 3, DType.BF16)
TOKENS = 7
CHUNK_BYTES = GROUP.chunk_bytes(TOKENS)
SPAN = BlockSpan([0], 0, TOKENS, TOKENS)
KEYS = [ChunkKey(bytes([number]) * 16) for number in range(3)]


def chunk(seed: int = 1) -> bytearray:
    return bytearray((7 * i + seed) % 256 for i in range(CHUNK_BYTES))


def differing_bits(one: bytes, other: bytes) -> int:
    return sum((a ^ b).bit_count() for a, b in zip(one, other, strict=True))


# -- without faults everything is as before ------------------------------------------------


class TestSerdeWithoutFaults(SerdeTests):
    @pytest.fixture
    def make_serde(self) -> MakeSerde:
        return lambda: FaultySerde(RawSerde(), Faults())


class TestBackendWithoutFaults(StorageBackendTests):
    @pytest.fixture
    def make_backend(self) -> MakeBackend:
        return lambda: FaultyBackend(MemoryBackend(MemoryConfig()), Faults())


class TestBlockingBackendWithoutFaults(StorageBackendTests):
    @pytest.fixture
    def make_backend(self, tmp_path: Path) -> MakeBackend:
        config = FilesystemConfig(path=tmp_path, min_free_gib=0)
        return lambda: FaultyBackend(FilesystemBackend(config), Faults())


class BufferMemory(EngineMemory):
    blocks, block_tokens = 1, TOKENS

    def __init__(self) -> None:
        self.memory = bytearray(CHUNK_BYTES)
        self.connector = FaultyConnector(CanonicalBuffer(self.memory, GROUP, TOKENS), Faults())

    def _rows(self, offset: int) -> list[slice]:
        row = GROUP.heads * GROUP.head_size * GROUP.dtype.itemsize
        begins = [(p * TOKENS + offset) * row for p in range(len(GROUP.layers) * GROUP.planes)]
        return [slice(begin, begin + row) for begin in begins]

    def read(self, group: int, block: int, offset: int) -> bytes:
        return b"".join(self.memory[row] for row in self._rows(offset))

    def write(self, group: int, block: int, offset: int, token: bytes) -> None:
        rows = self._rows(offset)
        size = len(token) // len(rows)
        for i, row in enumerate(rows):
            self.memory[row] = token[i * size : (i + 1) * size]


class TestConnectorWithoutFaults(EngineConnectorTests):
    @pytest.fixture
    def engine(self) -> EngineMemory:
        return BufferMemory()


@pytest.mark.parametrize(
    ("contract", "wrapper"),
    [
        (Serde, FaultySerde),
        (OrderedPolicy, FaultyPolicy),
        (EngineConnector, FaultyConnector),
        (HostKernels, FaultyKernels),
        (StorageBackend, FaultyBackend),
    ],
)
def test_a_wrapper_passes_on_all_of_its_contract(contract: type, wrapper: type) -> None:
    """Or a contract's new method with a default would silently not reach the real one."""
    promised = {
        name
        for part in contract.__mro__
        for name in vars(part)
        if not name.startswith("_") and part is not object
    }
    assert promised <= set(vars(wrapper)) | {"name"}, "wrap these, too"


# -- when ----------------------------------------------------------------------------------


def calls_that_fail(faults: Faults, calls: int) -> list[int]:
    policy = FaultyPolicy(LRU(), faults)
    return [n for n in range(1, calls + 1) if attempt(policy.touched, []) is not None]


def test_after_and_times() -> None:
    faults = Faults()
    faults.arm("touched", Raise(), after=2, times=3)
    assert calls_that_fail(faults, 9) == [3, 4, 5]
    assert faults.injected == tuple(Injected("touched", n, Raise()) for n in (3, 4, 5))


def test_always_until_disarmed() -> None:
    faults = Faults()
    faults.arm("touched", Raise(), times=None)
    assert calls_that_fail(faults, 4) == [1, 2, 3, 4]
    faults.disarm()
    assert calls_that_fail(faults, 4) == []
    assert faults.count() == 4


def test_chance_goes_by_the_seed() -> None:
    found = []
    for seed in (1, 1, 2):
        faults = Faults(seed)
        faults.arm("touched", Raise(), chance=0.25, times=None)
        found.append(calls_that_fail(faults, 400))
        assert [one.number for one in faults.injected] == found[-1]
    assert found[0] == found[1] != found[2]
    assert 50 < len(found[0]) < 150


def test_one_call_is_hit_by_the_first_whose_turn_it_is() -> None:
    faults = Faults()
    faults.arm("touched", Raise(ValueError))
    faults.arm("touched", Raise(KeyError))
    policy = FaultyPolicy(LRU(), faults)
    for expected in (ValueError, KeyError):
        with pytest.raises(expected):
            policy.touched([])
    policy.touched([])
    policy.added(1)
    assert faults.count("touched") == faults.count() == 2


def test_what_cannot_happen_cannot_be_armed() -> None:
    faults = Faults()
    with pytest.raises(ValueError, match="no operation 'encoed'; there are added, bound"):
        faults.arm("encoed", Raise())
    for operation, fault in (
        ("scatter", Corrupt()),
        ("max_encoded_bytes", Half()),
        ("decode", WRONG_TYPE),
        ("touched", Wait(Gate(), then=Corrupt())),
    ):
        with pytest.raises(ValueError, match=f"{operation} has nothing that"):
            faults.arm(operation, fault)


# -- what ----------------------------------------------------------------------------------

EXCEPTIONS = [
    Exception,
    ValueError,
    MemoryError,
    StopIteration,
    GeneratorExit,
    SystemExit,
    KeyboardInterrupt,
]


@pytest.mark.parametrize("kind", EXCEPTIONS)
@pytest.mark.parametrize(
    "operation", ["identity", "bound", "for_chunk", "max_encoded_bytes", "encode"]
)
def test_serde_raises(kind: type[BaseException], operation: str) -> None:
    faults = Faults()
    faults.arm(operation, Raise(kind))
    serde = FaultySerde(RawSerde(), faults)
    made, into = chunk(), bytearray(CHUNK_BYTES)
    calls: dict[str, Callable[[], object]] = {
        "identity": lambda: serde.identity(GROUP),
        "bound": lambda: serde.bound(SerdeFacts()),
        "for_chunk": lambda: serde.for_chunk(KEYS[0], None),
        "max_encoded_bytes": lambda: serde.max_encoded_bytes(GROUP, TOKENS),
        "encode": lambda: serde.encode(memoryview(made), memoryview(into), GROUP, TOKENS),
    }
    with pytest.raises(kind, match=f"injected into call 1 of {operation}"):
        calls[operation]()
    assert into == bytes(CHUNK_BYTES), "nothing was done"
    calls[operation]()
    assert faults.count(operation, Raise) == 1


def test_what_a_serde_is_bound_to_fails_as_well() -> None:
    class Bound(RawSerde):
        def for_chunk(self, key: bytes, start: int | None) -> Serde:
            return Bound()

    faults = Faults()
    serde = FaultySerde(Bound(), faults)
    faults.arm("max_encoded_bytes", Raise())
    with pytest.raises(ValueError, match="injected"):
        serde.for_chunk(KEYS[0], 0).max_encoded_bytes(GROUP, TOKENS)


def test_half_encoded_and_half_decoded() -> None:
    faults = Faults()
    serde = FaultySerde(RawSerde(), faults)
    faults.arm("encode", Half(MemoryError))
    faults.arm("decode", Half())
    into, half = bytearray(CHUNK_BYTES), CHUNK_BYTES // 2
    with pytest.raises(MemoryError, match="half way"):
        serde.encode(memoryview(chunk()), memoryview(into), GROUP, TOKENS)
    assert (into[:half], into[half:]) == (chunk()[:half], b"\xa5" * (CHUNK_BYTES - half))
    with pytest.raises(ValueError, match="half way"):
        serde.decode(memoryview(chunk(2)), memoryview(into), GROUP, TOKENS)
    assert (into[:half], into[half:]) == (chunk(2)[:half], b"\xa5" * (CHUNK_BYTES - half))
    assert faults.count(kind=Half) == 2


def test_one_bit_of_the_output_is_changed_and_nothing_else() -> None:
    faults = Faults(3)
    faults.arm("encode", Corrupt(), times=20)
    faults.arm("decode", Corrupt(at=5))
    serde = FaultySerde(RawSerde(), faults)
    places = set()
    for _ in range(20):
        source, into = chunk(), bytearray(CHUNK_BYTES + 8)
        assert serde.encode(memoryview(source), memoryview(into), GROUP, TOKENS) == CHUNK_BYTES
        assert source == chunk()
        assert into[CHUNK_BYTES:] == bytes(8), "behind the output"
        assert differing_bits(into[:CHUNK_BYTES], source) == 1
        places.add(next(i for i in range(CHUNK_BYTES) if into[i] != source[i]))
    assert len(places) > 10
    into = bytearray(CHUNK_BYTES)
    serde.decode(memoryview(chunk()), memoryview(into), GROUP, TOKENS)
    assert [i for i in range(CHUNK_BYTES) if into[i] != chunk()[i]] == [5]
    assert faults.count(kind=Corrupt) == 21


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(TOO_LARGE, CHUNK_BYTES + 9), (NEGATIVE, -2), (WRONG_TYPE, "nonsense")],
)
def test_encode_answers_nonsense(answer: WrongAnswer, expected: object) -> None:
    faults = Faults()
    faults.arm("encode", answer)
    serde = FaultySerde(RawSerde(), faults)
    into = bytearray(CHUNK_BYTES + 8)
    actual: object = serde.encode(memoryview(chunk()), memoryview(into), GROUP, TOKENS)
    assert actual == expected
    assert into == chunk() + bytes(8)
    assert faults.injected == (Injected("encode", 1, answer),)


def test_an_answer_that_is_no_nonsense_is_not_counted() -> None:
    faults = Faults()
    faults.arm("victim", WrongAnswer("the same", lambda answer, _: answer))
    policy = FaultyPolicy(LRU(), faults)
    policy.added(3)
    assert list(policy.victims()) == [3]
    assert faults.injected == ()


def test_a_real_failure_is_not_counted() -> None:
    faults = Faults()
    faults.arm("decode", Corrupt())
    serde = FaultySerde(RawSerde(), faults)
    with pytest.raises(ValueError, match="bytes"):
        serde.decode(memoryview(chunk()[:-1]), memoryview(chunk()), GROUP, TOKENS)
    assert faults.injected == ()


# -- connectors and kernels ----------------------------------------------------------------


def gathered(faults: Faults) -> tuple[Any, bytearray, bytearray]:
    """What ``gather_checked`` of two spans answers, and what lies in both chunks."""
    connector = FaultyConnector(CanonicalBuffer(chunk(), GROUP, TOKENS), faults)
    one, two = bytearray(CHUNK_BYTES), bytearray(CHUNK_BYTES)
    return connector.gather_checked([SPAN, SPAN], [memoryview(one), memoryview(two)]), one, two


def test_checksums_that_are_none() -> None:
    good, _, _ = gathered(Faults())
    for answer, expected in (
        (TOO_FEW, good[:1]),
        (TOO_MANY, [*good, good[1]]),
        (SHORT, [sums[:-1] for sums in good]),
        (WRONG_TYPE, "nonsense"),
    ):
        faults = Faults()
        faults.arm("gather_checked", answer)
        actual, one, two = gathered(faults)
        assert actual == expected
        assert one == two == chunk()
        assert faults.count("gather_checked", WrongAnswer) == 1


def test_a_damaged_chunk_keeps_the_checksums_of_the_whole_one() -> None:
    good, _, _ = gathered(Faults())
    faults = Faults(5)
    faults.arm("gather_checked", Corrupt())
    actual, one, two = gathered(faults)
    assert actual == good
    assert differing_bits(one, chunk()) + differing_bits(two, chunk()) == 1


def test_positions_that_are_none() -> None:
    (sums, _), _, _ = gathered(Faults())
    for answer, expected in ((NEGATIVE, [-2]), (TOO_LARGE, [2]), (TOO_MANY, [0])):
        faults = Faults()
        faults.arm("scatter_checked", answer)
        connector = FaultyConnector(CanonicalBuffer(chunk(), GROUP, TOKENS), faults)
        assert connector.scatter_checked([memoryview(chunk())], [SPAN], None, [sums]) == expected
        assert faults.count() == 1


def test_kernels_fail() -> None:
    plugins = pytest.importorskip("lmcache_kernels.cpu")
    faults = Faults()
    kernels = FaultyKernels(plugins.CpuKernels(1), faults)
    connector = CanonicalBuffer(chunk(), GROUP, TOKENS, kernels)
    into = bytearray(CHUNK_BYTES)
    faults.arm("gather_checked", Raise(RuntimeError))
    faults.arm("checksums", WRONG_TYPE)
    with pytest.raises(RuntimeError, match="injected"):
        connector.gather_checked([SPAN], [memoryview(into)])
    (sums,) = connector.gather_checked([SPAN], [memoryview(into)])
    assert into == chunk()
    assert kernels.checksums(memoryview(into), 3) == "nonsense"
    assert kernels.checksums(memoryview(into), 3) == sums
    assert connector.scatter_checked([memoryview(into)], [SPAN], None, [sums]) == []
    assert isinstance(kernels, HostKernels)


# -- policies ------------------------------------------------------------------------------


def policy_of(*slots: int, faults: Faults) -> FaultyPolicy:
    policy = FaultyPolicy(LRU(), faults)
    for slot in slots:
        policy.added(slot)
    return policy


@pytest.mark.parametrize("kind", EXCEPTIONS)
@pytest.mark.parametrize("operation", ["added", "touched", "removed", "victims", "clear"])
def test_policy_raises_and_does_nothing(kind: type[BaseException], operation: str) -> None:
    faults = Faults()
    policy = policy_of(1, 2, faults=faults)
    faults.arm(operation, Raise(kind))
    arguments = {"added": [3], "touched": [[1]], "removed": [1]}.get(operation, [])
    with pytest.raises(kind, match="injected"):
        getattr(policy, operation)(*arguments)
    assert list(policy.victims()) == [1, 2]
    assert faults.count(operation) == 1


def test_a_step_of_the_victims_fails() -> None:
    faults = Faults()
    policy = policy_of(1, 2, 3, faults=faults)
    faults.arm("victim", Raise(SystemExit), after=1)
    steps = policy.victims()
    assert next(steps) == 1
    with pytest.raises(SystemExit):
        next(steps)
    faults.arm("victim", Raise(StopIteration), after=1)
    assert list(policy.victims()) == [1], "an iterator that ends early"


def test_victims_that_are_none() -> None:
    for answer, expected in (
        (NEGATIVE, [-2]),
        (TOO_LARGE, [1 << 62]),
        (WrongAnswer("slot 5", lambda *_: iter([5, 5])), [5, 5]),
    ):
        faults = Faults()
        policy = policy_of(1, 2, faults=faults)
        faults.arm("victims", answer)
        assert list(policy.victims()) == expected
        assert list(policy.victims()) == [1, 2]
        assert faults.count("victims") == 1


# -- backends ------------------------------------------------------------------------------


@pytest.fixture
def run() -> Iterator[Callable[[Awaitable[T]], T]]:
    loop = asyncio.new_event_loop()
    yield lambda work: loop.run_until_complete(asyncio.wait_for(work, 60.0))
    loop.close()


def context() -> BackendContext:
    return BackendContext("it", CacheNamespace("model", KVLayout(TOKENS, (GROUP,))))


def views(count: int) -> list[memoryview]:
    return [memoryview(bytearray(CHUNK_BYTES + 8)) for _ in range(count)]


async def filled(real: StorageBackend, faults: Faults) -> FaultyBackend:
    backend = FaultyBackend(real, faults)
    await backend.open(context())
    await backend.store(KEYS[:2], [memoryview(chunk(n)) for n in range(2)])
    return backend


def test_a_backend_raises_wherever_it_is_called(run: Callable[[Awaitable[None]], None]) -> None:
    async def work() -> None:
        faults = Faults()
        backend = await filled(MemoryBackend(MemoryConfig()), faults)
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "open": lambda: backend.open(context()),
            "contains": lambda: backend.contains(KEYS),
            "load": lambda: backend.load(KEYS, views(3)),
            "store": lambda: backend.store(KEYS[2:], [memoryview(chunk())]),
            "delete": lambda: backend.delete(KEYS),
            "count_leading_hits": lambda: backend.count_leading_hits(KEYS),
            "clear": lambda: backend.clear(),
            "close": lambda: backend.close(),
        }
        for operation, call in calls.items():
            faults.arm(operation, Raise(MemoryError))
            with pytest.raises(MemoryError, match=f"of {operation}"):
                await call()
            assert backend.usage()[0] == 2, "nothing was done"
        faults.arm("usage", Raise())
        with pytest.raises(ValueError, match="of usage"):
            backend.usage()
        assert faults.count(kind=Raise) == len(calls) + 1

    run(work())


def test_a_wrapper_can_what_the_real_one_can() -> None:
    class Least(MemoryBackend):
        delete = count_leading_hits = clear = usage = None  # type: ignore[assignment]

    able = (SupportsDelete, SupportsPrefixLookup, SupportsClear, ReportsUsage)
    whole = FaultyBackend(MemoryBackend(MemoryConfig()), Faults())
    assert all(isinstance(whole, protocol) for protocol in able)
    least = FaultyBackend(Least(MemoryConfig()), Faults())
    assert not any(isinstance(least, protocol) for protocol in able)


def test_sizes_hits_and_outcomes_that_are_none(run: Callable[[Awaitable[None]], None]) -> None:
    async def work() -> None:
        faults = Faults()
        backend = await filled(MemoryBackend(MemoryConfig()), faults)
        cases: list[tuple[str, Fault, object]] = [
            ("load", TOO_LARGE, [CHUNK_BYTES + 9] * 3),
            ("load", NEGATIVE, [-2] * 3),
            ("load", TOO_FEW, [CHUNK_BYTES] * 2),
            ("load", TOO_MANY, [CHUNK_BYTES, CHUNK_BYTES, MISS, MISS]),
            ("contains", TOO_FEW, [True, True]),
            ("contains", WRONG_TYPE, "nonsense"),
            ("count_leading_hits", NEGATIVE, -2),
            ("count_leading_hits", TOO_LARGE, 1 << 62),
        ]
        for operation, fault, expected in cases:
            faults.arm(operation, fault)
            more = [views(3)] if operation == "load" else []
            assert await getattr(backend, operation)(KEYS, *more) == expected
        faults.arm("store", TOO_FEW)
        assert await backend.store(KEYS[:1], [memoryview(chunk())]) == []
        assert faults.count(kind=WrongAnswer) == len(cases) + 1

    run(work())


def test_damage_on_the_way_in_stays_and_on_the_way_out_does_not(
    run: Callable[[Awaitable[None]], None],
) -> None:
    async def work() -> None:
        faults = Faults(9)
        faults.arm("store", Corrupt(), after=1)
        backend = await filled(MemoryBackend(MemoryConfig()), faults)
        source = chunk(2)
        await backend.store(KEYS[2:], [memoryview(source)])
        assert source == chunk(2), "sources belong to the caller"
        faults.arm("load", Corrupt())
        for expected in (2, 1):  # bits
            into = views(3)
            await backend.load(KEYS, into)
            assert (
                sum(differing_bits(into[n][:CHUNK_BYTES], chunk(n)) for n in range(3)) == expected
            )
            assert all(view[CHUNK_BYTES:] == bytes(8) for view in into)
        assert [one.operation for one in faults.injected] == ["store", "load"]

    run(work())


def test_a_miss_cannot_be_damaged(run: Callable[[Awaitable[None]], None]) -> None:
    async def work() -> None:
        faults = Faults()
        backend = await filled(MemoryBackend(MemoryConfig()), faults)
        faults.arm("load", Corrupt())
        assert await backend.load(KEYS[2:], views(1)) == [MISS]
        assert faults.injected == ()

    run(work())


def test_a_backend_that_blocks_raises_and_waits_on_its_own_thread(
    run: Callable[[Awaitable[None]], None], tmp_path: Path
) -> None:
    threads: list[str] = []

    def made(why: str) -> BaseException:
        threads.append(threading.current_thread().name)
        return MemoryError(why)

    async def work() -> None:
        faults, gate = Faults(), Gate()
        config = FilesystemConfig(path=tmp_path, min_free_gib=0)
        backend = await filled(FilesystemBackend(config), faults)
        faults.arm("contains", Wait(gate, then=Raise(made)))
        asked = asyncio.ensure_future(backend.contains(KEYS))
        assert await asyncio.to_thread(gate.reached)
        assert not asked.done()
        gate.open()
        with pytest.raises(MemoryError):
            await asked
        assert threads == ["lmcache-it-0"]
        assert faults.count(kind=Wait) == 1
        await backend.close()

    run(work())


# -- waiting -------------------------------------------------------------------------------


def test_calls_stand_at_a_gate_until_it_is_opened() -> None:
    faults, gate = Faults(), Gate()
    faults.arm("touched", Wait(gate), times=2)
    policy = FaultyPolicy(LRU(), faults)
    with ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(policy.touched, []) for _ in range(2)]
        assert gate.reached(2)
        assert not any(call.done() for call in calls)
        assert not gate.reached(3, timeout_s=0.0)
        gate.open()
        for call in calls:
            call.result(60)
    faults.arm("touched", Wait(gate))
    policy.touched([])  # it is open


def test_a_gate_holds_up_no_loop_and_may_be_left(run: Callable[[Awaitable[None]], None]) -> None:
    async def work() -> None:
        faults, gate = Faults(), Gate()
        backend = await filled(MemoryBackend(MemoryConfig()), faults)
        faults.arm("contains", Wait(gate), times=2)
        left, waits = (asyncio.ensure_future(backend.contains(KEYS)) for _ in range(2))
        while not gate.reached(2, timeout_s=0.0):
            await asyncio.sleep(0)
        left.cancel()
        gate.open()
        assert await waits == [True, True, False]
        assert left.cancelled()
        assert faults.count(kind=Wait) == 1

    run(work())
