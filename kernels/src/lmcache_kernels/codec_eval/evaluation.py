"""Measures schemes on a model: the loop behind `lmcache codec eval`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmcache_kernels.codec_eval import needle, texts
from lmcache_kernels.codec_eval.models import Model
from lmcache_kernels.codec_eval.progress import Progress, silent
from lmcache_kernels.codec_eval.report import Report, Row
from lmcache_kernels.codec_eval.schemes import Scheme
from lmcache_kernels.codec_eval.scoring import Context, prepare, score


@dataclass(frozen=True)
class Extent:
    """How much is measured. Counts of tokens; ``generate`` 0: no greedy text."""

    contexts: int = 4
    context_tokens: int = 1024
    scored: int = 192
    generate: int = 0
    needles: bool = False


@dataclass(frozen=True)
class Trials:
    """What every scheme goes through."""

    contexts: Sequence[Context]
    haystacks: Sequence[needle.Haystack]


def prepared(
    model: Model, sources: Sequence[texts.Text], extent: Extent, progress: Progress = silent
) -> Trials:
    """Read the texts' evaluation half.

    Raises:
        ConfigError: they are too short.
    """
    length = extent.context_tokens + extent.scored
    pieces = texts.windows(sources, "evaluation", extent.contexts, length, model.tokens)
    contexts = [
        prepare(model, ids, extent.context_tokens, extent.generate)
        for ids in progress(pieces, "contexts")
    ]
    hiding = enumerate(pieces) if extent.needles else ()
    haystacks = [
        needle.hide(model, ids[: extent.context_tokens], seed)
        for seed, ids in progress(list(hiding), "haystacks")
    ]
    return Trials(contexts, haystacks)


def measured(
    model: Model,
    trials: Trials,
    schemes: Sequence[Scheme],
    facts: dict[str, object],
    progress: Progress = silent,
) -> Report:
    """Each scheme's row."""
    true = [context.cache for context in trials.contexts]
    hay = [haystack.cache for haystack in trials.haystacks]
    return Report(
        model=model.name,
        facts=facts,
        baseline=score(model, trials.contexts, true),
        needles=sum(len(h.questions) for h in trials.haystacks) if hay else None,
        needles_found=needle.retrieved(model, trials.haystacks, hay) if hay else None,
        rows=[_row(model, trials, scheme) for scheme in progress(schemes, "schemes")],
    )


def _row(model: Model, trials: Trials, scheme: Scheme) -> Row:
    coded = [scheme.code(context.cache) for context in trials.contexts]
    caches = [one.cache for one in coded]
    values = sum(cache.numel() for cache in caches)
    bits = sum(one.bits for one in coded) / values
    pairs = zip(caches, trials.contexts, strict=True)
    found = None
    if trials.haystacks:
        hay = [scheme.code(haystack.cache).cache for haystack in trials.haystacks]
        found = needle.retrieved(model, trials.haystacks, hay)
    return Row(
        scheme=scheme.name,
        reference=scheme.reference,
        ratio=8 * caches[0].element_size() / bits,
        bits=bits,
        exact=all(_same(cache, context.cache) for cache, context in pairs),
        score=score(model, trials.contexts, caches),
        needles=found,
    )


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit by bit."""
    return bool(torch.equal(a.view(torch.int16), b.view(torch.int16)))
