"""Writing a checkpoint in the original layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from reference.checkpoint.checkpoint import parameter_shapes
from reference.checkpoint.layouts import parameter_sources
from reference.model.deepseek_vl import DeepSeekVL
from runtimes.bundle.files import write_json
from runtimes.text.prompt import BOS, EOS, PAD


def write_original_checkpoint(
    model: DeepSeekVL, raw_config: Mapping[str, Any], tokenizer: Tokenizer, folder: Path
) -> None:
    """Write a checkpoint in the original layout, with float16 weights.

    Args:
        model: the weights.
        raw_config: content of ``config.json``.
        tokenizer: becomes ``tokenizer.json``.
        folder: made if it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = parameter_sources(model.config, parameter_shapes(model.config))
    state = {
        table[name].names[0]: parameter.detach().to(torch.float16).contiguous()
        for name, parameter in model.named_parameters()
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner only
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "config.json", raw_config)
    write_json(
        folder / "tokenizer_config.json",
        {"add_bos_token": True, "add_eos_token": False, "bos_token": BOS, "eos_token": EOS,
         "pad_token": PAD, "tokenizer_class": "LlamaTokenizer"},
    )  # fmt: skip
    norm = model.config.vision.high_norm or model.config.vision.low_norm
    write_json(
        folder / "preprocessor_config.json",
        {"image_size": model.config.vision.image_size, "min_size": 14, "do_normalize": False,
         "image_mean": list(norm.mean) if norm else None, "image_std": list(norm.std) if norm else None,
         "rescale_factor": 1 / 255, "image_processor_type": "VLMImageProcessor"},
    )  # fmt: skip
