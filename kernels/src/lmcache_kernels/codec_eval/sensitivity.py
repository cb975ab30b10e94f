"""What rounding one layer's keys or values does to what the model says, and the gains that follow.

Rounds in torch as `cachegen` with a profile does, without coding anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lmcache_kernels.codec_eval.capture import Bases, Moments
from lmcache_kernels.codec_eval.models import Model
from lmcache_kernels.codec_eval.progress import Progress
from lmcache_kernels.codec_eval.scoring import Context, divergence

MOST_GAIN = 3.0


def gains(divergences: Tensor) -> Tensor:
    """What should multiply each layer's steps, layers x (keys, values), for these divergences.

    Rounding with a step s costs about c s² nats, and every doubling of s saves the same number of
    bits in every layer. For a given sum of bits the sum of costs is least where all layers' costs
    are the same: with gains ∝ c^-1/2, of which the geometric mean is 1. They are kept within 3 and
    1/3, since few texts were looked at.
    """
    logs = -divergences.double().clamp_min(1e-9).log() / 2
    logs -= logs.mean()
    bound = torch.tensor(MOST_GAIN).log()
    for _ in range(20):  # what is cut off is made up for by the others
        logs = logs.clamp(-bound, bound)
        logs -= logs.mean()
    return logs.clamp(-bound, bound).exp().float()


def layer_divergences(
    model: Model,
    contexts: Sequence[Context],
    found: Moments,
    bases: Bases,
    steps: tuple[float, float],
    progress: Progress,
) -> Tensor:
    """KL divergence in nats, layers x (keys, values), when that alone is rounded, with ``steps``.

    ``steps`` of keys and values are those of `cachegen`'s option.
    """
    layers = len(model.group.layers)
    total = torch.zeros(layers, 2)
    jobs = [(c, layer, plane) for c in contexts for layer in range(layers) for plane in range(2)]
    rounded = Rounding(model, found, bases)
    for context, layer, plane in progress(jobs, "layers"):
        cache = context.cache.clone()
        cache[layer, plane] = rounded.plane(cache[layer, plane], layer, plane, steps[plane])
        said = model.log_probabilities(cache, context.following)
        total[layer, plane] += divergence(context.expected, said)
    return total / len(contexts)


class Rounding:
    """Rounds a layer's keys or values, tokens x heads x head size, in the profile's components.

    The first token stays as it is.
    """

    def __init__(self, model: Model, found: Moments, bases: Bases) -> None:
        self._model, self._found, self._bases = model, found, bases
        self._steps = key_steps(found)

    def plane(self, x: Tensor, layer: int, plane: int, step: float) -> Tensor:
        """Keys (``plane`` 0) or values (1)."""
        rest = x[1:].float()
        if plane == 0:
            y = turned(rest, self._model, -1)
            mean, scale = self._found.key_means[layer], self._steps[layer]
        else:
            y = rest
            mean = self._found.value_means[layer]
            scale = rest.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-9)
        blocks = (self._bases.keys, self._bases.values)[plane][layer]
        y = _in_components((y - mean) / scale, blocks, step) * scale + mean
        if plane == 0:
            y = turned(y, self._model, 1)
        return torch.cat((x[:1], y.to(x.dtype)))


def key_steps(found: Moments) -> Tensor:
    """The step of each channel of keys that changes attention's logits by an rms of 1.

    Rounding makes an error of variance step² / 12 in each of D channels, a query multiplies it, and
    the logit is the sum by √D: √12 by the rms of queries' channel.
    """
    return 12**0.5 / found.query_rms.clamp_min(1e-6)


def turned(keys: Tensor, model: Model, sign: int, first: int = 1) -> Tensor:
    """Rotate ``keys``, tokens x heads x head size, from position ``first`` on; -1 turns back."""
    if model.rope is None:
        return keys
    frequencies = torch.tensor(model.rope.frequencies, dtype=torch.float64)
    angles = torch.outer(torch.arange(first, first + len(keys)).double(), frequencies)
    cos, sin = angles.cos().float()[:, None], sign * angles.sin().float()[:, None]
    pairs = len(frequencies)
    a, b = keys[..., :pairs], keys[..., pairs : 2 * pairs]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, keys[..., 2 * pairs :]), -1)


def _in_components(x: Tensor, blocks: Sequence[Tensor], step: float) -> Tensor:
    """Round each block's components to multiples of ``step``."""
    flat = x.flatten(1)
    parts = [
        (piece @ basis / step).round() * step @ basis.T
        for piece, basis in zip(_split(flat, blocks), blocks, strict=True)
    ]
    return torch.cat(parts, 1).view_as(x)


def _split(flat: Tensor, blocks: Sequence[Tensor]) -> Iterator[Tensor]:
    yield from flat.split([len(basis) for basis in blocks], 1)
