"""DeepSeek-VL (arXiv 2403.05525): the 1.3B with SigLIP, and the 7B with SAM and SigLIP.

Two layouts exist: ``multi_modality`` (the original) and transformers' ``deepseek_vl`` and
``deepseek_vl_hybrid``. Janus has ``multi_modality`` too; see ``reference.families.janus``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from reference.families.family import PromptFormat, TextFiles
from reference.families.limits import MAX_IMAGE_SIZE, MAX_STD, MAX_VISION_LAYERS, MIN_STD
from reference.families.llama import parse_llama
from reference.families.names import ParameterSource, Rule, Shape, original_source, transformers_source
from reference.families.original_layout import (
    generates_images,
    sam_from_original,
    siglip_from_original,
    tower_normalization,
)
from reference.model.config import (
    CLIP_MEAN,
    CLIP_STD,
    GELU_APPROXIMATIONS,
    HALF_RGB,
    AdaptorConfig,
    ModelConfig,
    NormalizationConfig,
    SamConfig,
    SiglipConfig,
    VisionConfig,
)
from reference.settings import Settings

NAME, LABEL = "deepseek_vl", "DeepSeek-VL"
MODEL_TYPES: tuple[str, ...] = ("multi_modality", "deepseek_vl", "deepseek_vl_hybrid")
SKIPPED_TENSORS: re.Pattern[str] | None = None


def recognizes(raw: Mapping[str, Any]) -> bool:
    """Return whether a config is of this family; see ``Family``."""
    return raw["model_type"] != "multi_modality" or not generates_images(raw)


def parse_config(raw: Settings, preprocessor: Settings | None) -> ModelConfig:
    """Parse ``config.json`` in either layout; see ``Family``."""
    if raw.values["model_type"] == "multi_modality":
        return _parse_original(raw)
    return _parse_transformers(raw, preprocessor)


def parameter_source(config: ModelConfig, name: str, shape: Shape) -> ParameterSource:
    """Return the checkpoint tensors of a parameter; see ``Family``."""
    if config.layout == "original":
        return original_source(config.vision.hybrid, name, shape)
    return transformers_source(_TRANSFORMERS_NAMES, "out_proj", name, shape)


def image_processors(config: ModelConfig) -> tuple[str, ...]:
    """Return the classes of image processors; see ``Family``."""
    own = "DeepseekVLHybridImageProcessor" if config.vision.hybrid else "DeepseekVLImageProcessor"
    original = ("VLMImageProcessor",) if config.layout == "original" else ()
    return (*original, *(f"{own}{suffix}" for suffix in ("", "Fast", "Pil")))


def prompt_format(files: TextFiles) -> PromptFormat:
    """Return the ``deepseek`` conversation template of the original code, which is the default."""
    return PromptFormat()


def _neck_rules(pattern: str, replacement: str) -> list[Rule]:
    parts = ("conv1", "layer_norm1", "conv2", "layer_norm2")
    return [(rf"{pattern}{index}\.", f"{replacement}{part}.") for index, part in enumerate(parts)]


_HIGH = "model.high_res_vision_model.vision_encoder"
_TRANSFORMERS_NAMES: list[Rule] = [
    (r"vision_encoder\.high\.patch_embed\.proj\.", f"{_HIGH}.patch_embed.projection."),
    (r"vision_encoder\.high\.pos_embed$", f"{_HIGH}.pos_embed"),
    (r"vision_encoder\.high\.blocks\.(\d+)\.norm([12])\.", rf"{_HIGH}.layers.\1.layer_norm\2."),
    (r"vision_encoder\.high\.blocks\.(\d+)\.mlp\.fc([12])\.", rf"{_HIGH}.layers.\1.mlp.lin\2."),
    (r"vision_encoder\.high\.blocks\.", f"{_HIGH}.layers."),
    *_neck_rules(r"vision_encoder\.high\.neck\.", f"{_HIGH}.neck."),
    *_neck_rules(r"vision_encoder\.high\.neck_hd\.", "model.high_res_vision_neck."),
    (r"vision_encoder\.high\.downsamples\.0\.", "model.high_res_vision_proj.conv1."),
    (r"vision_encoder\.high\.downsamples\.1\.", "model.high_res_vision_proj.conv2."),
    (r"vision_encoder\.high\.hd_alpha$", "model.high_res_vision_alpha"),
    (r"adaptor\.high_up_proj\.", "model.aligner.high_res_vision_proj."),
    (r"adaptor\.low_up_proj\.", "model.aligner.vision_proj."),
    (r"adaptor\.layers\.1\.", "model.aligner.proj."),  # the hybrid adaptor starts with its GELU
    (r"adaptor\.layers\.0\.", "model.aligner.linear1."),
    (r"adaptor\.layers\.2\.", "model.aligner.linear2."),
]


def _parse_original(raw: Settings) -> ModelConfig:
    vision, projector = raw.section("vision_config"), raw.section("aligner_config").section("params")
    tower = vision.choice("cls", ("CLIPVisionTower", "HybridVisionTower"))
    params = vision.section("params")
    hybrid = tower == "HybridVisionTower"
    params.refuse_unsupported({"concat_type": ("tuple",), "select_layers": ()})
    low_params = params.section("low_res_cfg") if hybrid else params
    high_params = params.section("high_res_cfg") if hybrid else None
    low = siglip_from_original(low_params)
    high = sam_from_original(high_params) if high_params else None
    projector.choice("projector_type", ("low_high_hybrid_split_mlp_gelu" if hybrid else "mlp_gelu",))
    language = raw.section("language_config")
    return ModelConfig(
        vision=VisionConfig(
            siglip=low,
            sam=high,
            low_norm=tower_normalization(low_params),
            high_norm=tower_normalization(high_params) if high_params else None,
        ),
        adaptor=AdaptorConfig(
            low_width=low.width,
            high_width=high.downsample_widths[-1] if high else None,
            width=projector.integer("n_embed"),
            depth=projector.integer("depth", 1, high=MAX_VISION_LAYERS),
        ),
        decoder=parse_llama(language),
        layout="original",
        tied_head=language.flag("tie_word_embeddings", False),
    )


def _parse_transformers(raw: Settings, preprocessor: Settings | None) -> ModelConfig:
    vision = raw.section("vision_config", optional=True)
    vision.choice("model_type", ("siglip_vision_model",), "siglip_vision_model")
    vision.refuse_unsupported({"num_channels": (3,)})
    # Defaults of transformers' SiglipVisionConfig.
    low = SiglipConfig(
        image_size=vision.integer("image_size", 224, high=MAX_IMAGE_SIZE),
        patch_size=vision.integer("patch_size", 16),
        width=vision.integer("hidden_size", 768),
        layers=vision.integer("num_hidden_layers", 12, high=MAX_VISION_LAYERS),
        heads=vision.integer("num_attention_heads", 12),
        mlp_width=vision.integer("intermediate_size", 3072),
        activation=vision.choice("hidden_act", tuple(GELU_APPROXIMATIONS), "gelu_pytorch_tanh"),
        norm_eps=vision.number("layer_norm_eps", 1e-6, high=1.0),
    )
    hybrid = raw.values["model_type"] == "deepseek_vl_hybrid"
    high = _sam_from_transformers(raw.section("high_res_vision_config", optional=True)) if hybrid else None
    norms = _branch_normalizations(preprocessor) if hybrid else (None, None)
    decoder = parse_llama(raw.section("text_config", optional=True))
    return ModelConfig(
        vision=VisionConfig(low, high, *norms),
        adaptor=AdaptorConfig(
            low_width=low.width,
            high_width=high.downsample_widths[-1] if high else None,
            width=decoder.width,
        ),
        decoder=decoder,
        layout="transformers",
        tied_head=raw.flag("tie_word_embeddings", True),
    )


def _branch_normalizations(
    preprocessor: Settings | None,
) -> tuple[NormalizationConfig | None, NormalizationConfig | None]:
    """Return the normalization of both branches, low first; the released 7B's without settings."""
    if preprocessor is None:
        return NormalizationConfig(HALF_RGB, HALF_RGB), NormalizationConfig(CLIP_MEAN, CLIP_STD)
    if not preprocessor.nullable_flag("do_normalize", True):
        return None, None
    # transformers' class defaults to CLIP's values for both branches.
    low, high = (
        NormalizationConfig(
            preprocessor.triple(f"{prefix}image_mean", CLIP_MEAN),
            preprocessor.triple(f"{prefix}image_std", CLIP_STD, low=MIN_STD, high=MAX_STD),
        )
        for prefix in ("", "high_res_")
    )
    return low, high


