"""Names of known chunks. A change here makes a miss of all that anybody has stored, or a lie."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lmcache_core.chunks.hashing import PrefixHasher, request_root
from lmcache_core.chunks.keys import CacheNamespace, chunk_key
from lmcache_core.chunks.layout import (
    AttentionKind,
    DType,
    KVLayout,
    LayerGroup,
    full_attention,
    mla,
)

NEVER = "names never change; see docs/decisions/0018-names.md"
FULL = full_attention(layers=4, heads=4, head_size=64, dtype=DType.BF16)
WINDOW = LayerGroup((1, 3), AttentionKind.SLIDING_WINDOW, 2, 4, 64, DType.BF16, window_tokens=128)
STATE = LayerGroup((0, 2), AttentionKind.STATE, 3, 8, 16, DType.F32)
LATENT = mla(layers=3, latent_size=576, dtype=DType.F8_E4M3)


def space(*groups: LayerGroup, chunk: int = 16, **facts: str) -> CacheNamespace:
    return CacheNamespace("model", KVLayout(chunk, groups), **facts)  # type: ignore[arg-type]


PLAIN = space(FULL)
SPACES = {
    "plain": PLAIN,
    "salt": space(FULL, salt="tenant"),
    "chunk of 256": space(FULL, chunk=256),
    "unicode": replace(PLAIN, model="org/Modèle"),
    "window first": space(WINDOW),
    "latent": space(LATENT),
    "latent, rank 3 of 8": space(LATENT).for_rank(3, 8),
    "stage": space(replace(FULL, layers=(2, 3))),
    "place": PLAIN.placed("frame=3;serde=1"),
    **{f"rank {r} of 2": PLAIN.for_rank(r, 2) for r in range(2)},
    **{f"rank {r} of 8": PLAIN.for_rank(r, 8) for r in range(8)},
}
GOLDEN_SPACES = {
    "plain": ("8252467f928d87537ffae90e60693a34", "2a4ebf98104431ab"),
    "salt": ("d641fc129acc587730d97bf1fddb3c76", "fb59defe28606f11"),
    "chunk of 256": ("2ae782c1fcc033a52f7943e7ecf61990", "45410b141843c4c8"),
    "unicode": ("eef0dd1e7e6ccf0af88db98280e89378", "8cf94a897d42b532"),
    "window first": ("76e6d166a977febdea7393a3aa8abd7f", "a1e818960fa390d6"),
    "latent": ("0530e7a36417d323ea532450f3a0d634", "73cd109470823c57"),
    "latent, rank 3 of 8": ("0530e7a36417d323ea532450f3a0d634", "73cd109470823c57"),
    "stage": ("8252467f928d87537ffae90e60693a34", "3376aff241dd17fa"),
    "place": ("8252467f928d87537ffae90e60693a34", "ac8d79ed9946e0ed"),
    "rank 0 of 2": ("8252467f928d87537ffae90e60693a34", "bdd00506a9f544bf"),
    "rank 1 of 2": ("8252467f928d87537ffae90e60693a34", "224563fc59e17fab"),
    "rank 0 of 8": ("8252467f928d87537ffae90e60693a34", "995c8dc503fd60e0"),
    "rank 1 of 8": ("8252467f928d87537ffae90e60693a34", "995c8dc503fd60e0"),
    "rank 2 of 8": ("8252467f928d87537ffae90e60693a34", "9e87ba048c0e24ff"),
    "rank 3 of 8": ("8252467f928d87537ffae90e60693a34", "9e87ba048c0e24ff"),
    "rank 4 of 8": ("8252467f928d87537ffae90e60693a34", "ffed2772c1803379"),
    "rank 5 of 8": ("8252467f928d87537ffae90e60693a34", "ffed2772c1803379"),
    "rank 6 of 8": ("8252467f928d87537ffae90e60693a34", "1bd291e930abcd6b"),
    "rank 7 of 8": ("8252467f928d87537ffae90e60693a34", "1bd291e930abcd6b"),
}
GOLDEN_GROUPS = {
    (0, 1): ["", "cbd00efd29257931", "abf91e3ee85679ad"],
    (1, 2): ["", "083976108dad567d", "bb26fa29f361275b"],
    (1, 8): ["", "f2e6a696bbd97049", "7bc0725f5e4dec45"],
}
FACTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "salt": ("salt=a",),
    "adapter": ("lora=x",),
    "both": ("salt=a", "lora=x"),
    "unicode": ("salt=ü",),
}
GOLDEN_REQUESTS = {
    "plain": "8252467f928d87537ffae90e60693a34",
    "salt": "234cef8b8e2a5aabf1904bebef46e4f7",
    "adapter": "7caa952e8ba2e071f9103feb04b01e43",
    "both": "c9a2b5c9534360231903ce7cab69dce7",
    "unicode": "3744f951e3bdaa824db87279fc9d624e",
}
EXTRAS: dict[str, dict[int, bytes]] = {
    "text": {},
    "image": {1: b"image"},
    "image in the tail": {4: b"image"},
}
GOLDEN_CHAINS = {
    "text": [
        "5e8b7c6d186f3725a94fb2acf855c1f9",
        "e3a17f6cef6745fd3e71561733ae4717",
        "fdf1b03515e7a6f75d2d84ba264cffb6",
        "380e2eb3846d9f88d516e93fd8ba5f2f",
        "9418462382ad0ac04a004c9d4758b0eb",
    ],
    "image": [
        "5e8b7c6d186f3725a94fb2acf855c1f9",
        "476755404612f1a23439c435994f253f",
        "baf99e7562c9b4a368bac52ef5e3e763",
        "aab097827d04bc89e0e9a18daa5e5cc8",
        "8c3239646745a8bd2e373fa48147cc7e",
    ],
    "image in the tail": [
        "5e8b7c6d186f3725a94fb2acf855c1f9",
        "e3a17f6cef6745fd3e71561733ae4717",
        "fdf1b03515e7a6f75d2d84ba264cffb6",
        "380e2eb3846d9f88d516e93fd8ba5f2f",
        "b92f1585f0efb81b9d51609d900c1ac0",
    ],
}


@pytest.mark.parametrize("name", SPACES)
def test_roots_and_fingerprints(name: str) -> None:
    assert (SPACES[name].root.hex(), SPACES[name].fingerprint) == GOLDEN_SPACES[name], NEVER


@pytest.mark.parametrize(("rank", "ranks"), GOLDEN_GROUPS)
def test_groups_and_their_parts(rank: int, ranks: int) -> None:
    """Of a model with full attention, a window and states; the first group's keys stay bare."""
    names = space(FULL, WINDOW, STATE).for_rank(rank, ranks).group_names
    assert [name.hex() for name in names] == GOLDEN_GROUPS[rank, ranks], NEVER
    keys = [chunk_key(bytes(16), name).hex() for name in names]
    assert keys == ["00" * 16 + name for name in GOLDEN_GROUPS[rank, ranks]], NEVER


@pytest.mark.parametrize("name", FACTS)
def test_roots_of_requests(name: str) -> None:
    assert request_root(PLAIN.root, *FACTS[name]).hex() == GOLDEN_REQUESTS[name], NEVER


@pytest.mark.parametrize("name", EXTRAS)
def test_chunks_and_tails(name: str) -> None:
    """Four chunks of sixteen tokens, and a tail of six."""
    tokens = list(range(100_000, 100_070))
    hasher = PrefixHasher(PLAIN.root, 16, EXTRAS[name])
    chunks = [digest.hex() for digest in hasher.extend(tokens)]
    tail = hasher.tail(tokens)
    assert [*chunks, tail.hex() if tail else ""] == GOLDEN_CHAINS[name], NEVER
