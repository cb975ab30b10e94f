"""The Triton kernels against the reference, in Triton's interpreter, which needs no GPU.

They were never run on hardware. The interpreter shows that what they compute is
right, not that it compiles everywhere or is fast.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_memory import Paged, TorchMemory, situations

from lmcache_core.chunks.layout import DType
from lmcache_core.contracts.connector import BlockSpan, Kernels
from lmcache_core.memory.reference import ReferenceKernels
from lmcache_core.testing.connector import EngineConnectorTests, EngineMemory

pytest.importorskip("triton", reason="pip install lmcache-kernels[triton]")

REFERENCE = ReferenceKernels()
Situation = tuple[Paged, list[BlockSpan], range]


class OneAtATime:
    """Triton's interpreter, unlike its compiler, patches the language while it runs."""

    def __init__(self, kernels: Kernels) -> None:
        self.name, self._kernels, self._lock = kernels.name, kernels, threading.Lock()

    def gather(self, *arguments: Any) -> None:
        with self._lock:
            self._kernels.gather(*arguments)

    def scatter(self, *arguments: Any) -> None:
        with self._lock:
            self._kernels.scatter(*arguments)


@pytest.fixture(scope="module")
def kernels() -> Iterator[Kernels]:
    # Triton decides when a kernel is defined whether it will be interpreted.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        from lmcache_kernels.triton_kernels import TritonKernels

        yield OneAtATime(TritonKernels())


@given(situation=situations())
@settings(max_examples=40, deadline=None)
def test_gather_equals_the_reference(kernels: Kernels, situation: Situation) -> None:
    paged, spans, layers = situation
    expected = [bytearray(b"\xa5") * paged.group.chunk_bytes(s.chunk_tokens) for s in spans]
    actual = [bytearray(chunk) for chunk in expected]
    for each, into in ((REFERENCE, expected), (kernels, actual)):
        each.gather(paged.tensors, paged.layout, spans, [memoryview(c) for c in into], layers)
    assert actual == expected


@given(situation=situations(), seed=st.integers(0, 2**16))
@settings(max_examples=40, deadline=None)
def test_scatter_equals_the_reference(kernels: Kernels, situation: Situation, seed: int) -> None:
    paged, spans, layers = situation
    draw = random.Random(seed)
    chunks = [
        memoryview(draw.randbytes(paged.group.chunk_bytes(span.chunk_tokens))) for span in spans
    ]
    content = []
    for each in (REFERENCE, kernels):
        paged.fill(seed)
        each.scatter(chunks, paged.tensors, paged.layout, spans, layers)
        content.append(paged.content())
    assert content[0] == content[1]


@pytest.mark.parametrize(
    ("span", "error"),
    [
        (BlockSpan([0], 0, 5, 8), ValueError),
        (BlockSpan([0, 1], -1, 4, 8), ValueError),
        (BlockSpan([0, 1], 0, 0, 8), ValueError),
        (BlockSpan([0, 1], 0, 6, 8, 3), ValueError),
        (BlockSpan([0, 1], 0, 8, 9), ValueError),
        (BlockSpan([0, 4], 0, 8, 8), IndexError),
    ],
)
def test_spans_that_make_no_sense(
    kernels: Kernels, span: BlockSpan, error: type[Exception]
) -> None:
    paged = Paged("nhd", DType.F16)
    chunk = memoryview(bytearray(paged.group.chunk_bytes(8)))
    with pytest.raises(error):
        kernels.gather(paged.tensors, paged.layout, [span], [chunk], range(2))
    with pytest.raises(error):
        kernels.scatter([chunk], paged.tensors, paged.layout, [span], range(2))


def test_a_layout_that_leaves_the_tensor(kernels: Kernels) -> None:
    paged, span = Paged("hnd", DType.BF16), BlockSpan([0], 0, 4, 4)
    chunk = memoryview(bytearray(paged.group.chunk_bytes(4)))
    short = [tensor[:-1].clone() for tensor in paged.tensors]
    with pytest.raises(ValueError, match="reaches element 191 of a tensor that has 191"):
        kernels.gather(short, paged.layout, [span], [chunk], range(2))


class TestPacked(EngineConnectorTests):
    @pytest.fixture
    def engine(self, kernels: Kernels) -> EngineMemory:
        return TorchMemory("packed", DType.BF16, kernels)
