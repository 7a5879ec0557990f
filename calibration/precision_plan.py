"""Precision plans: the precision of every layer, as rules by layer name.

A plan is a YAML file, or the name of a recipe in ``calibration/recipes``. Layers are named as in
the reference model (``vision_encoder.high.blocks.0.attn.qkv``, ``decoder.head``). Only linear
layers and convolutions are quantized; all other operations (norms, softmax, RoPE, residuals) keep
the plan's base precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from reference.model.config import ModelConfig
from reference.trace import PRECISION_DTYPES, TRACED_COMPONENTS, build_component
from runtimes.bundle.yaml_files import read_yaml
from runtimes.errors import UserError

RECIPES = Path(__file__).parent / "recipes"
PRECISION_KINDS = ("float", "int8", "fp8", "int8-weights", "int4", "palette4")
# Weights of the kind, with activations quantized dynamically, per token.
DYNAMIC_FAMILIES = {"8da8w": "int8-weights", "8da4w": "int4"}
DEFAULT_GROUP_SIZES = {"int4": 32, "palette4": 16}  # kinds that have groups
CACHE_PRECISIONS = ("float", "int8", "fp8")


@dataclass(frozen=True)
class LayerPrecision:
    """The precision of one layer.

    ``float`` is the plan's base. ``int8`` and ``fp8`` (E4M3) quantize weights per output channel
    and activations per tensor. The other kinds quantize weights only: ``int8-weights`` per output
    channel; ``int4`` with one scale per ``group`` of consecutive inputs; ``palette4`` with a
    palette of 16 numbers per ``group`` of consecutive output channels. With ``dynamic`` (``8da8w``
    and ``8da4w`` in plans), activations are quantized to 8 bits too; each token's range gives its
    scale and zero point.
    """

    kind: str
    group: int = 0  # of int4 and palette4
    dynamic: bool = False

    @classmethod
    def parse(cls, text: str) -> LayerPrecision:
        """Parse a precision such as ``int8`` or ``int4-g128``.

        Raises:
            ValueError: there is no such precision, or the group is too small.
        """
        family, dash, group = text.partition("-g")
        if family not in (*PRECISION_KINDS, *DYNAMIC_FAMILIES):
            family, dash = text, ""
        kind, dynamic = DYNAMIC_FAMILIES.get(family, family), family in DYNAMIC_FAMILIES
        if kind not in PRECISION_KINDS or (dash and (not group or kind not in DEFAULT_GROUP_SIZES)):
            raise ValueError(
                f"there is no precision {text!r} of a layer; there are"
                f" {', '.join((*PRECISION_KINDS, *DYNAMIC_FAMILIES))}, int4-g128"
            )
        if kind not in DEFAULT_GROUP_SIZES:
            return cls(kind, dynamic=dynamic)
        number = int(group) if group else DEFAULT_GROUP_SIZES[kind]
        if number < 2:
            raise ValueError(f"a group of {number} is too small in {text!r}")
        return cls(kind, number, dynamic)

    @property
    def quantizes_activations(self) -> bool:
        """Whether activations are quantized with calibrated scales."""
        return self.kind in ("int8", "fp8")

    def group_axis(self, layer: LayerSpec) -> tuple[int, str]:
        """Return the size and the name of a layer's axis that is divided into groups."""
        if self.kind == "int4":
            return layer.inputs, "inputs"
        return layer.weight[0], "output channels"

    @property
    def family(self) -> str:
        """The precision as in a plan, without the group; backends support families."""
        return next(
            (name for name, kind in DYNAMIC_FAMILIES.items() if self.dynamic and kind == self.kind), self.kind
        )

    def __str__(self) -> str:
        """Return the precision as in a plan, such as ``int4-g32``."""
        return f"{self.family}-g{self.group}" if self.kind in DEFAULT_GROUP_SIZES else self.family


FLOAT = LayerPrecision("float")


