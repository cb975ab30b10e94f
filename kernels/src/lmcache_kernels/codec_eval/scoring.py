"""How far what a model says moves when its cache went through a codec.

Knows caches and tokens. Knows nothing about codecs, nor how results are shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmcache_kernels.codec_eval.models import Model


@dataclass(frozen=True)
class Context:
    """A prompt whose cache is coded, and what the model says behind it with the true one."""

    cache: Tensor
    following: Tensor
    """Ids of the text behind the prompt."""
    expected: Tensor
    """Log-probabilities behind each of them, len(following) x vocabulary."""
    continuation: Tensor
    """What the model itself writes behind the prompt, greedily; may be empty."""


@dataclass(frozen=True)
class Score:
    """Means over all contexts. ``kl``: nats; ``top1``: share of tokens; see `scores`."""

    kl: float
    top1: float
    perplexity: float
    greedy_same: float
    """Tokens of the greedy continuation before the first different one; NaN if none were made."""
    greedy_whole: float
    """Share of continuations without a different token; NaN if none were made."""


def prepare(model: Model, ids: Tensor, context: int, generate: int) -> Context:
    """Read ``ids``: ``context`` of them as the prompt, the others behind it."""
    cache = model.prefill(ids[:context])
    following = ids[context:]
    return Context(
        cache,
        following,
        model.log_probabilities(cache, following),
        model.greedy(cache, following[:1], generate),
    )


def score(model: Model, contexts: Sequence[Context], caches: Sequence[Tensor]) -> Score:
    """Compare ``caches``, each context's after a codec, with the true ones.

    KL divergence is from the true distribution of each next token, top-1 agreement whether the
    most likely one is the same. Perplexity is of the texts. Greedy text is checked as speculative
    decoding does it: all tokens of the true continuation at once, and where the model would have
    chosen another one first, there the two texts part.
    """
    kl, same, loss, lengths = 0.0, 0.0, 0.0, []
    for context, cache in zip(contexts, caches, strict=True):
        found = model.log_probabilities(cache, context.following)
        kl += float(divergence(context.expected, found))
        same += float((context.expected.argmax(-1) == found.argmax(-1)).float().mean())
        loss -= float(found[:-1].gather(1, context.following[1:, None]).mean())
        lengths.append(_common(model, context, cache))
    count, written = len(contexts), len(contexts[0].continuation)
    return Score(
        kl / count,
        same / count,
        math.exp(loss / count),
        sum(lengths) / count if written else math.nan,
        sum(length == written for length in lengths) / count if written else math.nan,
    )


def divergence(expected: Tensor, found: Tensor) -> Tensor:
    """The mean KL divergence of rows of log-probabilities, in nats."""
    return (expected.exp() * (expected - found)).sum(-1).mean()


def _common(model: Model, context: Context, cache: Tensor) -> int:
    """How many tokens of the continuation come first that the model would write with ``cache``."""
    if not len(context.continuation):
        return 0
    given = torch.cat((context.following[:1], context.continuation[:-1]))
    chosen = model.log_probabilities(cache, given).argmax(-1)
    return _leading(chosen == context.continuation)


def _leading(right: Tensor) -> int:
    return int(right.long().cumprod(0).sum())
