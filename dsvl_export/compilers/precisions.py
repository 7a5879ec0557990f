"""Which precisions a backend compiles, and which plan and scales a bundle keeps for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from calibration.precision_plan import (
    PrecisionPlan,
    component_layers,
    load_precision,
    read_plan,
    recipe_names,
)
from calibration.quantized_weights import QuantizedWeights
from calibration.scale_table import TABLE_FILE, ScaleTable
from dsvl_export.compilers.protocol import ChecksPlans, Compiler
from dsvl_export.targets.options import CompileOptions
from dsvl_export.targets.targets import BASES, Target
from reference.checkpoint.checkpoint import Checkpoint
from reference.model.config import ModelConfig
from reference.trace import PRECISION_DTYPES, TRACED_COMPONENTS, component_contract
from runtimes.bundle.mixes import Mix
from runtimes.errors import UserError


def plan_for(compiler: Compiler, precision: str) -> PrecisionPlan:
    """Load the plan that a ``--precision`` names; a recipe is applied to the compiler's base."""
    plan = load_precision(precision)
    return plan.with_base(compiler.RECIPE_BASE) if precision in recipe_names() else plan


def check_plan(backend: str, compiler: Compiler, plan: PrecisionPlan, config: ModelConfig) -> None:
    """Refuse a plan that the model or the backend does not support.

    Raises:
        UserError: names the layer or the precision, and what the backend supports instead.
    """
    plan.check(config)
    if plan.base not in compiler.PRECISIONS:
        raise UserError(
            f"The backend {backend} has no precision {plan.base!r}; it has {', '.join(compiler.PRECISIONS)}."
        )
    layers = {layer.name: layer for name in TRACED_COMPONENTS for layer in component_layers(config, name)}
    for name, layer in layers.items():
        family = plan.precision_of(layer).family
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


def supported_precisions(compiler: Compiler) -> list[str]:
    """List the names that ``--precision`` accepts for a backend, for any target."""
    names = []
    for name in (*PRECISION_DTYPES, *recipe_names()):
        plan = plan_for(compiler, name)
        families = {rule.precision.family for rule in plan.rules}
        if (
            plan.base in compiler.PRECISIONS
            and families <= {"float", *compiler.LAYER_PRECISIONS}
            and plan.kv_cache in ("float", *compiler.CACHE_PRECISIONS)
        ):
            names.append(name)
    return names


def required_precisions(plan: PrecisionPlan, config: ModelConfig) -> list[str]:
    """List the precisions that a target must support for a plan, as ``targets.yaml`` names them."""
    layers = (layer for name in TRACED_COMPONENTS for layer in component_layers(config, name))
    families = dict.fromkeys(plan.precision_of(layer).family for layer in layers)
    cache = [f"kv-{plan.kv_cache}"] if plan.kv_cache != "float" else []
    return list(dict.fromkeys([plan.base, *(family for family in families if family != "float"), *cache]))


def check_request(
    backend: str,
    compiler: Compiler,
    plans: Sequence[PrecisionPlan],
    config: ModelConfig,
    options: CompileOptions,
) -> None:
    """Refuse what the backend or its target does not support, for ``plan`` and ``export``.

    Raises:
        UserError: names the closest alternative.
    """
    for plan in plans:
        check_plan(backend, compiler, plan, config)
        if options.target:
            for kind in required_precisions(plan, config):
                _check_target(options.target, backend, plan, kind)
    compiler.settings(options)
    if isinstance(compiler, ChecksPlans):
        compiler.check(plans, config, options)


def _check_target(target: Target, backend: str, plan: PrecisionPlan, kind: str) -> None:
    """Check that a target supports one of the precisions that a plan requires.

    Raises:
        UserError: it does not.
    """
    supported = target.backends.get(backend)
    if supported and kind == plan.base != plan.name and kind not in supported:
        bases = " or ".join(base for base in BASES if base in supported)
        raise UserError(
            f"{target.device} does not compute in {kind}, the base of {plan.name}; use a precision with"
            f" the base {bases}."
        )
    target.check(backend, kind)


def check_mix(mix: Mix, plans: Mapping[str, PrecisionPlan], config: ModelConfig) -> None:
    """Refuse a mix whose components do not fit each other.

    Args:
        mix: the mix.
        plans: component → its plan.
        config: of the model.

    Raises:
        UserError: names two neighbors.
    """
    contracts = {name: component_contract(config, name, plan.base) for name, plan in plans.items()}
    mix.check_borders({name: contract.inputs[0].dtype for name, contract in contracts.items()})


def precision_folder(precision: str) -> str:
    """Return the bundle's folder for the plan and the scales of a quantized precision."""
    return f"precisions/{precision}"


def bundled_plan(folder: Path, precision: str) -> PrecisionPlan:
    """Load the plan that a precision of a bundle was exported with."""
    file = folder / precision_folder(precision) / f"{precision}.yaml"
    return read_plan(file) if file.exists() else load_precision(precision)


def planned_weights(source: Checkpoint, folder: Path, precision: str) -> QuantizedWeights:
    """Open a checkpoint's parameters in a precision of a bundle, with the bundle's scales.

    Raises:
        UserError: the scales are damaged, or belong to another checkpoint.
    """
    scales = folder / precision_folder(precision)
    table = ScaleTable.load(scales) if (scales / TABLE_FILE).exists() else None
    return QuantizedWeights(source, bundled_plan(folder, precision), table)
