"""The model families, found by ``model_type``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reference.families import deepseek_vl, janus
from reference.families.family import Family
from reference.model.config import ModelConfig
from reference.settings import format_value
from runtimes.errors import UserError

# The name of a family is that of its module; a ``ModelConfig`` holds it.
FAMILIES: dict[str, Family] = {deepseek_vl.NAME: deepseek_vl, janus.NAME: janus}


def find_family(raw: Mapping[str, Any], where: str) -> Family:
    """Find the family of a ``config.json``.

    Args:
        raw: the JSON object.
        where: file name for error messages.

    Raises:
        UserError: no family has its ``model_type``.
    """
    kind = raw.get("model_type")
    for family in FAMILIES.values():
        if kind in family.MODEL_TYPES and family.recognizes(raw):
            return family
    types = dict.fromkeys(name for family in FAMILIES.values() for name in family.MODEL_TYPES)
    labels = " or ".join(family.LABEL for family in FAMILIES.values())
    raise UserError(
        f"{where} has model_type {format_value(kind)}, which is not a {labels} model; expected one of"
        f" {', '.join(types)}."
    )


def family_of(config: ModelConfig) -> Family:
    """Return the family of a config.

    Raises:
        UserError: this release does not have the family that a manifest names.
    """
    if config.family not in FAMILIES:
        raise UserError(
            f"The model family {config.family!r} is not supported; this release has {', '.join(FAMILIES)}."
        )
    return FAMILIES[config.family]
