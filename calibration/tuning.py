"""Searches that make a plan's codes better: smoothing factors, and GPTQ's rounding.

Both judge a layer by what comes out of it for the rows of activations that calibration kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from calibration.folding import foldings
from calibration.observers import Floats, TensorStatistics
from calibration.precision_plan import LayerPrecision, LayerSpec, PrecisionPlan
from calibration.quantized_program import fake_quantize, round_trip
from calibration.quantized_weights import FoldedWeights, find_weight_scale, spread
from calibration.ranges import find_amax
from calibration.scale_table import QUANTIZED_MAX, TunedWeight
from calibration.statistics import Statistics
from reference.checkpoint.checkpoint import Checkpoint
from runtimes.errors import UserError

ALPHAS = tuple(step / 10 for step in range(1, 11))
DAMPING = 0.01  # of the mean of the Hessian's diagonal, as in GPTQ
BLOCK = 128  # columns that GPTQ updates at once
OnStep = Callable[[int, int], None]


def find_smoothing(
    source: Checkpoint,
    plan: PrecisionPlan,
    layers: Mapping[str, LayerSpec],
    statistics: Statistics,
    method: str,
    percentile: float,
    on_step: OnStep,
) -> dict[str, Floats]:
    """Factors of every folding that lower the error of its consumers' outputs, by producer.

    Consumers with quantized activations take SmoothQuant's candidates (arXiv 2211.10438, eq. 4: largest
    activations against largest weights), those with quantized weights alone AWQ's (arXiv 2306.00978: mean
    activations); alpha is searched for each folding, and none is taken where none helps.
    """
    found: dict[str, Floats] = {}
    places = foldings(source.config)
    for index, folding in enumerate(places):
        on_step(index, len(places))
        seen = statistics.tensors.get(folding.consumers[0])
        if seen is None or not len(seen.rows):
            continue
        precisions = [plan.of(layers[name]) for name in folding.consumers]
        if all(precision.kind == "float" for precision in precisions):
            continue
        weights = [source.load(f"{name}.weight").float() for name in folding.consumers]
        factors = _best_factors(seen, weights, precisions, method, percentile)
        if factors is not None:
            found[folding.producer] = factors
    on_step(len(places), len(places))
    return found


def _best_factors(
    seen: TensorStatistics,
    weights: list[Tensor],
    precisions: list[LayerPrecision],
    method: str,
    percentile: float,
) -> Floats | None:
    rows = torch.from_numpy(seen.rows)
    exact = [rows @ weight.T for weight in weights]

    def error(factors: Tensor) -> float:
        divided = seen.divided(factors.numpy())
        total = 0.0
        for weight, precision, wanted in zip(weights, precisions, exact, strict=True):
            x, scaled = torch.from_numpy(divided.rows), weight * factors
            if precision.quantizes_activations:
                amax = find_amax(divided, method if precision.kind == "int8" else "minmax", percentile)
                x = fake_quantize(x, torch.tensor(amax / QUANTIZED_MAX[precision.kind]), precision)
            if precision.kind != "float":
                scaled = round_trip(scaled, find_weight_scale(scaled, precision), precision)
            total += float((x @ scaled.T - wanted).square().sum())
        return total

    if any(precision.quantizes_activations for precision in precisions):
        size = torch.from_numpy(seen.channel_max)
    else:
        size = rows.abs().mean(dim=0)
    if not bool(size.max() > 0):
        return None
    size = size.clamp(min=1e-5 * float(size.max()))
    weight_size = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0)
    weight_size = weight_size.clamp(min=1e-5 * float(weight_size.max()))
    ones = torch.ones_like(size)
    best, lowest = None, error(ones)
    for alpha in ALPHAS:
        for against in (weight_size ** (1 - alpha), ones):
            factors = size**alpha / against
            factors = factors / (factors.max() * factors.min()).sqrt()
            cost = error(factors)
            if cost < lowest:
                best, lowest = factors, cost
    return None if best is None else best.numpy()


def tune_weights(
    plan: PrecisionPlan,
    layers: Mapping[str, LayerSpec],
    weights: FoldedWeights,
    inputs: Callable[[str], TensorStatistics | None],
    on_step: OnStep,
) -> dict[str, TunedWeight]:
    """GPTQ for every layer that the plan gives 4-bit weights.

    Args:
        inputs: layer → statistics of its input, with the smoothing in them.
    """
    tuned: dict[str, TunedWeight] = {}
    chosen = [layer for layer in layers.values() if plan.of(layer).kind == "int4"]
    for index, layer in enumerate(chosen):
        on_step(index, len(chosen))
        seen = inputs(layer.name)
        if seen is None or not len(seen.rows):
            raise UserError(f"The statistics have no rows for {layer.name}; calibrate with --rows above 0.")
        weight = weights.load(f"{layer.name}.weight").float()
        codes, scale = gptq(weight, torch.from_numpy(seen.rows), plan.of(layer))
        tuned[layer.name] = TunedWeight(str(plan.of(layer)), codes.numpy(), scale.numpy())
    on_step(len(chosen), len(chosen))
    return tuned


def gptq(weight: Tensor, rows: Tensor, precision: LayerPrecision) -> tuple[Tensor, Tensor]:
    """Round a weight ``[out, in]`` column by column, each error made up for by the columns to come.

    GPTQ (arXiv 2210.17323) with the scales of plain rounding, fixed beforehand.

    Args:
        rows: ``[K, in]`` inputs of the layer.

    Returns:
        int8 codes ``[out, in]`` and their scale ``[out, in / group]``.
    """
    scale = find_weight_scale(weight, precision)
    each = spread(scale, precision, weight)
    hessian = rows.double().T @ rows.double()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal += DAMPING * diagonal.mean() + dead.double()
    # The upper Cholesky factor of the inverse.
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    left = weight.double()
    codes = torch.empty_like(weight, dtype=torch.int8)
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        errors = torch.zeros(len(weight), end - start, dtype=torch.float64)
        for column in range(start, end):
            step = each[:, column].double()
            code = (left[:, column] / step).round().clamp(-8, 7)
            codes[:, column] = code.to(torch.int8)
            errors[:, column - start] = (left[:, column] - code * step) / inverse[column, column]
            left[:, column:end] -= torch.outer(errors[:, column - start], inverse[column, column:end])
        left[:, end:] -= errors @ inverse[start:end, end:]
    return codes, scale
