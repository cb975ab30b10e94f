"""Says what makes vLLM's KV values what they are: layout, heads, request.

Whatever changes the numbers must be in here or in `facts`, or two things that
differ share bytes; whatever doesn't must stay out, or things that are equal
don't share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lmcache_core import (
    AttentionKind,
    CacheNamespace,
    ConfigError,
    DType,
    KVLayout,
    LayerGroup,
    LayoutError,
    Rope,
    request_root,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

_DTYPES = {
    "torch.bfloat16": DType.BF16,
    "torch.float16": DType.F16,
    "torch.float32": DType.F32,
    "torch.float8_e4m3fn": DType.F8_E4M3,
    "torch.float8_e5m2": DType.F8_E5M2,
    "torch.uint8": DType.U8,
}
TAG_PREFIX = "lmcache.tag."
SKIP_SAVE = "lmcache.skip_save"


@dataclass(frozen=True)
class Marks:
    """What a request's ``kv_transfer_params`` say to LMCache."""

    tags: Mapping[str, str]
    """The ``lmcache.tag.*``, as text."""
    skip_save: bool


def namespace(
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    chunk_tokens: int,
    rank: int,
    model: str,
) -> CacheNamespace:
    """The namespace of tensor-parallel rank ``rank``; ``model`` is the model's name.

    Raises:
        LayoutError: the model's KV cache isn't one that can be stored without guessing.
        ConfigError: vLLM is configured so that its KV isn't reproducible or is split by token.
    """
    group = layer_group(vllm_config, kv_cache_config)
    ranks = vllm_config.parallel_config.tensor_parallel_size
    if ranks > 1 and group.kind is not AttentionKind.MLA:
        total = vllm_config.model_config.get_total_num_kv_heads()
        whole = replace(group, heads=total, model_heads=total)
        if whole.for_rank(rank, ranks).heads != group.heads:
            raise LayoutError(
                f"a rank of this model keeps {group.heads} KV heads, but {total} KV heads on "
                f"{ranks} ranks (--tensor-parallel-size) make {whole.for_rank(rank, ranks).heads}: "
                "LMCache can't tell which heads it has"
            )
        group = whole.for_rank(rank, ranks)
    called = str(vllm_config.model_config.model)
    return CacheNamespace(model, KVLayout(chunk_tokens, (group,)), label=called)


def writes(namespace: CacheNamespace, rank: int, ranks: int) -> bool:
    """Whether ``rank`` writes to slow tiers: of ranks with the same heads, only the first one."""
    return rank == 0 or namespace.for_rank(rank - 1, ranks) != namespace


def layer_group(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> LayerGroup:
    """The one layer group that this version stores, or a refusal that says why."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

    _refuse_parallelism(vllm_config)
    groups = kv_cache_config.kv_cache_groups
    specs = [type(g.kv_cache_spec).__name__ for g in groups]
    if len(groups) != 1 or type(groups[0].kv_cache_spec) not in (
        FullAttentionSpec,
        MLAAttentionSpec,
    ):
        raise LayoutError(
            f"LMCache can't store this model's KV cache yet: it has {len(groups)} layer group(s) "
            f"of kind {', '.join(specs) or 'none'}. Only models with one group of full attention "
            "or MLA are supported; hybrid, Mamba and sliding-window models aren't. "
            "Start vLLM without --kv-transfer-config for this model."
        )
    spec = groups[0].kv_cache_spec
    if spec.sliding_window is not None or spec.attention_chunk_size is not None:
        raise LayoutError(
            f"LMCache can't store this model's KV cache yet: some layers use a sliding window "
            f"({spec.sliding_window}) or chunked attention ({spec.attention_chunk_size}). "
            "Start vLLM without --kv-transfer-config for this model."
        )
    mla = isinstance(spec, MLAAttentionSpec)
    dtype = _DTYPES.get(str(spec.dtype))
    quantised = vllm_config.cache_config.cache_dtype not in ("auto", "bfloat16", "float16")
    if dtype is None or (quantised and (mla or spec.head_size_v != spec.head_size)):
        raise LayoutError(
            f"LMCache can't store KV of type {spec.dtype} "
            f"(kv_cache_dtype={vllm_config.cache_config.cache_dtype}) for this model yet"
        )
    if not mla and spec.head_size_v != spec.head_size:
        raise LayoutError(
            f"LMCache can't store KV whose K and V differ in size yet "
            f"({spec.head_size} and {spec.head_size_v})"
        )
    return LayerGroup(
        layers=_layers(groups[0].layer_names),
        kind=AttentionKind.MLA if mla else AttentionKind.FULL,
        planes=1 if mla else 2,
        heads=spec.num_kv_heads,
        head_size=spec.head_size,
        dtype=dtype,
    )


def _layers(names: Sequence[str]) -> tuple[int, ...]:
    """The model's numbers of its layers; counted, if two have the same, as a draft model's may."""
    numbers = sorted(layer_number(name) for name in names)
    if len(set(numbers)) < len(numbers):
        return tuple(range(len(numbers)))
    return tuple(numbers)


def layer_number(name: str) -> int:
    """What vLLM's name of a layer, such as ``model.layers.3.self_attn.attn``, says of its place."""
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)


