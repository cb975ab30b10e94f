"""How much errors of keys and values matter to what the model says, and the steps that follow.

Knows the numbers that `cachegen` with a profile rounds. Rounds and codes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmcache_kernels.codec_eval.capture import Moments, paired
from lmcache_kernels.codec_eval.models import Model
from lmcache_kernels.codec_eval.progress import Progress
from lmcache_kernels.codec_eval.scoring import Context

SAMPLES = 4
"""Of the tokens that the model would write behind each text."""

CHANNELS_SHARE = 0.7
LAYERS_SHARE = 0.5
"""How far steps of channels and of layers go from where they are to what gradients ask for, as a
power. Few texts are looked at, and gradients know of small errors only. On SmolLM2-135M, with steps
of .5, the first saves 7 % of KL divergence at the same size, and with a basis the second 23 %.
Without a basis the second costs 16 % on keys, so there it isn't used."""

MOST_FACTOR = 4.0
MOST_GAIN = 3.0


def weights(
    model: Model, contexts: Sequence[Context], found: Moments, progress: Progress
) -> Tensor:
    """What errors cost: layers x (keys, values) x heads x head size, in nats.

    An error whose mean square is e² in one channel of all tokens adds e² times its weight to the KL
    divergence of the next token. Errors are in units of what is rounded: of `query_steps` in keys
    that are turned back, of the rms of its token's head in values. A first token isn't rounded.

    To second order the divergence is half of what the Fisher information says of the errors, and
    that is the mean square of the gradient of the log-probability of tokens that the model itself
    would write. A few gradients tell of all channels at once. Both channels of a rotary pair have
    the same weight: where a chunk begins doesn't matter then.
    """
    shape = (len(model.group.layers), 2, model.group.heads, model.group.head_size)
    total = torch.zeros(shape)
    generator = torch.Generator().manual_seed(0)
    for context in progress(contexts, "gradients"):
        cache = context.cache.clone().float().requires_grad_()
        said = model.differentiable(cache, context.following)
        for _ in range(SAMPLES):
            chosen = torch.multinomial(said.detach().exp(), 1, generator=generator)
            (gradient,) = torch.autograd.grad(
                said.gather(1, chosen).sum(), cache, retain_graph=True
            )
            total += _squares(model, cache.detach(), gradient, found)
    tokens = sum(len(context.following) for context in contexts)
    total[:, 0] = paired(total[:, 0], model)
    return total / (2 * SAMPLES * tokens)


def _squares(model: Model, cache: Tensor, gradient: Tensor, found: Moments) -> Tensor:
    """Of the gradient by what is rounded: sums over tokens."""
    layers = []
    for x, g, steps in zip(cache, gradient, query_steps(found), strict=True):
        keys = turned(g[0, 1:], model, -1) * steps
        values = g[1, 1:] * x[1, 1:].square().mean(-1, keepdim=True).sqrt()
        layers.append(torch.stack((keys.square().sum(0), values.square().sum(0))))
    return torch.stack(layers)


def query_steps(found: Moments) -> Tensor:
    """The step of each channel of keys that changes attention's logits by an rms of 1.

    Rounding makes an error of variance step² / 12 in each of D channels, a query multiplies it, and
    the logit is the sum by √D: √12 by the rms of queries' channel.
    """
    return 12**0.5 / found.query_rms.clamp_min(1e-6)


def key_steps(found: Moments, weighed: Tensor) -> Tensor:
    """The step of each channel of keys: `query_steps`, and finer where errors cost more.

    Every doubling of a step saves the same number of bits in every channel. For a given sum of bits
    the sum of costs, weight x step², is least where all are the same: with steps ∝ weight^-1/2. The
    geometric mean of a layer's changes is 1.
    """
    logs = -weighed[:, 0].double().clamp_min(1e-12).log() / 2
    factors = _bounded(CHANNELS_SHARE * logs.flatten(1).T, MOST_FACTOR).T.view_as(logs)
    return query_steps(found) * factors.float()


def gains(steps: Tensor, found: Moments, weighed: Tensor) -> Tensor:
    """What should multiply each layer's ``steps`` of keys, and of values: layers x 2.

    As between channels, the costs of all layers should be the same; the geometric mean is 1.
    """
    factors = steps / query_steps(found)
    keys = (weighed[:, 0] * factors.square()).sum((1, 2))
    costs = torch.stack((keys, weighed[:, 1].sum((1, 2))), 1)
    logs = -costs.double().clamp_min(1e-12).log() / 2
    return _bounded(LAYERS_SHARE * logs, MOST_GAIN).float()


def _bounded(logs: Tensor, most: float) -> Tensor:
    """``e^logs``, each column with a geometric mean of 1 and within ``most`` and its reciprocal."""
    bound = torch.tensor(most).log()
    for _ in range(20):  # what is cut off is made up for by the others
        logs = (logs - logs.mean(0)).clamp(-bound, bound)
    return logs.exp()


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
