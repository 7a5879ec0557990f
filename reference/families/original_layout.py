"""The towers in ``config.json`` of the original layout, which DeepSeek-VL and Janus share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from reference.families.limits import MAX_IMAGE_SIZE, MAX_STD, MAX_VISION_LAYERS, MIN_STD
from reference.model.config import GELU_APPROXIMATIONS, NormalizationConfig, SamConfig, SiglipConfig
from reference.settings import Settings

# Sections about image generation, which Janus and JanusFlow have and DeepSeek-VL does not.
GENERATION_SECTIONS = re.compile(r"gen_\w+_config|vision_gen_\w+_config")


def generates_images(raw: Mapping[str, Any]) -> bool:
    """Return whether a ``config.json`` of model type ``multi_modality`` is of Janus.

    DeepSeek-VL and Janus have this type, the class ``MultiModalityCausalLM`` and the same sections;
    only Janus has sections about image generation, such as ``gen_vision_config``.
    """
    return any(GENERATION_SECTIONS.fullmatch(key) for key in raw)


# Towers that original checkpoints give by name, without sizes.
_SIGLIP_BY_NAME: dict[str, dict[str, Any]] = {
    "siglip_large_patch16_384": {},
    "siglip_large_patch16_256": {"image_size": 256},
}
_SAM_BY_NAME: dict[str, dict[str, Any]] = {"sam_b_downsample": {}}


def siglip_from_original(params: Settings) -> SiglipConfig:
    """Parse the parameters of a SigLIP tower."""
    config = SiglipConfig(**_tower_sizes(params, _SIGLIP_BY_NAME, SiglipConfig()))
    # As in the original: -1 keeps every layer, -2 (its default) all but the last, n the first n.
    select = params.integer("select_layer", -2, low=-MAX_VISION_LAYERS)
    return replace(config, layers=min(config.layers, config.layers + select + 1 if select <= 0 else select))


def sam_from_original(params: Settings) -> SamConfig:
    """Parse the parameters of a SAM tower."""
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
        if isinstance(value, bool):  # the original's towers do not read flags
            continue
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


def tower_normalization(params: Settings) -> NormalizationConfig | None:
    """Return the normalization inside a tower; None if it has none."""
    if params.values.get("pixel_mean") is None or params.values.get("pixel_std") is None:
        return None
    return NormalizationConfig(
        params.triple("pixel_mean"), params.triple("pixel_std", low=MIN_STD, high=MAX_STD)
    )
