"""What a model's queries, keys and values are like, before rotation: means and covariances.

Knows the names of Llama's projections. Knows nothing about what is made of the numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmcache_core import ConfigError
from lmcache_kernels.codec_eval.models import ROTARY_HALVES, Model


@dataclass(frozen=True)
class Moments:
    """Of layers x heads x head size channels, over all tokens but each text's first.

    A text's first token is where attention goes that has nowhere to go; it is stored as it is.
    """

    query_rms: Tensor
    """Of those queries that see a head of keys; the same for both channels of a rotary pair."""
    key_means: Tensor
    value_means: Tensor


@dataclass(frozen=True)
class Bases:
    """Orthogonal, largest variance first: for each layer and block of heads, channels x components.

    The blocks are those of `Profile`: ``block_heads`` heads each, the last maybe of fewer.
    """

    keys: list[list[Tensor]]
    values: list[list[Tensor]]


def check(model: Model) -> None:
    """Refuse a model whose projections aren't found.

    Raises:
        ConfigError: with what was expected.
    """
    if model.kind not in ROTARY_HALVES or model.rope is None:
        raise ConfigError(
            f"{model.name} is a {model.kind} with "
            f"{'rotary embedding' if model.rope else 'a rotary embedding that changes'}; "
            f"calibration knows {', '.join(ROTARY_HALVES)} with fixed frequencies. `cachegen` "
            "works without a profile, too"
        )


def moments(model: Model, texts: Iterable[Tensor]) -> Moments:
    """Run ``texts`` (ids) through the model and average."""
    group = model.group
    shape = (len(group.layers), group.heads, group.head_size)
    queries, keys, values = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    tokens = 0
    for ids in texts:
        for layer, (q, k, v) in enumerate(_projected(model, ids)):
            queries[layer] += q.double().square().sum(0).unflatten(0, (group.heads, -1)).mean(1)
            keys[layer] += k.sum(0)
            values[layer] += v.sum(0)
        tokens += len(ids) - 1
    rms = paired(queries / tokens, model).sqrt()
    return Moments(rms.float(), (keys / tokens).float(), (values / tokens).float())


def bases(
    model: Model, texts: Iterable[Tensor], found: Moments, steps: Tensor, block_heads: int
) -> Bases:
    """Principal components: of keys around their means in steps, of values in their tokens' rms.

    ``steps`` has a number for each channel of a key.
    """
    blocks = range(0, model.group.heads, block_heads)
    size = model.group.head_size
    widths = [min(block_heads, model.group.heads - first) * size for first in blocks]
    sums = [[[torch.zeros(w, w) for w in widths] for _ in model.group.layers] for _ in range(2)]
    for ids in texts:
        for layer, (_, k, v) in enumerate(_projected(model, ids)):
            keys = (k - found.key_means[layer]) / steps[layer]
            rms = v.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-9)
            values = (v - found.value_means[layer]) / rms
            for which, x in enumerate((keys, values)):
                for block, first in enumerate(blocks):
                    y = x[:, first : first + block_heads].flatten(1)
                    sums[which][layer][block] += y.T @ y
    return Bases(*[[[_components(s) for s in layer] for layer in plane] for plane in sums])


def _components(covariance: Tensor) -> Tensor:
    """Eigenvectors as columns, largest eigenvalue first; the sign makes the largest part > 0."""
    vectors = torch.linalg.eigh(covariance.double()).eigenvectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return (vectors * largest.sign()).float()


def paired(squares: Tensor, model: Model) -> Tensor:
    """The mean of each rotary pair (j, j + pairs) in the last dimension; others as they are."""
    pairs = 0 if model.rope is None else len(model.rope.frequencies)
    first, second = squares[..., :pairs], squares[..., pairs : 2 * pairs]
    mean = (first + second) / 2
    return torch.cat((mean, mean, squares[..., 2 * pairs :]), -1)


def _projected(model: Model, ids: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values of each layer, before rotation, without the first token's.

    Each is tokens x its heads x head size, in float32.
    """
    seen: list[dict[str, Tensor]] = [{} for _ in model.group.layers]
    with _watched(model, seen), torch.inference_mode():
        model.network(ids[None], use_cache=False, logits_to_keep=1)
    for layer in seen:
        q, k, v = (layer[n].reshape(len(ids), -1, model.group.head_size)[1:].float() for n in "qkv")
        yield q, k, v


@contextmanager
def _watched(model: Model, seen: list[dict[str, Tensor]]) -> Iterator[None]:
    """While this is open, projections' outputs go into ``seen``, by layer and q, k or v.

    Where queries and keys are normalised before rotation (Qwen3), they are taken behind that.
    """
    handles = []
    for layer, kept in zip(model.network.model.layers, seen, strict=True):
        attention = layer.self_attn
        for name in "qkv":
            module = getattr(attention, f"{name}_norm", None) or getattr(attention, f"{name}_proj")
            handles.append(module.register_forward_hook(_keeper(kept, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keeper(kept: dict[str, Tensor], name: str) -> Any:
    def keep(module: Any, inputs: Any, output: Tensor) -> None:  # noqa: ARG001
        kept[name] = output

    return keep
