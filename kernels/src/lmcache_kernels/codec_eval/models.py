"""A real model, as far as codecs are concerned: its KV cache, and what it says with another one.

Knows transformers. Knows nothing about codecs. Networks compute in float32 on the CPU, so that what
is measured is the cache and not the arithmetic; caches have the type that an engine would use.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmcache_core import ConfigError, DType, LayerGroup, Rope, full_attention, weights_identity

ROTARY_HALVES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose pairs are (j, j + pairs), and whose projections have the names of Llama's."""
INSTALL = "pip install lmcache-kernels[eval]"


@dataclass(frozen=True)
class Model:
    """A causal language model and its tokenizer.

    A *cache* is a tensor of layers x 2 (keys, values) x tokens x heads x head size, in `dtype`:
    a chunk of lmcache-core's, of any length. Keys are rotated, as in an engine.
    """

    name: str
    kind: str
    """transformers' ``model_type``."""
    network: Any
    tokenizer: Any
    group: LayerGroup
    dtype: torch.dtype
    rope: Rope | None
    """``None``: none that serdes know."""
    identity: str

    def tokens(self, text: str) -> Tensor:
        """The ids of ``text``, with the special ones that the model begins with."""
        # A warning about texts that are longer than the model can read: they are cut afterwards.
        ids: Tensor = self.tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
        return ids

    def prefill(self, ids: Tensor) -> Tensor:
        """The cache after ``ids``."""
        past = _dynamic()
        self._forward(ids[None], past, logits_to_keep=1)
        pairs = [torch.stack((layer.keys[0], layer.values[0])) for layer in past.layers]
        return torch.stack(pairs).transpose(2, 3).to(self.dtype).contiguous()

    def log_probabilities(self, cache: Tensor, ids: Tensor) -> Tensor:
        """Of each next token, len(ids) x vocabulary in float32, when ``ids`` follow ``cache``."""
        return torch.log_softmax(self._forward(ids[None], _dynamic(cache))[0].float(), -1)

    def differentiable(self, cache: Tensor, ids: Tensor) -> Tensor:
        """As `log_probabilities`, for gradients of a float32 ``cache``."""
        logits = self.network(ids[None], **_cached(self.network, _dynamic(cache))).logits[0]
        return torch.log_softmax(logits.float(), -1)

    def greedy(self, cache: Tensor, first: Tensor, count: int) -> Tensor:
        """The ``count`` most likely tokens, one after the other, behind ``cache`` and ``first``.

        ``first`` has one id: what follows the cache.
        """
        past, token = _dynamic(cache), first[None]
        found = []
        for _ in range(count):
            token = self._forward(token, past)[:, -1].argmax(-1, keepdim=True)
            found.append(token[0])
        return torch.cat(found) if found else first[:0]

    def _forward(self, ids: Tensor, past: Any, **options: int) -> Tensor:
        """Logits behind ``ids``, which go into ``past``."""
        with torch.inference_mode():
            logits: Tensor = self.network(ids, **_cached(self.network, past), **options).logits
        return logits


def load(path: str, threads: int | None = None, *, quiet: bool = False) -> Model:
    """The model in the folder ``path``. ``quiet``: without transformers' own progress.

    Raises:
        ConfigError: there is none, or transformers isn't installed, or doesn't know it.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise ConfigError(f"`lmcache codec` needs {error.name}: {INSTALL}") from None
    if not (Path(path) / "config.json").is_file():
        raise ConfigError(
            f"--model {path}: no folder with a config.json; name one that `save_pretrained` wrote "
            "or a model hub's download"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    if quiet:
        logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        network = AutoModelForCausalLM.from_pretrained(
            path, local_files_only=True, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"--model {path}: transformers can't load it: {error}") from None
    network.eval().requires_grad_(False)
    return _described(Path(path).resolve().name, network, tokenizer, weights_identity(path))


def _described(name: str, network: Any, tokenizer: Any, identity: str) -> Model:
    """``network`` with what has to be known of it.

    Raises:
        ConfigError: its cache isn't keys and values of one shape for all layers.
    """
    config = network.config
    stored = torch.float16 if getattr(config, "dtype", None) is torch.float16 else torch.bfloat16
    past = _dynamic()
    with torch.inference_mode():
        network(torch.zeros(1, 2, dtype=torch.long), **_cached(network, past))
    shapes = {tuple(t.shape) for layer in past.layers for t in (layer.keys, layer.values)}
    if len(shapes) != 1 or len(next(iter(shapes))) != 4:
        raise ConfigError(
            f"{name} ({config.model_type}): its layers' caches have the shapes {sorted(shapes)}; "
            "only models whose layers all keep keys and values of one shape can be measured"
        )
    ((_, heads, _, size),) = shapes
    return Model(
        name=name,
        kind=config.model_type,
        network=network,
        tokenizer=tokenizer,
        group=full_attention(
            layers=len(past.layers),
            heads=heads,
            head_size=size,
            dtype=DType.F16 if stored is torch.float16 else DType.BF16,
        ),
        dtype=stored,
        rope=_rope(network),
        identity=identity,
    )


def _rope(network: Any) -> Rope | None:
    """The rotation of all layers' keys, from the network's own frequencies."""
    rotary = getattr(getattr(network, "model", None), "rotary_emb", None)
    if network.config.model_type not in ROTARY_HALVES or rotary is None:
        return None
    # Scaled variants that also scale keys, or whose frequencies change with the length.
    if rotary.attention_scaling != 1 or rotary.rope_type not in ("default", "linear", "llama3"):
        return None
    return Rope(tuple(rotary.inv_freq.double().tolist()))


def _cached(network: Any, past: Any) -> dict[str, Any]:
    """``past`` as the argument of ``network``: transformers renamed it in 5.20."""
    names = inspect.signature(type(network).forward).parameters
    return {"cache" if "cache" in names else "past_key_values": past, "use_cache": True}


def _dynamic(cache: Sequence[Tensor] | Tensor = ()) -> Any:
    """transformers' cache with ours in it, in float32."""
    from transformers.cache_utils import DynamicCache

    past = DynamicCache()
    for number, layer in enumerate(cache):
        keys, values = layer.float().transpose(1, 2)
        past.update(keys[None], values[None], number)
    return past
