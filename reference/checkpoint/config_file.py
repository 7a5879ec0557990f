"""Parser of a checkpoint's ``config.json`` in either layout into a ``ModelConfig``.

Two layouts exist: ``multi_modality`` (the original, arXiv 2403.05525) and transformers'
``deepseek_vl`` / ``deepseek_vl_hybrid``. Both leave out keys that equal the defaults of the class
that wrote them, so the parser fills in those defaults. It refuses a key that changes the
computation in a way that the reference model does not implement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from reference.checkpoint.settings import Settings, format_value
from reference.model.config import (
    CLIP_MEAN,
    CLIP_STD,
    GELU_APPROXIMATIONS,
    HALF_RGB,
    AdaptorConfig,
    DecoderConfig,
    ModelConfig,
    NormalizationConfig,
    SamConfig,
    SiglipConfig,
    VisionConfig,
)
from runtimes.errors import UserError

MODEL_TYPES = ("multi_modality", "deepseek_vl", "deepseek_vl_hybrid")
MAX_DECODER_LAYERS = 128  # tracing takes about 0.1 s per layer
MAX_VISION_LAYERS = 64  # of one tower
MAX_IMAGE_SIZE = 4096  # pixels
MAX_VOCAB_SIZE = 1 << 24
MAX_POSITIONS = 1 << 20
MIN_STD, MAX_STD = 1e-6, 1000.0


def parse_config(raw: Mapping[str, Any], where: str, preprocessor: Settings | None = None) -> ModelConfig:
    """Parse the JSON object of a ``config.json``.

    Args:
        raw: the JSON object.
        where: file name for error messages.
        preprocessor: the image processor's settings. transformers stores the normalization of
            both branches there, the original layout in ``config.json``.

    Raises:
        UserError: the config is not a DeepSeek-VL config, is incomplete or inconsistent, or asks
            for something that is not supported.
    """
    settings = Settings.from_json(raw, where)
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise UserError(
            f"{where} has model_type {format_value(kind)}, which is not a DeepSeek-VL model; expected one"
            f" of {', '.join(MODEL_TYPES)}."
        )
    _refuse_quantized(settings)
    try:
        if kind == "multi_modality":
            return _parse_original(settings)
        return _parse_transformers(settings, preprocessor)
    except ValueError as error:  # inconsistent sizes
        raise UserError(f"{where}: {error}.") from error


def _refuse_quantized(settings: Settings) -> None:
    """Raise UserError for a checkpoint that a quantizer wrote: its tensors are codes and scales."""
    parts = [settings.values, *(part for part in settings.values.values() if isinstance(part, Mapping))]
    for part in parts:
        for key in ("quantization_config", "compression_config"):
            quantization = part.get(key)
            if quantization:
                raise UserError(
                    f"{settings.file} has a {key}: the weights are quantized already (by"
                    f" {_quantization_method(quantization)})."
                    " Export the unquantized checkpoint; --precision quantizes it."
                )


def _quantization_method(quantization: Any) -> str:
    if not isinstance(quantization, Mapping):
        return format_value(quantization)
    method = quantization.get("quant_method")
    if method is None and any(name.startswith("bnb_") for name in quantization):
        method = "bitsandbytes"  # its older versions do not write their name
    return format_value(method) if method else "an unnamed method"


# Towers that original checkpoints give by name, without sizes.
_SIGLIP_BY_NAME: dict[str, dict[str, Any]] = {
    "siglip_large_patch16_384": {},
    "siglip_large_patch16_256": {"image_size": 256},
}
_SAM_BY_NAME: dict[str, dict[str, Any]] = {"sam_b_downsample": {}}


def _parse_original(raw: Settings) -> ModelConfig:
    vision, projector = raw.section("vision_config"), raw.section("aligner_config").section("params")
    tower = vision.choice("cls", ("CLIPVisionTower", "HybridVisionTower"))
    params = vision.section("params")
    hybrid = tower == "HybridVisionTower"
    params.refuse_unsupported({"concat_type": ("tuple",), "select_layers": ()})
    low_params = params.section("low_res_cfg") if hybrid else params
    high_params = params.section("high_res_cfg") if hybrid else None
    low = _siglip_from_original(low_params)
    high = _sam_from_original(high_params) if high_params else None
    projector.choice("projector_type", ("low_high_hybrid_split_mlp_gelu" if hybrid else "mlp_gelu",))
    language = raw.section("language_config")
    return ModelConfig(
        vision=VisionConfig(
            siglip=low,
            sam=high,
            low_norm=_tower_normalization(low_params),
            high_norm=_tower_normalization(high_params) if high_params else None,
        ),
        adaptor=AdaptorConfig(
            low_width=low.width,
            high_width=high.downsample_widths[-1] if high else None,
            width=projector.integer("n_embed"),
            depth=projector.integer("depth", 1, high=MAX_VISION_LAYERS),
        ),
        decoder=_parse_llama(language),
        layout="original",
        tied_head=language.flag("tie_word_embeddings", False),
    )


def _siglip_from_original(params: Settings) -> SiglipConfig:
    config = SiglipConfig(**_tower_sizes(params, _SIGLIP_BY_NAME, SiglipConfig()))
    # As in the original: -1 keeps every layer, -2 (its default) all but the last, n the first n.
    select = params.integer("select_layer", -2, low=-MAX_VISION_LAYERS)
    return replace(config, layers=min(config.layers, config.layers + select + 1 if select <= 0 else select))


def _sam_from_original(params: Settings) -> SamConfig:
    config = SamConfig(**_tower_sizes(params, _SAM_BY_NAME, SamConfig()))
    if len(config.downsample_widths) != 2:
        raise params.error("downsample_widths", "expected two downsample_widths")
    # The original's second neck reads the lowest global layer, whatever the order of the list.
    return replace(config, global_layers=tuple(sorted(config.global_layers)))


def _tower_sizes(
    params: Settings, by_name: Mapping[str, dict[str, Any]], default: SiglipConfig | SamConfig
) -> dict[str, Any]:
    """Return a tower's sizes: those of its name, overridden by explicit keys (as in ``tiny``)."""
    name = params.text("model_name", next(iter(by_name)))
    if name not in by_name and not all(key in params for key in ("width", "layers", "heads")):
        raise params.error("model_name", f"which is not supported; expected {' or '.join(by_name)}")
    sizes: dict[str, Any] = {**asdict(default), **by_name.get(name, {})}
    bounds = {"layers": MAX_VISION_LAYERS, "image_size": MAX_IMAGE_SIZE}
    for key, value in sizes.items():
        if isinstance(value, int):
            low = 0 if key == "window_size" else 1
            sizes[key] = params.integer(key, value, low, **{"high": bounds[key]} if key in bounds else {})
        elif isinstance(value, float):
            sizes[key] = params.number(key, value, high=1.0)
        elif isinstance(value, str):
            sizes[key] = params.choice(key, tuple(GELU_APPROXIMATIONS), value)
        else:
            sizes[key] = params.integers(key, value, low=0 if key == "global_layers" else 1)
    return sizes


