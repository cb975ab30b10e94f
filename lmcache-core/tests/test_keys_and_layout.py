"""Names and shapes: what makes two stores the same, and how large a chunk is."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace

import pytest

from lmcache_core.chunks.keys import DIGEST_BYTES, GROUP_NAME_BYTES, CacheNamespace, chunk_key
from lmcache_core.chunks.layout import AttentionKind, DType, KVLayout, LayerGroup
from lmcache_core.errors import LayoutError

GROUP = LayerGroup((0, 1), AttentionKind.FULL, 2, heads=4, head_size=8, dtype=DType.BF16)
LAYOUT = KVLayout(16, (GROUP,))
NAMESPACE = CacheNamespace("model", LAYOUT)


@pytest.mark.parametrize(
    ("dtype", "itemsize"),
    [("BF16", 2), ("F16", 2), ("F32", 4), ("F8_E4M3", 1), ("F8_E5M2", 1), ("U8", 1)],
)
def test_itemsize(dtype: str, itemsize: int) -> None:
    assert DType(dtype).itemsize == itemsize


def test_sizes() -> None:
    assert GROUP.layer_token_bytes == 2 * 4 * 8 * 2
    assert GROUP.token_bytes == 2 * GROUP.layer_token_bytes
    assert GROUP.chunk_bytes(16) == 16 * GROUP.token_bytes == LAYOUT.chunk_bytes()
    latent = LayerGroup((0,), AttentionKind.MLA, 1, heads=1, head_size=576, dtype=DType.F8_E4M3)
    assert latent.token_bytes == 576
    assert KVLayout(16, (GROUP, latent)).chunk_bytes(1) == 16 * 576


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layers": ()}, "needs layers"),
        ({"planes": 0}, "positive sizes"),
        ({"heads": 0}, "positive sizes"),
        ({"head_size": -1}, "positive sizes"),
        ({"planes": 1}, "full attention can't have 1 planes"),
        ({"kind": AttentionKind.MLA}, "mla attention can't have 2 planes"),
        ({"window_tokens": 128}, "goes with kind sliding_window"),
        ({"kind": AttentionKind.SLIDING_WINDOW}, "goes with kind sliding_window"),
        ({"layers": (1, 0)}, "ascending order"),
        ({"layers": (0, 0)}, "ascending order"),
        ({"layers": (-1, 0)}, "ascending order"),
        ({"heads": 5}, "5 KV heads from number 0 on aren't among a model's 4"),
        ({"first_head": 1}, "4 KV heads from number 1 on"),
        ({"first_head": -1}, "4 KV heads from number -1 on"),
    ],
)
def test_groups_that_contradict_themselves(change: dict[str, object], reason: str) -> None:
    with pytest.raises(LayoutError, match=reason):
        replace(GROUP, **change)  # type: ignore[arg-type]


def test_state_may_have_any_number_of_planes() -> None:
    assert replace(GROUP, kind=AttentionKind.STATE, planes=3).planes == 3


def test_layouts_need_something() -> None:
    for tokens, groups in ((0, (GROUP,)), (16, ())):
        with pytest.raises(LayoutError, match="at least one token"):
            KVLayout(tokens, groups)


def test_groups_that_are_one_are_refused() -> None:
    with pytest.raises(LayoutError, match="must be one group"):
        KVLayout(16, (GROUP, replace(GROUP, layers=(5,))))


def test_layouts_are_values() -> None:
    assert replace(LAYOUT) == LAYOUT
    assert hash(replace(GROUP)) == hash(GROUP)
    with pytest.raises(FrozenInstanceError):
        GROUP.heads = 5  # type: ignore[misc]
    assert replace(GROUP, model_heads=4) == GROUP


def test_keys() -> None:
    digest = bytes(range(DIGEST_BYTES))
    assert chunk_key(digest) == digest
    assert chunk_key(digest, b"windowed") == digest + b"windowed"


def test_fingerprint_is_a_file_name() -> None:
    odd = replace(NAMESPACE, model="../org/Modèle:7B\n")
    assert re.fullmatch(r"[0-9a-f]{16}", odd.fingerprint)
    assert len(odd.root) == DIGEST_BYTES


def changed(**changes: object) -> Callable[[CacheNamespace], CacheNamespace]:
    group = replace(GROUP, **changes)  # type: ignore[arg-type]
    return lambda n: replace(n, layout=KVLayout(16, (group,)))


CHANGES: dict[str, Callable[[CacheNamespace], CacheNamespace]] = {
    "model": lambda n: replace(n, model="other"),
    "salt": lambda n: replace(n, salt="tenant"),
    "format_version": lambda n: replace(n, format_version=3),
    "tokens_per_chunk": lambda n: replace(n, layout=replace(LAYOUT, tokens_per_chunk=32)),
    "dtype": changed(dtype=DType.F16),
    "head_size": changed(head_size=4),
    "model_heads": changed(model_heads=8),
    "kind": changed(kind=AttentionKind.SLIDING_WINDOW, window_tokens=128),
    "planes": changed(kind=AttentionKind.STATE, planes=3),
}
WINDOW = replace(GROUP, kind=AttentionKind.SLIDING_WINDOW, window_tokens=128)
PARTS: dict[str, LayerGroup] = {
    "fewer heads": replace(GROUP, heads=2),
    "other heads": replace(GROUP, heads=2, first_head=2),
    "other layers": replace(GROUP, layers=(2, 3)),
    "fewer layers": replace(GROUP, layers=(0,)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_the_numbers_are_is_in_both_names(name: str) -> None:
    other = CHANGES[name](NAMESPACE)
    assert other.fingerprint != NAMESPACE.fingerprint
    assert other.root != NAMESPACE.root


@pytest.mark.parametrize("name", PARTS)
def test_which_part_is_here_is_in_the_fingerprint_only(name: str) -> None:
    """So that what one rank looks for can be what two have stored."""
    other = replace(NAMESPACE, layout=KVLayout(16, (PARTS[name],)))
    assert other.root == NAMESPACE.root
    assert other.fingerprint != NAMESPACE.fingerprint


def test_a_place_is_in_the_fingerprint_only() -> None:
    placed = NAMESPACE.placed("serde=2")
    assert placed.root == NAMESPACE.root
    assert len({NAMESPACE.fingerprint, placed.fingerprint, placed.placed("x").fingerprint}) == 3


def test_what_people_call_a_model_is_in_no_name() -> None:
    called = replace(NAMESPACE, label="org/model")
    assert called == NAMESPACE
    assert (called.root, called.fingerprint) == (NAMESPACE.root, NAMESPACE.fingerprint)
    assert called.for_rank(0, 1).placed("somewhere").label == "org/model"
    assert called.facts()["label"] == "org/model"


def test_window_length_is_a_fact() -> None:
    spaces = [
        replace(NAMESPACE, layout=KVLayout(16, (replace(WINDOW, window_tokens=size),)))
        for size in (128, 256)
    ]
    assert spaces[0].root != spaces[1].root


def test_a_further_group_leaves_the_names_of_the_first() -> None:
    more = replace(NAMESPACE, layout=KVLayout(16, (GROUP, WINDOW)))
    assert (more.root, more.fingerprint) == (NAMESPACE.root, NAMESPACE.fingerprint)
    assert NAMESPACE.group_names == (b"",)
    assert more.group_names[0] == b""
    assert len(more.group_names[1]) == GROUP_NAME_BYTES


@pytest.mark.parametrize(
    "other",
    [
        replace(WINDOW, window_tokens=64),
        replace(WINDOW, dtype=DType.F16),
        replace(WINDOW, heads=2),
        replace(WINDOW, heads=2, first_head=2),
        replace(WINDOW, model_heads=8),
        replace(WINDOW, layers=(4, 5)),
    ],
)
def test_a_group_has_the_name_of_what_it_holds(other: LayerGroup) -> None:
    def names(*groups: LayerGroup) -> tuple[bytes, ...]:
        return replace(NAMESPACE, layout=KVLayout(16, (GROUP, *groups))).group_names

    (_, name), (_, another) = names(WINDOW), names(other)
    assert name != another
    latent = LayerGroup((0,), AttentionKind.MLA, 1, heads=1, head_size=9, dtype=DType.BF16)
    assert names(latent, WINDOW)[2] == name  # whatever its place among the groups


def test_heads_of_ranks() -> None:
    def parts(ranks: int) -> list[tuple[int, int]]:
        shares = [GROUP.for_rank(rank, ranks) for rank in range(ranks)]
        return [(share.first_head, share.heads) for share in shares]

    assert parts(1) == [(0, 4)]
    assert parts(2) == [(0, 2), (2, 2)]
    assert parts(4) == [(0, 1), (1, 1), (2, 1), (3, 1)]
    assert parts(8) == [(0, 1), (0, 1), (1, 1), (1, 1), (2, 1), (2, 1), (3, 1), (3, 1)]
    assert GROUP.for_rank(0, 1) == GROUP
    assert GROUP.for_rank(1, 4).for_rank(1, 2) == GROUP.for_rank(1, 2)


@pytest.mark.parametrize(("rank", "ranks"), [(2, 2), (-1, 2), (0, 0)])
def test_ranks_that_are_not_there(rank: int, ranks: int) -> None:
    with pytest.raises(LayoutError, match=f"no rank {rank} of {ranks}"):
        NAMESPACE.for_rank(rank, ranks)


@pytest.mark.parametrize("ranks", [3, 6])
def test_heads_that_cannot_be_dealt_out(ranks: int) -> None:
    with pytest.raises(LayoutError, match=f"4 KV heads can't be dealt out evenly to {ranks} ranks"):
        NAMESPACE.for_rank(0, ranks)


def test_ranks_with_the_same_heads_are_equal() -> None:
    latent = LayerGroup((0,), AttentionKind.MLA, 1, heads=1, head_size=9, dtype=DType.BF16)
    shared = CacheNamespace("m", KVLayout(16, (latent,)))
    assert {shared.for_rank(rank, 4) for rank in range(4)} == {shared}
    assert len({NAMESPACE.for_rank(rank, 8).fingerprint for rank in range(8)}) == 4
    assert {NAMESPACE.for_rank(rank, 8).root for rank in range(8)} == {NAMESPACE.root}
