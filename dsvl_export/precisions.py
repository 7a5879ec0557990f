"""Precisions of bundles: what a backend can compile, and which plan and scales a bundle keeps of each."""

from __future__ import annotations

from pathlib import Path

from calibration.precision import PrecisionPlan, component_layers, load_precision, read_plan, recipe_names
from calibration.table import TABLE_FILE, ScaleTable
from calibration.weights import QuantizedWeights
from dsvl_export.compilers import Compiler
from dsvl_export.planner.targets import Target
from reference.checkpoint import Checkpoint
from reference.config import ModelConfig
from reference.trace import TRACED_COMPONENTS
from runtimes.errors import UserError


def plan_for(compiler: Compiler, precision: str) -> PrecisionPlan:
    """The plan that a ``--precision`` names; what a recipe leaves alone is in the compiler's base."""
    plan = load_precision(precision)
    return plan.on(compiler.RECIPE_BASE) if precision in recipe_names() else plan


def check_plan(backend: str, compiler: Compiler, plan: PrecisionPlan, config: ModelConfig) -> None:
    """Refuse a plan that the model or the backend cannot have, before any work.

    Raises:
        UserError: names the layer, or the precision, and what there is instead.
    """
    plan.check(config)
    if plan.base not in compiler.PRECISIONS:
        raise UserError(
            f"The backend {backend} has no precision {plan.base!r}; it has {', '.join(compiler.PRECISIONS)}."
        )
    layers = {layer.name: layer for name in TRACED_COMPONENTS for layer in component_layers(config, name)}
    for name, layer in layers.items():
        family = plan.of(layer).family
        if family not in ("float", *compiler.LAYER_PRECISIONS):
            raise UserError(
                f"The backend {backend} cannot compute {name} in {family}; it has"
                f" {', '.join(compiler.LAYER_PRECISIONS)}."
            )
    if plan.kv_cache not in ("float", *compiler.CACHE_PRECISIONS):
        raise UserError(
            f"The backend {backend} has no KV cache in {plan.kv_cache}; the nearest is"
            f" {', '.join(compiler.CACHE_PRECISIONS) or 'float'}."
        )


def kinds_of(plan: PrecisionPlan, config: ModelConfig) -> list[str]:
    """The precisions that a target must support for a plan, in the words of ``targets.yaml``."""
    names = {"float": plan.base, "int8-weights": "int8", "palette4": "int4"}
    layers = (layer for name in TRACED_COMPONENTS for layer in component_layers(config, name))
    kinds = dict.fromkeys(plan.of(layer).kind for layer in layers)
    return list(dict.fromkeys(names.get(kind, kind) for kind in kinds))


def check_target(target: Target, backend: str, plan: PrecisionPlan, config: ModelConfig) -> None:
    """Refuse what a device cannot run.

    Raises:
        UserError: names what comes nearest.
    """
    for precision in kinds_of(plan, config):
        target.check(backend, precision)


def precision_folder(precision: str) -> str:
    """Where a bundle keeps the plan and the scales of a quantized precision."""
    return f"precisions/{precision}"


def bundled_plan(folder: Path, precision: str) -> PrecisionPlan:
    """The plan that a precision of a bundle was exported with."""
    file = folder / precision_folder(precision) / f"{precision}.yaml"
    return read_plan(file) if file.exists() else load_precision(precision)


def planned_weights(source: Checkpoint, folder: Path, precision: str) -> QuantizedWeights:
    """Parameters of a checkpoint in a precision of a bundle, with the scales that the bundle keeps.

    Raises:
        UserError: the scales are damaged, or of another checkpoint.
    """
    scales = folder / precision_folder(precision)
    table = ScaleTable.load(scales) if (scales / TABLE_FILE).exists() else None
    return QuantizedWeights(source, bundled_plan(folder, precision), table)
