"""A Janus in the original layout, written from transformers' model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from tests.oracles.models import save_oracle

# transformers' names and the original's, in order; the first that matches counts.
NAMES = (
    (r"model\.vision_model\.embeddings\.patch_embedding\.", "vision_model.vision_tower.patch_embed.proj."),
    (r"model\.vision_model\.embeddings\.position_embedding\.weight", "vision_model.vision_tower.pos_embed"),
    (r"model\.vision_model\.post_layernorm\.", "vision_model.vision_tower.norm."),
    (r"model\.vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection_layer\.",
     r"vision_model.vision_tower.blocks.\1.attn.proj."),
    (r"model\.vision_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.",
     r"vision_model.vision_tower.blocks.\1.attn.\2."),
    (r"model\.vision_model\.encoder\.layers\.(\d+)\.layer_norm([12])\.",
     r"vision_model.vision_tower.blocks.\1.norm\2."),
    (r"model\.vision_model\.encoder\.layers\.(\d+)\.", r"vision_model.vision_tower.blocks.\1."),
    (r"model\.aligner\.fc1\.", "aligner.layers.0."),
    (r"model\.aligner\.hidden_layers\.0\.", "aligner.layers.2."),
    (r"model\.aligner\.hidden_layers\.1\.", "aligner.layers.4."),
    (r"model\.generation_aligner\.fc1\.", "gen_aligner.layers.0."),
    (r"model\.generation_aligner\.hidden_layers\.0\.", "gen_aligner.layers.2."),
    (r"model\.generation_head\.proj_out\.", "gen_head.output_mlp_projector."),
    (r"model\.generation_head\.", "gen_head."),
    (r"model\.generation_embeddings\.", "gen_embed."),
    (r"model\.vqmodel\.", "gen_vision_model."),
    (r"model\.language_model\.", "language_model.model."),
    (r"lm_head\.", "language_model.lm_head."),
)  # fmt: skip


def original_name(name: str) -> str:
    """The original's name of a tensor of transformers; those of q, k and v differ in one letter."""
    for pattern, replacement in NAMES:
        renamed, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            return renamed
    raise KeyError(name)


def original_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in the original layout: q, k and v in one, and a pooling head that nothing uses."""
    renamed = {original_name(name): tensor for name, tensor in state.items()}
    for name in [name for name in renamed if re.search(r"\.attn\.q\.", name)]:
        parts = [renamed.pop(name.replace(".q.", f".{part}.")) for part in "qkv"]
        renamed[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    renamed["vision_model.vision_tower.pos_embed"] = renamed["vision_model.vision_tower.pos_embed"][None]
    renamed["vision_model.vision_tower.attn_pool.latent"] = torch.zeros(1, 1, 4)
    return {name: tensor.contiguous() for name, tensor in renamed.items()}


def original_config(oracle: transformers.PreTrainedModel) -> dict[str, Any]:
    """``config.json`` as the original code writes it, with the sizes of the small towers."""
    vision, text = oracle.config.vision_config, oracle.config.text_config
    sizes = {
        "image_size": vision.image_size, "patch_size": vision.patch_size, "width": vision.hidden_size,
        "layers": vision.num_hidden_layers, "heads": vision.num_attention_heads,
        "mlp_width": int(vision.hidden_size * vision.mlp_ratio),
    }  # fmt: skip
    language = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "max_position_embeddings", "rms_norm_eps")  # fmt: skip
    projector = {"projector_type": "mlp_gelu", "depth": vision.depth, "n_embed": text.hidden_size}
    return {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "vision_config": {
            "cls": "CLIPVisionTower", "model_type": "vision",
            "params": {"model_name": "siglip_large_patch16_384", "select_feature": "same", "select_layer": -1, **sizes},
        },
        "aligner_config": {"cls": "MlpProjector", "params": {**projector, "input_dim": vision.hidden_size}},
        "gen_vision_config": {"cls": "VQ-16", "params": {"image_token_size": 12, "n_embed": 4}},
        "gen_aligner_config": {"cls": "MlpProjector", "params": {**projector, "input_dim": 4}},
        "gen_head_config": {"cls": "vision_head", "params": {"image_token_embed": 16, "image_token_size": 12}},
        "language_config": {"model_type": "llama"} | {key: getattr(text, key) for key in language},
    }  # fmt: skip


def save_original(oracle: transformers.PreTrainedModel, folder: Path) -> None:
    """Write a checkpoint in the original layout, with the settings of its processor."""
    save_oracle(oracle, folder)
    save_file(original_state(oracle.state_dict()), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(original_config(oracle)))
    image = {"image_processor_type": "VLMImageProcessor", "image_size": oracle.config.vision_config.image_size,
             "background_color": [127, 127, 127], "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
             "min_size": 14, "rescale_factor": 1 / 255, "processor_class": "VLChatProcessor"}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    processor = {"add_special_token": False, "ignore_id": -100, "image_tag": "<image_placeholder>", "mask_prompt": True,
                 "num_image_tokens": 25, "processor_class": "VLChatProcessor", "sft_format": "deepseek"}  # fmt: skip
    (folder / "processor_config.json").write_text(json.dumps(processor))
