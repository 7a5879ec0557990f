"""Names of the reference model's parameters in checkpoints, as far as families share them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

Shape = tuple[int, ...]
Rule = tuple[str, str]  # a pattern for the start of a name, and what replaces it


@dataclass(frozen=True)
class ParameterSource:
    """The checkpoint tensors of one parameter; ``shape`` is that of each tensor.

    There are several if the checkpoint stores q, k and v separately; they are concatenated along
    axis 0.
    """

    names: tuple[str, ...]
    shape: Shape


def apply_first_rule(rules: Iterable[Rule], name: str) -> str:
    """Rename by the first rule that matches the start of a name.

    Raises:
        KeyError: no rule matches.
    """
    for pattern, replacement in rules:
        renamed, count = re.subn("^" + pattern, replacement, name)
        if count:
            return renamed
    raise KeyError(name)


def original_source(hybrid: bool, name: str, shape: Shape) -> ParameterSource:
    """Return the source of a parameter in the original layout of DeepSeek-VL and Janus."""
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
    return ParameterSource((apply_first_rule(rules, name),), shape)


def transformers_source(rules: list[Rule], projection: str, name: str, shape: Shape) -> ParameterSource:
    """Return the source of a parameter in the layout of transformers.

    Args:
        rules: the names of the parts that families do not share; they come first.
        projection: name of the layer after the attention of SigLIP.
        name: name of the parameter.
        shape: of the parameter.

    Raises:
        KeyError: the layout has no such tensor.
    """
    low = "model.vision_model"
    if re.fullmatch(r"vision_encoder\.low\.blocks\.\d+\.attn\.qkv\.(weight|bias)", name):
        base = apply_first_rule([(r"vision_encoder\.low\.blocks\.", f"{low}.encoder.layers.")], name)
        names = tuple(base.replace("attn.qkv", f"self_attn.{part}_proj") for part in "qkv")
        return ParameterSource(names, (shape[0] // 3, *shape[1:]))
    if name == "vision_encoder.low.pos_embed":
        return ParameterSource((f"{low}.embeddings.position_embedding.weight",), shape[1:])
    block = r"vision_encoder\.low\.blocks\.(\d+)"
    shared = [
        (r"vision_encoder\.low\.patch_embed\.proj\.", f"{low}.embeddings.patch_embedding."),
        (r"vision_encoder\.low\.norm\.", f"{low}.post_layernorm."),
        (rf"{block}\.norm([12])\.", rf"{low}.encoder.layers.\1.layer_norm\2."),
        (rf"{block}\.attn\.proj\.", rf"{low}.encoder.layers.\1.self_attn.{projection}."),
        (rf"{block}\.", rf"{low}.encoder.layers.\1."),
        (r"token_embedding\.", "model.language_model.embed_tokens."),
        (r"decoder\.head\.", "lm_head."),
        (r"decoder\.", "model.language_model."),
    ]
    return ParameterSource((apply_first_rule([*rules, *shared], name),), shape)
