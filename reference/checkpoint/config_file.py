"""Parser of a checkpoint's ``config.json`` into a ``ModelConfig``.

The model family, found by ``model_type``, parses its own layouts (``reference.families``). Both
the original code and transformers leave out keys that equal the defaults of the class that wrote
them, so the families fill in those defaults. They refuse a key that changes the computation in a
way that the reference model does not implement.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reference.families.registry import find_family
from reference.model.config import ModelConfig
from reference.settings import Settings, format_value
from runtimes.errors import UserError


def parse_config(raw: Mapping[str, Any], where: str, preprocessor: Settings | None = None) -> ModelConfig:
    """Parse the JSON object of a ``config.json``.

    Args:
        raw: the JSON object.
        where: file name for error messages.
        preprocessor: the image processor's settings. transformers stores the normalization of
            both branches there, the original layout in ``config.json``.

    Raises:
        UserError: the config is of no family, is incomplete or inconsistent, or asks for something
            that is not supported.
    """
    settings = Settings.from_json(raw, where)
    family = find_family(raw, where)
    _refuse_quantized(settings)
    try:
        return family.parse_config(settings, preprocessor)
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
