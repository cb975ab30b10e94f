"""KV that isn't what the layout says is the caller's to hear of, before anything is planned."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmcache_core import Cache, DType, KVLayout, Paged, Plugins, full_attention, load_config, mla
from lmcache_core.chunks.layout import LayerGroup
from lmcache_core.contracts.buffers import kv_memory
from lmcache_core.contracts.connector import EngineConnector
from lmcache_core.contracts.paged import CanonicalBuffer

CHUNK, TOKENS = 16, 64
GROUP = full_attention(layers=3, heads=2, head_size=8, dtype=DType.F16)
SHAPE = (3, 2, TOKENS, 2, 8)
SIZE = GROUP.chunk_bytes(TOKENS)
PROMPT = list(range(TOKENS))


def grouped(dtype: DType) -> LayerGroup:
    return full_attention(layers=3, heads=2, head_size=8, dtype=dtype)


@pytest.fixture(params=["kernels", "python"])
def cache(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cache]:
    if request.param == "python":
        monkeypatch.setattr(Plugins, "host_kernels", lambda _: None)
    config = load_config(
        Plugins(), environ={}, assignments=[f"chunk_size={CHUNK}", "max_local_cpu_size=0.01"]
    )
    with Cache.open(model="m", layout=KVLayout(CHUNK, (GROUP,)), config=config) as opened:
        yield opened


@pytest.fixture
def kv() -> np.ndarray:
    return np.random.default_rng(0).random(SHAPE).astype(np.float16)


def nothing_happened(cache: Cache) -> None:
    """All chunks are still known, and nothing is held or under way."""
    assert cache.lookup(PROMPT) == TOKENS
    again = np.zeros(SHAPE, np.float16)
    assert cache.load(PROMPT, again) == TOKENS
    assert cache._running.planner.pending == 0
    figures = cache.counters.snapshot()
    assert not {name for name, *_ in figures} & {"load_failures", "store_dropped"}


def torch_like(dtype: str, shape: tuple[int, ...] = SHAPE) -> Any:
    torch = pytest.importorskip("torch")
    return torch.zeros(shape, dtype=getattr(torch, dtype))


# -- what may not be written to ------------------------------------------------------------


def read_only_array(path: Path) -> Any:
    array = np.zeros(SHAPE, np.float16)
    array.flags.writeable = False
    return array


def read_only_map(path: Path) -> Any:
    (path / "file").write_bytes(bytes(SIZE))
    with (path / "file").open("rb") as file:
        return mmap.mmap(file.fileno(), SIZE, prot=mmap.PROT_READ)


READ_ONLY: dict[str, Callable[[Path], Any]] = {
    "bytes": lambda _: bytes(SIZE),
    "array": read_only_array,
    "map": read_only_map,
    "array of a map": lambda path: np.frombuffer(read_only_map(path), np.float16),
    "view": lambda _: memoryview(bytearray(SIZE)).toreadonly(),
}


@pytest.mark.parametrize("kind", READ_ONLY)
def test_nothing_is_loaded_into_what_is_read_only(
    cache: Cache, kv: np.ndarray, kind: str, tmp_path: Path
) -> None:
    cache.store(PROMPT, kv)
    target = READ_ONLY[kind](tmp_path)
    with pytest.raises(ValueError, match="read-only"):
        cache.load(PROMPT, target)
    engine = CanonicalBuffer(target, GROUP, TOKENS, Plugins().host_kernels())
    source = memoryview(bytearray(b"\1" * GROUP.chunk_bytes(CHUNK)))
    span = Paged(engine, [0], TOKENS).span(0, CHUNK)
    with pytest.raises(ValueError, match="read-only"):
        engine.scatter([source], [span])
    with pytest.raises(ValueError, match="read-only"):
        engine.scatter_checked([source], [span], None, [b"\0" * 24])
    assert bytes(target) == bytes(SIZE)
    nothing_happened(cache)


@pytest.mark.parametrize("kind", READ_ONLY)
def test_a_store_reads_what_is_read_only(cache: Cache, kind: str, tmp_path: Path) -> None:
    assert cache.store(PROMPT, READ_ONLY[kind](tmp_path)) == TOKENS


# -- shape, order, type --------------------------------------------------------------------

WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "tokens before planes": (
        lambda: np.zeros((3, TOKENS, 2, 2, 8), np.float16),
        ValueError,
        r"has the shape \(3, 2, 64, 2, 8\).*this buffer has \(3, 64, 2, 2, 8\)",
    ),
    "heads before tokens": (
        lambda: np.zeros((3, 2, 2, TOKENS, 8), np.float16),
        ValueError,
        "shape",
    ),
    "bytes of another order": (
        lambda: np.zeros((3, TOKENS, 2, 2, 16), np.uint8),
        ValueError,
        "shape",
    ),
    "a table": (lambda: np.zeros((TOKENS, 3 * 2 * 2 * 8), np.float16), ValueError, "shape"),
    "a view": (lambda: memoryview(bytearray(SIZE)).cast("B", [2, SIZE // 2]), ValueError, "shape"),
    "float32 of that size": (
        lambda: np.zeros(SIZE // 4, np.float32),
        ValueError,
        "KV of F16.*holds float32",
    ),
    "int64 of that size": (lambda: np.zeros(SIZE // 8, np.int64), ValueError, "holds int64"),
    "uint32 of that size": (lambda: np.zeros(SIZE // 4, np.uint32), ValueError, "holds uint32"),
    "truth values": (lambda: np.zeros(SIZE, bool), ValueError, "holds bool"),
    "another byte order": (
        lambda: np.zeros(SHAPE, ">f2"),
        ValueError,
        "float16 in another byte order",
    ),
    "Fortran's order": (lambda: np.zeros(SHAPE, np.float16, order="F"), ValueError, "contiguous"),
    "every other": (lambda: np.zeros(SIZE, np.float16)[::2], ValueError, "isn't contiguous"),
    "too short": (lambda: bytearray(SIZE - 16), ValueError, f"of {SIZE} bytes"),
    "too long": (lambda: bytearray(SIZE + 16), ValueError, f"of {SIZE} bytes"),
    "a list": (lambda: [0] * SIZE, TypeError, "list isn't readable"),
    "nothing": (lambda: None, TypeError, "NoneType isn't readable"),
    "bf16 for f16": (lambda: torch_like("bfloat16"), ValueError, "holds torch.bfloat16"),
    "a tensor of another order": (
        lambda: torch_like("float16", (3, TOKENS, 2, 2, 8)),
        ValueError,
        "shape",
    ),
    "a transposed tensor": (
        lambda: torch_like("float16", (3, TOKENS, 2, 2, 8)).transpose(1, 2),
        ValueError,
        "contiguous",
    ),
    "a tensor elsewhere": (lambda: torch_like("float16").to("meta"), ValueError, "lies on meta"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_the_layout_s_is_refused(cache: Cache, kv: np.ndarray, name: str) -> None:
    make, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        cache.store(PROMPT, make())
    assert cache.lookup(PROMPT) == 0
    cache.store(PROMPT, kv)
    with pytest.raises(kind, match=message) as raised:
        cache.load(PROMPT, make())
    assert "\n" not in str(raised.value)
    nothing_happened(cache)


RIGHT: dict[str, tuple[DType, Callable[[], Any]]] = {
    "bytearray": (DType.BF16, lambda: bytearray(SIZE)),
    "uint8, one dimension": (DType.BF16, lambda: np.zeros(SIZE, np.uint8)),
    "uint8, all dimensions": (DType.BF16, lambda: np.zeros((*SHAPE[:4], 16), np.uint8)),
    "uint16": (DType.BF16, lambda: np.zeros(SHAPE, np.uint16)),
    "int16": (DType.F16, lambda: np.zeros(SHAPE, np.int16)),
    "float16": (DType.F16, lambda: np.zeros(SHAPE, np.float16)),
    "float16 in one dimension": (DType.F16, lambda: np.zeros(SIZE // 2, np.float16)),
    "float32": (DType.F32, lambda: np.zeros(SHAPE, np.float32)),
    "float8 in uint8": (DType.F8_E4M3, lambda: np.zeros(SHAPE, np.uint8)),
    "torch bf16": (DType.BF16, lambda: torch_like("bfloat16")),
    "torch f16": (DType.F16, lambda: torch_like("float16")),
    "torch f32": (DType.F32, lambda: torch_like("float32")),
    "torch f8": (DType.F8_E4M3, lambda: torch_like("float8_e4m3fn")),
    "torch bytes": (DType.BF16, lambda: torch_like("uint8", (*SHAPE[:4], 16))),
    "torch int16": (DType.BF16, lambda: torch_like("int16")),
    "torch parameter": (DType.F16, lambda: torch_like("float16").requires_grad_()),
}


@pytest.mark.parametrize("name", RIGHT)
def test_types_and_what_carries_them(name: str) -> None:
    dtype, make = RIGHT[name]
    given = make()
    view = kv_memory(given, grouped(dtype), TOKENS, writable=True)
    assert (view.format, view.ndim, view.nbytes) == ("B", 1, grouped(dtype).chunk_bytes(TOKENS))
    view[-1] = 7  # the memory itself, not a copy
    assert kv_memory(given, grouped(dtype), TOKENS, writable=False)[-1] == 7


def test_a_tensor_lives_as_long_as_its_view() -> None:
    view = kv_memory(torch_like("bfloat16"), grouped(DType.BF16), TOKENS, writable=True)
    view[:] = bytes(range(256)) * (view.nbytes // 256)
    torch_like("bfloat16").fill_(3)  # takes the memory, had it been freed
    assert view.tobytes() == bytes(range(256)) * (view.nbytes // 256)


def test_dimensions_of_one_need_not_be_there() -> None:
    latent = mla(layers=2, latent_size=12, dtype=DType.F16)
    assert kv_memory(np.zeros((2, 5, 12), np.float16), latent, 5, writable=True).nbytes == 240
    with pytest.raises(ValueError, match="shape"):
        kv_memory(np.zeros((5, 2, 12), np.float16), latent, 5, writable=True)


def test_tensors_are_stored_and_loaded(cache: Cache) -> None:
    torch = pytest.importorskip("torch")
    kv = torch.rand(SHAPE).to(torch.float16)
    prompt = torch.arange(TOKENS)
    assert cache.store(prompt, kv) == TOKENS
    again = torch.zeros_like(kv)
    assert cache.load(prompt, again) == TOKENS
    assert torch.equal(again, kv)


# -- blocks --------------------------------------------------------------------------------


class Unknown(EngineConnector):
    """An engine that doesn't say how its memory is divided."""

    def __init__(self, real: EngineConnector) -> None:
        self.real = real

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        return self.real.groups

    def gather(self, *args: Any) -> None:
        self.real.gather(*args)

    def scatter(self, *args: Any) -> None:
        self.real.scatter(*args)


def paged_engine() -> Any:
    """Eight blocks of sixteen tokens."""
    torch = pytest.importorskip("torch")
    from lmcache_core import PagedLayout, PlaneStrides
    from lmcache_core.contracts.paged import PagedConnector

    row, plane = 16, 16 * 16
    planes = tuple(PlaneStrides(i * plane, 2 * plane, row, 8, 1) for i in range(2))
    tensors = [torch.rand(8, 2, 16, 2, 8).to(torch.float16) for _ in range(3)]
    return PagedConnector([PagedLayout(GROUP, 8, 16, planes)], [tensors], Plugins().kernels("cpu"))


MISTAKES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no blocks": (
        {"blocks": []},
        ValueError,
        "names 0 blocks of 16 tokens; 64 tokens from 0 on need 4",
    ),
    "too few": ({"blocks": [0, 1, 2]}, ValueError, "names 3 blocks"),
    "too few after first": ({"first": 1}, ValueError, "64 tokens from 1 on need 5"),
    "negative first": ({"first": -16}, ValueError, "first = -16"),
    "a block that isn't there": ({"blocks": [0, 1, 2, 8]}, IndexError, "block 8.*0 to 7"),
    "a negative block": ({"blocks": [0, -1, 2, 3]}, IndexError, "block -1"),
    "a block twice": ({"blocks": [0, 1, 2, 1]}, ValueError, "block 1 twice"),
    "smaller blocks": (
        {"blocks": list(range(8)), "block_tokens": 8},
        ValueError,
        "block_tokens = 8, but the engine's blocks have 16",
    ),
    "greater blocks": ({"block_tokens": 64}, ValueError, "block_tokens = 64"),
    "no block tokens": ({"block_tokens": 0}, ValueError, "block_tokens = 0"),
    "blocks in floats": ({"blocks": [0.0, 1.0, 2.0, 3.0]}, TypeError, "aren't integers"),
    "a float first": ({"first": 0.5}, TypeError, r"Paged.first = 0.5 isn't an integer"),
    "no blocks at all": ({"blocks": None}, TypeError, "aren't integers"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_caller_s_mistake_is_the_caller_s(cache: Cache, kv: np.ndarray, name: str) -> None:
    change, kind, message = MISTAKES[name]
    paged = Paged(
        **{"engine": paged_engine(), "blocks": [4, 2, 0, 6], "block_tokens": 16, **change}
    )
    with pytest.raises(kind, match=message):
        cache.store(PROMPT, paged)
    assert cache.lookup(PROMPT) == 0
    cache.store(PROMPT, kv)
    with pytest.raises(kind, match=message) as raised:
        cache.load(PROMPT, paged)
    assert "\n" not in str(raised.value)
    nothing_happened(cache)


def test_an_engine_of_another_layout_is_refused(cache: Cache, kv: np.ndarray) -> None:
    cache.store(PROMPT, kv)
    other = full_attention(layers=3, heads=8, head_size=2, dtype=DType.F16)  # of the same size
    engine = CanonicalBuffer(bytearray(SIZE), other, TOKENS)
    for call in (cache.store, cache.load):
        with pytest.raises(ValueError, match=r"head_size=2.*head_size=8"):
            call(PROMPT, Paged(engine, [0], TOKENS))
    nothing_happened(cache)


def test_blocks_come_in_any_container(cache: Cache) -> None:
    torch = pytest.importorskip("torch")
    engine = paged_engine()
    assert cache.store(PROMPT, Paged(engine, np.array([4, 2, 0, 6]), 16)) == TOKENS
    assert cache.load(PROMPT, Paged(engine, torch.tensor([1, 3, 5, 7]), 16)) == TOKENS
    layer = engine._tensors[0][0]
    assert torch.equal(layer[[4, 2, 0, 6]], layer[[1, 3, 5, 7]])


def test_only_what_whole_chunks_lie_in_is_asked_for(cache: Cache) -> None:
    """The last, unfilled chunk isn't stored: its blocks needn't be there."""
    engine = paged_engine()
    assert cache.store([*PROMPT, 7, 8], Paged(engine, [4, 2, 0, 6], 16)) == TOKENS
    assert cache.load([*PROMPT, 7, 8], Paged(engine, [4, 2, 0, 6, 99], 16)) == TOKENS


def test_an_engine_s_own_failure_forgets_nothing(cache: Cache, kv: np.ndarray) -> None:
    """It knows its blocks best: where it says nothing before, it fails, and that is no damage."""
    cache.store(PROMPT, kv)
    engine = Unknown(paged_engine())
    assert cache.load(PROMPT, Paged(engine, [0, 1, 2, 99], 16)) == 0
    assert cache.lookup(PROMPT) == TOKENS
    assert cache.load(PROMPT, np.zeros(SHAPE, np.float16)) == TOKENS
