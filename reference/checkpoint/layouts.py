"""Names of the reference model's parameters in the two checkpoint layouts.

A ``ParameterSource`` lists the checkpoint tensors that make up one parameter: usually one, but
three where transformers stores q, k and v separately (they are concatenated along axis 0).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from reference.model.config import ModelConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ParameterSource:
    """The checkpoint tensors of one parameter; ``shape`` is that of each tensor."""

    names: tuple[str, ...]
    shape: Shape


# Tensors in published checkpoints that no computation uses: pooling heads and norms of other tower
# modes, and tables that every loader computes itself.
UNUSED_TENSORS = re.compile(
    r"(.*\.attn_pool\..*|vision_model\.(high|low)_layer_norm\.(weight|bias)"
    r"|model\.vision_model\.(vision_model\.)?head\..*|.*\.rotary_emb\.inv_freq|.*\.position_ids)"
)


def parameter_sources(config: ModelConfig, shapes: dict[str, Shape]) -> dict[str, ParameterSource]:
    """Return the source of every parameter.

    Args:
        config: its ``layout`` determines the names.
        shapes: parameter name → shape, as in ``DeepSeekVL.named_parameters()``.
    """
    rename = _original_source if config.layout == "original" else _transformers_source
    return {name: rename(config, name, shape) for name, shape in shapes.items()}


# Names that wrapper modules add inside the names of a state dict: torch.compile, FSDP and
# activation checkpointing.
_WRAPPERS = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# What comes before the first part of the model: DistributedDataParallel's and DeepSpeed's
# ``module.``, Lightning's ``_forward_module.``, PEFT's ``base_model.model.``, or any other name
# under which a trainer holds the model.
_OUTER_NAMES = re.compile(
    r"^(?:[^.]+\.)*?(?=(?:vision_model|high_res_vision_(?:model|neck|proj|alpha)|aligner|language_model"
    r"|lm_head)(?:\.|$))"
)


def canonical_names(config: ModelConfig, stored: Iterable[str]) -> dict[str, list[str]]:
    """Map names as in ``parameter_sources`` to the names under which a checkpoint stores them.

    Accepts all that transformers 5.23 accepts (``conversion_mapping.py`` and ``rename_source_key``
    in ``core_model_loading.py``) and more: names with or without ``model.`` or what a trainer
    writes before it; SigLIP nested as in all files of transformers before 5.6; the language model
    nested or not; the head at any level.
    """
    table: dict[str, list[str]] = {}
    for name in stored:
        base = re.sub(r"^(model\.)+", "", _OUTER_NAMES.sub("", _WRAPPERS.sub("", name), count=1))
        base = re.sub(r"^(vision_model\.)+", "vision_model.", base)
        base = re.sub(r"^(?:language_model\.)?(?:model\.)*lm_head\.", "lm_head.", base)
        base = re.sub(r"^language_model\.(model\.)+", "language_model.", base)
        if config.layout == "original":
            base = re.sub(r"^lm_head\.", "language_model.lm_head.", base)
            canonical = re.sub(r"^language_model\.(?!lm_head\.)", "language_model.model.", base)
        else:
            canonical = base if base.startswith("lm_head.") else f"model.{base}"
        table.setdefault(canonical, []).append(name)
    return table


def _original_source(config: ModelConfig, name: str, shape: Shape) -> ParameterSource:
    hybrid = config.vision.hybrid
    tower = "vision_model.vision_tower"
    rules = [
        (r"vision_encoder\.high\.hd_alpha$", f"{tower}_high.vision_tower.hd_alpha_downsamples"),
        (r"vision_encoder\.high\.(.*)\.mlp\.fc([12])\.", rf"{tower}_high.vision_tower.\1.mlp.lin\2."),
        (r"vision_encoder\.high\.", f"{tower}_high.vision_tower."),
        (r"vision_encoder\.low\.", f"{tower}_low.vision_tower." if hybrid else f"{tower}."),
        (r"adaptor\.", "aligner."),
        (r"token_embedding\.", "language_model.model.embed_tokens."),
        (r"decoder\.head\.", "language_model.lm_head."),
        (r"decoder\.", "language_model.model."),
    ]
    return ParameterSource((_apply_first_rule(rules, name),), shape)


def _transformers_source(config: ModelConfig, name: str, shape: Shape) -> ParameterSource:
    low, high = "model.vision_model", "model.high_res_vision_model.vision_encoder"
    if re.fullmatch(r"vision_encoder\.low\.blocks\.\d+\.attn\.qkv\.(weight|bias)", name):
        base = _apply_first_rule([(r"vision_encoder\.low\.blocks\.", f"{low}.encoder.layers.")], name)
        names = tuple(base.replace("attn.qkv", f"self_attn.{part}_proj") for part in "qkv")
        return ParameterSource(names, (shape[0] // 3, *shape[1:]))
    if name == "vision_encoder.low.pos_embed":
        return ParameterSource((f"{low}.embeddings.position_embedding.weight",), shape[1:])
    rules = [
        (r"vision_encoder\.low\.patch_embed\.proj\.", f"{low}.embeddings.patch_embedding."),
        (r"vision_encoder\.low\.norm\.", f"{low}.post_layernorm."),
        (r"vision_encoder\.low\.blocks\.(\d+)\.norm([12])\.", rf"{low}.encoder.layers.\1.layer_norm\2."),
        (
            r"vision_encoder\.low\.blocks\.(\d+)\.attn\.proj\.",
            rf"{low}.encoder.layers.\1.self_attn.out_proj.",
        ),
        (r"vision_encoder\.low\.blocks\.", f"{low}.encoder.layers."),
        (r"vision_encoder\.high\.patch_embed\.proj\.", f"{high}.patch_embed.projection."),
        (r"vision_encoder\.high\.pos_embed$", f"{high}.pos_embed"),
        (r"vision_encoder\.high\.blocks\.(\d+)\.norm([12])\.", rf"{high}.layers.\1.layer_norm\2."),
        (r"vision_encoder\.high\.blocks\.(\d+)\.mlp\.fc([12])\.", rf"{high}.layers.\1.mlp.lin\2."),
        (r"vision_encoder\.high\.blocks\.", f"{high}.layers."),
        *_neck_rules(r"vision_encoder\.high\.neck\.", f"{high}.neck."),
        *_neck_rules(r"vision_encoder\.high\.neck_hd\.", "model.high_res_vision_neck."),
        (r"vision_encoder\.high\.downsamples\.0\.", "model.high_res_vision_proj.conv1."),
        (r"vision_encoder\.high\.downsamples\.1\.", "model.high_res_vision_proj.conv2."),
        (r"vision_encoder\.high\.hd_alpha$", "model.high_res_vision_alpha"),
        (r"adaptor\.high_up_proj\.", "model.aligner.high_res_vision_proj."),
        (r"adaptor\.low_up_proj\.", "model.aligner.vision_proj."),
        (r"adaptor\.layers\.1\.", "model.aligner.proj."),  # the hybrid adaptor starts with its GELU
        (r"adaptor\.layers\.0\.", "model.aligner.linear1."),
        (r"adaptor\.layers\.2\.", "model.aligner.linear2."),
        (r"token_embedding\.", "model.language_model.embed_tokens."),
        (r"decoder\.head\.", "lm_head."),
        (r"decoder\.", "model.language_model."),
    ]
    return ParameterSource((_apply_first_rule(rules, name),), shape)


def _neck_rules(pattern: str, replacement: str) -> list[tuple[str, str]]:
    parts = ("conv1", "layer_norm1", "conv2", "layer_norm2")
    return [(rf"{pattern}{index}\.", f"{replacement}{part}.") for index, part in enumerate(parts)]


def _apply_first_rule(rules: Iterable[tuple[str, str]], name: str) -> str:
    for pattern, replacement in rules:
        renamed, count = re.subn("^" + pattern, replacement, name)
        if count:
            return renamed
    raise KeyError(name)
