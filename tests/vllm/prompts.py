"""Prompts whose prefixes overlap in all the ways that matter. Stdlib only."""

from __future__ import annotations

import random


def overlapping(
    count: int, *, vocabulary: int, longest: int = 600, seed: int = 0
) -> list[list[int]]:
    """``count`` prompts of token ids: a tree of shared prefixes, and some that share nothing.

    Each new prompt extends, cuts, branches off or repeats an earlier one, so that hits end inside
    chunks, at chunk ends, inside blocks and at block ends.
    """
    dice = random.Random(seed)

    def fresh(length: int) -> list[int]:
        return [dice.randrange(10, vocabulary) for _ in range(length)]

    prompts = [fresh(dice.randrange(20, longest))]
    while len(prompts) < count:
        kind = dice.choice(["fresh", "extend", "branch", "branch", "cut", "repeat", "aligned"])
        old = dice.choice(prompts)
        if kind == "fresh":
            new = fresh(dice.randrange(20, longest))
        elif kind == "extend":
            new = old + fresh(dice.randrange(1, 120))
        elif kind == "branch":
            new = old[: dice.randrange(1, len(old) + 1)] + fresh(dice.randrange(1, 120))
        elif kind == "cut":
            new = old[: dice.randrange(2, len(old) + 1)]
        elif kind == "aligned":
            new = old[: max(8, len(old) // 8 * 8)]
        else:
            new = list(old)
        prompts.append(new[:longest])
    return prompts


def expected_hits(prompts: list[list[int]], wave: int, chunk: int) -> list[int]:
    """What each prompt can hit: whole chunks that an earlier wave stored, but never its last token.

    Prompts of one wave run side by side, so what they can hit of each other depends on timing; the
    figure is a lower bound for them.
    """
    stored: set[tuple[int, ...]] = set()
    hits: list[int] = []
    for start in range(0, len(prompts), wave):
        for prompt in prompts[start : start + wave]:
            length = 0
            while length + chunk <= len(prompt) and tuple(prompt[: length + chunk]) in stored:
                length += chunk
            hits.append(min(length, len(prompt) - 1))
        for prompt in prompts[start : start + wave]:
            for end in range(chunk, len(prompt) + 1, chunk):
                stored.add(tuple(prompt[:end]))
    return hits
