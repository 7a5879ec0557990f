"""Overflow of a precision: weights are checked before an export, activations on its goldens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from calibration.precision_plan import PrecisionPlan
from calibration.quantized_weights import QuantizedWeights
from dsvl_export.exporter.job import ExportJob, Variant
from dsvl_export.exporter.stages import ExportProgress
from reference.checkpoint.checkpoint import parameter_shapes
from reference.trace import PRECISION_DTYPES, TRACED_COMPONENTS
from runtimes.errors import PrecisionOverflowError, UserError

WIDER = {"fp16": ("bf16", "fp32")}  # by base: those with a larger range, the smallest first


def overflow_remedy(variant: Variant) -> str:
    """Return what to export if a variant's base cannot hold a checkpoint's numbers."""
    if variant.mix:
        return "give the components precisions with another base"
    (part,) = variant.parts
    plan = part.plan
    bases = [base for base in WIDER.get(plan.base, ()) if base in part.compiler.PRECISIONS]
    if not bases:
        return f"{part.backend} has no wider base than {plan.base}: export for onnxruntime in fp32"
    name = plan.name.removesuffix(f"-{plan.base}")
    names = [base if plan.name == plan.base else f"{name}-{base}" for base in bases]
    if plan.quantizes and name == plan.name:  # a plan of the user's own
        return f"set the base of the plan {plan.name} to {' or '.join(bases)}"
    return f"export with --precision {' or '.join(names)}"


def check_ranges(job: ExportJob, variants: Sequence[Variant]) -> None:
    """Check that the base of each plan can hold the checkpoint's weights.

    Raises:
        PrecisionOverflowError: names the tensor.
        UserError: the checkpoint holds NaN or infinity.
    """
    checked: set[tuple[str, tuple[str, ...]]] = set()  # plans of one base round the same numbers
    for variant in variants:
        for part in variant.parts:
            base, components = part.plan.base, part.components
            if (base, components) in checked:
                continue
            checked.add((base, components))
            name = f"range of {base}"
            job.report(ExportProgress(name))
            weights = QuantizedWeights(job.source, PrecisionPlan(part.plan.name, base))
            check_weights(weights, overflow_remedy(variant), components)
            job.report(ExportProgress(name, 1, 1, "finished"))


def check_weights(
    weights: QuantizedWeights, remedy: str, components: Sequence[str] = TRACED_COMPONENTS
) -> None:
    """Read every parameter of a precision and compare it with the range of the plan's base.

    Args:
        weights: the parameters.
        remedy: what the user can do if one overflows, for the message.
        components: whose parameters are read; the token embedding belongs to all.

    Raises:
        PrecisionOverflowError: the base cannot hold one; it is named.
        UserError: the checkpoint itself holds NaN or infinity.
    """
    plan, source = weights.plan, weights.source
    dtype = PRECISION_DTYPES[plan.base]
    others = tuple(f"{name}." for name in TRACED_COMPONENTS if name not in components)
    for name in (name for name in parameter_shapes(source.config) if not name.startswith(others)):
        low, high = weights.load(name).aminmax()
        largest = float(torch.maximum(high, -low))
        if not torch.isfinite(low + high):
            raise UserError(
                f"The tensor {name} of {source.label} holds NaN or infinity; check the weights, or download"
                " them again."
            )
        if not torch.isfinite(torch.tensor(largest).to(dtype)):
            raise PrecisionOverflowError(
                f"{plan.name} cannot hold the tensor {name} of {source.label}: its largest magnitude is"
                f" {largest:.4g}, but {plan.base} holds at most {torch.finfo(dtype).max:.5g}; {remedy}."
            )
