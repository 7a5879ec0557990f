"""GPTQ: rounding of 4-bit weights that lowers the error of a layer's outputs (arXiv 2210.17323).

The error is measured on the rows of activations that calibration kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from calibration.observers import TensorStatistics
from calibration.precision_plan import LayerPrecision, LayerSpec, PrecisionPlan
from calibration.quantized_weights import FoldedWeights, broadcast_scale, find_weight_scale
from calibration.scale_table import TunedWeight
from runtimes.errors import UserError

DAMPING = 0.01  # relative to the mean of the Hessian's diagonal, as in GPTQ
GPTQ_BLOCK = 128  # columns per update of the remaining weight


def apply_gptq(
    plan: PrecisionPlan,
    layers: Mapping[str, LayerSpec],
    weights: FoldedWeights,
    inputs: Callable[[str], TensorStatistics | None],
    on_step: Callable[[int, int], None],
) -> dict[str, TunedWeight]:
    """Quantize with GPTQ every layer to which the plan gives 4-bit weights.

    Args:
        plan: precision of each layer.
        layers: layer name → layer.
        weights: the checkpoint's weights with the smoothing factors folded in.
        inputs: layer name → statistics of its input, divided by the smoothing factors.
        on_step: called with the number of layers done and in total.

    Returns:
        Layer name → codes and scale.

    Raises:
        UserError: the statistics have no rows of a layer's input.
    """
    tuned: dict[str, TunedWeight] = {}
    int4_layers = [layer for layer in layers.values() if plan.precision_of(layer).kind == "int4"]
    for index, layer in enumerate(int4_layers):
        on_step(index, len(int4_layers))
        observed = inputs(layer.name)
        if observed is None or not len(observed.rows):
            raise UserError(
                f"The statistics have no rows of the input of {layer.name};"
                " calibrate again with --rows above 0."
            )
        weight = weights.load(f"{layer.name}.weight").float()
        precision = plan.precision_of(layer)
        codes, scale = quantize_with_gptq(weight, torch.from_numpy(observed.rows), precision)
        tuned[layer.name] = TunedWeight(str(precision), codes.numpy(), scale.numpy())
    on_step(len(int4_layers), len(int4_layers))
    return tuned


def quantize_with_gptq(weight: Tensor, rows: Tensor, precision: LayerPrecision) -> tuple[Tensor, Tensor]:
    """Round a weight column by column; later columns compensate the error of each.

    This is GPTQ with the scales of round-to-nearest, which are not updated.

    Args:
        weight: ``[out, in]``.
        rows: ``[K, in]`` inputs of the layer.
        precision: ``int4``, which has the group size.

    Returns:
        int8 codes ``[out, in]`` and their scale ``[out, in / group]``.
    """
    scale = find_weight_scale(weight, precision)
    column_scales = broadcast_scale(scale, precision, weight)
    hessian = rows.double().T @ rows.double()
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal += DAMPING * diagonal.mean() + dead.double()
    # The upper Cholesky factor of the inverse.
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    remaining = weight.double()
    codes = torch.empty_like(weight, dtype=torch.int8)
    for start in range(0, weight.shape[1], GPTQ_BLOCK):
        end = min(start + GPTQ_BLOCK, weight.shape[1])
        errors = torch.zeros(len(weight), end - start, dtype=torch.float64)
        for column in range(start, end):
            step = column_scales[:, column].double()
            code = (remaining[:, column] / step).round().clamp(-8, 7)
            codes[:, column] = code.to(torch.int8)
            error = (remaining[:, column] - code * step) / inverse[column, column]
            errors[:, column - start] = error
            remaining[:, column:end] -= torch.outer(error, inverse[column, column:end])
        remaining[:, end:] -= errors @ inverse[start:end, end:]
    return codes, scale