@dataclass(frozen=True)
class Rule:
    """The precision of the layers that match a pattern and, if it is set, a kind.

    ``layers`` is a shell pattern of layer names; ``*`` also matches dots.
    """

    layers: str
    precision: LayerPrecision
    kind: str | None = None  # linear or conv

    def matches(self, layer: LayerSpec) -> bool:
        """Return whether the rule applies to a layer."""
        return self.kind in (None, layer.kind) and fnmatchcase(layer.name, self.layers)


@dataclass(frozen=True)
class LayerSpec:
    """A layer that can be quantized; ``weight`` is the shape of its weight ``[out, in, ...]``."""

    name: str
    kind: str
    weight: tuple[int, ...]

    @property
    def inputs(self) -> int:
        """Number of input channels."""
        return self.weight[1]


@dataclass(frozen=True)
class PrecisionPlan:
    """A precision per layer; if several rules match a layer, the last one applies."""

    name: str
    base: str = "fp32"
    kv_cache: str = "float"
    rules: tuple[Rule, ...] = ()

    def precision_of(self, layer: LayerSpec) -> LayerPrecision:
        """Return the precision of a layer.

        Raises:
            UserError: the layer cannot have that precision.
        """
        precision = FLOAT
        for rule in self.rules:
            if rule.matches(layer):
                precision = rule.precision
        if layer.kind != "linear" and (precision.kind in DEFAULT_GROUP_SIZES or precision.dynamic):
            raise UserError(
                f"The precision plan {self.name} gives {precision} to the convolution {layer.name}, but only"
                " linear layers can have it; use int8-weights."
            )
        if precision.kind in DEFAULT_GROUP_SIZES:
            size, axis = precision.group_axis(layer)
            if size % precision.group:
                raise UserError(
                    f"The group size {precision.group} does not divide the {size} {axis} of"
                    f" {layer.name}; choose another in the precision plan {self.name}."
                )
        return precision

    def with_base(self, base: str) -> PrecisionPlan:
        """Return the plan with another base, which is appended to its name."""
        return self if base == self.base else replace(self, name=f"{self.name}-{base}", base=base)

    @property
    def quantizes(self) -> bool:
        """Whether any layer or the KV cache is quantized."""
        return bool(self.rules) or self.kv_cache != "float"

    @property
    def quantizes_activations(self) -> bool:
        """Whether a rule quantizes activations with calibrated scales."""
        return any(rule.precision.quantizes_activations for rule in self.rules)

    @property
    def quantizes_inputs_or_cache(self) -> bool:
        """Whether activations, statically or dynamically, or the KV cache are quantized."""
        dynamic = any(rule.precision.dynamic for rule in self.rules)
        return dynamic or self.quantizes_activations or self.kv_cache != "float"

    def needs_scales(self, config: ModelConfig) -> bool:
        """Return whether the plan needs calibrated scales, of activations or of the KV cache."""
        layers = (layer for component in TRACED_COMPONENTS for layer in component_layers(config, component))
        return self.kv_cache != "float" or any(
            self.precision_of(layer).quantizes_activations for layer in layers
        )

    def check(self, config: ModelConfig) -> None:
        """Check the plan against a model.

        Raises:
            UserError: a layer cannot have its precision, or a rule matches no layer.
        """
        layers = [layer for component in TRACED_COMPONENTS for layer in component_layers(config, component)]
        for layer in layers:
            self.precision_of(layer)
        for rule in self.rules:
            if not any(rule.matches(layer) for layer in layers):
                raise UserError(
                    f"The precision plan {self.name} names {rule.layers!r}, which no layer matches."
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the YAML file, which does not have the name."""
        rules = []
        for rule in self.rules:
            row = {"layers": rule.layers, "precision": str(rule.precision)}
            rules.append({**row, "kind": rule.kind} if rule.kind else row)
        return {"base": self.base, "kv_cache": self.kv_cache, "rules": rules}

    def save(self, file: Path, comment: str = "") -> None:
        """Write the YAML file, with a comment at its start."""
        lines = "".join(f"# {line}\n" for line in comment.splitlines())
        file.write_text(lines + yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")


@cache
def component_layers(config: ModelConfig, component: str) -> tuple[LayerSpec, ...]:
    """Return every linear layer and convolution of a component, in the order of the model."""
    return tuple(
        LayerSpec(f"{component}.{path}", kind, tuple(module.weight.shape))
        for path, module in build_component(config, component).named_modules()
        if (kind := layer_kind(module))
    )


def layer_kind(module: nn.Module) -> str | None:
    """Return ``linear`` or ``conv``; None for a module that is never quantized."""
    if isinstance(module, nn.Linear):
        return "linear"
    return "conv" if isinstance(module, nn.Conv2d) else None


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def recipe_names_with_base() -> list[str]:
    """Return the names of recipes with an explicit base, such as ``int8-fp16``."""
    return [f"{name}-{base}" for name in recipe_names() for base in PRECISION_DTYPES]


def load_precision(precision: str) -> PrecisionPlan:
    """Load the plan of a ``--precision``: a float precision, a recipe, or a YAML file.

    ``int8-fp16`` is the recipe ``int8`` with the base fp16.

    Raises:
        UserError: there is no such precision, or the file is not a precision plan.
    """
    if precision in PRECISION_DTYPES:
        return PrecisionPlan(precision, base=precision)
    recipe, file = RECIPES / f"{precision}.yaml", Path(precision).expanduser()
    if recipe.is_file():
        return read_plan(recipe)
    name, _, base = precision.rpartition("-")
    if precision in recipe_names_with_base():
        return read_plan(RECIPES / f"{name}.yaml").with_base(base)
    if file.suffix in (".yaml", ".yml"):
        plan = read_plan(file)
        if plan.name in (*PRECISION_DTYPES, *recipe_names(), *recipe_names_with_base()):
            raise UserError(f"{file} has the name of a shipped precision; rename the file.")
        return plan
    names = ", ".join([*PRECISION_DTYPES, *recipe_names()])
    raise UserError(f"There is no precision {precision!r}; there are {names}, or a YAML file of a plan.")


def read_plan(file: Path) -> PrecisionPlan:
    """Read a plan from a YAML file; the name of the file becomes that of the plan.

    Raises:
        UserError: the file cannot be read, or is not a precision plan.
    """
    try:
        return replace(_parse_plan(read_yaml(file, "precision plan")), name=file.stem)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is not a precision plan: {str(error).strip(chr(39))}.") from error


def _parse_plan(raw: Any) -> PrecisionPlan:
    _check_keys(raw, {"base", "kv_cache", "rules"}, "the file")
    base, cache = raw.get("base", "fp32"), raw.get("kv_cache", "float")
    if base not in PRECISION_DTYPES:
        raise ValueError(f"its base {base!r} is not one of {', '.join(PRECISION_DTYPES)}")
    if cache not in CACHE_PRECISIONS:
        raise ValueError(f"its kv_cache {cache!r} is not one of {', '.join(CACHE_PRECISIONS)}")
    rules = []
    for row in raw.get("rules") or []:
        _check_keys(row, {"layers", "precision", "kind"}, "a rule")
        kind = row.get("kind")
        if kind not in (None, "linear", "conv"):
            raise ValueError(f"the kind {kind!r} of a rule is neither linear nor conv")
        rules.append(Rule(str(row["layers"]), LayerPrecision.parse(str(row["precision"])), kind))
    return PrecisionPlan("", base, cache, tuple(rules))


def _check_keys(raw: Any, keys: set[str], what: str) -> None:
    if not isinstance(raw, Mapping):
        raise ValueError(f"{what} must be a mapping with the keys {', '.join(sorted(keys))}")
    if set(raw) - keys:
        raise ValueError(f"{what} has the unknown keys {', '.join(sorted(map(str, set(raw) - keys)))}")
