"""Names and shapes: what makes two stores the same, and how large a chunk is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace

import pytest

from lmcache_core.errors import LayoutError
from lmcache_core.keys import DIGEST_BYTES, CacheNamespace, chunk_key
from lmcache_core.layout import AttentionKind, DType, KVLayout, LayerGroup

GROUP = LayerGroup((0, 1), AttentionKind.FULL, 2, heads=4, head_size=8, dtype=DType.BF16)
LAYOUT = KVLayout(16, (GROUP,))
NAMESPACE = CacheNamespace("model", LAYOUT, shard=0, shard_count=2)
GOLDEN_FINGERPRINT = "84b1e4f8466228a5"
GOLDEN_ROOT = "a80ac426ddf59beb"


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


def test_layouts_are_values() -> None:
    assert replace(LAYOUT) == LAYOUT
    assert hash(replace(GROUP)) == hash(GROUP)
    with pytest.raises(FrozenInstanceError):
        GROUP.heads = 5  # type: ignore[misc]
    assert json.loads(json.dumps(LAYOUT.as_dict()))["tokens_per_chunk"] == 16


def test_keys() -> None:
    digest = bytes(range(DIGEST_BYTES))
    assert chunk_key(digest) == digest
    assert chunk_key(digest, 258) == digest + b"\x02\x01"
    assert len({chunk_key(digest, group) for group in range(300)}) == 300
    with pytest.raises(OverflowError):
        chunk_key(digest, 1 << 16)


def test_fingerprint_is_a_file_name() -> None:
    odd = replace(NAMESPACE, model="../org/Modèle:7B\n")
    assert re.fullmatch(r"[0-9a-f]{16}", odd.fingerprint)


def test_golden_fingerprint() -> None:
    """A release that changes this line makes every stored chunk of every user a miss."""
    assert NAMESPACE.fingerprint == GOLDEN_FINGERPRINT
    assert NAMESPACE.root.hex() == GOLDEN_ROOT


CHANGES: dict[str, Callable[[CacheNamespace], CacheNamespace]] = {
    "model": lambda n: replace(n, model="other"),
    "shard_count": lambda n: replace(n, shard_count=4),
    "salt": lambda n: replace(n, salt="tenant"),
    "format_version": lambda n: replace(n, format_version=2),
    "tokens_per_chunk": lambda n: replace(n, layout=replace(LAYOUT, tokens_per_chunk=32)),
    "dtype": lambda n: replace(n, layout=KVLayout(16, (replace(GROUP, dtype=DType.F16),))),
    "heads": lambda n: replace(n, layout=KVLayout(16, (replace(GROUP, heads=2),))),
    "layers": lambda n: replace(n, layout=KVLayout(16, (replace(GROUP, layers=(0, 2)),))),
    "groups": lambda n: replace(n, layout=KVLayout(16, (GROUP, GROUP))),
}


@pytest.mark.parametrize("name", CHANGES)
def test_everything_that_must_match_is_in_both_names(name: str) -> None:
    other = CHANGES[name](NAMESPACE)
    assert other.fingerprint != NAMESPACE.fingerprint
    assert other.root != NAMESPACE.root


def test_ranks_share_digests_but_not_chunks() -> None:
    other = NAMESPACE.for_shard(1)
    assert other.root == NAMESPACE.root
    assert other.fingerprint != NAMESPACE.fingerprint
    assert other.for_shard(0) == NAMESPACE
