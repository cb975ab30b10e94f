"""Makes a profile of a model: see `Profile` for what is in one, and docs/codecs.md for its use.

Deterministic: the same model, texts and versions make the same file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lmcache_kernels.codec.profile import Profile
from lmcache_kernels.codec_eval import capture
from lmcache_kernels.codec_eval.models import Model
from lmcache_kernels.codec_eval.progress import Progress, silent
from lmcache_kernels.codec_eval.scoring import prepare
from lmcache_kernels.codec_eval.sensitivity import gains, key_steps, weights

Kind = Literal["t2", "t3", "t4"]

GRADIENT_TEXTS = 6
SCORED = 128
"""Tokens at the end of each of those texts, by which errors are weighed."""


@dataclass(frozen=True)
class CalibrationOptions:
    """What to make."""

    kind: Kind = "t4"
    """t2: means and steps; t3: bases, too; t4: gains, too."""
    ranks: int = 1
    """Tensor-parallel ranks that can use it: bases don't cross them."""
    most_basis_channels: int = 512
    """Decoding multiplies every token by matrices of this size."""


def calibrate(
    model: Model, texts: Sequence[Tensor], options: CalibrationOptions, progress: Progress = silent
) -> Profile:
    """The profile of ``model``, after it has read ``texts`` (ids of each).

    Raises:
        ConfigError: it isn't a model that can be calibrated.
    """
    capture.check(model)
    group = model.group
    found = capture.moments(model, progress(texts, "means"))
    some = progress(texts[:GRADIENT_TEXTS], "contexts")
    contexts = [prepare(model, ids, len(ids) - SCORED, 0) for ids in some]
    weighed = weights(model, contexts, found, progress)
    steps = key_steps(found, weighed)
    plain = Profile(
        len(group.layers),
        group.heads,
        group.head_size,
        _raw(steps),
        _raw(found.value_means.bfloat16()),
        model=model.identity,
        key_means=_raw(found.key_means.bfloat16()),
    )
    if options.kind == "t2":
        return plain
    block = basis_heads(group.heads, group.head_size, options)
    bases = capture.bases(model, progress(texts, "components"), found, steps, block)
    rotated = replace(
        plain,
        basis_heads=block,
        key_basis=b"".join(_halves(bases.keys)),
        value_basis=b"".join(_halves(bases.values)),
    )
    if options.kind == "t3":
        return rotated
    return replace(rotated, gains=_raw(gains(steps, found, weighed)))


def basis_heads(heads: int, head_size: int, options: CalibrationOptions) -> int:
    """Heads that share a basis: as many as one rank has, or as fit into the largest matrix."""
    mine = max(heads // options.ranks, 1)
    fitting = [n for n in range(1, mine + 1) if mine % n == 0]
    allowed = [n for n in fitting if n * head_size <= options.most_basis_channels]
    return max(allowed, default=1)


def _halves(layers: Iterable[Iterable[Tensor]]) -> Iterable[bytes]:
    return (_raw(basis.half()) for layer in layers for basis in layer)


def _raw(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).numpy())