def _sam_from_transformers(raw: Settings) -> SamConfig:
    raw.choice("model_type", ("sam_vision_model",), "sam_vision_model")
    raw.refuse_unsupported(
        {"num_channels": (3,), "qkv_bias": (True,), "use_abs_pos": (True,), "use_rel_pos": (True,)}
    )
    # Defaults of transformers' SamVisionConfig.
    width = raw.integer("hidden_size", 768)
    neck = raw.integer("output_channels", 256)
    return SamConfig(
        image_size=raw.integer("image_size", 1024, high=MAX_IMAGE_SIZE),
        patch_size=raw.integer("patch_size", 16),
        width=width,
        layers=raw.integer("num_hidden_layers", 12, high=MAX_VISION_LAYERS),
        heads=raw.integer("num_attention_heads", 12),
        mlp_width=raw.optional_integer("mlp_dim", int(width * raw.number("mlp_ratio", 4.0, high=1024.0))),
        window_size=raw.integer("window_size", 14, low=0),
        global_layers=raw.integers("global_attn_indexes", (2, 5, 8, 11), low=0),
        neck_width=neck,
        downsample_widths=(2 * neck, 4 * neck),
        activation=raw.choice("hidden_act", tuple(GELU_APPROXIMATIONS), "gelu"),
        norm_eps=raw.number("layer_norm_eps", 1e-6, high=1.0),
    )
