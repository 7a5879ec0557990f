"""Random small configs, most of them unusual, and the comparison of ours with transformers on each.

Each config either gives transformers' numbers or is refused with a sentence. ``benchmarks/robustness/configs.py``
compares more of them than the tests.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from reference.checkpoint.checkpoint import open_checkpoint
from reference.model.config import CLIP_MEAN, CLIP_STD
from runtimes.errors import UserError
from tests.oracles.models import IMAGE_TOKEN_ID, randomize, save_oracle

LIMIT = 3e-5  # of the largest value; fp32 rounding
VARIANTS = ("siglip", "hybrid", "janus")
CLASSES: dict[str, tuple[Any, Any]] = {
    "siglip": (transformers.DeepseekVLConfig, transformers.DeepseekVLForConditionalGeneration),
    "hybrid": (transformers.DeepseekVLHybridConfig, transformers.DeepseekVLHybridForConditionalGeneration),
    "janus": (transformers.JanusConfig, transformers.JanusForConditionalGeneration),
}
MODEL_TYPES = {"siglip": "deepseek_vl", "hybrid": "deepseek_vl_hybrid", "janus": "janus"}
# Keys that are rarely there, and their values: some of them change nothing, most are not supported.
RARE_TEXT: dict[str, list[Any]] = {
    "head_dim": [None, 8, 24],
    "hidden_act": ["swish", "gelu", "relu"],
    "attention_bias": [False, True],
    "mlp_bias": [False, True],
    "sliding_window": [None, 4],
    "pretraining_tp": [1, 2],
    "model_type": ["mistral", "granite", "qwen2", "gemma"],
    "rope_theta": [500.0, 1e6],
    "rope_parameters": [
        {"rope_theta": 300.0},
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 2.0},
    ],
    "rope_scaling": [
        {"type": "default"},
        {"rope_type": "linear", "factor": 2.0},
        {"type": "dynamic", "factor": 4.0},
    ],
    "partial_rotary_factor": [1.0, 0.5],
    "tie_word_embeddings": [True, False],
    "attention_dropout": [0.1],
    "pad_token_id": [3],
    "layer_types": [["full_attention"], ["sliding_attention"]],
    "logits_scaling": [8.0],
}
RARE_VISION: dict[str, list[Any]] = {
    "vision_use_head": [False, True],
    "attention_dropout": [0.1],
    "num_channels": [3, 1],
    "hidden_act": ["quick_gelu", "relu", "gelu_new"],
    "patch_size": [7],
    "num_attention_heads": [3, 8],
    "model_type": ["clip_vision_model"],
}
RARE_JANUS: dict[str, list[Any]] = {
    "attention_bias": [True, False],
    "use_qk_norm": [False, True],
    "mlp_ratio": [2, 1.3],
    "depth": [1, 3],
    "projection_dim": [20],
    "num_image_tokens": [9],
    "projection_dropout": [0.1],
    "hidden_dropout_rate": [0.1],
    **{key: RARE_VISION[key] for key in ("num_channels", "hidden_act", "num_attention_heads", "model_type")},
}
VQ = {"embed_dim": 4, "num_embeddings": 8, "latent_channels": 32, "base_channels": 32, "num_res_blocks": 1,
      "channel_multiplier": [1], "projection_dim": 8, "image_token_embed_dim": 8, "num_hidden_layers": 1}  # fmt: skip
RARE_HIGH: dict[str, list[Any]] = {
    "use_rel_pos": [True, False],
    "use_abs_pos": [True, False],
    "qkv_bias": [True, False],
    "num_channels": [3, 1],
    "hidden_act": ["gelu_pytorch_tanh", "relu"],
    "mlp_dim": [None, 50],
    "mlp_ratio": [2.0, 1.5],
    "num_pos_feats": [64],
    "attention_dropout": [0.1],
    "global_attn_indexes": [[], [-1], [9], [0, 0]],
}  # fmt: skip


def random_config(seed: int, variant: str) -> dict[str, Any]:
    """A ``config.json`` in transformers' layout, with one or two rare keys per part at most."""
    rng = Random(f"{variant} {seed}")

    def rare(keys: dict[str, list[Any]]) -> dict[str, Any]:
        return {
            key: rng.choice(keys[key]) for key in rng.sample(sorted(keys), rng.choice((0, 0, 0, 1, 1, 2)))
        }

    heads = rng.choice((2, 4, 8))
    patch = rng.choice((6, 8))
    raw: dict[str, Any] = {
        "model_type": MODEL_TYPES[variant],
        "image_token_id": IMAGE_TOKEN_ID,
        "tie_word_embeddings": rng.random() < 0.3,
        "text_config": {
            "model_type": "llama",
            "vocab_size": rng.randint(520, 600),
            "hidden_size": rng.choice((32, 48, 64)),
            "intermediate_size": rng.randint(20, 90),
            "num_hidden_layers": rng.randint(1, 3),
            "num_attention_heads": heads,
            "num_key_value_heads": rng.choice((None, heads, heads // 2, 1)),
            "max_position_embeddings": rng.randint(150, 400),
            "rms_norm_eps": rng.choice((1e-6, 1e-5, 1e-2)),
            **rare(RARE_TEXT),
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "image_size": patch * rng.randint(2, 6),
            "patch_size": patch,
            "hidden_size": rng.choice((24, 32, 48)),
            "intermediate_size": rng.randint(20, 90),
            "num_hidden_layers": rng.randint(1, 3),
            "num_attention_heads": rng.choice((2, 4)),
            "layer_norm_eps": rng.choice((1e-6, 1e-2)),
            **({"hidden_act": "gelu"} if rng.random() < 0.5 else {}),
            **rare(RARE_VISION),
        },
    }
    if variant == "janus":
        vision = raw["vision_config"]
        for key in ("intermediate_size", "model_type", *RARE_VISION):
            if key not in ("patch_size", "num_attention_heads"):
                vision.pop(key, None)
        vision |= {"projection_dim": raw["text_config"]["hidden_size"], **rare(RARE_JANUS)}
        raw["vq_config"] = VQ
    if variant == "hybrid":
        layers, patch = rng.randint(2, 4), rng.choice((8, 16))
        raw["high_res_vision_config"] = {
            "model_type": "sam_vision_model",
            "image_size": patch * rng.randint(4, 9),
            "patch_size": patch,
            "hidden_size": rng.choice((24, 36)),
            "num_hidden_layers": layers,
            "num_attention_heads": rng.choice((2, 3)),
            "window_size": rng.choice((0, 1, 2, 3, 5, 14)),
            "global_attn_indexes": rng.sample(range(layers), rng.randint(1, layers)),
            "output_channels": rng.choice((8, 12)),
            "layer_norm_eps": rng.choice((1e-6, 1e-2)),
            **rare(RARE_HIGH),
        }
    return raw


def compare(raw: dict[str, Any], folder: Path) -> str:
    """What becomes of a config: ``equal``, ``refused``, or ``refused by both``.

    Raises:
        AssertionError: the numbers differ, or transformers refuses what ours accepts.
    """
    (variant,) = (name for name, kind in MODEL_TYPES.items() if kind == raw["model_type"])
    config_class, model_class = CLASSES[variant]
    try:
        config = config_class.from_dict(json.loads(json.dumps(raw)))
        oracle = randomize(model_class(config))
        save_oracle(oracle, folder)
        pixels = _pixels(raw)
        ids = _prompt(raw)
        expected = _outputs_of_transformers(oracle, pixels, ids)
    except Exception as error:  # noqa: BLE001  (its validation and modules raise many types)
        oracle, expected, reason = None, [], f"{type(error).__name__}: {error}"
        folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    try:
        checkpoint = open_checkpoint(str(folder), weights=oracle is not None)
    except UserError as error:
        assert len(str(error)) < 1000, str(error)
        return "refused" if oracle else "refused by both"
    assert oracle, f"transformers refuses it ({reason})"
    model = checkpoint.load_model()
    embeds = model.encode_image(pixels)
    merged = model.merge(ids, embeds, IMAGE_TOKEN_ID)
    found = [*model.vision_encoder(pixels), embeds, model.logits(merged)]
    for name, ours, theirs in zip(
        ("last", *("features",) * 3), reversed(found), reversed(expected), strict=False
    ):
        assert ours.shape == theirs.shape
        error = float((ours - theirs).abs().max() / theirs.abs().max())
        assert error < LIMIT, f"{name} differ by {error:.1e}"
    return "equal"


def _pixels(raw: dict[str, Any]) -> Tensor:
    side = raw.get("high_res_vision_config", raw["vision_config"])["image_size"]
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(3))


def _prompt(raw: dict[str, Any]) -> Tensor:
    vision = raw["vision_config"]
    image = torch.full(((vision["image_size"] // vision["patch_size"]) ** 2,), IMAGE_TOKEN_ID)
    text = torch.randint(10, 500, (2, 9), generator=torch.Generator().manual_seed(4))
    return torch.cat([text[0], image, text[1]])[None]


def _outputs_of_transformers(oracle: Any, pixels: Tensor, ids: Tensor) -> list[Tensor]:
    """Features of each branch, image embeddings and logits, as the original prepares the images."""
    if not hasattr(oracle.config, "high_res_vision_config"):
        inputs = {"pixel_values": pixels}
        features = [oracle.model.vision_model(pixels).last_hidden_state]
    else:
        side = oracle.config.vision_config.image_size
        low = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
        mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        inputs = {"pixel_values": (low - 0.5) / 0.5, "high_res_pixel_values": (pixels - mean) / std}
        features = [
            oracle.model.get_high_res_image_features(inputs["high_res_pixel_values"]).last_hidden_state,
            oracle.model.vision_model(inputs["pixel_values"]).last_hidden_state,
        ]
    embeds = oracle.model.get_image_features(**inputs).pooler_output
    return [*features, embeds, oracle(input_ids=ids, **inputs).logits]
