"""What users put into ``kv_transfer_params``: whatever it is, the engine goes on. Needs no vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lmcache_connector_vllm import identity
from lmcache_connector_vllm.identity import Marks


def nested(depth: int) -> Any:
    made: Any = 1
    for _ in range(depth):
        made = [made]
    return made


DEEP = 200_000
LONG = 10**5000
"""Deeper than any Python writes, and more digits than it writes."""


def test_tags_are_text_and_others_options_are_left_alone() -> None:
    params = {"lmcache.tag.a": "x", "lmcache.tag.b": 1, "lmcache.tag.c": None, "x": nested(DEEP)}
    tags = {"lmcache.tag.a": "x", "lmcache.tag.b": "1", "lmcache.tag.c": "None"}
    assert identity.marks(params) == Marks(tags, skip_save=False)
    assert identity.marks(None) == identity.marks({}) == Marks({}, skip_save=False)


@pytest.mark.parametrize(
    ("value", "skips"),
    [
        *((yes, True) for yes in (True, 1, "Yes", "true", "1")),
        *((no, False) for no in (False, 0, "no", "", None, nested(DEEP), {"a": 1}, LONG)),
    ],
    ids=lambda _: "",  # pytest would have to write them as text
)
def test_skip_save(value: Any, skips: bool) -> None:
    assert identity.marks({"lmcache.skip_save": value}) == Marks({}, skip_save=skips)


@pytest.mark.parametrize("params", ["lmcache.tag.a", ["lmcache.tag.a"], 7, 0.5, True, "", []])
def test_what_is_no_mapping_says_nothing_that_can_be_told(params: Any) -> None:
    assert identity.marks(params) is None


@pytest.mark.parametrize(
    "value", [nested(DEEP), {"a": nested(DEEP)}, LONG], ids=["list", "mapping", "number"]
)
def test_a_tag_that_cannot_be_written_as_text_shares_with_nobody(value: Any) -> None:
    assert identity.marks({"lmcache.tag.a": value}) is None


def test_half_a_surrogate_pair_sets_apart_like_any_other_text() -> None:
    request: Any = SimpleNamespace(cache_salt="\ud800", mm_features=[])
    other: Any = SimpleNamespace(cache_salt="\ud801", mm_features=[])
    plain: Any = SimpleNamespace(cache_salt=None, mm_features=[])
    roots = {
        identity.root(b"r" * 16, request, {}),
        identity.root(b"r" * 16, other, {}),
        identity.root(b"r" * 16, plain, {"lmcache.tag.a": "\ud800"}),
    }
    assert len(roots) == 3
    where = SimpleNamespace(offset=0, length=4)
    image = SimpleNamespace(identifier="\ud800", mm_position=where)
    shown: Any = SimpleNamespace(mm_features=[image])
    assert list(identity.media(shown, 16)) == [0]
