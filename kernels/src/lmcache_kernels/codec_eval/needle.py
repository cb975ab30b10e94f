"""Needle in a haystack: facts hidden in a long text, asked for behind it.

A *haystack* is a prompt with several needles in it, at even distances. Its cache goes through the
codec; each question follows it, and the answer is right if the model would write all its tokens.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmcache_kernels.codec_eval.models import Model

NEEDLES = 5
_THINGS = (
    "lighthouse", "tramway", "orchard", "violin", "glacier", "bakery", "telescope", "harbour",
    "windmill", "library", "volcano", "carousel", "monastery", "submarine", "greenhouse",
)  # fmt: skip


@dataclass(frozen=True)
class Haystack:
    """A prompt's cache, and for each needle the ids of its question and its answer."""

    cache: Tensor
    questions: tuple[tuple[Tensor, Tensor], ...]


def hide(model: Model, ids: Tensor, seed: int) -> Haystack:
    """Put needles into the prompt ``ids``, which stays as long as it is."""
    dice = random.Random(seed)  # noqa: S311  the same needles every time, not a secret
    facts = [(t, str(dice.randrange(10000, 100000))) for t in dice.sample(_THINGS, NEEDLES)]
    needles = [_continuing(model, f"\n{_said(thing)} {number}.\n") for thing, number in facts]
    room = len(ids) - sum(map(len, needles))
    edges = [room * place // (NEEDLES + 1) for place in range(NEEDLES + 2)]
    hay = [ids[first:last] for first, last in itertools.pairwise(edges)]
    prompt = torch.cat(
        [part for pair in zip(hay, needles, strict=False) for part in pair] + hay[-1:]
    )
    return Haystack(model.prefill(prompt), tuple(_asked(model, *fact) for fact in facts))


def _asked(model: Model, thing: str, number: str) -> tuple[Tensor, Tensor]:
    """Question and answer."""
    words = f"\n\nQuestion: What is the secret number of the {thing}?\nAnswer: {_said(thing)}"
    question = _continuing(model, words)
    return question, _continuing(model, f"{words} {number}")[len(question) :]


def _continuing(model: Model, words: str) -> Tensor:
    """The ids of ``words`` without the special ones that begin a text."""
    ids: Tensor = model.tokenizer(words, add_special_tokens=False, return_tensors="pt").input_ids[0]
    return ids


def retrieved(model: Model, haystacks: Sequence[Haystack], caches: Sequence[Tensor]) -> int:
    """How many answers are right with ``caches``, each haystack's after a codec."""
    right = 0
    for haystack, cache in zip(haystacks, caches, strict=True):
        for question, answer in haystack.questions:
            # The model writes `answer` if each of its tokens is the likeliest behind those before.
            found = model.log_probabilities(cache, torch.cat((question, answer[:-1])))
            chosen = found[len(question) - 1 :].argmax(-1)
            right += bool((chosen == answer).all())
    return right


def _said(thing: str) -> str:
    return f"The secret number of the {thing} is"
