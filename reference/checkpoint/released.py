"""Configs of the released models: ``config.json`` of each in the original layout.

Keys that the reference does not read are left out.
"""

from __future__ import annotations

from typing import Any

from reference.checkpoint.config_file import parse_config
from reference.model.config import CLIP_MEAN, CLIP_STD, HALF_RGB, ModelConfig

_SIGLIP = {"model_name": "siglip_large_patch16_384", "image_size": 384, "select_layer": -1}

_LLAMA_1B = {
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "max_position_embeddings": 16384,
}
# Its other sizes are LlamaConfig's defaults.
_LLAMA_7B = {"vocab_size": 102400, "num_hidden_layers": 30, "max_position_embeddings": 16384}


def _janus(width: int, language: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a Janus; its sections about image generation are not read."""
    return {
        "model_type": "multi_modality",
        "vision_config": {"cls": "CLIPVisionTower", "params": {**_SIGLIP, "select_feature": "same"}},
        "aligner_config": {"params": {"projector_type": "mlp_gelu", "depth": 2, "n_embed": width}},
        "gen_vision_config": {"cls": "VQ-16", "params": {"image_token_size": 16384, "n_embed": 8}},
        "gen_aligner_config": {"params": {"projector_type": "mlp_gelu", "depth": 2, "n_embed": width}},
        "gen_head_config": {"params": {"image_token_embed": width, "image_token_size": 16384}},
        "language_config": language,
    }


RELEASED_CONFIGS: dict[str, dict[str, Any]] = {
    "1.3b": {
        "model_type": "multi_modality",
        "vision_config": {"cls": "CLIPVisionTower", "params": _SIGLIP},
        "aligner_config": {"params": {"projector_type": "mlp_gelu", "depth": 2, "n_embed": 2048}},
        "language_config": _LLAMA_1B,
    },
    "7b": {
        "model_type": "multi_modality",
        "vision_config": {
            "cls": "HybridVisionTower",
            "params": {
                "high_res_cfg": {
                    "model_name": "sam_b_downsample",
                    "image_size": 1024,
                    "pixel_mean": CLIP_MEAN,
                    "pixel_std": CLIP_STD,
                },
                "low_res_cfg": {**_SIGLIP, "pixel_mean": HALF_RGB, "pixel_std": HALF_RGB},
            },
        },
        "aligner_config": {
            "params": {"projector_type": "low_high_hybrid_split_mlp_gelu", "depth": 2, "n_embed": 4096}
        },
        "language_config": _LLAMA_7B,
    },
    "janus-1.3b": _janus(2048, _LLAMA_1B),
    "janus-pro-1b": _janus(2048, _LLAMA_1B),
    "janus-pro-7b": _janus(4096, _LLAMA_7B),
}


def released_config(size: str) -> ModelConfig:
    """Return the config of a released model, such as ``1.3b`` or ``janus-pro-7b``."""
    return parse_config(RELEASED_CONFIGS[size], f"the released {size} config")
