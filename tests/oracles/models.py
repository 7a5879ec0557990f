"""Small random transformers models in which every size differs from every other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers
import torch
import transformers

from reference.model.config import CLIP_MEAN, CLIP_STD, HALF_RGB
from reference.tiny import TINY
from runtimes.text.prompt import IMAGE_PLACEHOLDER

VOCABULARY = 521
# Tokenizers are tiny's: its ids lie below the vocabulary of every model here.
IMAGE_TOKEN_ID = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json")).token_to_id(IMAGE_PLACEHOLDER)


JANUS_TOKENS = ("<begin_of_image>", "<end_of_image>", "<|User|>", "<|Assistant|>")


def _text(**changes: int) -> dict[str, object]:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 96, "intermediate_size": 100, "num_hidden_layers": 3,
             "num_attention_heads": 6, "num_key_value_heads": 6, "max_position_embeddings": 300}  # fmt: skip
    return {"model_type": "llama", "rms_norm_eps": 1e-6, **sizes, **changes}


def _siglip(image_size: int, patch_size: int, activation: str) -> dict[str, object]:
    return {"model_type": "siglip_vision_model", "image_size": image_size, "patch_size": patch_size,
            "hidden_size": 40, "intermediate_size": 68, "num_hidden_layers": 2,
            "num_attention_heads": 5, "hidden_act": activation}  # fmt: skip


def siglip_oracle(**text: int) -> transformers.PreTrainedModel:
    """``deepseek_vl``: 30 px, 5×5 tokens; tanh GELU, so that the activation is really read.

    ``text`` changes the decoder's sizes.
    """
    config = transformers.DeepseekVLConfig(
        vision_config=_siglip(30, 6, "gelu_pytorch_tanh"),
        text_config=_text(**{"num_key_value_heads": 3, **text}),
        image_token_id=IMAGE_TOKEN_ID,
        tie_word_embeddings=False,
    )
    return randomize(transformers.DeepseekVLForConditionalGeneration(config))


def hybrid_oracle(**text: int) -> transformers.PreTrainedModel:
    """``deepseek_vl_hybrid``: 112 px in a 14×14 grid with windows of 4 (padded to 16), 28 px low."""
    config = transformers.DeepseekVLHybridConfig(
        vision_config=_siglip(28, 7, "gelu"),
        high_res_vision_config={
            "model_type": "sam_vision_model", "image_size": 112, "patch_size": 8, "hidden_size": 48,
            "num_hidden_layers": 4, "num_attention_heads": 3, "mlp_dim": 76, "window_size": 4,
            "global_attn_indexes": [1, 3], "output_channels": 20, "hidden_act": "gelu",
        },
        text_config=_text(**text),
        image_token_id=IMAGE_TOKEN_ID,
        tie_word_embeddings=False,
    )  # fmt: skip
    return randomize(transformers.DeepseekVLHybridForConditionalGeneration(config))


def janus_oracle(
    vision: Mapping[str, object] | None = None, tied: bool = False, **text: int
) -> transformers.PreTrainedModel:
    """``janus``: 30 px, 5×5 tokens, q, k and v without bias, an aligner of three layers with tanh GELU.

    ``vision`` and ``text`` change the tower and the decoder; ``tied`` makes the embedding the head.
    """
    config = transformers.JanusConfig(
        vision_config={
            "image_size": 30, "patch_size": 6, "hidden_size": 40, "mlp_ratio": 1.7, "num_hidden_layers": 2,
            "num_attention_heads": 5, "hidden_act": "gelu_pytorch_tanh", "attention_bias": False,
            "projection_dim": text.get("hidden_size", 96), "depth": 3, **(vision or {}),
        },
        vq_config={
            "embed_dim": 4, "num_embeddings": 12, "latent_channels": 32, "base_channels": 32, "num_res_blocks": 1,
            "channel_multiplier": [1, 1], "projection_dim": 16, "image_token_embed_dim": 16, "num_hidden_layers": 1,
        },
        text_config=_text(**text),
        image_token_id=IMAGE_TOKEN_ID,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return randomize(transformers.JanusForConditionalGeneration(config))


def randomize(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Give a model weights large enough that every part matters, norms and biases included."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
        is_norm = "norm" in name and name.endswith("weight")
        parameter.data = 1 + 0.2 * noise if is_norm else noise * (0.3 if fan_in == 1 else fan_in**-0.5)
    return model.eval().requires_grad_(False)


def save_janus_texts(folder: Path, tokens: Sequence[str] = JANUS_TOKENS, **processor: object) -> None:
    """Write a tokenizer with Janus's tokens, and the settings of transformers' processor."""
    tokenizer = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    tokenizer.add_special_tokens([*tokens])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "processor_class": "JanusProcessor",
        "num_image_tokens": 25,
        "use_default_system_prompt": True,
    }
    (folder / "processor_config.json").write_text(json.dumps(settings | processor))


def save_oracle(oracle: transformers.PreTrainedModel, folder: Path, shard: str = "50GB") -> None:
    """Save as transformers does, with tiny's tokenizer and a processor config."""
    oracle.save_pretrained(folder, max_shard_size=shard)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / name, folder / name)
    if oracle.config.model_type == "janus":
        save_janus_texts(folder)
    vision = oracle.config.vision_config
    processor: dict[str, object] = {"image_mean": HALF_RGB, "image_std": HALF_RGB, "min_size": 14, "rescale_factor": 1 / 255,
                                    "size": {"height": vision.image_size, "width": vision.image_size}}  # fmt: skip
    if hasattr(oracle.config, "high_res_vision_config"):
        side = oracle.config.high_res_vision_config.image_size
        processor |= {"high_res_size": {"height": side, "width": side},
                      "high_res_image_mean": CLIP_MEAN, "high_res_image_std": CLIP_STD}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
