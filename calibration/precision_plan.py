"""Precision plans: which layer computes in which precision, as rules that one can read.

A plan is a YAML file, or a recipe of ``calibration/recipes`` by its name. Layers are named as in the
reference model (``vision_encoder.high.blocks.0.attn.qkv``, ``decoder.head``); all that is no linear layer
or convolution (norms, softmax, RoPE, residuals) keeps the plan's base precision.
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
KINDS = ("float", "int8", "fp8", "int8-weights", "int4", "palette4")
# Weights alone, as in the kind, on activations that are quantized as they come, token by token.
DYNAMIC = {"8da8w": "int8-weights", "8da4w": "int4"}
GROUPS = {"int4": 32, "palette4": 16}  # of those that have groups, the usual one
CACHES = ("float", "int8", "fp8")


@dataclass(frozen=True)
class LayerPrecision:
    """How one layer computes.

    ``float``: in the plan's base. ``int8`` and ``fp8`` (E4M3): weights per output channel and activations
    per tensor. ``int8-weights``: weights per output channel alone. ``int4``: weights alone, a scale for
    every ``group`` of consecutive inputs. ``palette4``: weights alone, each one of 16 numbers that
    ``group`` consecutive output channels share. ``dynamic``: activations in 8 bits besides, with a scale and
    a zero point for each token that its own range gives; ``8da8w`` and ``8da4w`` in plans.
    """

    kind: str
    group: int = 0  # of int4 and palette4
    dynamic: bool = False

    @classmethod
    def parse(cls, text: str) -> LayerPrecision:
        """From ``int8`` or ``int4-g128``; raises ValueError on anything else."""
        family, dash, group = text.partition("-g")
        if family not in (*KINDS, *DYNAMIC):
            family, dash = text, ""
        kind, dynamic = DYNAMIC.get(family, family), family in DYNAMIC
        if kind not in KINDS or (dash and (not group or kind not in GROUPS)):
            raise ValueError(
                f"there is no precision {text!r} of a layer; there are {', '.join((*KINDS, *DYNAMIC))},"
                " int4-g128"
            )
        if kind not in GROUPS:
            return cls(kind, dynamic=dynamic)
        number = int(group) if group else GROUPS[kind]
        if number < 2:
            raise ValueError(f"a group of {number} is too small in {text!r}")
        return cls(kind, number, dynamic)

    @property
    def quantizes_activations(self) -> bool:
        return self.kind in ("int8", "fp8")

    def grouped(self, layer: LayerSpec) -> tuple[int, str]:
        """How many of what a layer has along the axis of groups."""
        if self.kind == "int4":
            return layer.inputs, "inputs"
        return layer.weight[0], "output channels"

    @property
    def family(self) -> str:
        """As in a plan, without the group: what a backend has or has not."""
        return next((name for name, kind in DYNAMIC.items() if self.dynamic and kind == self.kind), self.kind)

    def __str__(self) -> str:
        return f"{self.family}-g{self.group}" if self.kind in GROUPS else self.family


FLOAT = LayerPrecision("float")


@dataclass(frozen=True)
class Rule:
    """Layers by a shell pattern of their name (``*`` crosses dots) and, if given, by their kind."""

    layers: str
    precision: LayerPrecision
    kind: str | None = None  # linear or conv

    def matches(self, layer: LayerSpec) -> bool:
        return self.kind in (None, layer.kind) and fnmatchcase(layer.name, self.layers)


@dataclass(frozen=True)
class LayerSpec:
    """One layer that can be quantized: ``weight`` is its shape, output channels first."""

    name: str
    kind: str
    weight: tuple[int, ...]

    @property
    def inputs(self) -> int:
        return self.weight[1]


@dataclass(frozen=True)
class PrecisionPlan:
    """A precision per layer; of several rules that match, the last one holds."""

    name: str
    base: str = "fp32"
    kv_cache: str = "float"
    rules: tuple[Rule, ...] = ()

    def of(self, layer: LayerSpec) -> LayerPrecision:
        """The precision of a layer.

        Raises:
            UserError: the layer cannot have it.
        """
        precision = FLOAT
        for rule in self.rules:
            if rule.matches(layer):
                precision = rule.precision
        if layer.kind != "linear" and (precision.kind in GROUPS or precision.dynamic):
            raise UserError(
                f"{layer.name} is a convolution, which {self.name} gives {precision}; only linear layers"
                " can have that, int8-weights is the nearest."
            )
        if precision.kind in GROUPS:
            along, what = precision.grouped(layer)
            if along % precision.group:
                raise UserError(
                    f"The group size {precision.group} does not divide the {along} {what} of"
                    f" {layer.name}; choose another in the precision plan {self.name}."
                )
        return precision

    def on(self, base: str) -> PrecisionPlan:
        """The plan with another base, which its name then says."""
        return self if base == self.base else replace(self, name=f"{self.name}-{base}", base=base)

    @property
    def quantizes(self) -> bool:
        return bool(self.rules) or self.kv_cache != "float"

    @property
    def quantizes_activations(self) -> bool:
        """Whether some rule gives the inputs of layers scales."""
        return any(rule.precision.quantizes_activations for rule in self.rules)

    @property
    def quantizes_inputs_or_cache(self) -> bool:
        """Whether inputs of layers, also as they come, or the KV cache are quantized."""
        dynamic = any(rule.precision.dynamic for rule in self.rules)
        return dynamic or self.quantizes_activations or self.kv_cache != "float"

    def needs_scales(self, config: ModelConfig) -> bool:
        """Whether anything must be calibrated: activations or the KV cache."""
        layers = (layer for component in TRACED_COMPONENTS for layer in component_layers(config, component))
        return self.kv_cache != "float" or any(self.of(layer).quantizes_activations for layer in layers)

    def check(self, config: ModelConfig) -> None:
        """Raise UserError where a layer cannot have its precision, or a rule matches no layer."""
        layers = [layer for component in TRACED_COMPONENTS for layer in component_layers(config, component)]
        for layer in layers:
            self.of(layer)
        for rule in self.rules:
            if not any(rule.matches(layer) for layer in layers):
                raise UserError(
                    f"The precision plan {self.name} names {rule.layers!r}, which no layer matches."
                )

    def to_dict(self) -> dict[str, Any]:
        """As in the YAML file, without the name."""
        rules = []
        for rule in self.rules:
            row = {"layers": rule.layers, "precision": str(rule.precision)}
            rules.append({**row, "kind": rule.kind} if rule.kind else row)
        return {"base": self.base, "kv_cache": self.kv_cache, "rules": rules}

    def save(self, file: Path, comment: str = "") -> None:
        """Write YAML; ``comment`` goes above it."""
        lines = "".join(f"# {line}\n" for line in comment.splitlines())
        file.write_text(lines + yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")


@cache
def component_layers(config: ModelConfig, component: str) -> tuple[LayerSpec, ...]:
    """Every linear layer and convolution of a component, in the order of the model."""
    return tuple(
        LayerSpec(f"{component}.{path}", kind, tuple(module.weight.shape))
        for path, module in build_component(config, component).named_modules()
        if (kind := layer_kind(module))
    )


def layer_kind(module: nn.Module) -> str | None:
    """``linear`` or ``conv``; None for a module that is never quantized."""
    if isinstance(module, nn.Linear):
        return "linear"
    return "conv" if isinstance(module, nn.Conv2d) else None


def recipe_names() -> list[str]:
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def based_recipes() -> list[str]:
    """Recipes on another base than their own."""
    return [f"{name}-{base}" for name in recipe_names() for base in PRECISION_DTYPES]


def load_precision(precision: str) -> PrecisionPlan:
    """The plan that a ``--precision`` names: a float precision, a recipe, or a YAML file.

    ``int8-fp16`` is the recipe ``int8`` with all that is not quantized in fp16.

    Raises:
        UserError: there is none of that name, or the file is no plan.
    """
    if precision in PRECISION_DTYPES:
        return PrecisionPlan(precision, base=precision)
    recipe, file = RECIPES / f"{precision}.yaml", Path(precision).expanduser()
    if recipe.is_file():
        return read_plan(recipe)
    name, _, base = precision.rpartition("-")
    if precision in based_recipes():
        return read_plan(RECIPES / f"{name}.yaml").on(base)
    if file.suffix in (".yaml", ".yml"):
        plan = read_plan(file)
        if plan.name in (*PRECISION_DTYPES, *recipe_names(), *based_recipes()):
            raise UserError(f"{file} has the name of a shipped precision; rename the file.")
        return plan
    known = ", ".join([*PRECISION_DTYPES, *recipe_names()])
    raise UserError(f"There is no precision {precision!r}; there are {known}, or a YAML file of a plan.")


def read_plan(file: Path) -> PrecisionPlan:
    """A plan from its YAML file, named like the file.

    Raises:
        UserError: it cannot be read, or is no plan.
    """
    try:
        return replace(_parse(read_yaml(file, "precision plan")), name=file.stem)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is no precision plan: {str(error).strip(chr(39))}.") from error


def _parse(raw: Any) -> PrecisionPlan:
    _no_others(raw, {"base", "kv_cache", "rules"}, "the file")
    base, cache = raw.get("base", "fp32"), raw.get("kv_cache", "float")
    if base not in PRECISION_DTYPES:
        raise ValueError(f"its base {base!r} is not one of {', '.join(PRECISION_DTYPES)}")
    if cache not in CACHES:
        raise ValueError(f"its kv_cache {cache!r} is not one of {', '.join(CACHES)}")
    rules = []
    for row in raw.get("rules") or []:
        _no_others(row, {"layers", "precision", "kind"}, "a rule")
        kind = row.get("kind")
        if kind not in (None, "linear", "conv"):
            raise ValueError(f"the kind {kind!r} of a rule is neither linear nor conv")
        rules.append(Rule(str(row["layers"]), LayerPrecision.parse(str(row["precision"])), kind))
    return PrecisionPlan("", base, cache, tuple(rules))


def _no_others(raw: Any, known: set[str], what: str) -> None:
    if not isinstance(raw, Mapping):
        raise ValueError(f"{what} must be a table of {', '.join(sorted(known))}")
    if set(raw) - known:
        raise ValueError(f"{what} has the unknown keys {', '.join(sorted(map(str, set(raw) - known)))}")
