"""What an export adds to a bundle: backends and precisions, or a mix of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

from dsvl_export.compilers.precisions import plan_for
from dsvl_export.compilers.protocol import CompilesProgram
from dsvl_export.compilers.registry import load_compiler
from dsvl_export.exporter.config import ExportConfig, parse_choice
from dsvl_export.exporter.job import Part, Variant
from runtimes.bundle.mixes import MIXED, Mix
from runtimes.errors import UserError

SAME_NAME = "Two precision plans are called {!r}; rename one of the files."


def list_variants(config: ExportConfig) -> tuple[Variant, ...]:
    """Return what a config with its defaults describes; equal plans are listed once.

    Raises:
        UserError: there is no such backend or precision, its libraries are not installed, two plans
            have one name, or a backend cannot be part of a mix.
    """
    chosen = config.components.chosen()
    variants = (_mix(chosen),) if chosen else _single_backend(config)
    plans = [part.plan for variant in variants for part in variant.parts]
    for one, other in combinations(plans, 2):
        if one.name == other.name and one != other:
            raise UserError(SAME_NAME.format(one.name))
    return variants


def _single_backend(config: ExportConfig) -> tuple[Variant, ...]:
    """Return a variant for each precision of the config."""
    backend = str(config.backend)
    compiler = load_compiler(backend)
    parts: list[Part] = []
    for precision in config.precisions:
        plan = plan_for(compiler, precision)
        if plan not in [part.plan for part in parts]:
            parts.append(Part(backend, compiler, plan, precision))
    return tuple(Variant(backend, part.plan.name, (part,)) for part in parts)


def _mix(chosen: dict[str, str]) -> Variant:
    """Return the variant of a mix, or of a backend and precision that all components have."""
    parts: dict[tuple[str, str], Part] = {}
    for component, text in chosen.items():
        backend, precision = parse_choice(component, text)
        compiler = load_compiler(backend)
        plan = plan_for(compiler, precision)
        part = parts.get((backend, plan.name), Part(backend, compiler, plan, precision, ()))
        if part.plan != plan:
            raise UserError(SAME_NAME.format(plan.name))
        parts[backend, plan.name] = replace(part, components=(*part.components, component))
    if len(parts) == 1:
        ((pair, part),) = parts.items()
        return Variant(*pair, (part,))
    for part in parts.values():
        if isinstance(part.compiler, CompilesProgram):
            raise UserError(
                f"{part.backend} writes all components into one file, so that it cannot be part of a mix."
            )
    pairs = {component: pair for pair, part in parts.items() for component in part.components}
    mix = Mix(**pairs)
    return Variant(MIXED, mix.name, tuple(parts.values()), mix)
