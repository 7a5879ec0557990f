"""Search for smoothing factors, SmoothQuant's and AWQ's, that lower a plan's quantization error.

Candidates are judged by the error of the layers' outputs on the rows of activations that
calibration kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from calibration.folding import list_foldings
from calibration.observers import Floats, TensorStatistics
from calibration.precision_plan import LayerPrecision, LayerSpec, PrecisionPlan
from calibration.quantized_program import fake_quantize, fake_quantize_weight
from calibration.quantized_weights import find_weight_scale
from calibration.ranges import find_amax
from calibration.scale_table import QUANTIZED_MAX
from calibration.statistics import Statistics
from reference.checkpoint.checkpoint import Checkpoint

SMOOTHING_ALPHAS = tuple(step / 10 for step in range(1, 11))
MIN_RELATIVE_SIZE = 1e-5  # relative to the largest channel; smaller channels count as this


def find_smoothing(
    source: Checkpoint,
    plan: PrecisionPlan,
    layers: Mapping[str, LayerSpec],
    statistics: Statistics,
    method: str,
    percentile: float,
    on_step: Callable[[int, int], None],
) -> dict[str, Floats]:
    """Find factors that lower the error of the consumers' outputs of each folding.

    Consumers with quantized activations take SmoothQuant's candidates (arXiv 2211.10438, eq. 4:
    largest activations against largest weights); those with quantized weights alone take AWQ's
    (arXiv 2306.00978: mean activations). Alpha is searched for each folding. A folding gets no
    factors if none lower the error.

    Args:
        source: the checkpoint.
        plan: precision of each layer.
        layers: layer name → layer.
        statistics: of the layers' inputs, with rows.
        method: how INT8 ranges are found, one of ``ranges.METHODS``.
        percentile: for that method.
        on_step: called with the number of foldings done and in total.

    Returns:
        Producer of a folding → factors ``[C]``.
    """
    smoothing: dict[str, Floats] = {}
    foldings = list_foldings(source.config)
    for index, folding in enumerate(foldings):
        on_step(index, len(foldings))
        observed = statistics.tensors.get(folding.consumers[0])
        if observed is None or not len(observed.rows):
            continue
        precisions = [plan.precision_of(layers[name]) for name in folding.consumers]
        if all(precision.kind == "float" for precision in precisions):
            continue
        weights = [source.load(f"{name}.weight").float() for name in folding.consumers]
        factors = _best_factors(observed, weights, precisions, method, percentile)
        if factors is not None:
            smoothing[folding.producer] = factors
    on_step(len(foldings), len(foldings))
    return smoothing


def _best_factors(
    observed: TensorStatistics,
    weights: list[Tensor],
    precisions: list[LayerPrecision],
    method: str,
    percentile: float,
) -> Floats | None:
    rows = torch.from_numpy(observed.rows)
    exact_outputs = [rows @ weight.T for weight in weights]

    def error(factors: Tensor) -> float:
        divided = observed.divided(factors.numpy())
        total = 0.0
        for weight, precision, exact in zip(weights, precisions, exact_outputs, strict=True):
            x, scaled = torch.from_numpy(divided.rows), weight * factors
            if precision.quantizes_activations:
                amax = find_amax(divided, method if precision.kind == "int8" else "minmax", percentile)
                x = fake_quantize(x, torch.tensor(amax / QUANTIZED_MAX[precision.kind]), precision)
            if precision.kind != "float":
                scaled = fake_quantize_weight(scaled, find_weight_scale(scaled, precision), precision)
            total += float((x @ scaled.T - exact).square().sum())
        return total

    if any(precision.quantizes_activations for precision in precisions):
        activation_size = torch.from_numpy(observed.channel_max)
    else:
        activation_size = rows.abs().mean(dim=0)
    if not bool(activation_size.max() > 0):
        return None
    activation_size = activation_size.clamp(min=MIN_RELATIVE_SIZE * float(activation_size.max()))
    weight_size = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0)
    weight_size = weight_size.clamp(min=MIN_RELATIVE_SIZE * float(weight_size.max()))
    ones = torch.ones_like(activation_size)
    best, lowest = None, error(ones)
    for alpha in SMOOTHING_ALPHAS:
        for divisor in (weight_size ** (1 - alpha), ones):
            factors = activation_size**alpha / divisor
            factors = factors / (factors.max() * factors.min()).sqrt()
            candidate_error = error(factors)
            if candidate_error < lowest:
                best, lowest = factors, candidate_error
    return None if best is None else best.numpy()
