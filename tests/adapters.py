"""LoRA adapters for the decoder of tiny, in PEFT's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from reference.checkpoint.checkpoint import open_checkpoint, parameter_shapes

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model.language_model.model."


def write_decoder_adapter(
    folder: Path,
    rank: int = 4,
    modules: tuple[str, ...] = MODULES,
    scale: float = 1.0,
    seed: int = 0,
    **settings: Any,
) -> Path:
    """An adapter with random weights on layers of the decoder."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in parameter_shapes(open_checkpoint("tiny").config).items():
        module = name.removeprefix("decoder.").removesuffix(".weight")
        last = module.rpartition(".")[2]
        if not name.startswith("decoder.") or last not in modules:
            continue
        outputs, inputs = shape
        r = settings.get("rank_pattern", {}).get(last, rank)
        stem = PREFIX + module if last != "head" else "base_model.model.language_model.lm_head"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(r, inputs, generator=generator) * inputs**-0.5
        tensors[f"{stem}.lora_B.weight"] = torch.randn(outputs, r, generator=generator) * scale * r**-0.5
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    content = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(modules),
        **settings,
    }
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder
