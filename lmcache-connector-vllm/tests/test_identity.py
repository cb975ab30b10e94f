"""What makes KV values what they are, in terms of vLLM's own classes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("default")]

torch = pytest.importorskip("torch")
interface = pytest.importorskip("vllm.v1.kv_cache_interface")

from lmcache_connector_vllm import identity  # noqa: E402
from lmcache_core.chunks.keys import CacheNamespace  # noqa: E402
from lmcache_core.chunks.layout import AttentionKind, DType, KVLayout, full_attention  # noqa: E402
from lmcache_core.contracts.serde import Rope  # noqa: E402
from lmcache_core.errors import ConfigError, LayoutError  # noqa: E402


def vllm_config(**parallel: int) -> Any:
    sizes = {
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        **parallel,
    }
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**sizes),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        model_config=SimpleNamespace(model="org/model"),
    )


def full(**options: Any) -> Any:
    arguments = {"block_size": 32, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
    return interface.FullAttentionSpec(**{**arguments, **options})


def cache_config(*specs: Any, layers: int = 3) -> Any:
    groups = [
        SimpleNamespace(layer_names=[f"layers.{i}" for i in range(layers)], kv_cache_spec=spec)
        for spec in specs
    ]
    return SimpleNamespace(kv_cache_groups=groups)


def test_full_attention() -> None:
    group = identity.layer_group(vllm_config(), cache_config(full()))
    assert (group.kind, group.planes, group.heads, group.head_size) == (
        AttentionKind.FULL,
        2,
        2,
        64,
    )
    assert group.dtype is DType.BF16
    assert group.layers == (0, 1, 2)


def test_mla_has_one_plane_and_is_the_same_on_all_ranks() -> None:
    spec = interface.MLAAttentionSpec(
        block_size=64, num_kv_heads=1, head_size=576, dtype=torch.bfloat16
    )
    config = vllm_config(tensor_parallel_size=4)
    names = [identity.namespace(config, cache_config(spec), 256, rank, "m") for rank in range(4)]
    assert names[0].layout.groups[0].planes == 1
    assert names[0].label == "org/model"
    assert len({name.fingerprint for name in names}) == 1
    assert [identity.writes(name, rank, 4) for rank, name in enumerate(names)] == [True] + [
        False
    ] * 3


@pytest.mark.parametrize(("ranks", "held", "names"), [(1, 4, 1), (2, 2, 2), (4, 1, 4), (8, 1, 4)])
def test_ranks_have_the_names_of_their_heads(ranks: int, held: int, names: int) -> None:
    """A model with four KV heads: however it is split its root is one, and equal heads one name."""
    config = vllm_config(tensor_parallel_size=ranks)
    config.model_config.get_total_num_kv_heads = lambda: 4
    spec = cache_config(full(num_kv_heads=held))
    spaces = [identity.namespace(config, spec, 256, rank, "m") for rank in range(ranks)]
    whole = full_attention(layers=3, heads=4, head_size=64, dtype=DType.BF16)
    assert {space.root for space in spaces} == {CacheNamespace("m", KVLayout(256, (whole,))).root}
    assert len({space.fingerprint for space in spaces}) == names
    writers = [space for r, space in enumerate(spaces) if identity.writes(space, r, ranks)]
    assert writers == list(dict.fromkeys(spaces))
    assert [space.for_rank(0, ranks) for space in spaces] == [spaces[0]] * ranks


def test_heads_that_cannot_be_told_apart_are_refused() -> None:
    config = vllm_config(tensor_parallel_size=2)
    config.model_config.get_total_num_kv_heads = lambda: 8
    with pytest.raises(LayoutError, match="keeps 2 KV heads, but 8"):
        identity.namespace(config, cache_config(full(num_kv_heads=2)), 256, 0, "m")


def test_layers_have_the_numbers_of_the_model() -> None:
    one = cache_config(full())
    one.kv_cache_groups[0].layer_names = [f"model.layers.{i}.self_attn.attn" for i in (10, 9, 31)]
    assert identity.layer_group(vllm_config(), one).layers == (9, 10, 31)
    one.kv_cache_groups[0].layer_names = ["model.layers.0.attn", "draft.layers.0.attn"]
    assert identity.layer_group(vllm_config(), one).layers == (0, 1)


REFUSED = {
    "no layers": (),
    "two groups": (full(), full(head_size=128)),
    "sliding window": (
        interface.SlidingWindowSpec(
            block_size=32, num_kv_heads=2, head_size=64, dtype=torch.bfloat16, sliding_window=128
        ),
    ),
    "window kept in full": (full(sliding_window=128),),
    "chunked": (full(attention_chunk_size=128),),
    "state": (interface.MambaSpec(block_size=32, shapes=((4, 4),), dtypes=(torch.float32,)),),
    "unequal K and V": (full(head_size_v=32),),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_stored_is_refused(name: str) -> None:
    with pytest.raises(LayoutError, match="can't store"):
        identity.layer_group(vllm_config(), cache_config(*REFUSED[name]))


@pytest.mark.parametrize(
    "name",
    ["pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"],
)
def test_other_parallelism_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=2"):
        identity.layer_group(vllm_config(**{name: 2}), cache_config(full()))


def request(**facts: Any) -> Any:
    values = {"cache_salt": None, "mm_features": [], **facts}
    return SimpleNamespace(**values)


def test_adapters_set_apart() -> None:
    root = b"r" * 8
    plain = identity.root(root, request(), {})
    one = identity.root(root, request(), {}, adapter="one")
    assert plain == root
    assert len({plain, one, identity.root(root, request(), {}, adapter="two")}) == 3


def test_salt_and_tags_cannot_be_confused() -> None:
    root = b"r" * 8
    salted = identity.root(root, request(cache_salt="x"), {})
    tagged = identity.root(root, request(), {"lmcache.tag.salt": "x"})
    assert len({root, salted, tagged}) == 3


def feature(name: str, offset: int, length: int) -> Any:
    return SimpleNamespace(
        identifier=name, mm_position=SimpleNamespace(offset=offset, length=length)
    )


def test_media_mark_the_chunks_they_touch() -> None:
    extras = identity.media(request(mm_features=[feature("cat", 10, 20)]), 16)
    assert sorted(extras) == [0, 1]
    other = identity.media(request(mm_features=[feature("dog", 10, 20)]), 16)
    moved = identity.media(request(mm_features=[feature("cat", 11, 20)]), 16)
    assert extras[0] != other[0]
    assert extras[1] != moved[1]
    two = identity.media(request(mm_features=[feature("cat", 10, 4), feature("dog", 20, 4)]), 16)
    assert sorted(two) == [0, 1]


# -- RoPE ------------------------------------------------------------------------------------------


def rope_of(head_size: int = 64, **facts: Any) -> Rope | None:
    model = SimpleNamespace(
        hf_text_config=SimpleNamespace(**facts), use_mla=False, get_head_size=lambda: head_size
    )
    return identity.rope(SimpleNamespace(model_config=model))


@pytest.mark.parametrize(
    "facts",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ],
    ids=lambda facts: facts["rope_type"],
)
def test_rope_is_that_of_transformers(facts: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_theta": 500000.0, **facts}
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, head_dim=64, rope_parameters=parameters
    )
    expected = LlamaRotaryEmbedding(config).inv_freq.tolist()
    found = rope_of(rope_parameters=parameters)
    assert found is not None
    assert found.frequencies == pytest.approx(expected, rel=1e-6)
    assert not found.interleaved


def test_rope_that_is_not_known() -> None:
    assert rope_of() is None
    assert rope_of(rope_theta=1e4, rope_scaling={"rope_type": "yarn", "factor": 2.0}) is None
    partial = rope_of(rope_theta=1e4, partial_rotary_factor=0.5)
    assert partial is not None
    assert len(partial.frequencies) == 16