def _refuse_parallelism(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    for name, size in (
        ("pipeline_parallel_size", parallel.pipeline_parallel_size),
        ("decode_context_parallel_size", parallel.decode_context_parallel_size),
        ("prefill_context_parallel_size", parallel.prefill_context_parallel_size),
    ):
        if size > 1:
            raise ConfigError(
                f"{name}={size}: LMCache doesn't support this kind of parallelism yet; "
                "set it to 1 or start vLLM without --kv-transfer-config"
            )


def cacheable(request: Request) -> bool:
    """Whether the request's token ids say what it computes, for good.

    A resumable request may take tokens back, so what was hashed of it may become untrue.
    """
    return (
        request.prompt_token_ids is not None
        and request.prompt_embeds is None
        and not request.resumable
    )


def root(
    namespace_root: bytes,
    request: Request,
    tags: Mapping[str, str],
    epoch: str = "",
    adapter: str = "",
) -> bytes:
    """Where the request's digest chain starts: salt, tags, epoch and ``adapter`` set it apart."""
    facts = [f"epoch={epoch}"] if epoch else []
    if request.cache_salt:
        facts.append(f"salt={request.cache_salt}")
    if adapter:
        facts.append(f"lora={adapter}")
    facts += [f"tag:{name}={tags[name]}" for name in sorted(tags)]
    return request_root(namespace_root, *facts)


def marks(params: object) -> Marks | None:
    """What ``kv_transfer_params`` say; ``None`` where that can't be told, so nothing may be shared.

    They are a user's, and vLLM hands on what JSON has, however deep it is nested.
    An error here would end the engine.
    """
    if params is None:
        return Marks({}, skip_save=False)
    if not isinstance(params, Mapping):
        return None
    try:
        tags = {
            name: str(value)
            for name, value in params.items()
            if isinstance(name, str) and name.startswith(TAG_PREFIX)
        }
    except (RecursionError, ValueError):  # nested too deep, or thousands of digits
        return None
    skip = params.get(SKIP_SAVE)
    yes = skip.lower() in ("1", "true", "yes") if isinstance(skip, str) else skip == 1
    return Marks(tags, skip_save=yes)


def media(request: Request, chunk_tokens: int) -> dict[int, bytes]:
    """For each chunk that contains placeholder tokens of images or audio, what they stand for."""
    extras: dict[int, bytes] = {}
    for feature in request.mm_features:
        where = feature.mm_position
        first, last = (
            where.offset // chunk_tokens,
            (where.offset + where.length - 1) // chunk_tokens,
        )
        for chunk in range(first, last + 1):
            text = f"{feature.identifier}@{where.offset - chunk * chunk_tokens};"
            entry = text.encode(errors="surrogatepass")
            extras[chunk] = extras.get(chunk, b"") + len(entry).to_bytes(4, "little") + entry
    return extras


def rope(vllm_config: VllmConfig) -> Rope | None:
    """How the model turns its keys, for serdes that compress better when they turn them back.

    ``None`` where that isn't one angle a pair and position, or isn't known. Being wrong would cost
    compression, not correctness: what is stored says how it was turned.
    """
    model = vllm_config.model_config.hf_text_config
    facts = getattr(model, "rope_parameters", None) or getattr(model, "rope_scaling", None) or {}
    theta = facts.get("rope_theta") or getattr(model, "rope_theta", None)
    if theta is None or vllm_config.model_config.use_mla:
        return None
    size = vllm_config.model_config.get_head_size()
    share = facts.get("partial_rotary_factor") or getattr(model, "partial_rotary_factor", 1.0)
    plain = Rope.of(theta=float(theta), rotary_size=int(size * share))
    kind = facts.get("rope_type") or facts.get("type") or "default"
    if kind == "default":
        return plain
    if kind == "linear":
        return Rope(tuple(f / facts["factor"] for f in plain.frequencies))
    if kind == "llama3":
        return Rope(tuple(_llama3(f, facts) for f in plain.frequencies))
    return None


def _llama3(frequency: float, facts: Mapping[str, Any]) -> float:
    """Llama 3.1's scaling: low frequencies are divided, those in between partly (its release)."""
    original = float(facts["original_max_position_embeddings"])
    low, high = float(facts["low_freq_factor"]), float(facts["high_freq_factor"])
    turns = original * frequency / (2 * math.pi)
    part = min(max((turns - low) / (high - low), 0.0), 1.0)
    return (1 - part) * frequency / float(facts["factor"]) + part * frequency
