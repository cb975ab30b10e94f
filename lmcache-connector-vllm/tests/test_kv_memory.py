"""Descriptions of vLLM's blocks, checked against vLLM's own writers and views."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

from lmcache_connector_vllm import kv_memory  # noqa: E402
from lmcache_core.chunks.layout import DType, LayerGroup, full_attention, mla  # noqa: E402
from lmcache_core.contracts.connector import BlockSpan  # noqa: E402
from lmcache_core.errors import LayoutError  # noqa: E402
from lmcache_core.memory.reference import ReferenceKernels  # noqa: E402

BLOCKS, HEADS, TOKENS, SIZE = 4, 2, 32, 64
GROUP = full_attention(layers=1, heads=HEADS, head_size=SIZE, dtype=DType.F32)


def config(backend: str, isa: str = "vec") -> Any:
    layer = SimpleNamespace(
        get_attn_backend=lambda: SimpleNamespace(get_name=lambda: backend), isa=isa
    )
    return SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context={"layers.0.attn": layer})
    )


def describe(backend: str, tensor: Any, group: LayerGroup = GROUP, isa: str = "vec") -> Any:
    return kv_memory.describe(config(backend, isa), group, {"layers.0.attn": tensor})


def gathered(tensor: Any, layout: Any, group: LayerGroup = GROUP) -> Any:
    chunk = torch.empty(
        (1, group.planes, 2 * TOKENS, group.heads, group.head_size), dtype=torch.float32
    )
    ReferenceKernels().gather(
        [tensor],
        layout,
        [BlockSpan([3, 1], 0, 2 * TOKENS, 2 * TOKENS)],
        [memoryview(chunk.numpy()).cast("B")],
        range(1),
    )
    return chunk


@pytest.mark.parametrize("tokens_first", [False, True])
def test_side_by_side(tokens_first: bool) -> None:
    """Whatever the physical order: K and V are where vLLM's own split says."""
    if tokens_first:
        tensor = torch.randn(BLOCKS, TOKENS, HEADS, 2 * SIZE).transpose(1, 2)
    else:
        tensor = torch.randn(BLOCKS, HEADS, TOKENS, 2 * SIZE)
    _, layout = describe("FLASH_ATTN", tensor)
    key, value = tensor.transpose(1, 2).split(SIZE, dim=-1)  # as in flash_attn.py
    chunk = gathered(tensor, layout)
    assert torch.equal(chunk[0, 0], key[[3, 1]].flatten(0, 1))
    assert torch.equal(chunk[0, 1], value[[3, 1]].flatten(0, 1))


def test_mla() -> None:
    group = mla(layers=1, latent_size=96, dtype=DType.F32)
    tensor = torch.randn(BLOCKS, 1, TOKENS, 96)
    _, layout = describe("TRITON_MLA", tensor, group)
    assert torch.equal(
        gathered(tensor, layout, group)[0, 0], tensor[[3, 1], 0].flatten(0, 1)[:, None]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [32, 64, 80])
def test_cpu_blocks_are_tried_out(dtype: Any, size: int) -> None:
    names = {torch.float32: DType.F32, torch.bfloat16: DType.BF16}
    group = full_attention(layers=1, heads=HEADS, head_size=size, dtype=names[dtype])
    tensor = torch.zeros(BLOCKS, HEADS, TOKENS, 2 * size, dtype=dtype)
    isa = "vec" if size % 32 == 0 else "vec16"
    _, layout = describe("CPU_ATTN", tensor, group, isa)
    assert layout.block_tokens == TOKENS


def test_a_cpu_packing_that_does_not_match_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import _custom_ops as ops

    def other_order(key: Any, value: Any, key_cache: Any, value_cache: Any, *_: Any) -> None:
        for source, cache in ((key, key_cache), (value, value_cache)):
            by_head = source.transpose(0, 1).reshape(HEADS, 2, -1)
            cache.copy_(by_head.transpose(0, 1).reshape(cache.shape))

    monkeypatch.setattr(ops, "cpu_attn_reshape_and_cache", other_order)
    with pytest.raises(LayoutError, match="doesn't know"):
        describe("CPU_ATTN", torch.zeros(BLOCKS, HEADS, TOKENS, 2 * SIZE))


def test_unknown_backends_and_contradictions_are_refused() -> None:
    good = torch.zeros(BLOCKS, HEADS, TOKENS, 2 * SIZE)
    with pytest.raises(LayoutError, match="won't guess"):
        describe("SOMETHING_NEW", good)
    with pytest.raises(LayoutError, match="contradict"):
        describe("FLASH_ATTN", torch.zeros(BLOCKS, HEADS + 1, TOKENS, 2 * SIZE))
    with pytest.raises(LayoutError, match="aren't known"):
        describe("FLASH_ATTN", torch.zeros(2, BLOCKS, HEADS, TOKENS, SIZE))
    two = full_attention(layers=2, heads=HEADS, head_size=SIZE, dtype=DType.F32)
    with pytest.raises(LayoutError, match="registered 1 KV tensors"):
        describe("FLASH_ATTN", good, two)
