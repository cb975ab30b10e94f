"""Says which facts of vLLM's configuration change KV values.

Every field of `VllmConfig` is either read here or in `identity`, or a reason why not stands in
the table of tests/test_fields.py. The name that the facts make is `lmcache_core.chunks.identity`'s.
Knows nothing about layouts, requests or adapters.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcache_core import ModelFacts, UnnamedError, config_identity, is_address, weights_identity

if TYPE_CHECKING:
    from vllm.config import LoadConfig, ModelConfig, VllmConfig

_FROM_FILES = frozenset(
    ["auto", "fastsafetensors", "hf", "instanttensor", "mistral", "npcache", "pt", "safetensors"]
)
_FROM_ANYWHERE = frozenset(["runai_streamer", "runai_streamer_sharded", "sharded_state"])
"""These read from ``model_weights`` where that is set."""
_WITHOUT_KV = frozenset(["medusa", "mlp_speculator", "ngram", "ngram_gpu", "suffix"])
"""Speculative methods that keep nothing in the KV cache."""
_WITHOUT_WEIGHTS = frozenset(["custom_class", "extract_hidden_states"])
_LLAMA4_TUNING_TOKENS = 32768


def model_facts(vllm_config: VllmConfig) -> ModelFacts:
    """All that the model's KV values depend on besides tokens and layout.

    Raises:
        UnnamedError: something of it can't be named, so nothing may be stored or loaded.
    """
    if vllm_config.weight_transfer_config is not None:
        raise UnnamedError("weight_transfer_config lets a trainer replace weights while they serve")
    if vllm_config.diffusion_config is not None or vllm_config.attention_config.use_non_causal:
        raise UnnamedError("its KV depends on later tokens, so no prefix names it")
    model = vllm_config.model_config
    kv_dtype = _kv_dtype(vllm_config.cache_config.cache_dtype, model)
    more = {
        "skipped_kv_layers": vllm_config.cache_config.kv_cache_dtype_skip_layers,
        **_attention(vllm_config),
        **_media(vllm_config),
        "platform": _platform(vllm_config.additional_config),
    }
    facts = _facts(model, vllm_config.load_config)
    return dataclasses.replace(
        facts,
        overrides=_overrides(model),
        kv_dtype=kv_dtype,
        draft=_draft(vllm_config),
        more={**facts.more, **{name: _plain(value) for name, value in more.items() if value}},
    )


def _facts(model: ModelConfig, load: LoadConfig) -> ModelFacts:
    """Those of the target model and of a draft alike.

    Not the overrides: a draft's are vLLM's own.
    """
    more = {
        "config": _config(model),
        "code": model.code_revision if model.trust_remote_code else None,
        "classes": model.model_class_overrides,
        **_context(model),
    }
    quantization, more["quantization_config"] = _quantization(model)
    return ModelFacts(
        weights=_weights(model, load),
        dtype=str(model.dtype).removeprefix("torch."),
        quantization=quantization,
        more={name: _plain(value) for name, value in more.items() if value},
    )


def _weights(model: ModelConfig, load: LoadConfig) -> str:
    form = load.load_format
    if form == "dummy":
        raise UnnamedError("load_format=dummy makes weights up")
    if form not in _FROM_FILES | _FROM_ANYWHERE or not _vllms_own(load):
        raise UnnamedError(f"load_format={form}: which weights its loader reads isn't known here")
    if form in _FROM_ANYWHERE and model.model_weights:
        if is_address(model.model_weights):
            return weights_identity(model.model_weights, config=Path(model.model))
        return weights_identity(model.model_weights)
    return weights_identity(model.model, _commit(model))


def _vllms_own(load: LoadConfig) -> bool:
    """Whether vLLM's loader is behind the format's name; anybody may register another there."""
    from vllm.model_executor.model_loader import get_model_loader

    return type(get_model_loader(load)).__module__.startswith("vllm.model_executor.")


def _commit(model: ModelConfig) -> str | None:
    """The commit of a hub's model that was resolved when the configuration was made."""
    resolved: str | None = getattr(model.revision, "resolved", None)
    if resolved is None and not model.hf_config_path:
        resolved = getattr(model.hf_config, "_commit_hash", None)
    return resolved or model.revision


def _config(model: ModelConfig) -> str | None:
    """What names a configuration that isn't the weights' own."""
    if not model.hf_config_path or model.hf_config_path == model.model:
        return None
    return config_identity(model.hf_config_path, getattr(model.hf_config, "_commit_hash", None))


