"""Describes vLLM's paged KV tensors so that core can read and write them.

Every attention backend orders a block's inside in its own way, and a tensor's
shape doesn't say how: on CPU, K lies transposed inside a head although the
tensor claims otherwise. So a layout is never taken from the shape alone. On
CPU it is tried out: the engine's own kernel writes known values into a scratch
block and the description has to find each of them. For GPU backends the known
ones are listed (from vLLM 0.32's source; not run on hardware). Anything else
is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from lmcache_connector_vllm.identity import layer_number
from lmcache_core import (
    AttentionKind,
    BlockSpan,
    LayerGroup,
    LayoutError,
    PagedLayout,
    PlaneStrides,
    ReferenceKernels,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig

KV_SIDE_BY_SIDE = frozenset({"FLASH_ATTN", "TRITON_ATTN"})
"""Backends that keep a token's K and V next to each other: [..., :head_size] and the rest."""
MLA_LATENT = frozenset(
    {"TRITON_MLA", "FLASHMLA", "FLASH_ATTN_MLA", "CUTLASS_MLA", "FLASHINFER_MLA"}
)
CPU = "CPU_ATTN"


def describe(
    vllm_config: VllmConfig, group: LayerGroup, kv_caches: dict[str, torch.Tensor]
) -> tuple[list[torch.Tensor], PagedLayout]:
    """The layers' tensors in layer order, and the one layout that they share.

    Raises:
        LayoutError: the tensors differ among themselves, contradict the model's description, or
            belong to an attention backend whose block order isn't known.
    """
    names = layer_order(kv_caches)
    tensors = [kv_caches[name] for name in names]
    if len(tensors) != len(group.layers):
        raise LayoutError(
            f"vLLM registered {len(tensors)} KV tensors, its configuration has "
            f"{len(group.layers)} layers"
        )
    first = tensors[0]
    for name, tensor in zip(names, tensors, strict=True):
        same = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device) == (
            first.shape,
            first.stride(),
            first.dtype,
            first.device,
        )
        if not same:
            raise LayoutError(
                f"layer {name} has KV of shape {tuple(tensor.shape)}, stride {tensor.stride()}, "
                f"{tensor.dtype}; layer {names[0]} has {tuple(first.shape)}, {first.stride()}, "
                f"{first.dtype}. Layers that differ aren't supported yet."
            )
    layers = vllm_config.compilation_config.static_forward_context
    backend = layers[names[0]].get_attn_backend().get_name()
    layout = _layout(group, first, backend)
    if backend == CPU:
        _try_out(first, layout, layers[names[0]].isa)
    return tensors, layout


def _layout(group: LayerGroup, tensor: torch.Tensor, backend: str) -> PagedLayout:
    if tensor.dim() != 4:
        raise LayoutError(f"{backend}: KV tensors of shape {tuple(tensor.shape)} aren't known")
    blocks, heads, tokens, width = tensor.shape
    b, h, t, c = tensor.stride()
    expected = group.head_size * group.planes
    if heads != group.heads or width != expected:
        raise LayoutError(
            f"{backend}: KV tensors of shape {tuple(tensor.shape)} contradict the model's "
            f"{group.heads} KV heads x {expected} elements a token"
        )
    d = group.head_size
    planes: tuple[PlaneStrides, ...]
    if group.kind is AttentionKind.MLA:
        if backend not in MLA_LATENT:
            raise _unknown(backend)
        planes = (PlaneStrides(0, b, t, h, c),)
    elif backend == CPU:
        if (t, c) != (width, 1):
            raise LayoutError(f"{backend}: blocks with inner strides {(t, c)} aren't known")
        # K: [head_size, tokens], then V: [tokens, head_size], inside each (block, head).
        planes = (PlaneStrides(0, b, 1, h, tokens), PlaneStrides(tokens * d, b, d, h, 1))
    elif backend in KV_SIDE_BY_SIDE:
        planes = (PlaneStrides(0, b, t, h, c), PlaneStrides(d * c, b, t, h, c))
    else:
        raise _unknown(backend)
    return PagedLayout(group, blocks, tokens, planes)


def _unknown(backend: str) -> LayoutError:
    return LayoutError(
        f"LMCache doesn't know how attention backend {backend} orders a KV block, and won't guess: "
        f"choose one of {', '.join(sorted(KV_SIDE_BY_SIDE | MLA_LATENT | {CPU}))} "
        "(vLLM: --attention-backend)"
    )


def _try_out(tensor: torch.Tensor, layout: PagedLayout, isa: str) -> None:
    """Let vLLM's kernel fill a scratch cache, and read it back through ``layout``."""
    from vllm import _custom_ops as ops

    group, tokens = layout.group, layout.block_tokens
    scratch = torch.zeros((2, *tensor.shape[1:]), dtype=tensor.dtype)
    view = scratch.view(2, group.heads, tokens * 2, -1)
    key_cache, value_cache = view.chunk(2, dim=2)
    shape = (2, tokens, group.heads, group.head_size)
    generator = torch.Generator().manual_seed(0)
    known = [torch.randn(shape, generator=generator).to(tensor.dtype) for _ in range(2)]
    flat = [plane.reshape(2 * tokens, group.heads, group.head_size) for plane in known]
    ops.cpu_attn_reshape_and_cache(
        flat[0], flat[1], key_cache, value_cache, torch.arange(2 * tokens), isa
    )
    read = torch.empty((1, 2, 2 * tokens, group.heads, group.head_size), dtype=tensor.dtype)
    strides = [
        PlaneStrides(p.offset, scratch.stride(0), p.token, scratch.stride(1), p.dim)
        for p in layout.planes
    ]
    one = LayerGroup((0,), group.kind, 2, group.heads, group.head_size, group.dtype)
    ReferenceKernels().gather(
        [scratch],
        PagedLayout(one, 2, tokens, tuple(strides)),
        [BlockSpan([0, 1], 0, 2 * tokens, 2 * tokens)],
        _views([read]),
        range(1),
    )
    if not all(torch.equal(read[0, plane], flat[plane]) for plane in range(2)):
        raise LayoutError(
            f"vLLM's CPU attention kernel {isa!r} packs KV blocks in an order that LMCache doesn't "
            "know (it was tried out on a scratch block). Nothing would be wrong without LMCache: "
            "start vLLM without --kv-transfer-config on this machine"
        )


def _views(tensors: Sequence[torch.Tensor]) -> list[memoryview]:
    return [memoryview(t.view(torch.uint8).numpy()).cast("B") for t in tensors]


def layer_order(kv_caches: dict[str, torch.Tensor]) -> list[str]:
    """Layer names in the order of the model's layers, whatever order vLLM registered them in."""
    return sorted(kv_caches, key=lambda name: (layer_number(name), name))
