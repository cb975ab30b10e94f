"""What rounding one layer's keys or values does to what the model says, and the gains that follow.

Knows how `cachegen` with a profile rounds. Codes nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from lmcache_kernels.codec_eval.capture import Bases, Moments
from lmcache_kernels.codec_eval.models import Model
from lmcache_kernels.codec_eval.progress import Progress
from lmcache_kernels.codec_eval.scoring import Context

MOST_GAIN = 3.0
SAMPLES = 4
"""Of the tokens that the model would write behind each text."""


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
    components: Components,
    steps: tuple[float, float],
    progress: Progress,
) -> Tensor:
    """KL divergence in nats, layers x (keys, values), when that alone is rounded, with ``steps``.

    ``steps`` of keys and values are those of `cachegen`'s option. To second order the divergence is
    half of what the Fisher information says of the errors, and that is the mean square of the
    gradient of the log-probability of tokens that the model itself would write, times the errors'.
    A few gradients tell of all layers at once, where trying each would take a run for each.
    """
    total = torch.zeros(len(model.group.layers), 2)
    generator = torch.Generator().manual_seed(0)
    tokens = sum(len(context.following) for context in contexts)
    for context in progress(contexts, "gradients"):
        cache = context.cache.clone().float().requires_grad_()
        said = model.differentiable(cache, context.following)
        for _ in range(SAMPLES):
            chosen = torch.multinomial(said.detach().exp(), 1, generator=generator)
            (gradient,) = torch.autograd.grad(
                said.gather(1, chosen).sum(), cache, retain_graph=True
            )
            for layer, plane in itertools.product(range(len(total)), range(2)):
                x, g = cache.detach()[layer, plane], gradient[layer, plane]
                total[layer, plane] += components.cost(x, g, layer, plane, steps[plane])
    return total / (2 * SAMPLES * tokens)


class Components:
    """What is rounded: a profile's components of a layer's keys or values.

    Those are tokens x heads x head size, keys rotated. A first token isn't rounded.
    """

    def __init__(self, model: Model, found: Moments, bases: Bases) -> None:
        self._model, self._found, self._bases = model, found, bases
        self._steps = key_steps(found)

    def of(self, x: Tensor, layer: int, plane: int) -> list[Tensor]:
        """Of keys (``plane`` 0) or values (1): for each block tokens - 1 x components."""
        straight, scale = self._straight(x, plane), self._scale(x, layer, plane)
        mean = (self._found.key_means, self._found.value_means)[plane][layer]
        return self._in_blocks((straight - mean) / scale, layer, plane)

    def cost(self, x: Tensor, gradient: Tensor, layer: int, plane: int, step: float) -> float:
        """The sum of the squares of the errors of rounding ``x``, times those of its gradient."""
        scaled = self._straight(gradient, plane) * self._scale(x, layer, plane)
        total = 0.0
        for z, g in zip(
            self.of(x, layer, plane), self._in_blocks(scaled, layer, plane), strict=True
        ):
            total += float(((z - (z / step).round() * step) * g).square().sum())
        return total

    def _straight(self, x: Tensor, plane: int) -> Tensor:
        rest = x[1:].float()
        return turned(rest, self._model, -1) if plane == 0 else rest

    def _scale(self, x: Tensor, layer: int, plane: int) -> Tensor:
        if plane == 0:
            return self._steps[layer]
        return x[1:].float().square().mean(-1, keepdim=True).sqrt().clamp_min(1e-9)

    def _in_blocks(self, y: Tensor, layer: int, plane: int) -> list[Tensor]:
        blocks = (self._bases.keys, self._bases.values)[plane][layer]
        pieces = y.flatten(1).split([len(basis) for basis in blocks], 1)
        return [piece @ basis for piece, basis in zip(pieces, blocks, strict=True)]


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