def _overrides(model: ModelConfig) -> Mapping[str, Any]:
    if callable(model.hf_overrides):
        raise UnnamedError("hf_overrides is a function, and functions have no names")
    return {name: _plain(value) for name, value in model.hf_overrides.items()}


def _quantization(model: ModelConfig) -> tuple[str, Any]:
    """What quantises the weights while they are loaded: method and options.

    A checkpoint's own quantisation is in its configuration, and which kernel runs it is the
    engine's business.
    """
    from vllm.config.quantization import resolve_quantization_config

    method, options = model.quantization, model.quantization_config
    if model.model_arch_config.quantization_config is not None:
        return "", options
    if method is not None and options == resolve_quantization_config(method, None):
        options = None
    return method or "", options


def _context(model: ModelConfig) -> dict[str, Any]:
    """Where the longest context that is served decides how each token is computed."""
    found: dict[str, Any] = {}
    for rope in _ropes(model):
        kind = rope.get("rope_type") or rope.get("type")
        original = rope.get("original_max_position_embeddings") or getattr(
            model.hf_text_config, "original_max_position_embeddings", None
        )
        if kind == "longrope" and original and model.max_model_len > original:
            found["long_rope"] = True
    if any(name.startswith("Llama4") for name in model.architectures):
        generation = {**model.try_get_generation_config(), **model.override_generation_config}
        found["attn_temperature_tuning"] = generation.get(
            "attn_temperature_tuning", model.max_model_len > _LLAMA4_TUNING_TOKENS
        )
    return found


def _ropes(model: ModelConfig) -> Iterator[Mapping[str, Any]]:
    """The model's RoPE parameters: one set, or one for each kind of layer."""
    config = model.hf_text_config
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    yield found
    yield from (part for part in found.values() if isinstance(part, Mapping))


def _kv_dtype(cache_dtype: str, model: ModelConfig) -> str:
    if cache_dtype in ("auto", str(model.dtype).removeprefix("torch.")):
        return ""
    return "fp8_e4m3" if cache_dtype == "fp8" else cache_dtype


def _attention(vllm_config: VllmConfig) -> dict[str, Any]:
    """What approximates attention. Backends that compute the same function aren't in here."""
    attention = vllm_config.attention_config
    chosen = {attention.backend, *attention.backend_per_kind.values()}
    return {
        "custom_attention": any(b is not None and b.name == "CUSTOM" for b in chosen),
        "quantised_prefill_queries": attention.use_prefill_query_quantization,
        "unquantised_queries": attention.disable_flashinfer_q_quantization,
        "indexer_kv_dtype": (
            None if attention.indexer_kv_dtype == "auto" else attention.indexer_kv_dtype
        ),
        "sparse_indexer_logits": attention.indexer_sparse_logits,
    }


def _media(vllm_config: VllmConfig) -> dict[str, Any]:
    """How images and audio are prepared: what stands for them in a chunk names the input only."""
    media = vllm_config.model_config.multimodal_config
    if media is None:
        return {}
    scales = media.mm_encoder_fp8_scale_path
    return {
        "media_io": media.media_io_kwargs,
        "media_processor": media.mm_processor_kwargs,
        "media_encoder_dtype": media.mm_encoder_attn_dtype,
        "media_encoder_scales": None if scales is None else weights_identity(str(scales)),
        "video_pruning": media.video_pruning_rate,
        "video_pruning_method": media.video_pruning_method if media.video_pruning_rate else None,
    }


def _platform(additional: Any) -> Any:
    """What only an out-of-tree platform understands."""
    return additional if isinstance(additional, Mapping) else additional.compute_hash()


def _draft(vllm_config: VllmConfig) -> str:
    """The name of the draft model whose layers share the cache; empty if none do."""
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method in _WITHOUT_KV:
        return ""
    if speculative.method in _WITHOUT_WEIGHTS:
        raise UnnamedError(f"speculative method {speculative.method}: its layers have no weights")
    draft = speculative.draft_model_config
    facts = _facts(draft, speculative.draft_load_config or vllm_config.load_config)
    kv_dtype = _kv_dtype(speculative.kv_cache_dtype or "auto", draft)
    more = {**facts.more, "method": speculative.method}
    return dataclasses.replace(facts, kv_dtype=kv_dtype, more=more).name()


def _plain(value: Any) -> Any:
    """``value`` as JSON has it, with enums, types and dataclasses by their names.

    Raises:
        UnnamedError: it is none of these.
    """
    import torch

    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(str(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    raise UnnamedError(f"its configuration has a {type(value).__name__}, which has no name")
