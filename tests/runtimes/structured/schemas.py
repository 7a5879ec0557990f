"""Random JSON Schemas, and logits under which their answers end."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

WORDS = (
    "id",
    "Name",
    "größe",
    "value in €",
    "日付",
    'a "quoted" key',
    "x/y",
    "total_amount",
    "line\nbreak",
    "",
)


def random_schema(source: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema of the keywords that llguidance supports, whose answers are short."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern", "format"]
    if depth < 3:
        kinds += ["object"] * 5 + ["array"] * 3 + ["anyOf", "ref"]
    kind = source.choice(kinds)
    if kind == "object":
        names = source.sample(WORDS, source.randint(0, 5))
        return {
            "type": "object",
            "properties": {name: random_schema(source, depth + 1) for name in names},
            "required": [name for name in names if source.random() < 0.7],
            "additionalProperties": source.random() < 0.1,
        }
    if kind == "array":
        least = source.randint(0, 2)
        bounds = {"minItems": least, "maxItems": least + source.randint(0, 2)}
        return {"type": "array", "items": random_schema(source, depth + 1), **bounds}
    if kind == "anyOf":
        return {"anyOf": [random_schema(source, depth + 1) for _ in range(source.randint(1, 3))]}
    if kind == "ref":
        return {"allOf": [{"$ref": "#/$defs/shared"}]}
    if kind == "string":
        least = source.randint(0, 3)
        return {"type": "string", "minLength": least, "maxLength": least + source.randint(0, 8)}
    if kind == "integer":
        low = source.randint(-1000, 1000)
        return {"type": "integer", "minimum": low, "maximum": low + source.randint(0, 5000)}
    if kind == "number":
        return {"type": "number", "minimum": -1, "maximum": source.choice([0, 2.5, 100])}
    if kind == "enum":
        return {"enum": source.sample([1, -2.5, "a", "b c", None, True, "größe", "", [1], {"k": "v"}], 3)}
    if kind == "const":
        return {"const": source.choice(["fixed", 7, None, False])}
    if kind == "pattern":
        return {
            "type": "string",
            "pattern": source.choice([r"^\d{4}-\d{2}$", "^[a-f]{1,6}$", r"^(EUR|USD) \d{1,3}$"]),
        }
    if kind == "format":
        return {"type": "string", "format": source.choice(["date", "time", "uuid"])}
    return {"type": kind}


def with_definitions(schema: dict[str, Any]) -> dict[str, Any]:
    shared = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}}
    return {**schema, "$defs": {"shared": {**shared, "required": ["n"], "additionalProperties": False}}}


def ending_logits(noise: np.random.Generator, ends: np.ndarray) -> np.ndarray:
    """Random logits ``[V]``, with tokens that end something more likely than others."""
    logits = noise.standard_normal(len(ends)).astype(np.float32)
    logits[ends] += 9
    return logits