def _tower_normalization(params: Settings) -> NormalizationConfig | None:
    if params.values.get("pixel_mean") is None or params.values.get("pixel_std") is None:
        return None
    return NormalizationConfig(
        params.triple("pixel_mean"), params.triple("pixel_std", low=MIN_STD, high=MAX_STD)
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
    decoder = _parse_llama(raw.section("text_config", optional=True))
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


# Keys of LLaMA and related models that change the computation, with the values that do not.
_LLAMA_KEYS_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "sliding_window": (),
    "attention_chunk_size": (),
    "layer_types": (),
    "no_rope_layers": (),
    "partial_rotary_factor": (1, 1.0),
    "rotary_pct": (1, 1.0),
    "logit_scale": (1, 1.0),
    "logits_scaling": (1, 1.0),
    "logit_scaling": (1, 1.0),
    "embedding_multiplier": (1, 1.0),
    "residual_multiplier": (1, 1.0),
    "attention_multiplier": (),
    "query_pre_attn_scalar": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "clip_qkv": (),
    "use_qk_norm": (False,),
    "qk_norm": (False,),
    "qk_layernorm": (False,),
    "alibi": (False,),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
}


def _parse_llama(raw: Settings) -> DecoderConfig:
    raw.choice("model_type", ("llama",), "llama")
    layers = raw.integer("num_hidden_layers", 32, high=MAX_DECODER_LAYERS)
    if raw.values.get("layer_types") == ["full_attention"] * layers:
        raw = replace(raw, values={key: value for key, value in raw.values.items() if key != "layer_types"})
    raw.refuse_unsupported(_LLAMA_KEYS_WITHOUT_EFFECT)
    raw.choice("hidden_act", ("silu", "swish"), "silu")
    width = raw.integer("hidden_size", 4096)
    heads = raw.integer("num_attention_heads", 32)
    if width % heads:
        raise ValueError(f"the decoder's {heads} heads must divide its width of {width}")
    return DecoderConfig(
        vocab_size=raw.integer("vocab_size", 32000, high=MAX_VOCAB_SIZE),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=raw.optional_integer("num_key_value_heads", heads),
        head_dim=raw.optional_integer("head_dim", width // heads),
        mlp_width=raw.integer("intermediate_size", 11008),
        norm_eps=raw.number("rms_norm_eps", 1e-6, high=1.0),
        rope_theta=_rope_theta(raw),
        max_positions=raw.integer("max_position_embeddings", 2048, high=MAX_POSITIONS),
    )


def _rope_theta(raw: Settings) -> float:
    """Return the base of RoPE, which transformers 5 keeps in ``rope_parameters``.

    ``rope_scaling`` takes precedence over ``rope_parameters``.
    """
    key = "rope_scaling" if raw.values.get("rope_scaling") else "rope_parameters"
    rope = raw.section(key, optional=True)
    for name in ("rope_type", "type"):
        if name in rope:
            rope.choice(name, ("default",))
            break
    rope.refuse_unsupported({"partial_rotary_factor": (1, 1.0)})
    for name, value in rope.values.items():
        if isinstance(value, Mapping):
            raise rope.error(name, "which is not supported; expected one RoPE for all layers")
    return rope.number("rope_theta") if "rope_theta" in rope else raw.number("rope_theta", 10000.0)
