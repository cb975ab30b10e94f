"""LoRA adapters for the tiny model: random numbers, the same ones for a seed."""

from __future__ import annotations

import json
from pathlib import Path

from engine_host import Adapter

WITH_ADAPTERS = {"enable_lora": True, "max_lora_rank": 8}
"""Arguments of an engine that takes them."""


def write_adapter(folder: Path, seed: int) -> Path:
    """A LoRA for the tiny model's attention, of random numbers; in place if it is there."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    dice = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(4):
        for module, out in (("q_proj", 256), ("k_proj", 128), ("v_proj", 128)):
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(8, 256, generator=dice) * 0.1
            tensors[f"{name}.lora_B.weight"] = torch.randn(out, 8, generator=dice)
    made = folder.with_name(f"{folder.name}.new")
    save_file(tensors, str(made))
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(made.read_bytes())
    made.unlink()
    settings = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "bias": "none", **settings})
    )
    return folder


def adapter(folder: Path, *, name: str = "sql", number: int = 1, inplace: bool = False) -> Adapter:
    return {
        "lora_name": name,
        "lora_int_id": number,
        "lora_path": str(folder),
        "load_inplace": inplace,
    }
