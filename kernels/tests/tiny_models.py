"""Random models of a few thousand parameters, in transformers' format, for tests."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    # Far above the usual 0.02: the next token has to depend on what came before.
    "initializer_range": 0.3,
}


def save(kind: str, folder: Path) -> Path:
    """A model of ``kind`` with 3 layers x 2 KV heads x 16, and a token for each byte."""
    tokenizer = byte_tokenizer()
    configs: dict[str, PretrainedConfig] = {
        "llama": LlamaConfig(**SHAPE, head_dim=16, vocab_size=len(tokenizer)),
        "qwen2": Qwen2Config(**SHAPE, vocab_size=len(tokenizer)),
        "qwen3": Qwen3Config(**SHAPE, head_dim=16, vocab_size=len(tokenizer)),
    }
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(configs[kind])
    network.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, without special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(alphabet)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=plain)
